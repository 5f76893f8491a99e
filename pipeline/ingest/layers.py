"""What a day of a chain takes from the days before it, and what it leaves to those after it: layers of histories.

A layer is the histories of some days, in files in the order of user keys. A day adds one, and small layers are merged
as they gather: their number grows with the logarithm of the days, and so does what each behaviour is written.

K = wanted users, U = users that are found.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.files import link_or_copy
from pipeline.hashing import hash_values
from pipeline.ingest.columns import USER_NUMBER, feature_column, user_column
from pipeline.ingest.definition import USER_KEY_RANGE
from pipeline.ingest.engine import Engine
from pipeline.ingest.histories import Found, Histories, HistoryFile, HistoryWriter, together
from pipeline.ingest.shards import WrittenShard
from schemas.errors import UserError
from schemas.manifest import REMEDY, File, Layer, Manifest
from schemas.shards import layer_schema, raw_type
from schemas.storage import RemotePath, local_copy

USERS = 1 << 18
"""Wanted users that are looked for at a time."""
BEHAVIORS = 1 << 20
"""Behaviours that are gathered at a time, about."""
FILE_BEHAVIORS = 1 << 24
"""Behaviours of a file of a merged layer, about."""


class Gathered(NamedTuple):
    """What the days before know of a day's users."""

    lines: ir.Table
    """Their behaviours: argument ``carried`` of `definition.lines`."""
    users: ir.Table | None
    """What belongs to them: argument ``earlier`` of `definition.with_earlier_users`; None: no feature does."""
    behaviors: int
    known: int
    """Users who had an event before."""
    touched: int
    """Users of the day."""

    @property
    def new(self) -> int:
        """Users of the day who had no event before."""
        return self.touched - self.known


class KeptLayers(NamedTuple):
    """Layers of a data set, the oldest first, and the records of all their files."""

    layers: tuple[Layer, ...]
    files: tuple[File, ...]


def gather(engine: Engine, touched: ir.Table, folder: Path, manifest: Manifest, work: Path) -> Gathered:
    """Read the last behaviours of a day's users, and nothing of others but their keys.

    Args:
        engine: gets files of them, however many they are.
        touched: `definition.touched` of the day's logs, computed already.
        folder: of the data set that the day continues.
        manifest: of that data set.
        work: for the files.

    Raises:
        UserError: what is read is not what was written.
    """
    assert manifest.chain is not None
    keep = manifest.settings["history"]["keep"]
    schema = layer_schema(manifest.features, user_type=manifest.user_type)
    layers = [_OpenLayer(folder, manifest, layer, schema) for layer in manifest.chain.layers]
    touched_users = int(engine.fetch(touched.agg(users=touched.count()))["users"][0].as_py())
    behaviors = known = 0
    lines_of, users_of = _line_schema(schema, manifest), _user_schema(schema)
    line_path, user_path = work / "carried.parquet", work / "carried_users.parquet"
    with ExitStack() as stack:
        # Text comes again on each line; numbers are written as they are.
        encoding = {"use_dictionary": ["user_id"] if manifest.user_type == "text" else False, "compression": "none"}
        line_file = stack.enter_context(pq.ParquetWriter(line_path, lines_of, **encoding))
        user_file = stack.enter_context(pq.ParquetWriter(user_path, users_of, **encoding))
        bounds = np.linspace(0, USER_KEY_RANGE, 1 + max(1, -(-touched_users // USERS))).astype(int).tolist()
        for first, end in pairwise(bounds):
            part = touched.filter((touched["user_key"] >= first) & (touched["user_key"] < end))
            wanted = engine.fetch(part.select("user_id", "user_key").order_by("user_key", "user_id")).combine_chunks()
            for histories in _found(layers, wanted, first - 1, end - 1, keep):
                behaviors += int(histories.length_U.sum())
                known += int(np.count_nonzero(histories.length_U))
                line_file.write_table(_lines(histories, lines_of))
                user_file.write_table(_users(histories, users_of))
    for layer in layers:
        layer.check_users()
    users = engine.open_ids(user_path) if len(users_of) > 1 else None
    return Gathered(engine.open_ids(line_path), users, behaviors, known, touched_users)


def layer_of(written: Sequence[WrittenShard], day: int) -> Layer:
    """The layer of a day, of which its shards have written the files."""
    files = [shard for shard in written if shard.history is not None]
    return Layer(
        first_day=day,
        last_day=day,
        files=tuple(str(shard.history) for shard in files),
        users=sum(shard.history_users for shard in files),
        behaviors=sum(shard.history_behaviors for shard in files),
    )


def keep_layers(base: Path | None, manifest: Manifest | None, own: Layer, folder: Path, keep: int) -> KeptLayers:
    """Bring the layers of the days before into the folder of a day, and merge the newest ones with its own.

    Merged are those that together have at least half as many behaviours as the one before them. Files of all others are
    links to those of the data set that the day continues, or copies where links are not possible.

    Args:
        base: folder of that data set; None: this is the first day.
        manifest: of that data set.
        own: the day's layer, in ``folder``.
        folder: of the day's data set.
        keep: behaviours of a user in a merged layer.

    Raises:
        UserError: what is read is not what was written.
        OSError: the disk is full.
    """
    if base is None or manifest is None:
        return KeptLayers((own,) if own.files else (), tuple(File.of(folder / name) for name in own.files))
    assert manifest.chain is not None
    earlier = manifest.chain.layers
    kept, size = len(earlier), _size(own)
    # A day without behaviours has no layer, and no reason to merge those of others.
    while own.files and kept and 2 * size >= _size(earlier[kept - 1]):
        kept -= 1
        size += _size(earlier[kept])
    records = {file.path: file for file in manifest.files}
    files = []
    for layer in earlier[:kept]:
        for name in layer.files:
            link_or_copy(_local(base, records[name]), folder / name)
            files.append(records[name])
    newest = (own,) if own.files else ()
    if kept < len(earlier) and own.files:
        newest = (_merged(base, manifest, earlier[kept:], own, folder, keep),)
    files += [File.of(folder / name) for layer in newest for name in layer.files]
    return KeptLayers((*earlier[:kept], *newest), tuple(files))


def _size(layer: Layer) -> int:
    # Users who have features and no behaviour take place too.
    return layer.behaviors + layer.users


class _OpenLayer:
    """A layer whose files are open one after the other: user keys are asked for in ascending order."""

    def __init__(self, folder: Path, manifest: Manifest | None, layer: Layer, schema: pa.Schema) -> None:
        records = {} if manifest is None else {file.path: file for file in manifest.files}
        self._paths = [(folder, records.get(name), name) for name in layer.files]
        self._layer, self._schema, self._folder = layer, schema, folder
        self._open: list[HistoryFile] = []
        self._users = 0

    def between(self, after: int, to: int) -> list[HistoryFile]:
        """Files that may have keys above ``after`` and at most ``to``."""
        # Of two neighbours, both may have users of the key at their border.
        while self._paths and (not self._open or self._open[-1].keys[-1][-1] <= to):
            folder, record, name = self._paths.pop(0)
            file = HistoryFile(folder / name if record is None else _local(folder, record), self._schema)
            self._users += file.users
            self._open.append(file)
        self._open = [file for file in self._open if file.keys[-1][-1] > after]
        return self._open

    def check_users(self) -> None:
        """Make sure that the files, all of which were read, have all the layer's users."""
        if self._paths or self._users != self._layer.users:
            raise UserError(
                f"{self._folder}: {', '.join(self._layer.files)} have {self._users:,} users, in the manifest "
                f"{self._layer.users:,}; {REMEDY}"
            )


def _found(layers: Sequence[_OpenLayer], wanted: pa.Table, after: int, to: int, keep: int) -> Iterator[Histories]:
    """Histories of those of the wanted users whom a layer knows, a bounded number of behaviours at a time."""
    key_K = wanted["user_key"].to_numpy().astype(np.int32, copy=False)
    found: list[list[tuple[HistoryFile, Found]]] = []
    length_K = np.zeros(len(key_K), np.int64)
    for layer in layers:
        found.append([(file, where) for file in layer.between(after, to) for where in file.find(key_K)])
        for _, where in found[-1]:
            np.add.at(length_K, where.wanted_K, where.length_K)
    if not len(wanted):
        return
    user_id_K = wanted["user_id"].combine_chunks()
    user_id_K = user_id_K.cast(pa.int64() if pa.types.is_integer(user_id_K.type) else pa.string())
    part_K = (np.cumsum(length_K) - length_K) // BEHAVIORS
    starts = np.flatnonzero(np.diff(part_K, prepend=-1))
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(key_K)], strict=True):
        parts = [
            histories
            for layer in found
            for file, where in layer
            if len(histories := _wanted(file, where, user_id_K, start, end))
        ]
        if parts:
            yield together(parts, keep)


def _wanted(file: HistoryFile, where: Found, user_id_K: pa.Array, start: int, end: int) -> Histories:
    """What a record batch has of the wanted users ``start`` .. ``end``."""
    first, last = np.searchsorted(where.wanted_K, [start, end])
    histories = file.take(where.batch, where.row_K[first:last])
    # Verified before they are compared: a wrong id would only look like somebody else's.
    same = pc.equal(histories.user_id_U, user_id_K.take(pa.array(where.wanted_K[first:last])))
    return histories.where(same.to_numpy(zero_copy_only=False))


def _line_schema(schema: pa.Schema, manifest: Manifest) -> pa.Schema:
    fields = [pa.field("user_id", raw_type(manifest.user_type), nullable=False)]
    if manifest.user_type == "text":
        fields.append(pa.field(USER_NUMBER, pa.int64(), nullable=False))
    for each in schema:
        if each.name.startswith("history_"):
            name = each.name.removeprefix("history_")
            name = name if name in ("item", "timestamp") else feature_column(name)
            fields.append(pa.field(name, each.type.value_type, nullable=False))
    return pa.schema(fields)


def _user_schema(schema: pa.Schema) -> pa.Schema:
    columns = [each.with_name(user_column(each.name.removeprefix("user_"))) for each in schema if _of_users(each.name)]
    return pa.schema([schema.field("user_id").with_name("key"), *columns])


def _of_users(name: str) -> bool:
    return name.startswith("user_") and name != "user_id"


def _lines(histories: Histories, schema: pa.Schema) -> pa.Table:
    user_B = np.repeat(np.arange(len(histories)), histories.length_U)
    columns = [histories.user_id_U.take(pa.array(user_B))]
    if USER_NUMBER in schema.names:
        columns.append(hash_values(histories.user_id_U).take(pa.array(user_B)))
    columns += [pa.array(values) for values in histories.behaviors.values()]
    return pa.Table.from_arrays(columns, schema=schema)


def _users(histories: Histories, schema: pa.Schema) -> pa.Table:
    columns = [histories.user_id_U, *(pa.array(values) for values in histories.users.values())]
    return pa.Table.from_arrays(columns, schema=schema)


def _local(folder: Path, record: File) -> Path:
    """A file of a data set on this machine. At a URL, its copy is verified as a whole."""
    path = folder / record.path
    return local_copy(path, record.sha256) if isinstance(path, RemotePath) else path


def _merged(base: Path, manifest: Manifest, layers: Sequence[Layer], own: Layer, folder: Path, keep: int) -> Layer:
    """Write a layer in the place of several ones, the last of which is in ``folder``, and remove that one."""
    schema = layer_schema(manifest.features, user_type=manifest.user_type)
    opened = [*(_OpenLayer(base, manifest, layer, schema) for layer in layers), _OpenLayer(folder, None, own, schema)]
    name = f"history-{layers[0].first_day:05d}-{own.last_day:05d}"
    files: list[str] = []
    users = behaviors = 0
    blocks = _all_users(opened, keep)
    more = next(blocks, None)
    while more is not None:
        files.append(f"{name}-{len(files):05d}.arrow")
        with HistoryWriter(folder / files[-1], schema) as writer:
            while more is not None and writer.behaviors < FILE_BEHAVIORS:
                writer.add(more)
                more = next(blocks, None)
        users, behaviors = users + writer.users, behaviors + writer.behaviors
    for layer in opened:
        layer.check_users()
    for file in own.files:
        (folder / file).unlink()
    return Layer(
        first_day=layers[0].first_day, last_day=own.last_day, files=tuple(files), users=users, behaviors=behaviors
    )


def _all_users(layers: Sequence[_OpenLayer], keep: int) -> Iterator[Histories]:
    """Histories of the users of all layers, in the order of their keys, about a record batch of each at a time."""
    after = -1
    while after < USER_KEY_RANGE:
        # As far as the record batch goes that ends first.
        ends = [
            int(key_U[-1])
            for layer in layers
            for file in layer.between(after, after + 1)
            for key_U in file.keys
            if key_U[-1] > after
        ]
        to = min(ends, default=USER_KEY_RANGE)
        parts = [
            file.take(number, row_U)
            for layer in layers
            for file in layer.between(after, to)
            for number, row_U in file.rows(after, to)
        ]
        if parts:
            yield together(parts, keep)
        after = to

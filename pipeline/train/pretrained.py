"""Vectors from elsewhere that tables begin with, by raw id: each rank keeps those of its own rows.

N = records of a file, R = rows of a shard, d = dim of a table.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import nn
from torchrec.distributed.model_parallel import get_unwrapped_module

from embeddings.initialization import TableShard, table_shards
from embeddings.model import CtrModel
from embeddings.tables.specs import TableSpec
from pipeline.ingest.values import WrongValueError, integers, texts
from pipeline.paths import location
from pipeline.stream.data_set import DataSet
from schemas.errors import UserError
from schemas.storage import arrow_file

BATCH_BYTES = 16 << 20
"""About how much of the vectors is in memory at a time."""

_LOGGER = logging.getLogger("dare.train")
"""Shown by the first rank alone."""

_FLOATS = (pa.types.is_float16, pa.types.is_float32, pa.types.is_float64)


@torch.no_grad()
def load_vectors(model: nn.Module, files: Mapping[str, str], data_set: DataSet) -> None:
    """Put the vectors of files into tables, in the place of values that were drawn.

    Every rank reads every file, a part at a time, and keeps what belongs to its own rows: so all of them find the same
    mistakes. Ids of the data set that a file does not name keep their drawn rows, and ids of the file that the data set
    does not have are left out; a line of the log counts both.

    Args:
        model: sharded, its weights drawn.
        files: Parquet, a path or a URL by the table's name, with the columns ``raw_id`` and ``vector`` (a list of
            floats, as many as the table's dim).
        data_set: gives raw ids their rows.

    Raises:
        UserError: no such table, one whose rows have no raw ids, or a file that does not fit it: a dim that is not the
            table's, an id that is there twice, a value that is missing or not finite.
    """
    inner = get_unwrapped_module(model)
    assert isinstance(inner, CtrModel)
    specs = inner.tables.specs
    for name, file in files.items():
        path = location(file)
        if name not in specs:
            raise UserError(f"init.{name}: the model has no such table; its tables: {', '.join(sorted(specs))}")
        shards = [shard for shard in table_shards(model) if shard.key.endswith(f".embedding_bags.{name}.weight")]
        _load(name, path, specs[name], shards, _dictionary(name, specs[name], data_set))


def _dictionary(name: str, spec: TableSpec, data_set: DataSet) -> pa.Table:
    """Raw ids and rows of a feature."""
    numbered = {each.name for each in data_set.manifest.declared if each.encoding == "dictionary"}
    if spec.feature not in numbered | {"item"}:
        raise UserError(f"init.{name}: rows of {spec.feature} have no raw ids in this data set; leave the table out")
    raw_I = data_set.names(spec.feature)
    row_I = np.arange(len(raw_I), dtype=np.int32)
    if spec.feature == "item":
        # Rare items are in the dictionary and have no row.
        place_I = data_set.item_places()
        row_I = np.where(row_I < spec.rows, row_I, 0) if place_I is None else place_I
    known = pc.and_(raw_I.is_valid(), pa.array(row_I > 0))
    if not pc.any(known).as_py():
        raise UserError(f"init.{name}: rows of {spec.feature} have no raw ids in this data set; leave the table out")
    return pa.table({"raw_id": raw_I, "id": row_I}).filter(known)


def _load(name: str, path: Path, spec: TableSpec, shards: list[TableShard], dictionary: pa.Table) -> None:
    file = _opened(name, path, spec)
    row_N = _rows(name, path, file, dictionary)
    dtypes = {shard.rows_Rd.dtype for shard in shards} or {torch.float32}
    first = 0
    for vectors_Nd in _vectors(name, path, file, spec):
        rows_of_batch = row_N[first : first + len(vectors_Nd)]
        # As the table holds them: a number that float16 does not reach is as wrong as one that is not finite.
        for dtype in dtypes:
            finite_N = torch.isfinite(torch.from_numpy(vectors_Nd).to(dtype)).all(dim=1).numpy()
            if not finite_N.all():
                record = first + int(finite_N.argmin()) + 1
                raise UserError(f"init.{name}: {path}: record {record}: its vector has a value that is not finite")
        for shard in shards:
            # Row 0 is of the unknown, whatever the file calls it.
            here_N = (rows_of_batch >= max(1, shard.first_row)) & (rows_of_batch < shard.last_row)
            values = torch.from_numpy(vectors_Nd[here_N][:, shard.columns]).to(shard.rows_Rd)
            index = torch.from_numpy(rows_of_batch[here_N] - shard.first_row).to(shard.rows_Rd.device)
            shard.rows_Rd.index_copy_(0, index, values)
        first += len(vectors_Nd)
    found = int((row_N > 0).sum())
    _LOGGER.info(
        "init.%s: %s rows begin with a vector of %s, %s keep their drawn values; %s of its ids have no row",
        *(name, f"{found:,}", path, f"{spec.rows - 1 - found:,}", f"{len(row_N) - found:,}"),
    )


def _opened(name: str, path: Path, spec: TableSpec) -> pq.ParquetFile:
    """The file, whose schema is right."""
    with _reading(name, path):
        file = pq.ParquetFile(arrow_file(path), page_checksum_verification=True)
    schema = file.schema_arrow
    if missing := [column for column in ("raw_id", "vector") if schema.names.count(column) != 1]:
        raise UserError(
            f"init.{name}: {path}: wants one column {missing[0]}; there are {', '.join(schema.names) or 'none'}"
        )
    kind = schema.field("vector").type
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_list(kind) for is_list in lists) or not any(of(kind.value_type) for of in _FLOATS):
        raise UserError(f"init.{name}: {path}: column vector is {kind}; a list of floats is wanted")
    if pa.types.is_fixed_size_list(kind) and kind.list_size != spec.dim:
        raise UserError(f"init.{name}: {path}: vectors have {kind.list_size} values, the table's dim is {spec.dim}")
    return file


def _rows(name: str, path: Path, file: pq.ParquetFile, dictionary: pa.Table) -> NDArray[np.int64]:
    """Which row of the table each record's id has, int64 (N,); 0 where it has none."""
    # The ids of the whole file at once, as the dictionary is: one look-up, and none of the vectors.
    known = dictionary["raw_id"].combine_chunks()
    convert = texts if pa.types.is_string(known.type) else integers
    with _reading(name, path):
        raw = file.read(columns=["raw_id"])["raw_id"]
    ids, first = list[pa.Array](), 0
    for chunk in raw.chunks:
        try:
            ids.append(convert(chunk))
        except WrongValueError as error:
            raise UserError(f"init.{name}: {path}: record {first + error.index + 1}: raw_id {error}") from None
        first += len(chunk)
    id_N = pa.chunked_array(ids, known.type)
    if id_N.null_count:
        record = pc.index(id_N.is_null(), True).as_py() + 1
        raise UserError(f"init.{name}: {path}: record {record}: raw_id is missing")
    counts = pc.value_counts(id_N)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        raise UserError(
            f"init.{name}: {path}: {len(twice)} ids are there more than once, {twice[0]['values'].as_py()!r} among "
            "them; leave one vector of each"
        )
    row_N: NDArray[np.int64] = (
        pc.fill_null(dictionary["id"].take(pc.index_in(id_N, known)), 0).to_numpy().astype(np.int64)
    )
    if len(row_N) and not row_N.any():
        raise UserError(
            f"init.{name}: {path}: none of its {len(row_N):,} ids is in the data set, where they are such as "
            f"{known[0].as_py()!r}; is it the file of another table?"
        )
    return row_N


def _vectors(name: str, path: Path, file: pq.ParquetFile, spec: TableSpec) -> Iterator[NDArray[np.float32]]:
    """The vectors of the file in order, some at a time, float32 (N, d)."""
    batches = file.iter_batches(max(1, BATCH_BYTES // (4 * spec.dim)), columns=["vector"])
    first = 0
    while True:
        with _reading(name, path):
            batch = next(batches, None)
        if batch is None:
            return
        column = batch.column(0)
        length_N = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
        wrong_N = length_N != spec.dim
        if wrong_N.any():
            index = int(wrong_N.argmax())
            said = "no vector" if length_N[index] < 0 else f"{length_N[index]} values"
            raise UserError(
                f"init.{name}: {path}: record {first + index + 1} has {said}, the table's dim is {spec.dim}"
            )
        # A missing value becomes not a number here, and is found as such. (`flatten` goes by the list's offsets.)
        values = column.flatten().cast(pa.float32(), safe=False)
        yield values.to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, spec.dim)
        first += len(column)


@contextmanager
def _reading(name: str, path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"init.{name}: {path} cannot be read: {' '.join(str(error).split())}") from None

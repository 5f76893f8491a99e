"""Features of items beside their row, gathered by the reader, against the same values stored in each behaviour.

I = items.
"""

import statistics
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from benchmarks.reader import CATEGORIES, _exhaust, _file, _say, _seconds, write_dataset
from pipeline.ingest.shards import shard_encoding
from pipeline.stream.history_stream import HistoryStream
from schemas.manifest import ROW_GROUP_INDEX, File, Manifest, Shard
from schemas.shards import ITEM_FEATURES, FeatureRecord, shard_schema
from schemas.stream import StreamSettings

Place = Literal["stored", "beside"]


@dataclass(frozen=True)
class Case:
    """So many features of items, in both places; rates are medians, in turns in a random order."""

    features: int
    stored_samples_per_s: float
    """Targets a second as finished batches, where the shards have the features of each behaviour and target."""
    beside_samples_per_s: float
    """The same where they are gathered from a file of the items."""
    ratio: float
    """The second over the first."""
    stored_bytes_per_behavior: float
    """Bytes of the shards."""
    beside_bytes_per_behavior: float
    item_file_bytes: int
    """Bytes of the file of the items."""


def measure(users: int, rounds: int, threads: int, counts: tuple[int, ...] = (1, 5)) -> list[Case]:
    """Write data sets that differ in the place of their features alone, compare their batches, and read them.

    Args:
        users: users of the data sets; about 500 behaviours and 57 targets each.
        rounds: repetitions of each timing.
        threads: reader threads.
        counts: numbers of features.
    """
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        base.mkdir()
        _say(f"writing {users} users")
        write_dataset(base, users, seed=0)
        return [_case(base, Path(temporary), count, rounds, threads) for count in counts]


def _case(base: Path, folder: Path, features: int, rounds: int, threads: int) -> Case:
    places: tuple[Place, ...] = ("stored", "beside")
    manifests = {place: _write(base, folder / f"{place}-{features}", features, place) for place in places}
    settings = StreamSettings(threads=threads)

    def opened(place: Place, seed: int) -> HistoryStream:
        return HistoryStream(folder / f"{place}-{features}", "train", settings, seed=seed, shuffle=True)

    _say(f"{features} features: comparing batches")
    with opened("stored", 0) as one, opened("beside", 0) as other:
        for here, there in zip(one, other, strict=True):
            assert torch.equal(here.item_T, there.item_T)
            for name, values in here.features_T.items():
                assert torch.equal(values, there.features_T[name])
            for name, values in here.histories["history"].features_M.items():
                assert torch.equal(values, there.histories["history"].features_M[name])
    seconds: dict[Place, list[float]] = {place: [] for place in places}
    dealt = np.random.default_rng(0)
    for turn in range(rounds):
        _say(f"{features} features: reading, round {turn + 1} of {rounds}")
        for place in dealt.permutation(places):
            with opened(place, turn) as stream:
                seconds[place].append(_seconds(partial(_exhaust, stream)))
    counts = manifests["stored"].counts
    rate = {place: counts.train.targets / statistics.median(seconds[place]) for place in places}
    size = {place: sum(shard.bytes for shard in manifests[place].shards) / counts.behaviors for place in places}
    (items,) = (file for file in manifests["beside"].files if file.path == ITEM_FEATURES)
    return Case(
        features,
        round(rate["stored"]),
        round(rate["beside"]),
        # Of the rounds, each with its own load, not of two medians.
        round(statistics.median(a / b for a, b in zip(seconds["stored"], seconds["beside"], strict=True)), 3),
        round(size["stored"], 2),
        round(size["beside"], 2),
        items.bytes,
    )


def _write(base: Path, folder: Path, features: int, place: Place) -> Manifest:
    """The data set of ``base`` with features of its items: in the shards, as if they were of behaviours, or beside."""
    folder.mkdir()
    manifest = Manifest.read(base)
    of_items = {f"f{number}": _feature(manifest.counts.items, number) for number in range(features)}
    records = tuple(
        FeatureRecord(
            name=name,
            of="item" if place == "beside" else "behavior",
            kind="id",
            encoding="hash",
            rows=CATEGORIES,
            target=place == "stored",
        )
        for name in of_items
    )
    schema = shard_schema(records, user_type="integer", labels=("label",), weighted=False, line=False)
    shards = []
    for shard in manifest.shards:
        with (
            pq.ParquetFile(base / shard.path) as file,
            pq.ParquetWriter(folder / shard.path, schema, **shard_encoding(schema)) as writer,
        ):
            for row_group in range(file.num_row_groups):
                writer.write_table(_with_features(file.read_row_group(row_group), schema, of_items))
        contents = {name: getattr(shard, name) for name in ("users", "behaviors", "row_groups")}
        shards.append(Shard.of(folder / shard.path, **contents))
    (folder / ROW_GROUP_INDEX).write_bytes((base / ROW_GROUP_INDEX).read_bytes())
    files = [ROW_GROUP_INDEX]
    if place == "beside":
        table = pa.table(of_items)
        with pa.ipc.new_file(folder / ITEM_FEATURES, table.schema) as out:
            out.write_table(table)
        files.append(ITEM_FEATURES)
    written = manifest.model_copy(
        update={
            "schema_version": 3,
            "features": records,
            "shards": tuple(shards),
            "files": tuple(File(**_file(folder / name)) for name in files),
        }
    )
    written.write(folder)
    return written


def _feature(items: int, number: int) -> NDArray[np.int32]:
    """(I + 1,), as categories are spread."""
    ids: NDArray[np.int32] = np.random.default_rng(number).integers(1, CATEGORIES + 1, items + 1).astype(np.int32)
    ids[0] = 0
    return ids


def _with_features(table: pa.Table, schema: pa.Schema, of_items: dict[str, NDArray[np.int32]]) -> pa.Table:
    def column(name: str) -> pa.Array:
        side, _, feature = name.partition("_")
        if feature not in of_items:
            return table[name].combine_chunks().cast(schema.field(name).type)
        items = table[f"{side}_item"].combine_chunks()
        values = of_items[feature].take(items.flatten().to_numpy())
        return pa.ListArray.from_arrays(items.offsets, pa.array(values), type=schema.field(name).type)

    return pa.Table.from_arrays([column(name) for name in schema.names], schema=schema)

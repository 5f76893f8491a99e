"""A run that begins on another one's checkpoint after its item table has grown: seconds and memory."""

import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from embeddings.initialization import initialize
from embeddings.sharding import sharded_model
from pipeline.ingest.shards import shard_encoding
from pipeline.planning.measuring import on_gloo_ranks
from pipeline.runs.checkpoint_writer import CheckpointWriter
from pipeline.runs.run_folder import RunFolder, settings_text
from pipeline.stream.data_set import DataSet
from pipeline.stream.history_stream import HistoryStream
from pipeline.train.trainer import Trainer
from pipeline.train.warm_start import open_source, start_from
from schemas.manifest import (
    ROW_GROUP_INDEX,
    Chain,
    Counts,
    Day,
    File,
    Manifest,
    Shard,
    TargetCounts,
    data_set_fingerprint,
)
from schemas.row_layout import RowLayout
from schemas.settings import load_settings
from schemas.shards import ITEM_FEATURES, ROW_GROUPS, dictionary_schema, shard_schema
from schemas.train import TrainSettings

CPU = torch.device("cpu")
BATCH = 64


@dataclass(frozen=True)
class WarmStartFigures:
    """What the growth of a table took."""

    ranks: int
    rows: int
    """Items of the day before."""
    grown_rows: int
    """Items of the new day."""
    dim: int
    """Of both item tables."""
    state_bytes: int
    """Bytes of the former tables of items and their optimizers' states."""
    seconds: float
    """From the verification of the checkpoint to the last row, with the draw of new rows."""
    draw_seconds: float
    """The draw of all first weights alone, which a run that begins needs as well."""
    resident_bytes: int
    """Memory of the rank that has most, before: the new tables among it, and the libraries."""
    peak_bytes: int
    """Memory of that rank at most. Ranks send each other no rows: each reads what it needs."""


def measure(ranks: int, rows: int, grown_rows: int, dim: int) -> WarmStartFigures:
    """Write two days and a checkpoint of the first one, and begin a run of the second on it.

    Args:
        ranks: processes, a thread each, that talk through gloo.
        rows: items of the first day.
        grown_rows: items of the second day.
        dim: of both item tables.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = _write_day(folder / "first", rows, rows)
        _write_day(folder / "second", grown_rows, rows, first)
        # In processes of its own, whose memory is not that of the run that begins.
        on_gloo_ranks(ranks, _save, folder, dim, timeout_s=3600)
        figures: WarmStartFigures = on_gloo_ranks(ranks, _begin, folder, dim, timeout_s=3600)[0]
        return figures


def _settings(dim: int) -> TrainSettings:
    keys = [f"model.{role}.dim={dim}" for role in ("attention", "representation")]
    return load_settings(TrainSettings, [], [*keys, "model.features=[item,position]", f"stream.batch_size={BATCH}"])


def _save(folder: Path, dim: int) -> None:
    """A run of the first day, as far as its checkpoint; on each rank."""
    settings, data_set = _settings(dim), DataSet.open(folder / "first")
    run = RunFolder(folder / "run")
    trainer, stream = _trainer(settings, data_set)
    with stream:
        initialize(trainer.model, settings.seed)
        trainer._optimizer.prepare_to_load()
        if dist.get_rank() == 0:
            run.path.mkdir()
            documents = {run.settings_file.name: settings_text(settings)}
            run.begin(documents, data_set.folder, data_set.fingerprint, data_set.dictionaries(), data_set.lineage())
        with CheckpointWriter(run.checkpoints, 1, {}) as writer:
            writer.save(trainer.state_dict(), 1, None)
            writer.wait()
        dist.barrier()


def _begin(folder: Path, dim: int) -> WarmStartFigures:
    settings, data_set = _settings(dim), DataSet.open(folder / "second")
    trainer, stream = _trainer(settings, data_set)
    with stream:
        dist.barrier()
        began = time.perf_counter()
        initialize(trainer.model, settings.seed)
        draw_seconds = _longest(time.perf_counter() - began)
        resident, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        start_from(open_source(folder / "run", settings, data_set), trainer, settings, data_set)
        seconds = _longest(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    former = DataSet.open(folder / "first").manifest
    return WarmStartFigures(
        ranks=dist.get_world_size(),
        rows=former.counts.items,
        grown_rows=data_set.manifest.counts.items,
        dim=dim,
        # Two sets of tables; of rowwise Adagrad a float a row.
        state_bytes=2 * (former.largest_item + 1) * (dim + 1) * 4,
        seconds=round(seconds, 2),
        draw_seconds=round(draw_seconds, 2),
        resident_bytes=int(_longest(resident)) << 10,
        peak_bytes=int(_longest(peak)) << 10,
    )


def _longest(value: float) -> float:
    """The largest of all ranks."""
    largest = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def _trainer(settings: TrainSettings, data_set: DataSet) -> tuple[Trainer, HistoryStream]:
    model = sharded_model(settings, data_set.manifest, CPU)
    stream = HistoryStream(
        data_set.folder,
        "train",
        settings.stream,
        seed=1,
        shuffle=True,
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        features=settings.model.feature_names,
    )
    return Trainer(settings, model, stream, None, CPU), stream


def _write_day(folder: Path, rows: int, rows_before: int, former: Path | None = None) -> Path:
    """A data set of a few users, and of many items, each with the row of its id."""
    folder.mkdir()
    schema = shard_schema((), user_type="integer", labels=("label",), weighted=False, line=False)
    users, length = 64, 10
    values = np.arange(users * length)
    columns = {
        "user_id": np.arange(users),
        "history_item": 1 + values * 7919 % rows_before,
        "history_timestamp": values % length,
        "target_item": 1 + np.arange(users) * 7907 % rows_before,
        "target_timestamp": np.full(users, length),
        "target_label": np.arange(users) % 2,
        "target_split": np.zeros(users, np.int8),
        "target_history_end": np.full(users, length),
    }
    offsets = {"history": np.arange(users + 1) * length, "target": np.arange(users + 1)}

    def column(field: pa.Field) -> pa.Array:
        if field.name == "user_id":
            return pa.array(columns[field.name])
        of = pa.array(offsets[field.name.split("_")[0]], pa.int32())
        return pa.ListArray.from_arrays(of, pa.array(columns[field.name], field.type.value_type), type=field.type)

    path = folder / "shard-00000.parquet"
    with pq.ParquetWriter(path, schema, **shard_encoding(schema)) as writer:
        writer.write_table(pa.Table.from_arrays([column(field) for field in schema], schema=schema))
    index = pa.table([[0], [0], [users], [users * length], [users], [0], [0]], schema=ROW_GROUPS)
    pq.write_table(index, folder / ROW_GROUP_INDEX)
    id_N, layout = np.arange(1, rows + 1), RowLayout.of(rows)
    items = [id_N, id_N, np.ones(rows), np.zeros(rows), id_N, id_N > rows_before]
    kinds = dictionary_schema(text=False, of_days=True)
    arrays = [pa.array(values.astype(field.type.to_pandas_dtype())) for values, field in zip(items, kinds, strict=True)]
    pq.write_table(pa.Table.from_arrays(arrays, schema=kinds), folder / "items.parquet")
    places = pa.table({"item": layout.place(np.arange(rows + 1, dtype=np.int32))})
    with pa.ipc.new_file(folder / ITEM_FEATURES, places.schema) as out:
        out.write_table(places)
    days: tuple[Day, ...] = ()
    if former is not None:
        fingerprint = data_set_fingerprint(former)
        days = (Day(fingerprint=fingerprint, first_timestamp=0, last_timestamp=0, sources=()),)
    nothing = TargetCounts(targets=0, positives=0)
    Manifest(
        schema_version=4,
        seed=0,
        counts=Counts(
            events=users * length,
            users=users,
            users_left_out=0,
            behaviors=users * length,
            items=rows,
            categories=0,
            items_with_changed_category=0,
            first_timestamp=0,
            last_timestamp=length,
            train=TargetCounts(targets=users, positives=users // 2),
            validation=nothing,
            test=nothing,
        ),
        item_rows=layout.places - 1,
        placed_items=True,
        chain=Chain(days=days, first_timestamp=0, last_timestamp=length, rows=rows, layers=()),
        settings={},
        sources=(),
        shards=(Shard.of(path, users=users, behaviors=users * length, row_groups=1),),
        files=tuple(File.of(folder / name) for name in (ROW_GROUP_INDEX, "items.parquet", ITEM_FEATURES)),
    ).write(folder)
    return folder

"""Writes the predictions of a checkpoint on a split to Parquet, one file a rank.

I = items, T = targets of a batch.
"""

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from embeddings.batch import Batch
from embeddings.loss import labels_of
from pipeline.evaluate.evaluate import predictions, tasks_of
from pipeline.evaluate.open_run import opened_run
from pipeline.files import SUCCESS, output_folder
from pipeline.upload import remote_output, scratch_folder, upload_files
from schemas.errors import UserError
from schemas.shards import RECORDS_OF_A_FILE, UNLABELED, raw_type
from schemas.storage import RemotePath

COMPRESSION = "zstd"
PREDICTED = {"score": pa.float64(), "logit": pa.float32()}
"""Columns that a task has: its probability and the logarithm of its odds."""
PARTS = "part-*.parquet"
"""Names of the files with predictions."""


def score_run(
    run: Path,
    split: str,
    which: str,
    data: Path | None,
    out: Path,
    device: torch.device,
    *,
    overwrite: bool,
    plan: Path | None = None,
    impressions: tuple[str, ...] = (),
) -> int:
    """Write a line for each target; all ranks must call it.

    Columns: ``user_id``, ``item_id`` (raw ids; null for the unknown item), ``timestamp`` (seconds), where targets are
    impressions ``file`` and ``line`` (name of the file, and number of the record in it, from 1), ``label`` (null where
    there is none), ``score`` (probability, float64) and ``logit`` (float32: in the order of logits no two differ that
    the model told apart, which probabilities near 1 do). Those are of the main task; ``label_NAME``, ``score_NAME`` and
    ``logit_NAME`` are of each further one.

    Args:
        run: folder of the run.
        split: ``train``, ``validation`` or ``test``.
        which: ``best`` or ``last`` checkpoint, or its step.
        data: folder of the data set; None: the one that the run was trained on.
        out: folder that appears when all ranks are done.
        device: device of this rank.
        overwrite: whether it may take the place of what is in ``out``.
        plan: file of a sharding plan to follow; None: see `pipeline.evaluate.open_run.opened_run`.
        impressions: files that the data set's impressions were read from; their lines are written again with all their
            columns and the predictions, see `pipeline.evaluate.scored_impressions`.

    Returns:
        Number of predictions over all ranks.

    Raises:
        UserError: run, checkpoint, data, impressions and output do not fit each other.
    """
    rank = dist.get_rank()
    if impressions and isinstance(out, RemotePath):
        _refuse_several_machines(out)
    with (
        opened_run(run, split, which, data, device, plan, lines=True) as (model, stream),
        _folder_of_all(out, overwrite) as folder,
    ):
        manifest, tasks = stream.data_set.manifest, tasks_of(model)
        # The main task's columns have no name beside theirs: they are the same however many tasks there are.
        endings = ["", *(f"_{task.name}" for task in tasks[1:])]
        scored = None
        if impressions and rank == 0:
            # Loaded by the runs that use it alone, and before hours are spent on predictions.
            from pipeline.evaluate.scored_impressions import ScoredImpressions

            added = {name + ending: kind for ending in endings for name, kind in PREDICTED.items()}
            scored = ScoredImpressions(impressions, stream.data_set.folder, manifest, pa.schema(added))
        # The dictionary once for each rank; batches hold dense ids.
        raw_I = stream.data_set.names("item")
        schema = pa.schema(
            [
                ("user_id", raw_type(manifest.user_type)),
                ("item_id", raw_I.type),
                ("timestamp", pa.int64()),
                *([("file", pa.string()), ("line", pa.int64())] if manifest.impression_files else []),
                *((f"label{ending}", pa.int8()) for ending in endings),
                *((name + ending, kind) for ending in endings for name, kind in PREDICTED.items()),
            ]
        )
        names = pa.array(manifest.impression_files, pa.string())
        with pq.ParquetWriter(
            folder / f"part-{rank:05}.parquet", schema, compression=COMPRESSION, write_page_checksum=True
        ) as writer:
            for batch, logits in predictions(model, stream, device):
                of_tasks = dict(zip(endings, zip(labels_of(batch, tasks), logits, strict=True), strict=True))
                writer.write_table(_table(batch, of_tasks, raw_I, names, schema))
        # Every rank must have closed its part before the first one reads them, and gives the folder its name.
        dist.barrier()
        if scored is not None:
            scored.write(folder)
        return stream.targets


def _table(
    batch: Batch,
    of_tasks: Mapping[str, tuple[Tensor, Tensor]],
    raw_I: pa.Array,
    files: pa.Array,
    schema: pa.Schema,
) -> pa.Table:
    """The lines of a batch; ``of_tasks``: labels and logits by the ending of their columns' names."""
    item_T = batch.item_T if batch.own_item_T is None else batch.own_item_T
    columns: dict[str, Any] = {
        "user_id": (pa.array(batch.user_id_U.numpy()) if batch.user_text_U is None else batch.user_text_U).take(
            pa.array(batch.user_T.numpy())
        ),
        "item_id": raw_I.take(pa.array(item_T.numpy())),
        "timestamp": batch.timestamp_T.numpy(),
    }
    for ending, (label_T, logit_T) in of_tasks.items():
        known = pa.array(label_T.to(torch.int8).numpy())
        columns |= {
            f"label{ending}": pc.if_else(pc.equal(known, UNLABELED), pa.scalar(None, pa.int8()), known),
            # In float64: float32 knows 2^24 probabilities next to 1, and far more logits.
            f"score{ending}": logit_T.double().sigmoid().cpu().numpy(),
            f"logit{ending}": logit_T.cpu().numpy(),
        }
    if batch.line_T is not None:
        file_T, record_T = np.divmod(batch.line_T.numpy(), RECORDS_OF_A_FILE)
        columns |= {"file": files.take(pa.array(file_T)), "line": record_T}
    return pa.table([columns[name] for name in schema.names], schema=schema)


@contextmanager
def _folder_of_all(out: Path, overwrite: bool) -> Iterator[Path]:
    """Make a folder that all ranks write into; the first one makes it and lets it appear at the end of the block.

    Where ``out`` is a URL, the ranks of each other machine write into a folder there, and upload it.
    """
    contents = [PARTS, "impressions-*.parquet"]
    if dist.get_rank() > 0:
        message: list[Any] = [None, None]
        # Waits until the first rank has made the folder. If that is refused, the first rank raises, and this one loses
        # contact with it.
        dist.broadcast_object_list(message)
        if not isinstance(out, RemotePath):
            yield Path(message[0])
            return
        with scratch_folder() as own:
            yield Path(message[0]) if message[1] == platform.node() else own
            # The first rank has removed what was there, and then waits for all files before the last one.
            dist.barrier()
            upload_files(own, out)
            dist.barrier()
        return
    with (
        remote_output(out, contents, SUCCESS, overwrite=overwrite, meet=dist.barrier)
        if isinstance(out, RemotePath)
        else output_folder(out, contents, overwrite=overwrite)
    ) as folder:
        dist.broadcast_object_list([str(folder), platform.node()])
        yield folder


def _refuse_several_machines(out: Path) -> None:
    """Refuse to put lines and predictions together where a URL's parts are on several machines."""
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, platform.node())
    if len(set(hosts)) > 1:
        raise UserError(
            f"{out}: --impressions with --out at a URL needs all processes on one machine; use a shared disk"
        )

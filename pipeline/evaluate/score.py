"""Writes the predictions of a checkpoint on a split to Parquet, one file a rank.

I = items, T = targets of a batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from embeddings.batch import Batch
from pipeline.evaluate.evaluate import predictions
from pipeline.evaluate.open_run import opened_run
from pipeline.files import output_folder
from schemas.errors import UserError

COMPRESSION = "zstd"


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
) -> int:
    """Write user_id, item_id (raw ids; null for an unknown item), label and score (probability) of each target.

    All ranks must call it.

    Args:
        run: folder of the run.
        split: ``train``, ``validation`` or ``test``.
        which: ``best`` or ``last`` checkpoint.
        data: folder of the data set; None: the one that the run was trained on.
        out: folder that appears when all ranks are done.
        device: device of this rank.
        overwrite: whether it may take the place of what is in ``out``.
        plan: file of a sharding plan to follow; None: see `pipeline.evaluate.open_run.opened_run`.

    Returns:
        Number of predictions over all ranks.

    Raises:
        UserError: run, checkpoint, data and output do not fit each other.
    """
    rank = dist.get_rank()
    with opened_run(run, split, which, data, device, plan) as (model, stream), _folder_of_all(out, overwrite) as folder:
        # The dictionary once for each rank; batches hold dense ids.
        raw_I = _raw_items(stream.data_set.folder)
        schema = pa.schema(
            [("user_id", pa.int64()), ("item_id", raw_I.type), ("label", pa.int8()), ("score", pa.float32())]
        )
        with pq.ParquetWriter(folder / f"part-{rank:05}.parquet", schema, compression=COMPRESSION) as writer:
            for batch, logit_T in predictions(model, stream, device):
                writer.write_table(_table(batch, logit_T, raw_I, schema))
        # Every rank must have closed its part before the first one gives the folder its name.
        dist.barrier()
        return stream.targets


def _table(batch: Batch, logit_T: Tensor, raw_I: pa.Array, schema: pa.Schema) -> pa.Table:
    columns: list[Any] = [
        batch.user_id_U[batch.user_T].numpy(),
        raw_I.take(pa.array(batch.item_T.numpy())),
        batch.label_T.to(torch.int8).numpy(),
        logit_T.sigmoid().cpu().numpy(),
    ]
    return pa.table(columns, schema=schema)


def _raw_items(folder: Path) -> pa.Array:
    """Return (I,) raw ids by dense id; null for the unknown item 0."""
    file = folder / "items.parquet"
    try:
        dictionary = pq.read_table(file, columns=["id", "raw_id"])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read ({' '.join(str(error).split())}); prepare the data set again") from None
    # The file is sorted by raw id; here is the row of each dense id, and none for id 0.
    row_I = np.full(dictionary.num_rows + 1, -1)
    row_I[dictionary["id"].to_numpy()] = np.arange(dictionary.num_rows)
    raw = dictionary["raw_id"].combine_chunks()
    return raw.take(pa.array(row_I, mask=row_I < 0))


@contextmanager
def _folder_of_all(out: Path, overwrite: bool) -> Iterator[Path]:
    """Make a folder that all ranks write into; the first one makes it and lets it appear at the end of the block."""
    if dist.get_rank() > 0:
        message: list[Any] = [None]
        # Waits until the first rank has made the folder. If that is refused, the first rank raises, and this one loses
        # contact with it.
        dist.broadcast_object_list(message)
        yield Path(message[0])
        return
    with output_folder(out, ["part-*.parquet"], overwrite=overwrite) as folder:
        dist.broadcast_object_list([str(folder)])
        yield folder

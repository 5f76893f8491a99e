"""Metrics of targets as a whole and by segment: of new and old items, of new and old users, by length of the history.

T = targets of a batch, I = items, by id, the unknown 0 included.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from embeddings.batch import Batch
from embeddings.loss import labels_of
from pipeline.evaluate.evaluate import MAIN, predictions, tasks_of
from pipeline.evaluate.metrics import Evaluation, Metrics
from pipeline.stream.data_set import DataSet
from pipeline.stream.history_stream import HistoryStream
from schemas.online import WHOLE
from schemas.shards import UNLABELED
from schemas.stream import StreamSettings

LENGTHS = {"history 0": 0, "history 1-9": 1, "history 10-99": 10, "history 100-999": 100, "history 1000+": 1000}
"""Segments by the number of behaviours before the target, each with its smallest one."""
SEGMENTS = (WHOLE, "new items", "old items", "items without a row", "new users", "old users", *LENGTHS)
"""All segments. Those of items, of users and of lengths are a partition of all targets each."""


@dataclass(frozen=True)
class Segments:
    """Says which targets of a day are in which segment.

    An item is new if it has got its row since the day that the model knows; it is old if it had it then, and it may
    have none: rarer than ``items.min_count``, or evicted. A user is new without any behaviour before the day.
    """

    row_day_I: Tensor | None
    """(I,) int32, day on which each item got its row, by id; -1 where it has none. None: items are hashed, and have had
    their rows from the beginning."""
    known_day: int
    """Number of the day that the model was trained on last."""
    first_timestamp: int
    """The day's earliest moment, in seconds."""

    @classmethod
    def of(cls, data_set: DataSet, known_day: int) -> Self:
        """Read what is known of the items of a day of a chain.

        Args:
            data_set: the day.
            known_day: number of the day that the model was trained on last.

        Raises:
            UserError: the dictionary of items cannot be read.
        """
        chain = data_set.manifest.chain
        assert chain is not None
        row_day_I = None
        if chain.rows is not None:
            path = data_set.manifest.verified(data_set.folder, "items.parquet")
            table = pq.read_table(path, columns=["id", "row", "row_day"])
            has_row_N = table["row"].to_numpy() > 0
            row_day = np.full(data_set.manifest.counts.items + 1, -1, np.int32)
            row_day[table["id"].to_numpy()[has_row_N]] = table["row_day"].to_numpy()[has_row_N]
            row_day_I = torch.from_numpy(row_day)
        return cls(row_day_I, known_day, chain.first_timestamp)

    def masks(self, batch: Batch) -> dict[str, Tensor]:
        """Whether each target is in each segment, (T,) bool, by its name; on the CPU.

        Args:
            batch: of a stream with ``whole_histories``.
        """
        assert batch.history_end_T is not None
        assert batch.first_behavior_T is not None
        everything = torch.ones(len(batch), dtype=torch.bool)
        row_day_T = torch.zeros(len(batch), dtype=torch.int32)
        if self.row_day_I is not None:
            # Of the data set's own ids, wherever their rows lie.
            item_T = batch.item_T if batch.own_item_T is None else batch.own_item_T
            row_day_T = self.row_day_I[item_T.long()]
        new_user_T = batch.first_behavior_T >= self.first_timestamp
        bounds = torch.tensor(list(LENGTHS.values()))
        length_T = torch.bucketize(batch.history_end_T.long(), bounds, right=True) - 1
        return {
            WHOLE: everything,
            "new items": row_day_T > self.known_day,
            "old items": (row_day_T >= 0) & (row_day_T <= self.known_day),
            "items without a row": row_day_T < 0,
            "new users": new_user_T,
            "old users": ~new_user_T,
            **{name: length_T == number for number, name in enumerate(LENGTHS)},
        }


def segment_stream(
    data_set: DataSet,
    settings: StreamSettings,
    features: Collection[str] | None,
    rank: int,
    ranks: int,
    *,
    pin_memory: bool = False,
) -> HistoryStream:
    """The stream of a day's targets, in file order, as `evaluate_segments` wants it.

    Args:
        data_set: the day, whose targets are all in the split train.
        settings: how a model that is trained sees them; of the negatives, those that are stored are evaluated.
        features: names of features that the model reads; None: all.
        rank: which of the readers this is.
        ranks: number of readers.
        pin_memory: put batches into page-locked memory.
    """
    return HistoryStream(
        data_set.folder,
        "train",
        settings.model_copy(update={"negatives": None}),
        seed=0,
        shuffle=False,
        rank=rank,
        world=ranks,
        pin_memory=pin_memory,
        features=features,
        whole_histories=True,
    )


def evaluate_segments(
    model: nn.Module, stream: HistoryStream, segments: Segments, device: torch.device
) -> dict[str, dict[str, Evaluation]]:
    """Predict a day's targets; all ranks must call it.

    It holds 52 bytes a target: each is in four segments.

    Args:
        model: that has not learnt the day.
        stream: see `segment_stream`.
        segments: of the day.
        device: of this rank.

    Returns:
        By task, the main one first, and then by segment, all of `SEGMENTS`; the same on each rank.
    """
    tasks = tasks_of(model)
    metrics = {name: {segment: Metrics() for segment in SEGMENTS} for name in [task.name for task in tasks] or [MAIN]}
    for batch, logits in predictions(model, stream, device):
        user_id_T = batch.user_id_U[batch.user_T]
        masks = segments.masks(batch)
        for of_task, label_T, logit_T in zip(metrics.values(), labels_of(batch, tasks), logits, strict=True):
            on_cpu_T = logit_T.cpu()
            for segment, mask_T in masks.items():
                chosen_T = mask_T & (label_T != UNLABELED)
                of_task[segment].add(user_id_T[chosen_T], label_T[chosen_T], on_cpu_T[chosen_T])
    return {task: {name: each.compute() for name, each in of_task.items()} for task, of_task in metrics.items()}

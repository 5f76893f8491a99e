"""The loss of a batch that is spread over ranks.

T = targets of this rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from embeddings.batch import Batch
from embeddings.distributed.collectives import ranks, sum_over_ranks
from embeddings.model import Prediction
from schemas.model import Task
from schemas.shards import UNLABELED


def labels_of(batch: Batch, tasks: Sequence[Task]) -> list[Tensor]:
    """The labels of each task, float32 (T,): 0, 1, or -1 where there is none, as in data that lack the task's label.

    Args:
        batch: the targets.
        tasks: those of the settings; empty: the data's main label is the only task.
    """
    if not tasks:
        return [batch.label_T]
    nothing_T = torch.full_like(batch.item_T, UNLABELED, dtype=torch.float32)
    return [batch.labels_T.get(task.name, nothing_T) for task in tasks]


def click_loss(prediction: Prediction, label_T: Tensor, weight_T: Tensor | None = None) -> Tensor:
    """The log loss of one task; see `task_losses`."""
    (loss,) = task_losses(prediction, [label_T], weight_T)
    return loss


def task_losses(prediction: Prediction, labels: Sequence[Tensor], weight_T: Tensor | None = None) -> list[Tensor]:
    """The log loss of each task, such that gradients averaged over ranks are those of the global batch's mean loss.

    DistributedDataParallel averages the dense gradients over ranks, TorchRec divides the tables' by their number
    (`torchrec.distributed.comm_ops.set_gradient_division`). So each rank returns the sum over its targets, times ranks,
    over the global number of targets: the mean of what the ranks return is the mean over the global batch. Targets
    without a label are not among them, and weighted targets count as much as they weigh.

    Args:
        prediction: of T targets; if it has auxiliary logits, the log loss of those is added.
        labels: of each task, float32 (T,): 0, 1, or -1 where there is none.
        weight_T: float32, weights of the targets, 0 or more; None: all weigh 1.

    Returns:
        float32 scalar each; 0 on a rank without targets, which must call it and its backward pass nevertheless.
    """
    assert len(labels) == len(prediction.logits), "a label for each task"
    weights = [(label_T >= 0).to(label_T.dtype) for label_T in labels]
    if weight_T is not None:
        weights = [labeled_T * weight_T for labeled_T in weights]
    # Counted in each step, because ranks may have different numbers of targets, or none; for all tasks at once.
    totals = sum_over_ranks(torch.stack([weight_T.sum() for weight_T in weights]))
    # Where no rank has any target of a task, its loss is 0 over anything.
    scales = ranks() / torch.where(totals > 0, totals, 1)
    losses = []
    for number, (label_T, labeled_T) in enumerate(zip(labels, weights, strict=True)):
        target_T = label_T.clamp(min=0)

        def total(logit_T: Tensor, target_T: Tensor = target_T, weight_T: Tensor = labeled_T) -> Tensor:
            # A sum, because the mean of an empty batch would be not a number. On logits, which stay exact where a
            # sigmoid would round to 0 or 1.
            return binary_cross_entropy_with_logits(logit_T, target_T, weight_T, reduction="sum")

        loss = total(prediction.logits[number])
        if prediction.auxiliary_logits:
            loss = loss + total(prediction.auxiliary_logits[number])
        losses.append(loss * scales[number])
    return losses


def weighted_sum(losses: Sequence[Tensor], tasks: Sequence[Task]) -> Tensor:
    """What is learnt from: the sum of the tasks' losses, each times its weight; empty ``tasks``: the only loss."""
    if not tasks:
        return losses[0]
    return torch.stack([loss * task.weight for loss, task in zip(losses, tasks, strict=True)]).sum()

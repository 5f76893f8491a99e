"""AUC and GAUC of scores that are spread over ranks, exact, without any rank that holds all scores.

The AUC is the share of (positive, negative) pairs that the scores put in the right order; an equal pair counts half. It
comes from a sample sort, then counting. Splitters cut the line of scores into cells, in turn an open interval and a
single score: (-inf, s_1), {s_1}, (s_1, s_2), {s_2}, ..., (s_S, inf). Pairs in two different cells, and pairs of one
single score, follow from the counts of the cells. Only for pairs within an interval are scores sent, each interval's to
one rank. A score that many samples share becomes a splitter, so that it burdens no rank.

The GAUC is the AUC of each user, averaged over users; each user's samples are sent to one rank.

P = positives, N = negatives in `auc`, samples in `grouped_auc`, S = splitters, C = cells = 2 S + 1, W = ranks,
U = users, G = runs of samples of one user with one score.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_DRAWN = 1 << 16
"""About how many scores, over all ranks, splitters are chosen from."""
_MULTIPLIER = -7046029254386353131
"""2^64 divided by the golden ratio, as int64: multiplying by it spreads ids that follow a pattern."""


class Ranks:
    """The ranks of a group; every rank must call the same methods in the same order.

    Args:
        group: gloo or NCCL. None: the default group, or, where there is none, this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if group is None and dist.is_initialized():
            group = dist.group.WORLD
        self._group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        on_gpu = group is not None and dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        """Where tensors must be for the group's collectives."""

    def gather(self, values_N: Tensor) -> list[Tensor]:
        """Return the values of each rank, in the ranks' order; their numbers may differ.

        Args:
            values_N: (N,), of one dtype on all ranks, on any device.

        Returns:
            W tensors on ``device``.
        """
        values_N = values_N.to(self.device)
        if self.size == 1:
            return [values_N]
        length_W = [int(length) for length in self._gather_equal(torch.tensor([len(values_N)], device=self.device))]
        # A gather needs tensors of one length: the longest one's, cut again afterwards.
        padded = values_N.new_zeros(max(length_W))
        padded[: len(values_N)] = values_N
        return [values[:length] for values, length in zip(self._gather_equal(padded), length_W, strict=True)]

    def gather_numbers(self, *numbers: int | float) -> list[Sequence[int | float]]:
        """Return the numbers of each rank, in the ranks' order: all int (64 bits) or all float."""
        dtype = torch.float64 if isinstance(numbers[0], float) else torch.int64
        return [values.tolist() for values in self.gather(torch.tensor(numbers, dtype=dtype))]

    def exchange(self, values_N: Tensor, count_W: Sequence[int]) -> Tensor:
        """Send each rank its part of the values.

        Args:
            values_N: (N,) on ``device``, ordered by the rank that gets them.
            count_W: number of values for each rank; their sum is N.

        Returns:
            The values that this rank was sent, in the order of the senders.
        """
        if self.size == 1:
            return values_N
        sent_W = torch.tensor(count_W, dtype=torch.int64, device=self.device)
        # First how much comes from whom, then the values themselves: the receiver must know the sizes.
        received_W = torch.empty_like(sent_W)
        dist.all_to_all_single(received_W, sent_W, group=self._group)
        received: list[int] = received_W.tolist()
        result = values_N.new_empty(sum(received))
        dist.all_to_all_single(result, values_N.contiguous(), received, list(count_W), group=self._group)
        return result

    def _gather_equal(self, values: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(gathered, values, group=self._group)
        return gathered


def auc(positive_P: Tensor, negative_N: Tensor, ranks: Ranks) -> float:
    """The AUC over all ranks, the same on each: an exact fraction, rounded once. Every rank must call it.

    Args:
        positive_P: (P,) float32, scores of this rank's positive samples, on the ranks' device.
        negative_N: (N,) float32, scores of its negative samples, on the same device.
        ranks: the ranks whose scores count.

    Returns:
        The AUC, in 0 .. 1; nan where there are no positives or no negatives.
    """
    positive_P, negative_N = positive_P.sort().values, negative_N.sort().values
    splitter_S = _splitters(positive_P, negative_N, ranks)
    positive_C, own_positives = _spread(positive_P, splitter_S, ranks)
    negative_C, own_negatives = _spread(negative_N, splitter_S, ranks)
    # Python's integers from here on: the number of pairs may not fit into 64 bits.
    twice = sum(int(pairs) for (pairs,) in ranks.gather_numbers(_twice_ordered_pairs(own_positives, own_negatives)))
    negatives_below = 0
    for cell, (positives, negatives) in enumerate(zip(positive_C, negative_C, strict=True)):
        single_score = cell % 2 == 1
        twice += positives * (2 * negatives_below + single_score * negatives)
        negatives_below += negatives
    pairs = sum(positive_C) * sum(negative_C)
    return twice / (2 * pairs) if pairs else math.nan


def _splitters(positive_P: Tensor, negative_N: Tensor, ranks: Ranks) -> Tensor:
    """Return (S,) float32, S < W: different scores, ascending, that cut all scores into about equal parts."""
    if ranks.size == 1:  # one interval holds everything
        return positive_P[:0]
    total = sum(int(count) for (count,) in ranks.gather_numbers(len(positive_P) + len(negative_N)))
    # Every n-th of the sorted scores, not a random sample: ranks need no common generator, and quantiles are as good.
    stride = max(1, total // _DRAWN)
    drawn = torch.cat(ranks.gather(torch.cat([positive_P[::stride], negative_N[::stride]]))).sort().values
    cut = torch.arange(1, ranks.size, device=drawn.device) * len(drawn) // ranks.size
    # A score that many samples share fills several cuts: as one splitter it has a cell of its own.
    return drawn[cut].unique() if len(drawn) else drawn


def _spread(sorted_N: Tensor, splitter_S: Tensor, ranks: Ranks) -> tuple[Sequence[int], Tensor]:
    """Return the samples of all ranks in each cell, and the sorted scores of the interval that is this rank's."""
    # Both ends of each splitter's own scores, in turn, are the borders of the cells.
    first_S = torch.searchsorted(sorted_N, splitter_S)
    end_S = torch.searchsorted(sorted_N, splitter_S, right=True)
    inner = torch.stack([first_S, end_S], 1).flatten()
    local_C = torch.cat([inner.new_tensor([0]), inner, inner.new_tensor([len(sorted_N)])]).diff()
    count_C: list[int] = torch.stack(ranks.gather(local_C)).sum(0).tolist()
    if ranks.size == 1:
        return count_C, sorted_N
    # The even cells are the open intervals. There may be fewer than ranks, where splitters coincide: the last ranks
    # then get nothing.
    intervals = sorted_N.split(local_C.tolist())[::2]
    sent_W = [len(interval) for interval in intervals] + [0] * (ranks.size - len(intervals))
    return count_C, ranks.exchange(torch.cat(intervals), sent_W).sort().values


def _twice_ordered_pairs(positive_P: Tensor, negative_N: Tensor) -> int:
    """Return twice the pairs in the right order, an equal pair counting one; both tensors are sorted."""
    # Once with the equal ones and once without: their sum counts an equal pair once and a smaller one twice, in
    # integers.
    below = torch.searchsorted(negative_N, positive_P).sum()
    below_or_equal = torch.searchsorted(negative_N, positive_P, right=True).sum()
    return int(below + below_or_equal)


class GroupedAuc(NamedTuple):
    """The GAUC, and the number of different users, those without an AUC of their own included."""

    gauc: float
    users: int


def grouped_auc(user_id_N: Tensor, label_N: Tensor, logit_N: Tensor, ranks: Ranks) -> GroupedAuc:
    """The GAUC over all ranks, the same on each: the mean AUC of users, weighted by their numbers of samples.

    Users whose samples are all positive or all negative have no AUC and are left out. Every rank must call it.

    Args:
        user_id_N: (N,) int64, on the ranks' device like the others.
        label_N: (N,) bool.
        logit_N: (N,) float32.
        ranks: the ranks whose samples count.

    Returns:
        The GAUC, in 0 .. 1 or nan where no user has an AUC, and the number of users.
    """
    if ranks.size > 1:
        # The upper half of the product: the lower bits of ids that are multiples of W would all choose one rank.
        rank_N = ((user_id_N * _MULTIPLIER) >> 33) % ranks.size
        count_W = rank_N.bincount(minlength=ranks.size).tolist()
        # The three columns are sent one after the other in the same order, so that rows stay together.
        order_N = rank_N.argsort(stable=True)
        user_id_N = ranks.exchange(user_id_N[order_N], count_W)
        label_N = ranks.exchange(label_N[order_N].to(torch.uint8), count_W)
        logit_N = ranks.exchange(logit_N[order_N], count_W)
    weighted, weight, users = _of_whole_users(user_id_N, label_N, logit_N)
    # `fsum` rounds once, so that the result does not depend on the order of ranks.
    weighted = math.fsum(part for (part,) in ranks.gather_numbers(weighted))
    weight, users = (int(sum(parts)) for parts in zip(*ranks.gather_numbers(weight, users), strict=True))
    return GroupedAuc(weighted / weight if weight else math.nan, users)


def _of_whole_users(user_id_N: Tensor, label_N: Tensor, logit_N: Tensor) -> tuple[float, int, int]:
    """Return the sum of AUC times samples and the sum of samples, over users with an AUC, and the number of users."""
    if not len(user_id_N):
        return 0.0, 0, 0
    # By user, and by logit within a user: a stable sort by the second key, then by the first.
    order_N = logit_N.argsort()
    order_N = order_N[user_id_N[order_N].argsort(stable=True)]
    user_id_N, label_N, logit_N = user_id_N[order_N], label_N[order_N], logit_N[order_N]

    positives_before = torch.cat([label_N.new_zeros(1, dtype=torch.int64), label_N.cumsum(0)])
    new_user_N = _differs_from_previous(user_id_N)
    user_border = _borders(new_user_N)
    run_border = _borders(new_user_N | _differs_from_previous(logit_N))
    positive_U = positives_before[user_border].diff()
    negative_U = user_border.diff() - positive_U

    # Twice the pairs in the right order, an equal pair counting one: first with the negatives of earlier users.
    negatives_at_run = run_border - positives_before[run_border]
    twice_G = positives_before[run_border].diff() * (negatives_at_run[:-1] + negatives_at_run[1:])
    twice_before = torch.cat([twice_G.new_zeros(1), twice_G.cumsum(0)])
    twice_U = twice_before[torch.searchsorted(run_border, user_border)].diff()
    negatives_at_user = user_border - positives_before[user_border]
    twice_U = twice_U - 2 * positive_U * negatives_at_user[:-1]

    has_auc_U = (positive_U > 0) & (negative_U > 0)
    samples_U = (positive_U + negative_U)[has_auc_U]
    auc_U = twice_U[has_auc_U].double() / (2 * positive_U * negative_U)[has_auc_U].double()
    return float((auc_U * samples_U).sum()), int(samples_U.sum()), len(positive_U)


def _differs_from_previous(values_N: Tensor) -> Tensor:
    """Return (N,) bool: whether a value is the first or another than the one before it."""
    new_N = torch.ones_like(values_N, dtype=torch.bool)
    torch.ne(values_N[1:], values_N[:-1], out=new_N[1:])
    return new_N


def _borders(new_N: Tensor) -> Tensor:
    """Return where each run of equal values begins, and where the last one ends."""
    return torch.cat([new_N.nonzero().flatten(), new_N.new_tensor([len(new_N)], dtype=torch.int64)])

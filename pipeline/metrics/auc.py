"""Area under the ROC curve of scores that are spread over ranks: a sample sort, then counting.

W = ranks, P = positives, N = negatives, S = splitters, C = cells = 2 S + 1.

The AUC is the share of (positive, negative) pairs that the scores put in the right order; an equal pair counts half.
Splitters cut the line of scores into cells, in turn an open interval and a single score:
(-inf, s_1), {s_1}, (s_1, s_2), {s_2}, ..., (s_S, inf). Pairs in two different cells, and pairs of one single score,
follow from the counts of the cells. Only for pairs within an interval are scores sent, each interval's to one rank. So
no rank holds all scores, and a score that many samples share, as it becomes a splitter, burdens none.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.metrics.ranks import Ranks

_DRAWN = 1 << 16
"""About so many scores over all ranks are looked at to choose splitters."""


def auc(positive_P: Tensor, negative_N: Tensor, ranks: Ranks) -> float:
    """AUC over all ranks, the same on each: an exact fraction, rounded once.

    Args:
        positive_P: (P,) float32, scores of this rank's positive samples, on the ranks' device.
        negative_N: (N,) float32, scores of its negative samples.
        ranks: every rank must call this.

    Returns:
        nan where there are no positives or no negatives.
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
    """At most W - 1 different scores, ascending, that cut all scores into about equal parts."""
    if ranks.size == 1:
        return positive_P[:0]
    total = sum(int(count) for (count,) in ranks.gather_numbers(len(positive_P) + len(negative_N)))
    stride = max(1, total // _DRAWN)
    drawn = torch.cat(ranks.gather(torch.cat([positive_P[::stride], negative_N[::stride]]))).sort().values
    cut = torch.arange(1, ranks.size, device=drawn.device) * len(drawn) // ranks.size
    return drawn[cut].unique() if len(drawn) else drawn


def _spread(sorted_N: Tensor, splitter_S: Tensor, ranks: Ranks) -> tuple[Sequence[int], Tensor]:
    """Samples of all ranks in each cell, and the sorted scores of the interval that is this rank's."""
    first_S = torch.searchsorted(sorted_N, splitter_S)
    end_S = torch.searchsorted(sorted_N, splitter_S, right=True)
    inner = torch.stack([first_S, end_S], 1).flatten()
    local_C = torch.cat([inner.new_tensor([0]), inner, inner.new_tensor([len(sorted_N)])]).diff()
    count_C: list[int] = torch.stack(ranks.gather(local_C)).sum(0).tolist()
    if ranks.size == 1:
        return count_C, sorted_N
    intervals = sorted_N.split(local_C.tolist())[::2]
    sent_W = [len(interval) for interval in intervals] + [0] * (ranks.size - len(intervals))
    return count_C, ranks.exchange(torch.cat(intervals), sent_W).sort().values


def _twice_ordered_pairs(positive_P: Tensor, negative_N: Tensor) -> int:
    """Twice the pairs in the right order, an equal pair counting one; both sorted."""
    below = torch.searchsorted(negative_N, positive_P).sum()
    below_or_equal = torch.searchsorted(negative_N, positive_P, right=True).sum()
    return int(below + below_or_equal)

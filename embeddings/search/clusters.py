"""Clusters of each window's behaviours, of bounded size, and the behaviour that stands for each (TWIN-V2).

T = targets, N = longest window, M = behaviours of all users, D = dim of what is compared, C = clusters of a window at
most, W = (target, behaviour) pairs, one window after the other.
"""

import torch
from torch import Tensor

from embeddings.batch import History, Selection, gather_or_zeros
from embeddings.compiled import in_even_parts

CHUNK_FLOATS = 1 << 24
"""How many floats of windows' rows are in memory at once."""

TIE = 1e-4
"""Distances that differ by no more than this part of themselves count as equal, and the earlier behaviour wins.

The two behaviours of a cluster of two are equally far from their middle: without this, rounding would choose."""


def log_counts(rows_MD: Tensor, history: History, size: int) -> Tensor:
    """The logarithm of how many behaviours each one stands for; -inf where another one of its cluster stands for it.

    A window is split in two until no cluster has more than ``size`` behaviours (hierarchical clustering, TWIN-V2,
    arXiv 2407.16357, section 4.2). A split goes along the line from the behaviour that is farthest from the middle to
    the one that is farthest from that, and leaves halves of equal size, so that the number of splits is bounded too.
    The behaviour that is nearest to the middle stands for its cluster.

    Args:
        rows_MD: float32, the rows whose distances make the clusters.
        history: the windows.
        size: the most behaviours of a cluster; with 1 each stands for itself.

    Returns:
        float32 (W,), one window after the other.
    """
    if rows_MD.device.type == "cpu":
        return _on_cpu(rows_MD, history, size)
    return in_torch(rows_MD, history, size)


def _on_cpu(rows_MD: Tensor, history: History, size: int) -> Tensor:
    # The compiler takes a second or more to load: only those who need it pay for it.
    from embeddings.search import clusters_kernel

    length_T = history.end_T - history.start_T
    # Targets write into parts of one result that do not overlap, so threads need no lock; the kernel lets go of the
    # GIL.
    first_pair_T = length_T.cumsum(0) - length_T
    log_count_W = torch.empty(int(length_T.sum()))
    rows = rows_MD.detach().float().contiguous().numpy()

    def part(first: int, end: int) -> None:
        start_T, end_T = history.start_T[first:end].numpy(), history.end_T[first:end].numpy()
        pair_T = first_pair_T[first:end].numpy()
        clusters_kernel.log_counts(rows, start_T, end_T, pair_T, size, TIE, log_count_W.numpy())

    in_even_parts(part, len(length_T), torch.get_num_threads())
    return log_count_W


def in_torch(rows_MD: Tensor, history: History, size: int) -> Tensor:
    """What `log_counts` returns, by operators of torch, on any device; arguments as of `log_counts`."""
    window = Selection.everything(history)
    longest = window.index_TK.shape[1]
    # Rows of windows are copied side by side here, also those that windows share: so only some targets at a time.
    targets = max(1, CHUNK_FLOATS // max(1, longest * rows_MD.shape[1]))
    parts = [rows_MD.new_empty(0)]
    for index_TN, valid_TN in zip(window.index_TK.split(targets), window.valid_TK.split(targets), strict=True):
        rows_TND = gather_or_zeros(rows_MD, index_TN)
        cluster_TN = _bisected(rows_TND, valid_TN, size)
        parts.append(_log_counts(rows_TND, valid_TN, cluster_TN)[valid_TN])
    return torch.cat(parts)


def _bisected(rows_TND: Tensor, valid_TN: Tensor, size: int) -> Tensor:
    """The number of each behaviour's cluster, int64 (T, N); all clusters are split at once, round by round.

    Padding has number 0, and is masked wherever it would count.
    """
    cluster_TN = torch.zeros_like(valid_TN, dtype=torch.int64)
    clusters = 1
    while True:
        count_TC = _sums(valid_TN.long(), cluster_TN, clusters)
        if int(count_TC.amax()) <= size if count_TC.numel() else True:
            return cluster_TN
        # One extreme is the behaviour farthest from the middle, the other the one farthest from that.
        from_middle_TN = _distances(rows_TND, _middles(rows_TND, valid_TN, cluster_TN, count_TC), cluster_TN)
        one_TCD = _members(rows_TND, _farthest(from_middle_TN, valid_TN, cluster_TN, clusters))
        from_one_TN = _distances(rows_TND, one_TCD, cluster_TN)
        other_TCD = _members(rows_TND, _farthest(from_one_TN, valid_TN, cluster_TN, clusters))
        # Halves along the line between the two extremes, equal in number whatever the distances are.
        way_TND = (other_TCD - one_TCD).gather(1, cluster_TN.unsqueeze(2).expand_as(rows_TND))
        along_TN = (rows_TND * way_TND).sum(2).masked_fill(~valid_TN, torch.inf)
        rank_TN = _ranks(along_TN, cluster_TN)
        of_behavior_TN = count_TC.gather(1, cluster_TN)
        # A cluster that is small enough stays whole: all of it goes to its first half.
        second_TN = (of_behavior_TN > size) & (rank_TN >= (of_behavior_TN + 1) // 2) & valid_TN
        cluster_TN, clusters = 2 * cluster_TN + second_TN, 2 * clusters


def _log_counts(rows_TND: Tensor, valid_TN: Tensor, cluster_TN: Tensor) -> Tensor:
    clusters = int(cluster_TN.amax()) + 1 if cluster_TN.numel() else 1
    count_TC = _sums(valid_TN.long(), cluster_TN, clusters)
    distance_TN = _distances(rows_TND, _middles(rows_TND, valid_TN, cluster_TN, count_TC), cluster_TN)
    # The nearest is the farthest of the negated distances: one rule for ties serves both.
    nearest_TC = _farthest(-distance_TN, valid_TN, cluster_TN, clusters)
    column_TN = torch.arange(valid_TN.shape[1], device=valid_TN.device).expand_as(valid_TN)
    stands_TN = valid_TN & (nearest_TC.gather(1, cluster_TN) == column_TN)
    return torch.where(stands_TN, count_TC.gather(1, cluster_TN).float().log(), -torch.inf)


def _sums(value_TN: Tensor, cluster_TN: Tensor, clusters: int) -> Tensor:
    """The sum of the values of each cluster, (T, C)."""
    return value_TN.new_zeros(len(value_TN), clusters).scatter_add_(1, cluster_TN, value_TN)


def _middles(rows_TND: Tensor, valid_TN: Tensor, cluster_TN: Tensor, count_TC: Tensor) -> Tensor:
    """Means of the clusters, (T, C, D)."""
    sum_TCD = rows_TND.new_zeros(*count_TC.shape, rows_TND.shape[2])
    sum_TCD.scatter_add_(1, cluster_TN.unsqueeze(2).expand_as(rows_TND), rows_TND * valid_TN.unsqueeze(2))
    return sum_TCD / count_TC.clamp(min=1).unsqueeze(2)


def _distances(rows_TND: Tensor, points_TCD: Tensor, cluster_TN: Tensor) -> Tensor:
    """Squared distance of each behaviour from its cluster's point, (T, N)."""
    return (rows_TND - points_TCD.gather(1, cluster_TN.unsqueeze(2).expand_as(rows_TND))).square().sum(2)


def _farthest(value_TN: Tensor, valid_TN: Tensor, cluster_TN: Tensor, clusters: int) -> Tensor:
    """Which behaviour of each cluster has the largest value, of equals the earliest, int64 (T, C); N if it is empty."""
    value_TN = value_TN.masked_fill(~valid_TN, -torch.inf)
    largest_TC = value_TN.new_full((len(value_TN), clusters), -torch.inf)
    largest_TC.scatter_reduce_(1, cluster_TN, value_TN, "amax")
    longest = valid_TN.shape[1]
    column_TN = torch.arange(longest, device=valid_TN.device).expand_as(cluster_TN)
    enough_TC = largest_TC - TIE * largest_TC.abs()
    candidate_TN = torch.where(valid_TN & (value_TN >= enough_TC.gather(1, cluster_TN)), column_TN, longest)
    return candidate_TN.new_full(largest_TC.shape, longest).scatter_reduce_(1, cluster_TN, candidate_TN, "amin")


def _members(rows_TND: Tensor, column_TC: Tensor) -> Tensor:
    """The row of one behaviour of each cluster, (T, C, D); ``column_TC`` says of which."""
    column_TC = column_TC.clamp(max=rows_TND.shape[1] - 1)
    return rows_TND.gather(1, column_TC.unsqueeze(2).expand(-1, -1, rows_TND.shape[2]))


def _ranks(along_TN: Tensor, cluster_TN: Tensor) -> Tensor:
    """The rank of each behaviour among its cluster's, from the least value to the largest, int64 (T, N)."""
    # Sorted by value, then stably by cluster: so each cluster's are together, and in order.
    order_TN = along_TN.argsort(dim=1, stable=True)
    order_TN = order_TN.gather(1, cluster_TN.gather(1, order_TN).argsort(dim=1, stable=True))
    column_TN = torch.arange(along_TN.shape[1], device=along_TN.device).expand_as(order_TN)
    in_order_TN = cluster_TN.gather(1, order_TN)
    # Where a cluster begins in the sorted row; the distance from there is the rank.
    first_TN = torch.searchsorted(in_order_TN, in_order_TN)
    return torch.empty_like(order_TN).scatter_(1, order_TN, column_TN - first_TN)

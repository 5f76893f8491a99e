"""Top-K search in plain torch: what the other implementations must agree with, on any device.

R = rows of the table, D = dim, M = ids of all users, T = targets, W = sum of window lengths, N = longest window,
K = kept, G = groups of overlapping windows, S = longest span of a group, Q = most targets of a group,
C = targets of one pass.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from embeddings.search.topk.keys import NOTHING, decoded, ordered

CHUNK_BYTES = 64 << 20
"""Scores and gathered rows of one pass stay below this, unless a single user's do not."""


class _Span(NamedTuple):
    """Groups of targets whose windows overlap, padded to the longest and the largest of them."""

    begin_G: Tensor
    size_G: Tensor
    S: int
    Q: int


def top_k_reference(
    rows_RD: Tensor,
    ids_M: Tensor,
    start_T: Tensor,
    end_T: Tensor,
    query_TD: Tensor,
    additive_W: Tensor,
    k: int,
    scale_R: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `embeddings.search.topk.api.top_k`, which has checked the arguments.

    Targets whose windows overlap share one gather of the rows; of those, `CHUNK_BYTES` are in memory at a time.
    """
    score_TK = torch.empty(len(start_T), k, device=query_TD.device)
    index_TK = torch.empty(len(start_T), k, dtype=torch.int64, device=query_TD.device)
    length_T = end_T - start_T
    first_T = length_T.cumsum(0) - length_T
    for target_C, span in _chunks(start_T, end_T, rows_RD.shape[1]):
        score_CN = _scores(rows_RD, scale_R, ids_M, start_T[target_C], end_T[target_C], query_TD[target_C], span)
        column_N = torch.arange(score_CN.shape[1], device=query_TD.device)
        valid_CN = column_N < length_T[target_C, None]
        pair_CN = torch.where(valid_CN, first_T[target_C, None] + column_N, 0)
        key_CN = torch.where(valid_CN, ordered(score_CN + additive_W[pair_CN], column_N), NOTHING)
        key_CK = key_CN.topk(min(k, score_CN.shape[1])).values
        score_TK[target_C], index_TK[target_C] = decoded(key_CK, start_T[target_C], k)
    return score_TK, index_TK


def _chunks(start_T: Tensor, end_T: Tensor, dim: int) -> Iterator[tuple[Tensor, _Span]]:
    """The targets in portions of bounded memory: their indices, and the groups that they are in."""
    if not len(start_T):
        return
    order_T = torch.argsort(start_T, stable=True)
    start, reach = start_T[order_T], end_T[order_T].cummax(0).values
    new = torch.ones_like(start, dtype=torch.bool)
    new[1:] = start[1:] >= reach[:-1]
    group_T = new.cumsum(0) - 1
    size_G = torch.bincount(group_T)
    last_G = size_G.cumsum(0)
    begin_G = start[last_G - size_G]
    span_G = reach[last_G - 1] - begin_G
    # Groups of like span together, so that padding to the longest wastes little.
    by_span_G = torch.argsort(span_G, stable=True)
    order_T = order_T[torch.argsort(torch.argsort(by_span_G)[group_T], stable=True)]
    begin_G, size_G, spans, sizes = (
        begin_G[by_span_G],
        size_G[by_span_G],
        span_G[by_span_G].tolist(),
        size_G[by_span_G].tolist(),
    )
    group, target = 0, 0
    while group < len(spans):
        S, Q, stop = 0, 0, group
        while stop < len(spans):
            wider, more = max(S, spans[stop]), max(Q, sizes[stop])
            if stop > group and (stop - group + 1) * (wider * dim * 4 + more * wider * 24) > CHUNK_BYTES:
                break
            S, Q, stop = wider, more, stop + 1
        targets = sum(sizes[group:stop])
        yield order_T[target : target + targets], _Span(begin_G[group:stop], size_G[group:stop], S, Q)
        group, target = stop, target + targets


def _scores(
    rows_RD: Tensor,
    scale_R: Tensor | None,
    ids_M: Tensor,
    start_C: Tensor,
    end_C: Tensor,
    query_CD: Tensor,
    span: _Span,
) -> Tensor:
    """Dot products of each target with the rows of its window, (C, N); arbitrary behind the window's end."""
    begin_G, size_G, S, Q = span
    longest = int((end_C - start_C).max())
    if longest == 0:
        return query_CD.new_zeros(len(start_C), 0, dtype=torch.float32)
    index_GS = (begin_G[:, None] + torch.arange(S, device=begin_G.device)).clamp(max=len(ids_M) - 1)
    ids_GS = ids_M[index_GS]
    rows_GSD = rows_RD.index_select(0, ids_GS.flatten()).float().view(len(begin_G), S, -1)
    group_C = torch.arange(len(begin_G), device=begin_G.device).repeat_interleave(size_G)
    slot_C = torch.arange(len(group_C), device=group_C.device) - (size_G.cumsum(0) - size_G)[group_C]
    query_GQD = query_CD.new_zeros(len(begin_G), Q, rows_RD.shape[1], dtype=torch.float32)
    query_GQD[group_C, slot_C] = query_CD.float()
    score_GQS = torch.bmm(query_GQD, rows_GSD.transpose(1, 2))
    if scale_R is not None:
        score_GQS *= scale_R[ids_GS][:, None]
    column_CN = (start_C - begin_G[group_C])[:, None] + torch.arange(longest, device=begin_G.device)
    return score_GQS[group_C, slot_C].gather(1, column_CN.clamp(max=S - 1))

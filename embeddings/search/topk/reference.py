"""Top-K search in plain torch: what the other implementations must agree with, on any device.

D = dim, T = targets, N = longest window, K = kept, C = targets of one pass, G = groups of overlapping windows,
S = longest span of a group, Q = most targets of a group, M = behaviours of all users.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from embeddings.intervals import interval_bucket
from embeddings.search.topk.inputs import NOTHING, PartKind, ScorePart, TopKInputs, decoded, ordered

CHUNK_BYTES = 64 << 20
"""Scores and gathered rows of one pass stay below this, unless a single user's do not."""


class _Span(NamedTuple):
    """Groups of targets whose windows overlap, padded to the longest and the largest of them."""

    begin_G: Tensor
    """int64: the first behaviour of any of its windows."""
    size_G: Tensor
    """int64: its targets."""
    S: int
    Q: int


def top_k_reference(inputs: TopKInputs) -> tuple[Tensor, Tensor]:
    """The search of `embeddings.search.topk.api.top_k`, on any device; inputs are checked.

    Targets whose windows overlap share one gather of the rows; of those, `CHUNK_BYTES` are in memory at a time.
    """
    start_T, device, k = inputs.start_T, inputs.query_TD.device, inputs.k
    score_TK = torch.empty(len(start_T), k, device=device)
    index_TK = torch.empty(len(start_T), k, dtype=torch.int64, device=device)
    for target_C, span in _chunks(inputs):
        score_CN = _scores(inputs, target_C, span)
        column_N = torch.arange(score_CN.shape[1], device=device)
        valid_CN = column_N < inputs.length_T[target_C, None]
        # Padding reads the first behaviour and pair, which are there if any window is not empty, and is masked at last.
        index_CN = torch.where(valid_CN, start_T[target_C, None] + column_N, 0)
        for part in inputs.parts:
            score_CN = score_CN + _part_score(part, target_C, index_CN)
        if inputs.additive_W is not None:
            pair_CN = torch.where(valid_CN, inputs.first_pair_T[target_C, None] + column_N, 0)
            score_CN = score_CN + inputs.additive_W[pair_CN]
        key_CN = torch.where(valid_CN, ordered(score_CN, column_N), NOTHING)
        # A window shorter than K gives fewer columns; `decoded` fills them up.
        key_CK = key_CN.topk(min(k, score_CN.shape[1])).values
        score_TK[target_C], index_TK[target_C] = decoded(key_CK, start_T[target_C], k)
    return score_TK, index_TK


def _chunks(inputs: TopKInputs) -> Iterator[tuple[Tensor, _Span]]:
    """The targets in portions of bounded memory: which they are, int64 (C,), and the groups that they are in."""
    if not len(inputs.start_T):
        return
    dim = inputs.rows_RD.shape[1]
    order_T = torch.argsort(inputs.start_T, stable=True)
    # In order of their starts, a target begins a group if no window before it reaches as far.
    start_T, reach_T = inputs.start_T[order_T], inputs.end_T[order_T].cummax(0).values
    begins_T = torch.ones_like(start_T, dtype=torch.bool)
    begins_T[1:] = start_T[1:] >= reach_T[:-1]
    group_T = begins_T.cumsum(0) - 1
    # Targets of each group, where it begins, and how far its windows reach.
    size_G = torch.bincount(group_T)
    end_G = size_G.cumsum(0)
    begin_G = start_T[end_G - size_G]
    span_G = reach_T[end_G - 1] - begin_G
    # Groups of like span together, so that padding to the longest wastes little.
    by_span_G = torch.argsort(span_G, stable=True)
    order_T = order_T[torch.argsort(torch.argsort(by_span_G)[group_T], stable=True)]
    begin_G, size_G, spans, sizes = (
        begin_G[by_span_G],
        size_G[by_span_G],
        span_G[by_span_G].tolist(),
        size_G[by_span_G].tolist(),
    )
    # Groups are added to a pass as long as its tensors, padded to the longest and the largest group, stay within the
    # limit.
    group, target = 0, 0
    while group < len(spans):
        S, Q, stop = 0, 0, group
        while stop < len(spans):
            wider, more = max(S, spans[stop]), max(Q, sizes[stop])
            # A group has S rows of floats, and Q x S scores, keys and indices: about 24 bytes each.
            if stop > group and (stop - group + 1) * (wider * dim * 4 + more * wider * 24) > CHUNK_BYTES:
                break
            S, Q, stop = wider, more, stop + 1
        targets = sum(sizes[group:stop])
        yield order_T[target : target + targets], _Span(begin_G[group:stop], size_G[group:stop], S, Q)
        group, target = stop, target + targets


def _scores(inputs: TopKInputs, target_C: Tensor, span: _Span) -> Tensor:
    """Scaled dot products of each target with the rows of its window, (C, N); arbitrary behind the window's end."""
    begin_G, size_G, S, Q = span
    start_C, query_CD = inputs.start_T[target_C], inputs.query_TD[target_C]
    longest = int(inputs.length_T[target_C].max())
    if longest == 0:
        return query_CD.new_zeros(len(start_C), 0, dtype=torch.float32)
    # Each group's rows are gathered once, however many targets it has; indices behind the last behaviour read that one.
    index_GS = (begin_G[:, None] + torch.arange(S, device=begin_G.device)).clamp(max=len(inputs.ids_M) - 1)
    ids_GS = inputs.ids_M[index_GS]
    rows_GSD = inputs.rows_RD.index_select(0, ids_GS.flatten()).float().view(len(begin_G), S, -1)
    group_C = torch.arange(len(begin_G), device=begin_G.device).repeat_interleave(size_G)
    # Queries side by side, (G, Q, D), so that one batched product scores all targets of a group.
    slot_C = torch.arange(len(group_C), device=group_C.device) - (size_G.cumsum(0) - size_G)[group_C]
    query_GQD = query_CD.new_zeros(len(begin_G), Q, query_CD.shape[1], dtype=torch.float32)
    query_GQD[group_C, slot_C] = query_CD.float()
    score_GQS = torch.bmm(query_GQD, rows_GSD.transpose(1, 2))
    if inputs.scale_R is not None:
        score_GQS *= inputs.scale_R[ids_GS][:, None]
    # From columns of the group's span to columns of each target's own window.
    column_CN = (start_C - begin_G[group_C])[:, None] + torch.arange(longest, device=begin_G.device)
    return score_GQS[group_C, slot_C].gather(1, column_CN.clamp(max=S - 1))


def _part_score(part: ScorePart, target_C: Tensor, index_CN: Tensor) -> Tensor:
    """What a small table adds to the scores of some targets, float32 (C, N)."""
    row_CN = part_row(part, target_C, index_CN)
    if part.score_R is not None:
        return part.score_R[row_CN]
    return torch.einsum("cnd,cd->cn", part.rows_Rd[row_CN], part.query_Qd[target_C])


def part_row(part: ScorePart, target_C: Tensor, index_CN: Tensor) -> Tensor:
    """The row of a small table that each of some pairs has, int64 (C, N).

    Args:
        part: of the score.
        target_C: int64, the targets.
        index_CN: int64, which of the M behaviours.
    """
    # Without a column the value of a behaviour is its index.
    value_CN = index_CN if part.column_M is None else part.column_M[index_CN].long()
    if part.kind == PartKind.VALUE:
        return value_CN
    assert part.value_T is not None
    value_C1 = part.value_T[target_C, None]
    if part.kind == PartKind.MATCH:
        return (value_C1 == value_CN).long()
    difference_CN = value_C1 - value_CN
    row_CN = interval_bucket(difference_CN).long() if part.kind == PartKind.INTERVAL else difference_CN & part.mask
    return row_CN.clamp(0, len(part.rows_Rd) - 1)

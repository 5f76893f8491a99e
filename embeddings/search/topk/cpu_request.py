"""Top-K search on the CPU for targets that all have one window, as the candidates of a request do.

T = targets, G = groups of L = 16 of them, N = behaviours of the window, D = dim, d = dim of a small table, R = its
rows, P = small tables, K = kept.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from embeddings.compiled import in_even_parts
from embeddings.intervals import interval_bucket
from embeddings.search.topk import cpu_request_kernel
from embeddings.search.topk.cpu_request_kernel import LANES, TOGETHER
from embeddings.search.topk.inputs import NOTHING, PartKind, ScorePart, TopKInputs, decoded

FEW_ROWS = 4
"""A small table is scored row by row where the window has so many times as many behaviours; else its rows are laid
beside those of the behaviours."""


def is_request(inputs: TopKInputs) -> bool:
    """Whether the targets have one window, see all behaviours alike, and are enough to fill a vector."""
    if len(inputs.start_T) < LANES or inputs.additive_W is not None:
        return False
    columns = [inputs.start_T, inputs.end_T, *(part.value_T for part in inputs.parts if part.value_T is not None)]
    if any(part.kind == PartKind.MATCH for part in inputs.parts):
        return False
    return all(bool((column_T == column_T[0]).all()) for column_T in columns)


def top_k_of_request(inputs: TopKInputs) -> tuple[Tensor, Tensor]:
    """The search of `embeddings.search.topk.api.top_k` for inputs that `is_request` accepts."""
    start, end = int(inputs.start_T[0]), int(inputs.end_T[0])
    targets, count = len(inputs.start_T), end - start
    part_rows = [_part_rows(part, start, end) for part in inputs.parts]
    few = [len(part.query_Qd) > 1 and FEW_ROWS * len(part.rows_Rd) <= count for part in inputs.parts]
    # In any order, for each keeps its column: so that behaviours with one row of a small table come together, and the
    # scores of the row, of all targets, are read from the first-level cache.
    column_N = torch.arange(count)
    if any(few):
        first = part_rows[few.index(True)].numpy()
        column_N = torch.from_numpy(np.argsort(first.astype(np.uint16), kind="stable"))
    ids_N = inputs.ids_M[start:end][column_N]
    rows = [inputs.rows_RD.index_select(0, ids_N).float()]
    if inputs.scale_R is not None:
        rows[0] *= inputs.scale_R.index_select(0, ids_N)[:, None]
    queries, bias_N = [inputs.query_TD.float()], torch.zeros(count)
    scores, found, before = list[Tensor](), list[Tensor](), 0
    for part, row_N, has_few in zip(inputs.parts, part_rows, few, strict=True):
        row_N, score_R = row_N[column_N], part.score_R
        if score_R is not None:
            bias_N += score_R.index_select(0, row_N)
        elif has_few:
            found.append(row_N + before)
            scores.append(torch.matmul(part.rows_Rd, _in_groups([part.query_Qd])))
            before += len(part.rows_Rd)
        else:
            rows.append(part.rows_Rd.index_select(0, row_N))
            queries.append(part.query_Qd)
    query_GDL = _in_groups(queries)
    scores_GRL = torch.cat(scores, dim=1) if scores else query_GDL.new_empty(len(query_GDL), 0, LANES)
    row_NP = torch.stack(found, dim=1) if found else column_N.new_empty(count, 0)
    # Filled up with behaviours that nobody keeps.
    more_N = (0, 0, 0, -count % TOGETHER)
    rows_ND, row_NP, bias_N1 = (
        pad(values, more_N) if more_N[3] else values
        for values in (torch.cat(rows, dim=1) if len(rows) > 1 else rows[0], row_NP, bias_N[:, None])
    )
    key_TK = torch.full((targets, inputs.k), NOTHING)
    values, query, bias, score = rows_ND.numpy(), query_GDL.numpy(), bias_N1.flatten().numpy(), scores_GRL.numpy()
    places, column, key = row_NP.contiguous().numpy(), column_N.numpy(), key_TK.numpy()

    def search(first: int, end: int) -> None:
        cpu_request_kernel.search(values, query, bias, score, places, column, first, end, key)

    in_even_parts(search, len(query_GDL), torch.get_num_threads())
    return decoded(key_TK, inputs.start_T, inputs.k)


def _in_groups(queries: list[Tensor]) -> Tensor:
    """The queries side by side, (G, D, L); filled up with targets that keep nothing."""
    query_TD = torch.cat(queries, dim=1)
    query_GLD = pad(query_TD, (0, 0, 0, -len(query_TD) % LANES)).view(-1, LANES, query_TD.shape[1])
    return query_GLD.transpose(1, 2).contiguous()


def _part_rows(part: ScorePart, start: int, end: int) -> Tensor:
    """The row of a small table that each behaviour has, int64 (N,); it is the same for all targets."""
    column_N = part.column_M[start:end] if part.column_M is not None else torch.arange(start, end)
    if part.kind == PartKind.VALUE:
        return column_N.long()
    assert part.value_T is not None
    if part.kind == PartKind.INTERVAL:
        row_N = interval_bucket(part.value_T[0] - column_N)
    else:
        row_N = (part.value_T[0] - column_N) & part.mask
    return row_N.long().clamp(0, len(part.rows_Rd) - 1)

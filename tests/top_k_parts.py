"""Parts of a search's score, of all kinds, whose sums are exact in any order."""

from dataclasses import replace

import torch
from hypothesis import strategies as st

from embeddings.search.topk.inputs import PartKind, ScorePart, TopKInputs
from tests.top_k_inputs import searches

TIMES = st.sampled_from([0, 1, 2, 3, 6, 7, 2**31 + 5, 2**33 - 1, 2**33, 2**40, 2**62, -1, -(2**40)])


@st.composite
def searches_with_parts(draw: st.DrawFn, longest: int = 12, dims: int = 5, k: int = 15) -> TopKInputs:
    """Searches with up to five parts; some have no product of rows, and some no additive scores."""
    search = draw(searches(longest, dims, k))
    if draw(st.booleans()):
        search = replace(search, additive_W=None)
    if draw(st.integers(0, 4)) == 0:
        search = replace(search, rows_RD=search.rows_RD[:, :0], query_TD=search.query_TD[:, :0])
    kinds = draw(st.lists(st.sampled_from(PartKind), max_size=5))
    return replace(search, parts=[_part(draw, kind, search) for kind in kinds])


def _part(draw: st.DrawFn, kind: PartKind, search: TopKInputs) -> ScorePart:
    targets, behaviors = len(search.start_T), len(search.ids_M)
    values = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    rows, dim = draw(st.integers(2, 6)), draw(st.integers(1, 20))
    # A table is often a slice of a wider one, which vectors may or may not fit.
    wide_Rd = torch.randint(-2, 3, (rows, dim + 4), generator=values).float()
    queries = 1 if draw(st.booleans()) else targets
    column_M, value_T, mask = torch.randint(0, rows, (behaviors,), generator=values, dtype=torch.int32), None, -1
    if kind == PartKind.MATCH:
        value_T = torch.randint(0, rows, (targets,), generator=values)
    elif kind == PartKind.POSITION:
        if draw(st.booleans()):
            # As they travel, modulo a power of two; here it may be less than a window.
            mask = draw(st.sampled_from([3, 63]))
            column_M = torch.arange(behaviors, dtype=torch.int32) & mask
            value_T = (search.end_T + draw(st.integers(0, 3))) & mask
        else:
            column_M, value_T = None, search.end_T - draw(st.integers(0, 3))
    elif kind == PartKind.INTERVAL:
        times = [draw(TIMES) for _ in range(5)]
        column_M = torch.tensor(times)[torch.randint(0, 5, (behaviors,), generator=values)]
        value_T = torch.tensor(times)[torch.randint(0, 5, (targets,), generator=values)]
        wide_Rd = torch.randint(-2, 3, (draw(st.sampled_from([3, 34])), dim + 4), generator=values).float()
    first = draw(st.sampled_from([0, 1, 4]))
    return ScorePart(
        kind,
        wide_Rd[:, first : first + dim],
        torch.randint(-2, 3, (queries, dim), generator=values).float(),
        column_M,
        value_T,
        mask,
    )

"""Searches to compare implementations with, whose scores are exact in any order of summation and often equal."""

import math

import torch
from hypothesis import strategies as st

from embeddings.search.topk.inputs import PartKind, ScorePart, TopKInputs

SCORES = st.sampled_from([0.0, -0.0, 1.0, 1.0, -1.0, 0.5, math.inf, -math.inf, math.nan, 1e-30, -3e38])
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


@st.composite
def score_parts(draw: st.DrawFn, behaviors: int, targets: int, values: torch.Generator) -> ScorePart:
    """A part of any kind, with values on both sides of its table's bounds where those need not be checked."""
    kind = draw(st.sampled_from(PartKind))
    rows, dim = draw(st.integers(2, 6)), draw(st.integers(1, 3))
    queries = draw(st.sampled_from([1, targets]))
    span = 1 << draw(st.sampled_from([2, 20, 40])) if kind == PartKind.INTERVAL else rows
    column_M = torch.randint(0, span, (behaviors,), generator=values)
    without = kind == PartKind.POSITION and draw(st.booleans())
    return ScorePart(
        kind,
        torch.randint(-2, 3, (rows, dim), generator=values).float(),
        torch.randint(-2, 3, (queries, dim), generator=values).float(),
        None if without else column_M if kind == PartKind.INTERVAL else column_M.to(torch.int32),
        None if kind == PartKind.VALUE else torch.randint(0, 2 * span, (targets,), generator=values),
        draw(st.sampled_from([-1, 3])) if kind == PartKind.POSITION else -1,
    )


@st.composite
def searches(draw: st.DrawFn, longest: int = 12, dims: int = 5, k: int = 15) -> TopKInputs:
    """Several users, each with several targets whose windows may be empty and may overlap."""
    users = draw(st.lists(st.integers(0, longest), max_size=4))
    offsets = [sum(users[:n]) for n in range(len(users) + 1)]
    rows = draw(st.integers(1, 6))
    start, end = [], []
    for _ in range(draw(st.integers(0, 8)) if users else 0):
        user = draw(st.integers(0, len(users) - 1))
        first = draw(st.integers(offsets[user], offsets[user + 1]))
        start.append(first)
        end.append(draw(st.integers(first, offsets[user + 1])))
    pairs = sum(b - a for a, b in zip(start, end, strict=True))
    dim = draw(st.integers(1, dims))
    values = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    dtype = draw(st.sampled_from(DTYPES))
    additive = draw(st.lists(SCORES, min_size=min(pairs, 12), max_size=min(pairs, 12)))
    parts = [draw(score_parts(sum(users), len(start), values)) for _ in range(draw(st.integers(0, 3)))]
    return TopKInputs(
        rows_RD=torch.randint(-2, 3, (rows, dim), generator=values).to(dtype),
        ids_M=torch.randint(
            0, rows, (sum(users),), generator=values, dtype=draw(st.sampled_from([torch.int32, torch.int64]))
        ),
        start_T=torch.tensor(start, dtype=torch.int64),
        end_T=torch.tensor(end, dtype=torch.int64),
        query_TD=torch.randint(-2, 3, (len(start), dim), generator=values).float(),
        additive_W=torch.tensor((additive * (pairs // max(len(additive), 1) + 1))[:pairs], dtype=torch.float32),
        k=draw(st.integers(1, k)),
        parts=parts,
        longest=draw(st.sampled_from([None, longest])),
        scale_R=torch.randint(1, 4, (rows,), generator=values) / 4 if dtype == torch.int8 else None,
    )


def assert_same(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Equal scores, of which NaN is one, and equal positions."""
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[1], expected[1])

"""The search for targets that have one window, as a request's candidates: against plain torch, and rows of 8 bits."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.search.topk.api import TopKImplementation, top_k
from embeddings.search.topk.cpu_request import is_request
from embeddings.search.topk.inputs import PartKind, ScorePart, TopKInputs
from tests.tolerance import rounding

ROWS, LATEST = 300, 5000


def request(seed: int, targets: int, count: int, dim: int, k: int, dtype: torch.dtype, own: bool) -> TopKInputs:
    """Candidates of one user; ``own``: each has queries of its own for all small tables."""
    draw = torch.Generator().manual_seed(seed)

    def floats(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=draw)

    def part(kind: PartKind, rows: int, column_M: torch.Tensor | None, value: int | None) -> ScorePart:
        value_T = None if value is None else torch.full((targets,), value)
        return ScorePart(kind, floats(rows, 4), floats(targets if own else 1, 4), column_M, value_T)

    start, behaviors = 3, count + 5
    few, many = (torch.randint(0, rows, (behaviors,), generator=draw, dtype=torch.int32) for rows in (4, 2 * count + 1))
    seconds_M = torch.randint(0, LATEST, (behaviors,), generator=draw)
    rows_RD, scale_R = floats(ROWS, dim).to(dtype), None
    if dtype == torch.int8:
        rows_RD = torch.randint(-127, 128, (ROWS, dim), generator=draw, dtype=torch.int8)
        scale_R = torch.rand(ROWS, generator=draw) / 64
    return TopKInputs(
        rows_RD,
        torch.randint(0, ROWS, (behaviors,), generator=draw, dtype=torch.int32),
        torch.full((targets,), start),
        torch.full((targets,), start + count),
        floats(targets, dim),
        k,
        [
            part(PartKind.VALUE, 4, few, None),
            part(PartKind.VALUE, 2 * count + 1, many, None),
            # Fewer rows than there are positions: those beyond have the last one.
            part(PartKind.POSITION, count // 2 + 1, None, start + count),
            part(PartKind.INTERVAL, 10, seconds_M, LATEST),
        ],
        scale_R=scale_R,
    )


requests = st.builds(
    request,
    seed=st.integers(0, 1000),
    targets=st.integers(16, 70),
    count=st.sampled_from([0, 1, 3, 50, 331]),
    dim=st.sampled_from([4, 12, 33]),
    k=st.sampled_from([1, 5, 40]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    own=st.booleans(),
)


@given(requests)
@settings(max_examples=30, deadline=None)
def test_a_request_is_searched_as_plain_torch_searches(inputs: TopKInputs) -> None:
    assert is_request(inputs)
    (score_TK, index_TK), (expected_TK, _) = top_k(inputs), top_k(inputs, TopKImplementation.REFERENCE)
    # Of scores that differ by rounding alone either may come first: so scores are compared, and that they are its own.
    allowed = rounding(inputs.rows_RD.shape[1] + 16, 60.0)
    torch.testing.assert_close(score_TK, expected_TK, atol=allowed, rtol=0)
    every_TN = top_k(replace(inputs, k=len(inputs.ids_M)), TopKImplementation.REFERENCE)
    # Padding is written behind the last behaviour.
    place_TN = torch.where(every_TN[1] < 0, len(inputs.ids_M), every_TN[1])
    of_behavior_TM = torch.full((len(score_TK), len(inputs.ids_M) + 1), -torch.inf).scatter_(1, place_TN, every_TN[0])
    own_TK = of_behavior_TM.gather(1, torch.where(index_TK < 0, len(inputs.ids_M), index_TK))
    torch.testing.assert_close(score_TK, own_TK, atol=allowed, rtol=0)
    for kept in index_TK.tolist():
        valid = [index for index in kept if index >= 0]
        assert len(set(valid)) == len(valid) == min(inputs.k, int(inputs.length_T[0]))


@given(requests)
@settings(max_examples=20, deadline=None)
def test_rows_of_8_bits_are_searched_as_the_floats_that_they_stand_for(inputs: TopKInputs) -> None:
    if inputs.scale_R is None:
        scale_R = inputs.rows_RD.float().abs().amax(1) / 127
        rows_RD = (inputs.rows_RD.float() / scale_R[:, None]).round().to(torch.int8)
        inputs = replace(inputs, rows_RD=rows_RD, scale_R=scale_R)
    assert inputs.scale_R is not None
    floats = replace(inputs, rows_RD=inputs.rows_RD.float() * inputs.scale_R[:, None], scale_R=None)
    ours, theirs = top_k(inputs), top_k(floats)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_equal_scores_and_broken_rows_are_kept_as_elsewhere() -> None:
    rows_RD = torch.tensor([[1.0, 0.0], [0.0, 0.0], [torch.nan, 0.0], [-0.0, 0.0], [-torch.inf, 0.0]])
    ids_M = torch.tensor([1, 0, 3, 4, 0, 2, 1, 0], dtype=torch.int32)
    query_TD = torch.ones(20, 2)
    inputs = TopKInputs(rows_RD, ids_M, torch.zeros(20, dtype=torch.int64), torch.full((20,), 8), query_TD, 8)
    assert is_request(inputs)
    score_TK, index_TK = top_k(inputs)
    assert index_TK.tolist() == [[5, 1, 4, 7, 0, 2, 6, 3]] * 20
    expected_TK = top_k(inputs, TopKImplementation.REFERENCE)[0]
    torch.testing.assert_close(score_TK, expected_TK, equal_nan=True)


@pytest.mark.parametrize("changed", ["start_T", "end_T", "additive_W", "few"])
def test_other_searches_go_another_way(changed: str) -> None:
    inputs = request(0, 20, 50, 4, 5, torch.float32, own=True)
    if changed == "few":
        one = replace(
            inputs, start_T=inputs.start_T[:9], end_T=inputs.end_T[:9], query_TD=inputs.query_TD[:9], parts=()
        )
        assert not is_request(one)
        return
    if changed == "additive_W":
        assert not is_request(replace(inputs, additive_W=torch.zeros(20 * 50)))
        return
    other_T = getattr(inputs, changed).clone()
    other_T[7] -= 1
    assert not is_request(replace(inputs, **{changed: other_T}))

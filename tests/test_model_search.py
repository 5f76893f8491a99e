"""Top-K search against a search by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.search import top_k as module
from embeddings.search.top_k import top_k

SCORES = st.sampled_from([0.0, -0.0, 1.0, 1.0, -1.0, 0.5, math.inf, -math.inf, 1e-30, -3e38])


@st.composite
def searches(draw: st.DrawFn) -> dict:
    users = draw(st.lists(st.integers(0, 12), max_size=4))
    offsets = [sum(users[:n]) for n in range(len(users) + 1)]
    rows = draw(st.integers(1, 6))
    start, end = [], []
    for _ in range(draw(st.integers(0, 8)) if users else 0):
        user = draw(st.integers(0, len(users) - 1))
        first = draw(st.integers(offsets[user], offsets[user + 1]))
        start.append(first)
        end.append(draw(st.integers(first, offsets[user + 1])))
    pairs = sum(b - a for a, b in zip(start, end, strict=True))
    dim = draw(st.integers(1, 5))
    values = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return {
        # Small integers, so that sums are exact and scores are often equal.
        "rows_RD": torch.randint(-2, 3, (rows, dim), generator=values).float(),
        "ids_M": torch.randint(0, rows, (sum(users),), generator=values, dtype=torch.int32),
        "start_T": torch.tensor(start, dtype=torch.int64),
        "end_T": torch.tensor(end, dtype=torch.int64),
        "query_TD": torch.randint(-2, 3, (len(start), dim), generator=values).float(),
        "additive_W": torch.tensor(draw(st.lists(SCORES, min_size=pairs, max_size=pairs)), dtype=torch.float32),
        "k": draw(st.integers(1, 15)),
    }


def by_hand(rows_RD, ids_M, start_T, end_T, query_TD, additive_W, k) -> list[list[tuple[float, int]]]:
    found, pair = [], 0
    for target in range(len(start_T)):
        scored = []
        for behavior in range(int(start_T[target]), int(end_T[target])):
            score = rows_RD[int(ids_M[behavior])] @ query_TD[target] + additive_W[pair]
            scored.append((float(score), behavior))
            pair += 1
        found.append(sorted(scored, key=lambda pair: (-pair[0], pair[1]))[:k])
    return found


@given(search=searches(), chunk_bytes=st.sampled_from([1, 300, module.CHUNK_BYTES]))
@settings(max_examples=300, deadline=None)
def test_it_keeps_the_best_and_the_earlier_of_equals(search: dict, chunk_bytes: int) -> None:
    before = module.CHUNK_BYTES
    module.CHUNK_BYTES = chunk_bytes
    try:
        score_TK, behavior_TK = top_k(**search)
    finally:
        module.CHUNK_BYTES = before
    k = search["k"]
    assert score_TK.shape == behavior_TK.shape == (len(search["start_T"]), k)
    for target, expected in enumerate(by_hand(**search)):
        padding = k - len(expected)
        assert behavior_TK[target].tolist() == [behavior for _, behavior in expected] + [-1] * padding
        assert score_TK[target].tolist() == [score for score, _ in expected] + [-math.inf] * padding


def test_gradients_stop() -> None:
    rows = torch.randn(4, 3, requires_grad=True)
    one = torch.tensor([0]), torch.tensor([4])
    score_TK, _ = top_k(rows, torch.arange(4), *one, torch.randn(1, 3, requires_grad=True), torch.zeros(4), 2)
    assert not score_TK.requires_grad


def test_what_cannot_be_searched_is_refused() -> None:
    rows, ids, query = torch.zeros(4, 3), torch.arange(4), torch.zeros(1, 3)
    with pytest.raises(ValueError, match=r"k: at least 1 \(not 0\)"):
        top_k(rows, ids, torch.tensor([0]), torch.tensor([4]), query, torch.zeros(4), 0)
    for start, end in ((-1, 2), (0, 5), (3, 2)):
        with pytest.raises(ValueError, match="windows: must lie within the 4 behaviours"):
            top_k(rows, ids, torch.tensor([start]), torch.tensor([end]), query, torch.zeros(4), 1)

"""Top-K search: every implementation against a search by hand, what is refused, and what compilers see of it."""

import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.search.topk import cpu, cpu_kernel, inputs, reference
from embeddings.search.topk.api import TopKImplementation, top_k
from embeddings.search.topk.inputs import PartKind, ScorePart, TopKInputs
from tests.examples import examples
from tests.top_k_inputs import DTYPES, assert_same, searches

IMPLEMENTATIONS = [TopKImplementation.REFERENCE, TopKImplementation.CPU]


def by_hand(search: TopKInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """One pair after the other, then an ordinary sort: NaN first, then by score, of equals the earlier behaviour."""
    score_TK = torch.full((len(search.start_T), search.k), -math.inf)
    index_TK = torch.full((len(search.start_T), search.k), -1)
    pair = 0
    for target in range(len(search.start_T)):
        scored = []
        for behavior in range(int(search.start_T[target]), int(search.end_T[target])):
            row = int(search.ids_M[behavior])
            score = search.rows_RD[row].float() @ search.query_TD[target]
            score *= 1 if search.scale_R is None else search.scale_R[row]
            for part in search.parts:
                query = part.query_Qd[target if len(part.query_Qd) > 1 else 0]
                score += part.rows_Rd[row_by_hand(part, target, behavior)] @ query
            scored.append((float(score + (0 if search.additive_W is None else search.additive_W[pair])), behavior))
            pair += 1
        scored.sort(key=lambda one: (not math.isnan(one[0]), 0 if math.isnan(one[0]) else -one[0], one[1]))
        for column, (score, behavior) in enumerate(scored[: search.k]):
            score_TK[target, column], index_TK[target, column] = score, behavior
    return score_TK, index_TK


def row_by_hand(part: ScorePart, target: int, behavior: int) -> int:
    last = len(part.rows_Rd) - 1
    value = behavior if part.column_M is None else int(part.column_M[behavior])
    if part.kind == PartKind.VALUE:
        return value
    of_target = int(part.value_T[target])
    if part.kind == PartKind.MATCH:
        return int(of_target == value)
    if part.kind == PartKind.POSITION:
        return min(max((of_target - value) % (part.mask + 1) if part.mask > 0 else of_target - value, 0), last)
    # Bucket b is for 2^(b - 1) - 1 .. 2^b - 2 seconds; 33 is the last.
    seconds = max(of_target - value, 0)
    return min(next((bucket for bucket in range(1, 33) if seconds < 2**bucket - 1), 33), last)


@given(search=searches(), chunk_bytes=st.sampled_from([1, 300, reference.CHUNK_BYTES]))
@settings(max_examples=100, deadline=None)
def test_the_reference_keeps_the_best_and_the_earlier_of_equals(search: TopKInputs, chunk_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CHUNK_BYTES", chunk_bytes)
        assert_same(top_k(search, TopKImplementation.REFERENCE), by_hand(search))


@given(
    search=searches(longest=100, dims=100, k=40),
    together=st.sampled_from([1, 3, 64]),
    worth=st.integers(1, 4000),
    threads=st.sampled_from([1, 3]),
)
@settings(max_examples=examples(50, 400), deadline=None)
def test_the_cpu_agrees_with_the_reference(search: TopKInputs, together: int, worth: int, threads: int) -> None:
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "TARGETS_TOGETHER", together)
        patch.setattr(cpu, "WORTH_THREADS", worth)
        torch.set_num_threads(threads)
        try:
            found = top_k(search, TopKImplementation.CPU)
        finally:
            torch.set_num_threads(before)
    assert_same(found, top_k(search, TopKImplementation.REFERENCE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 100, 128])
def test_large_searches_agree_up_to_rounding(dtype: torch.dtype, dim: int) -> None:
    values = torch.Generator().manual_seed(dim)
    start_T = torch.arange(40) // 4 * 700 + torch.arange(40) % 4 * 30
    search = TopKInputs(
        rows_RD=(torch.randn(500, dim, generator=values) * 20).to(dtype),
        ids_M=torch.randint(0, 500, (7000,), generator=values),
        start_T=start_T,
        end_T=start_T + 600,
        query_TD=torch.randn(40, dim, generator=values),
        additive_W=torch.randn(24000, generator=values),
        k=100,
        scale_R=torch.rand(500, generator=values) if dtype == torch.int8 else None,
    )
    score_TK, index_TK = top_k(search, TopKImplementation.CPU)
    expected_TK, _ = top_k(search, TopKImplementation.REFERENCE)
    torch.testing.assert_close(score_TK, expected_TK, rtol=1e-5, atol=1e-3)
    rows_TKD = search.rows_RD[search.ids_M[index_TK]].float()
    if search.scale_R is not None:
        rows_TKD *= search.scale_R[search.ids_M[index_TK]][:, :, None]
    pair_TK = torch.arange(40)[:, None] * 600 + index_TK - start_T[:, None]
    again_TK = (rows_TKD @ search.query_TD[:, :, None])[:, :, 0] + search.additive_W[pair_TK]
    torch.testing.assert_close(score_TK, again_TK, rtol=1e-5, atol=1e-3)


@given(st.lists(st.integers(-5000, 5000), min_size=1, max_size=300, unique=True), st.integers(1, 300))
@settings(max_examples=100, deadline=None)
def test_keys_are_selected_and_sorted(keys: list[int], k: int) -> None:
    k = min(k, len(keys))
    key_X = torch.tensor(keys).numpy()
    cpu_kernel.keep_greatest(key_X, len(keys), k)
    assert sorted(key_X[:k], reverse=True) == sorted(keys, reverse=True)[:k]
    assert key_X[k - 1] == min(key_X[:k])
    cpu_kernel.sort_descending(key_X, key_X.copy(), k)
    assert key_X[:k].tolist() == sorted(keys, reverse=True)[:k]


@pytest.mark.slow
def test_the_gpus_search_agrees_when_interpreted() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    # Its own process: triton decides when it is loaded.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-m", "tests.triton_interpreted"], env=environment, check=True)


def one_search(**changes: object) -> TopKInputs:
    search = TopKInputs(
        rows_RD=torch.arange(12).view(4, 3).float(),
        ids_M=torch.arange(4),
        start_T=torch.tensor([0]),
        end_T=torch.tensor([4]),
        query_TD=torch.ones(1, 3),
        additive_W=torch.zeros(4),
        k=2,
    )
    return replace(search, **changes)


def values_of(search: TopKInputs) -> dict[str, object]:
    """By field, in the operator's order; parts are spelled out."""
    values: dict[str, object] = {}
    for field in fields(search):
        if field.name == "parts":
            values |= {
                f"parts.{of.name}": [getattr(part, of.name) for part in search.parts] for of in fields(ScorePart)
            }
        else:
            values[field.name] = getattr(search, field.name)
    return values


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tensors_need_not_be_contiguous(implementation: TopKImplementation) -> None:
    wide = torch.randint(-3, 4, (4, 10)).float()
    both = torch.randint(0, 4, (4, 2))
    for rows_RD in (wide[:, 2:5], wide[:, :6:2], wide[:3].T):
        search = one_search(rows_RD=rows_RD, ids_M=both[:, 1], query_TD=torch.ones(3, 1).T)
        contiguous = {
            name: value.clone(memory_format=torch.contiguous_format)
            for name, value in values_of(search).items()
            if isinstance(value, torch.Tensor)
        }
        assert_same(top_k(search, implementation), by_hand(replace(search, **contiguous)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_queries_may_have_half_precision(implementation: TopKImplementation, dtype: torch.dtype) -> None:
    search = one_search(query_TD=torch.tensor([[0.5, -1.5, 2.0]], dtype=dtype))
    assert_same(top_k(search, implementation), by_hand(replace(search, query_TD=search.query_TD.float())))


def test_a_cpus_rows_are_searched_by_the_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []
    monkeypatch.setattr(cpu_kernel, "search", lambda *arguments: searched.append(arguments))
    top_k(one_search())
    assert searched
    searched.clear()
    top_k(one_search(), TopKImplementation.REFERENCE)
    assert not searched


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20), st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_keys_keep_every_bit_of_a_score(scores: list[float], start: int) -> None:
    score_TC = torch.tensor([scores])
    column_C = torch.arange(len(scores))
    key_TC = inputs.ordered(score_TC, column_C)
    score_TK, index_TK = inputs.decoded(key_TC, torch.tensor([start]), len(scores) + 1)
    assert torch.equal(score_TK[:, :-1], score_TC + 0.0)
    assert index_TK.tolist() == [[*range(start, start + len(scores)), -1]]
    assert score_TK[0, -1] == -math.inf
    order_C = sorted(range(len(scores)), key=lambda column: (-scores[column], column))
    assert key_TC[0].argsort(descending=True).tolist() == order_C


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_that_differ_in_their_last_bit_are_in_order(implementation: TopKImplementation) -> None:
    for score in (-1.0 - 2**-23, -1.0, 1.0, -3e-39):
        higher = torch.nextafter(torch.tensor(score), torch.tensor(math.inf))
        additive_W = torch.stack([torch.tensor(score), higher, torch.tensor(score), higher])
        search = one_search(rows_RD=torch.zeros(4, 3), additive_W=additive_W, k=4)
        assert top_k(search, implementation)[1].tolist() == [[1, 3, 0, 2]], score


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_stop(implementation: TopKImplementation) -> None:
    search = one_search(rows_RD=torch.randn(4, 3, requires_grad=True), query_TD=torch.randn(1, 3, requires_grad=True))
    assert not top_k(search, implementation)[0].requires_grad


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, TopKImplementation.CUDA])
@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"k: at least 1 \(not 0\)", {"k": 0}),
        ("windows: must lie within the 4 behaviours", {"start_T": torch.tensor([-1])}),
        ("windows: must lie within the 4 behaviours", {"end_T": torch.tensor([5])}),
        ("windows: must lie within the 4 behaviours", {"start_T": torch.tensor([3]), "end_T": torch.tensor([2])}),
        ("ids_M: row 4, but the table has 4 rows", {"ids_M": torch.arange(1, 5)}),
        ("ids_M: row -1, but the table has 4 rows", {"ids_M": torch.arange(4) - 1}),
        ("ids_M: row 3, but the table has 0 rows", {"rows_RD": torch.zeros(0, 3)}),
        ("ids_M: row 3, but the table has 1 rows", {"rows_RD": torch.zeros(1, 3)}),
        ("additive_W: 3 scores, but the windows have 4 behaviours together", {"additive_W": torch.zeros(3)}),
        ("query_TD: dim 5, but the rows have dim 3", {"query_TD": torch.ones(1, 5)}),
        ("query_TD: must have 2 dimensions", {"query_TD": torch.ones(3)}),
        (r"ids_M: must have 1 dimensions \(not 2\)", {"ids_M": torch.zeros(4, 1, dtype=torch.int64)}),
        (r"additive_W: must have 1 dimensions \(not 2\)", {"additive_W": torch.zeros(4, 1)}),
        ("targets: 1 queries, but 1 starts and 2 ends", {"end_T": torch.tensor([4, 4])}),
        (r"rows_RD: must be float32 or .* \(not float64\)", {"rows_RD": torch.zeros(4, 3).double()}),
        (r"ids_M: must be int32 or int64 \(not float32\)", {"ids_M": torch.zeros(4)}),
        ("query_TD: on meta, but the rows are on cpu", {"query_TD": torch.ones(1, 3, device="meta")}),
        ("scale_R: needed for int8 rows", {"rows_RD": torch.zeros(4, 3).to(torch.int8)}),
        ("scale_R: only for int8 rows", {"scale_R": torch.ones(4)}),
        ("scale_R: 3 scales for 4 rows", {"rows_RD": torch.zeros(4, 3).to(torch.int8), "scale_R": torch.ones(3)}),
    ],
)
def test_what_cannot_be_searched_is_refused(implementation: TopKImplementation, message: str, changes: dict) -> None:
    with pytest.raises(ValueError, match=message):
        top_k(one_search(**changes), implementation)


def test_results_do_not_depend_on_threads() -> None:
    values = torch.Generator().manual_seed(0)
    start_T = torch.arange(60) * 50
    search = one_search(
        rows_RD=torch.randn(300, 37, generator=values),
        ids_M=torch.randint(0, 300, (3000,), generator=values),
        start_T=start_T,
        end_T=start_T + 50,
        query_TD=torch.randn(60, 37, generator=values),
        additive_W=torch.randn(3000, generator=values),
    )
    threads = torch.get_num_threads()
    try:
        found = []
        for torch_threads in (1, 2, 3):
            torch.set_num_threads(torch_threads)
            found.append(top_k(search))
    finally:
        torch.set_num_threads(threads)
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


class Searcher(torch.nn.Module):
    def forward(self, rows_RD, ids_M, start_T, end_T, query_TD, additive_W) -> torch.Tensor:
        score_TK, index_TK = top_k(TopKInputs(rows_RD, ids_M, start_T, end_T, query_TD * 2, 3, additive_W=additive_W))
        return score_TK.softmax(1) * index_TK


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_torch_accepts_the_operator(implementation: TopKImplementation) -> None:
    torch.library.opcheck(torch.ops.dare.top_k.default, (*values_of(one_search()).values(), implementation))


def test_compilation_and_export_see_one_operator() -> None:
    arguments = tuple(value for value in values_of(one_search()).values() if isinstance(value, torch.Tensor))
    expected = Searcher()(*arguments)
    compiled = torch.compile(Searcher(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), expected)
    exported = torch.export.export(Searcher(), arguments)
    torch.testing.assert_close(exported.module()(*arguments), expected)
    assert sum(node.target is torch.ops.dare.top_k.default for node in exported.graph.nodes) == 1

"""Top-K search against gather + bmm + topk in plain torch, and against what memory can deliver.

R = rows of the table, D = dim, M = behaviours of all users, U = users, T = targets, N = window, K = kept.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numba import njit
from torch import Tensor

from embeddings.search.topk.api import TopKImplementation, top_k
from embeddings.search.topk.cpu_kernel import dot, prefetch_row
from embeddings.search.topk.inputs import TopKInputs
from jobs.device import forced_kind

GATHERED_BYTES = 512 << 20
"""Torch's side writes the gathered rows, in float32; a batch is as large as this allows."""
MOST_TARGETS = 2052
DISTINCT_ROWS = 1 << 16
"""Rows of the table repeat after so many: they differ in place, which counts here, and are quickly made."""
AHEAD = (0, 8, 16, 32)
"""Rows ahead that the reading of memory asks for; the fastest is what memory can deliver."""


@dataclass(frozen=True)
class Case:
    """A search to measure."""

    dim: int
    length: int
    k: int
    dtype: torch.dtype = torch.float32
    targets_per_user: int = 1


CPU_CASES = (
    Case(16, 200, 20),
    Case(16, 200, 20, targets_per_user=57),
    Case(32, 2000, 100),
    Case(64, 2000, 100),
    Case(128, 2000, 100),
    Case(128, 2000, 100, torch.bfloat16),
    Case(128, 2000, 100, torch.int8),
    Case(128, 2000, 100, targets_per_user=8),
    Case(128, 10_000, 100),
)
CUDA_CASES = (
    *CPU_CASES,
    *(Case(dim, length, 100, torch.bfloat16) for dim in (64, 128) for length in (200, 2000, 10_000, 50_000)),
)


@dataclass(frozen=True)
class SearchFigures:
    """What one case gives; times are the shortest of the rounds, in which all sides take turns."""

    device: str
    dim: int
    length: int
    k: int
    dtype: str
    targets_per_user: int
    targets: int
    vs_torch: float
    """Time of gather + bmm + topk over ours."""
    rows_per_s: int
    """Rows scored: a row counts for each target that it is scored for."""
    bandwidth_share: float
    """Bytes of the rows that must be read, each user's once, over time, as a share of ``read_gb_per_s``."""
    read_gb_per_s: float
    """CPU: random rows of this size that are read and only summed up. GPU: a copy."""
    cost_vs_one_target: float
    """Time over the time for as many users with one target each."""
    exact: bool
    """Whether the K scores are those of gather + bmm + topk, and the behaviours those of the reference."""


@dataclass(frozen=True)
class Search:
    """Rows and targets. All numbers are small multiples of powers of 2: sums are exact in any order."""

    inputs: TopKInputs
    length: int
    """N, of all windows."""

    def ours(self, implementation: TopKImplementation | None = None) -> tuple[Tensor, Tensor]:
        """The operator."""
        return top_k(self.inputs, implementation)

    @property
    def additive_TN(self) -> Tensor:
        """What is added to the products."""
        assert self.inputs.additive_W is not None
        return self.inputs.additive_W.view(-1, self.length)

    @cached_property
    def ids_TN(self) -> Tensor:
        """A history a target, as torch's side needs them; not part of its time."""
        column_N = torch.arange(self.length, device=self.inputs.ids_M.device)
        return self.inputs.ids_M[self.inputs.start_T[:, None] + column_N]

    def plain(self) -> tuple[Tensor, Tensor]:
        """Gather + bmm + topk."""
        inputs = self.inputs
        rows_TND = inputs.rows_RD.index_select(0, self.ids_TN.flatten()).float().view(*self.ids_TN.shape, -1)
        score_TN = torch.bmm(rows_TND, inputs.query_TD.unsqueeze(2)).squeeze(2)
        if inputs.scale_R is not None:
            score_TN *= inputs.scale_R[self.ids_TN]
        score_TK, column_TK = (score_TN + self.additive_TN).topk(inputs.k)
        return score_TK, inputs.start_T[:, None] + column_TK

    def one_target_each(self) -> "Search":
        """A search with the first target of each user alone."""
        start_T = self.inputs.start_T
        first_T = torch.cat([start_T.new_ones(1, dtype=torch.bool), start_T.diff() > 1])
        alone = replace(
            self.inputs,
            start_T=start_T[first_T],
            end_T=self.inputs.end_T[first_T],
            query_TD=self.inputs.query_TD[first_T],
            additive_W=self.additive_TN[first_T].flatten(),
        )
        return Search(alone, self.length)


def measure(rows: int, rounds: int) -> list[SearchFigures]:
    """All cases on the GPU if there is one, else on the CPU; progress goes to standard error.

    Args:
        rows: of the table.
        rounds: repetitions of each timing.
    """
    # The search needs no fbgemm-gpu, so that torch alone decides.
    device = torch.device("cuda" if torch.cuda.is_available() and forced_kind(os.environ) != "cpu" else "cpu")
    cases = CUDA_CASES if device.type == "cuda" else CPU_CASES
    return [measure_case(case, rows, rounds, device) for case in cases]


def measure_case(case: Case, rows: int, rounds: int, device: torch.device) -> SearchFigures:
    """One case; the table is made for it."""
    dtype = str(case.dtype).removeprefix("torch.")
    shown = f"D {case.dim}, N {case.length}, K {case.k}, {dtype}, {case.targets_per_user} target(s) a user"
    print(f"{shown}: {rows} rows", file=sys.stderr, flush=True)
    search = make_search(case, rows, device)
    ours, plain, reference = search.ours(), search.plain(), search.ours(TopKImplementation.REFERENCE)
    # Equal to the last bit, because every sum is exact. Of equal scores torch promises no order, so the behaviours are
    # compared with the reference's.
    exact = torch.equal(ours[0], plain[0]) and torch.equal(ours[1], reference[1])
    del ours, plain, reference

    sides: dict[str, Callable[[], object]] = {"ours": search.ours, "plain": search.plain}
    if case.targets_per_user > 1:
        sides["alone"] = search.one_target_each().ours
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, read in _readings(search, pool).items():
            sides[name] = read
            # Once before any timing: Numba compiles at the first call.
            read()
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, work in sides.items():
                seconds[side].append(_seconds(work, device))
    # The shortest time is the one with the least of what else the machine does.
    least = {side: min(times) for side, times in seconds.items()}
    read_bytes = len(search.inputs.ids_M) * case.dim * case.dtype.itemsize
    reading = min(least[side] for side in sides if side.startswith("reading"))
    ratio = statistics.median(plain / ours for plain, ours in zip(seconds["plain"], seconds["ours"], strict=True))
    print(
        f"  ours {least['ours'] * 1e3:.1f} ms, torch {least['plain'] * 1e3:.1f} ms, reading {reading * 1e3:.1f} ms, "
        f"median of the rounds' ratios {ratio:.2f}",
        file=sys.stderr,
        flush=True,
    )
    return SearchFigures(
        device=device.type,
        dim=case.dim,
        length=case.length,
        k=case.k,
        dtype=dtype,
        targets_per_user=case.targets_per_user,
        targets=len(search.inputs.start_T),
        vs_torch=round(least["plain"] / least["ours"], 2),
        rows_per_s=round(search.additive_TN.numel() / least["ours"]),
        bandwidth_share=round(reading / least["ours"], 2),
        read_gb_per_s=round(read_bytes / reading / 1e9, 2),
        cost_vs_one_target=round(least["ours"] / least.get("alone", least["ours"]), 2),
        exact=exact,
    )


def make_search(case: Case, rows: int, device: torch.device) -> Search:
    """Users with random histories; a user's targets are a behaviour apart."""
    values = torch.Generator().manual_seed(0)
    targets = min(MOST_TARGETS, GATHERED_BYTES // (case.length * case.dim * 4))
    users = max(targets // case.targets_per_user, 1)
    targets = users * case.targets_per_user
    history = case.length + case.targets_per_user - 1
    distinct = torch.randint(-8, 9, (min(DISTINCT_ROWS, rows), case.dim), generator=values).to(case.dtype)
    rows_RD = torch.empty(rows, case.dim, dtype=case.dtype, device=device)
    for begin in range(0, rows, len(distinct)):
        rows_RD[begin : begin + len(distinct)] = distinct[: rows - begin]
    start_T = (torch.arange(users)[:, None] * history + torch.arange(case.targets_per_user)).flatten().to(device)
    inputs = TopKInputs(
        rows_RD=rows_RD,
        scale_R=torch.full((rows,), 0.5, device=device) if case.dtype == torch.int8 else None,
        ids_M=torch.randint(0, rows, (users * history,), generator=values, dtype=torch.int32).to(device),
        start_T=start_T,
        end_T=start_T + case.length,
        query_TD=torch.randint(-8, 9, (targets, case.dim), generator=values).float().to(device),
        additive_W=(torch.randint(0, 512, (targets * case.length,), generator=values) / 512).to(device),
        k=case.k,
    )
    return Search(inputs, case.length)


def _readings(search: Search, pool: ThreadPoolExecutor) -> dict[str, Callable[[], object]]:
    """Ways to read as many bytes as the search must, and to do nothing else."""
    rows_RD, ids_M = search.inputs.rows_RD, search.inputs.ids_M
    if rows_RD.is_cuda:
        copied = torch.empty(len(ids_M) * rows_RD.shape[1] // 2, dtype=rows_RD.dtype, device=rows_RD.device)
        return {"reading by copy": copied.clone}  # reads half and writes half
    as_integers = {torch.float16: torch.int16, torch.bfloat16: torch.uint16}.get(rows_RD.dtype, rows_RD.dtype)
    rows, ids = rows_RD.view(as_integers).numpy(), ids_M.numpy()
    ones = np.ones(rows.shape[1], np.float32)
    cuts = np.linspace(0, len(ids), 4 * torch.get_num_threads() + 1).astype(int).tolist()

    def reading(ahead: int) -> Callable[[], object]:
        def part(begin: int, end: int) -> float:
            return float(_sum_of_rows(rows, ids[begin:end], ones, ahead))

        return lambda: sum(pool.map(part, cuts[:-1], cuts[1:]))

    return {f"reading {ahead} ahead": reading(ahead) for ahead in AHEAD}


@njit(nogil=True)
def _sum_of_rows(rows_RD: np.ndarray, ids_M: np.ndarray, ones_D: np.ndarray, ahead: int) -> float:
    base, row_bytes, total = rows_RD.ctypes.data, rows_RD.strides[0], np.float32(0)
    ones = ones_D.ctypes.data
    for index in range(len(ids_M)):
        if ahead and index + ahead < len(ids_M):
            prefetch_row(rows_RD, base + np.int64(ids_M[index + ahead]) * row_bytes, (row_bytes + 63) // 64)
        total += dot(rows_RD, base + np.int64(ids_M[index]) * row_bytes, ones, len(ones_D))
    return float(total)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began

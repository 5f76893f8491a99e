"""The search kernel on a GPU: a step a call, `python -m benchmarks.gpu.kernel STEP`; needs torch and triton alone.

R = rows of the table, D = dim, M = behaviours of all users, T = targets, N = window, K = kept.
"""

import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import median

import torch
import triton
from torch import Tensor

from benchmarks.gpu.figures import run_step, tell
from embeddings.search.topk import cuda, cuda_kernel
from embeddings.search.topk.api import TopKImplementation, top_k
from embeddings.search.topk.inputs import PartKind, ScorePart, TopKInputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
ROWS = 4_000_000
TARGETS = 2048


def versions() -> None:
    """What the figures depend on."""
    tell("python", platform.python_version())
    tell("torch", torch.__version__)
    tell("triton", triton.__version__)
    tell("device", torch.cuda.get_device_name() if GPU else "CPU: Triton's interpreter")
    if GPU:
        tell("CUDA", str(torch.version.cuda))
        tell("compute capability", ".".join(map(str, torch.cuda.get_device_capability())))
        command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.mem,power.limit", "--format=csv,noheader"]
        if shutil.which(command[0]):
            tell("driver, memory clock, power limit", subprocess.check_output(command, text=True).splitlines()[0])


def compile_all() -> None:
    """Seconds of warming, and that nothing compiles after it."""
    for dtype in DTYPES:
        began = time.monotonic()
        for k in (20, 100):
            cuda.warm(k, dtype, DEVICE)
        torch.cuda.synchronize()
        tell(f"warming of {_plain(dtype)}", time.monotonic() - began, "s")
    before = len(_variants())
    tell("variants", before)
    for search in _mixed(few=True):
        top_k(search)
    tell("variants compiled after warming", len(_variants()) - before, at_most=0)
    for variant in _variants().values():
        tell(f"spilled registers, {variant.n_regs} used", variant.n_spills, at_most=0)


def correct() -> None:
    """All kinds of searches against plain torch, to the last bit: all sums are exact in any order."""
    if not GPU:
        # Small modes, so that small searches, which the interpreter can do, meet all of them.
        cuda.SHORT, cuda.FEW, cuda.MANY = cuda.Mode(4, 4), cuda.Mode(4, 16), cuda.Mode(16, 16)
    searches = wrong = 0
    for search in _mixed(few=not GPU):
        score_TK, index_TK = top_k(search, TopKImplementation.CUDA)
        expected_TK, expected_index_TK = top_k(search, TopKImplementation.REFERENCE)
        same = torch.equal(index_TK, expected_index_TK) and torch.allclose(
            score_TK, expected_TK, rtol=0, atol=0, equal_nan=True
        )
        searches += 1
        if not same:
            wrong += 1
            kinds = [part.kind.name for part in search.parts]
            print(
                f"differs: K {search.k}, rows {tuple(search.rows_RD.shape)} {search.rows_RD.dtype}, "
                f"{len(search.start_T)} targets, parts {kinds}",
                file=sys.stderr,
            )
    tell("searches compared", searches)
    tell("searches that differ", wrong, at_most=0)
    assert not wrong, f"{wrong} searches differ from the reference"


def sanitizer() -> None:
    """A few small searches under compute-sanitizer, which sees reads and writes out of bounds."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        tell("compute-sanitizer", "is not on this machine")
        return
    command = [program, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu.kernel", "sanitized"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(result.stdout[-4000:], file=sys.stderr)
    tell("errors under compute-sanitizer", float(result.returncode == 9), at_most=0)
    assert result.returncode == 0, f"exit code {result.returncode}"


def sanitized() -> None:
    """What `sanitizer` runs."""
    for dtype, length, k in product((torch.float32, torch.int8), (20, 300), (20, 100, 129)):
        top_k(_searches(dtype, 20, 5, length, k, parts=True, seed=length), TopKImplementation.CUDA)
    torch.cuda.synchronize()


def bandwidth() -> None:
    """Bytes of rows a second, against a copy on the device."""
    copied = _copy_bandwidth()
    tell("device copy, read and written", copied / 1e9, "GB/s")
    for dtype, dim, k in product((torch.bfloat16, torch.float32), (16, 32, 64, 128), (20, 100)):
        search = _timed(dtype, dim, 2000, k)
        seconds = _seconds(partial(top_k, search))
        scored = TARGETS * 2000
        shown = f"D {dim}, {_plain(dtype)}, N 2000, K {k}"
        tell(f"rows, {shown}", scored / seconds / 1e9, "G/s")
        goal = 0.6 if dim >= 64 and dtype == torch.bfloat16 else None
        share = scored * dim * search.rows_RD.itemsize / seconds / copied
        tell(f"share of the copy's bandwidth, {shown}", share, at_least=goal)


def _copy_bandwidth() -> float:
    """Bytes a second that a copy on the device reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source))


def against_torch() -> None:
    """Time of gather + bmm + topk over ours."""
    for length, dim in product((200, 2000, 10_000), (32, 64, 128)):
        # So many targets that the rows that torch gathers, in float32, stay below 4 GiB.
        search = _timed(torch.bfloat16, dim, length, 20, min(TARGETS, (4 << 30) // (length * dim * 4)))
        ids_TN = search.ids_M.view(-1, length)

        def plain(search: TopKInputs = search, ids_TN: Tensor = ids_TN) -> Tensor:
            rows_TND = search.rows_RD.index_select(0, ids_TN.flatten()).view(*ids_TN.shape, -1)
            score_TN = torch.bmm(rows_TND, search.query_TD.to(rows_TND.dtype)[:, :, None])[:, :, 0]
            return score_TN.float().topk(search.k).values

        ratio = _seconds(plain) / _seconds(partial(top_k, search))
        tell(f"gather + bmm + topk over ours, N {length}, D {dim}, bfloat16", ratio, at_least=5)


def pairs() -> None:
    """Time and peak memory of a search whose score has all kinds of parts, at 20 million pairs."""
    search = _timed(torch.bfloat16, 32, 10_000, 20)
    draw = torch.Generator(DEVICE).manual_seed(1)
    behaviors, targets = len(search.ids_M), TARGETS
    number_M = torch.arange(behaviors, device=DEVICE, dtype=torch.int32)
    time_T = torch.full((targets,), 10**8, device=DEVICE)

    def table(rows: int, queries: int) -> tuple[Tensor, Tensor]:
        return torch.randn(rows, 16, device=DEVICE, generator=draw), torch.randn(
            queries, 16, device=DEVICE, generator=draw
        )

    category_M = torch.randint(0, 10_000, (behaviors,), device=DEVICE, generator=draw).int()
    by_name = {
        "position": ScorePart(PartKind.POSITION, *table(10_001, 1), value_T=search.end_T),
        "interval": ScorePart(PartKind.INTERVAL, *table(34, 1), number_M.long(), time_T),
        "scene": ScorePart(PartKind.VALUE, *table(10, 1), number_M % 10),
        "category": ScorePart(PartKind.VALUE, *table(10_000, targets), category_M),
    }
    chosen: dict[str, list[ScorePart]] = {"no part": []}
    chosen |= {f"{name} alone": [part] for name, part in by_name.items()}
    chosen["all parts"] = list(by_name.values())
    for name, parts in chosen.items():
        with_parts = replace(search, parts=parts)
        top_k(with_parts)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        top_k(with_parts)
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / (targets * 10_000)
        tell(f"20.5 M pairs, {name}", _seconds(partial(top_k, with_parts)) * 1e3, "ms")
        tell(f"peak memory, {name}", peak, "bytes a pair", at_most=8)


def short_windows() -> None:
    """Windows of 10, as a shard of twenty has them of 200."""
    search = _timed(torch.bfloat16, 32, 10, 20, 20 * TARGETS)
    seconds = _seconds(partial(top_k, search))
    tell("20 x 2048 windows of 10, K 20, D 32", seconds * 1e3, "ms")
    tell("rows", len(search.ids_M) / seconds / 1e9, "G/s")
    one = _timed(torch.bfloat16, 32, 200_000, 20, 1)
    tell("one window of 200,000, K 20, D 32", _seconds(partial(top_k, one)) * 1e3, "ms")


def _mixed(few: bool) -> Iterator[TopKInputs]:
    """Searches of all dims, types, K and numbers of targets, each with or without parts."""
    seed = 0
    dims = (4, 20, 32) if few else (4, 8, 16, 20, 32, 48, 64, 100, 128)
    for k, dim, dtype in product((2, 17, 20) if few else (1, 2, 20, 32, 100, 128, 129, 300), dims, DTYPES):
        for targets, length in ((0, 5), (1, 50), (5, 3)) if few else ((0, 5), (1, 5000), (7, 31), (300, 400)):
            seed += 1
            yield _searches(dtype, dim, targets, length, k, parts=seed % 2 == 1, seed=seed)
    if not few:
        yield _searches(torch.bfloat16, 64, 3000, 300, 20, parts=True, seed=seed)


def _searches(dtype: torch.dtype, dim: int, targets: int, length: int, k: int, parts: bool, seed: int) -> TopKInputs:
    """Overlapping windows of up to ``length``, some of them empty; scores are often equal, some rows and pairs NaN."""
    draw = torch.Generator().manual_seed(seed)
    rows, behaviors = 500, 3 * length

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=draw)

    rows_RD = whole(-2, 3, rows, dim).to(dtype)
    if dtype != torch.int8:
        rows_RD[::97, 0] = torch.nan
        rows_RD[1::97, 0] = torch.inf
    start_T = whole(0, behaviors - length + 1, targets)
    end_T = start_T + whole(0, length + 1, targets)
    additive_W = whole(-1, 2, int((end_T - start_T).sum())).float()
    additive_W[5::1001] = -torch.inf
    search = TopKInputs(
        rows_RD=rows_RD.to(DEVICE),
        ids_M=whole(0, rows, behaviors).to(DEVICE, torch.int32 if seed % 3 else torch.int64),
        start_T=start_T.to(DEVICE),
        end_T=end_T.to(DEVICE),
        query_TD=whole(-2, 3, targets, dim).float().to(DEVICE),
        k=k,
        additive_W=additive_W.to(DEVICE) if seed % 4 else None,
        scale_R=(whole(1, 4, rows) / 4).to(DEVICE) if dtype == torch.int8 else None,
    )
    if not parts or not targets:
        return search

    def table(size: int, part_dim: int, queries: int) -> tuple[Tensor, Tensor]:
        return whole(-2, 3, size, part_dim).float().to(DEVICE), whole(-2, 3, queries, part_dim).float().to(DEVICE)

    column_M = whole(0, 9, behaviors).int().to(DEVICE)
    time_M = torch.cumsum(whole(0, 10**7, behaviors), 0).to(DEVICE)
    return replace(
        search,
        parts=[
            ScorePart(PartKind.POSITION, *table(length + 1, 5, 1), value_T=search.end_T),
            ScorePart(PartKind.INTERVAL, *table(34, 16, 1), time_M, time_M[start_T.to(DEVICE)] + 10**8),
            ScorePart(PartKind.VALUE, *table(9, 20, targets), column_M),
            ScorePart(PartKind.MATCH, *table(2, 4, targets), column_M, whole(0, 9, targets).to(DEVICE)),
        ],
    )


def _timed(dtype: torch.dtype, dim: int, length: int, k: int, targets: int = TARGETS) -> TopKInputs:
    """Windows side by side, of random rows of a table of `ROWS`; nothing is checked, so the host never waits."""
    draw = torch.Generator(DEVICE).manual_seed(1)
    rows_RD = torch.randn(ROWS, dim, device=DEVICE, generator=draw, dtype=dtype)
    start_T = torch.arange(targets, device=DEVICE) * length
    return TopKInputs(
        rows_RD=rows_RD,
        ids_M=torch.randint(0, ROWS, (targets * length,), device=DEVICE, generator=draw, dtype=torch.int32),
        start_T=start_T,
        end_T=start_T + length,
        query_TD=torch.randn(targets, dim, device=DEVICE, generator=draw),
        k=k,
        longest=length,
    )


def _seconds(work: Callable[[], object], rounds: int = 15) -> float:
    """Median seconds on the GPU, after two rounds that do not count."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds + 2)]
    for begin, end in events:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return float(median(begin.elapsed_time(end) for begin, end in events[2:])) / 1e3


def _variants() -> dict[object, triton.compiler.CompiledKernel]:
    """The compiled variants by Triton's key."""
    variants: dict[object, triton.compiler.CompiledKernel] = cuda_kernel.search.device_caches[
        torch.cuda.current_device()
    ][0]
    return variants


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


STEPS: dict[str, Callable[[], None]] = {
    "versions": versions,
    "compile": compile_all,
    "correct": correct,
    "bandwidth": bandwidth,
    "against-torch": against_torch,
    "pairs": pairs,
    "short-windows": short_windows,
    "sanitizer": sanitizer,
    "sanitized": sanitized,
}

if __name__ == "__main__":
    run_step(STEPS)

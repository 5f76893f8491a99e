"""A profile of some steps of a run: a trace of each rank, and a table of what a step spends its time on.

The parts of a step are regions that the code names (`torch.profiler.record_function`). A region within another counts
for itself alone, so the parts of a step do not overlap.
"""

import json
import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from pipeline.files import whole_file, write_whole

_LOGGER = logging.getLogger("dare.train")

STEP = "dare/step"
"""Region of a whole step: from the fetch of the next batch to what the ranks agree on. Validations and checkpoints are
not part of it."""
PARTS = {
    "dare/data": "waiting for data",
    "dare/exchange": "exchange",
    "dare/search": "search",
    "dare/lookups": "lookups",
    "dare/dense": "dense",
    "dare/backward": "backward",
    "dare/optimizer": "optimizer",
}
"""Regions within a step, and what the table calls them."""
OTHER = "other"
"""What the table calls a step's time outside of them."""


@dataclass(frozen=True)
class Part:
    """What a step spends on one of its parts, the mean over the profiled steps."""

    name: str
    ms: float
    """Milliseconds of the host."""
    share: float
    """Its part of the step's milliseconds."""
    device_ms: float | None
    """Milliseconds of the GPU's kernels that were launched in it; None on a CPU."""


class Span(NamedTuple):
    """A region as it ran, in microseconds."""

    name: str
    start: float
    end: float


class Launch(NamedTuple):
    """Kernels that an operator launched."""

    start: float
    """When, in microseconds."""
    device_us: float
    """How long they ran in all."""


class StepProfile:
    """Profiles the steps first .. last of a run; nothing before and after them. All ranks have one.

    A step computes what it would compute without, but takes longer: each operator is written down. Afterwards the
    folder has ``rank-R.pt.trace.json`` of each rank (for https://ui.perfetto.dev, ``chrome://tracing`` and
    TensorBoard's profile plugin) and ``step.json``, the first rank's table.

    Args:
        steps: first and last step, counted from 1.
        folder: where to write.
        device: this rank's device.
    """

    def __init__(self, steps: tuple[int, int], folder: Path, device: torch.device) -> None:
        self._first, self._last = steps
        self._folder, self._on_gpu = folder, device.type == "cuda"
        self._profiler: profile | None = None
        self._region: record_function | None = None
        self._steps: list[int] = []
        """The steps that were made under the profiler."""

    def begin(self, step: int) -> None:
        """Note that a step is about to be made; also where it turns out that the epoch has none left."""
        # A run that goes on within the range profiles what is left of it.
        if not self._first <= step <= self._last:
            return
        if self._profiler is None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
            self._profiler = profile(activities=activities)
            self._profiler.start()
        # Still open at an epoch's end, where the step begins anew with the next epoch: the wait in between is its own.
        if self._region is None:
            self._region = record_function(STEP)
            self._region.__enter__()

    def end(self, step: int) -> None:
        """Note that the step is made; after the last one the profile is written."""
        if self._region is None:
            return
        self._region.__exit__(None, None, None)
        self._region = None
        self._steps.append(step)
        if step == self._last:
            self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A run that was stopped within the range has a profile of the steps that it has made.
        if kind is None and self._steps and self._steps[-1] != self._last:
            self._write()
        if kind is None and not self._steps and dist.get_rank() == 0:
            _LOGGER.warning("profile.steps: no step of %d to %d was made, so none is profiled", self._first, self._last)

    def _write(self) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        rank = dist.get_rank()
        # The name by which TensorBoard's plugin knows a trace and its worker.
        with whole_file(self._folder / f"rank-{rank}.pt.trace.json") as file:
            self._profiler.export_chrome_trace(str(file))
        if rank > 0:
            return
        parts = parts_of_a_step(*_recorded(self._profiler, self._on_gpu), len(self._steps))
        first, last = self._steps[0], self._steps[-1]
        document = {"steps": [first, last], "parts": [asdict(part) for part in parts]}
        write_whole(self._folder / "step.json", json.dumps(document, indent=1) + "\n")
        _LOGGER.info("profile of steps %d to %d, the first rank's milliseconds of a step:", first, last)
        for line in table(parts):
            _LOGGER.info("%s", line)


def _recorded(profiler: profile, on_gpu: bool) -> tuple[list[Span], list[Launch] | None]:
    spans, launches = [], []
    for event in profiler.events():
        # The same regions appear once more as spans of the GPU's time, which overlap.
        if event.device_type.name != "CPU":
            continue
        if event.name == STEP or event.name in PARTS:
            spans.append(Span(event.name, event.time_range.start, event.time_range.end))
        elif event.kernels:
            launches.append(Launch(event.time_range.start, sum(kernel.duration for kernel in event.kernels)))
    return spans, launches if on_gpu else None


def parts_of_a_step(spans: Sequence[Span], launches: Sequence[Launch] | None, steps: int) -> list[Part]:
    """What a step spends its time on: its parts in the order of `PARTS`, the rest, and the step as a whole.

    Args:
        spans: regions as they ran in one thread, those of whole steps among them. Others that are not within a step, as
            those of a validation, do not count.
        launches: of all threads; None: there is no GPU.
        steps: number of steps.
    """
    pieces = list(_innermost(spans))
    us, device_us = dict.fromkeys([*PARTS, STEP], 0.0), dict.fromkeys([*PARTS, STEP], 0.0)
    for piece in pieces:
        us[piece.name] += piece.end - piece.start
    # By the time of the launch, not by thread: a GPU's backward pass launches its kernels in a thread of its own.
    starts = [piece.start for piece in pieces]
    for launch in launches or ():
        index = bisect_right(starts, launch.start) - 1
        if index >= 0 and launch.start < pieces[index].end:
            device_us[pieces[index].name] += launch.device_us
    whole_us = sum(us.values())

    def part(title: str, host: float, device: float) -> Part:
        device_ms = None if launches is None else round(device / steps / 1e3, 3)
        return Part(title, round(host / steps / 1e3, 3), round(host / whole_us, 4), device_ms)

    titles = {**PARTS, STEP: OTHER}
    parts = [part(title, us[name], device_us[name]) for name, title in titles.items()]
    return [*parts, part("step", whole_us, sum(device_us.values()))]


def _innermost(spans: Sequence[Span]) -> Iterator[Span]:
    """Cut the time of the steps into pieces, in order, each named after the innermost region that it lies in."""
    open_: list[Span] = []
    now = 0.0

    def until(time: float) -> Iterator[Span]:
        nonlocal now
        # A region outside of all steps is at the bottom of the stack by itself: its time is nobody's.
        if open_ and open_[0].name == STEP and time > now:
            yield Span(open_[-1].name, now, time)
        now = time

    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        while open_ and open_[-1].end <= span.start:
            yield from until(open_[-1].end)
            open_.pop()
        yield from until(span.start)
        open_.append(span)
    while open_:
        yield from until(open_[-1].end)
        open_.pop()


def table(parts: Iterable[Part]) -> Iterator[str]:
    """Lines of a table of the parts, for people."""
    for part in parts:
        device = "" if part.device_ms is None else f"  {part.device_ms:>10,.2f} on the GPU"
        yield f"  {part.name:17} {part.ms:>10,.2f} {part.share:>7.1%}{device}"

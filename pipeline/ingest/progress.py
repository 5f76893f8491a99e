"""Stages of a long run, on a terminal as bars with an estimate, elsewhere as a line a stage."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Stage:
    """A running stage; call it with what was done since, or set the share that is done."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar

    def advance(self, amount: int) -> None:
        """``amount`` more units are done."""
        self._bar.update(amount)

    def share(self, share: float) -> None:
        """``share`` (0 .. 1) of the stage is done."""
        self._bar.update(max(0, round(share * (self._bar.total or 0)) - self._bar.n))


@contextmanager
def stage(name: str, total: int = 100, unit: str = "%") -> Iterator[Stage]:
    """Show a stage on standard error."""
    started = time.monotonic()
    with tqdm(
        total=total,
        unit=" " + unit,
        desc=name,
        unit_scale=unit != "%",
        leave=False,
        disable=not sys.stderr.isatty(),
        bar_format=None if unit != "%" else "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
    ) as bar:
        yield Stage(bar)
    print(f"{name}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)

"""How far a run is, for the person who started it: a live line on a terminal, elsewhere a line now and then."""

import sys
import time
from typing import Self

from tqdm import tqdm

LINE_EVERY_S = 15.0
"""Where nobody watches: seconds between two lines."""


class Progress:
    """Shown on standard error by the first rank.

    Args:
        step: steps done before.
        steps: steps in all.
        shown: show anything at all.
    """

    def __init__(self, step: int, steps: int, shown: bool) -> None:
        self._live = shown and sys.stderr.isatty()
        self._plain = shown and not self._live
        self._bar = tqdm(initial=step, total=steps, unit="step", desc="train", disable=not self._live, smoothing=0.1)
        self._first, self._step, self._steps = step, step, steps
        self._began = self._told = time.monotonic()
        self._samples = self._samples_told = 0
        self._validation = ""

    def advance(self, loss: float, targets: int) -> None:
        """A step is done: its loss, and its targets over all ranks."""
        self._step += 1
        self._samples += targets
        now = time.monotonic()
        if self._live:
            rate = self.samples_per_s
            self._bar.set_postfix_str(f"{rate:,.0f} samples/s, loss {loss:.4f}{self._validation}", refresh=False)
            self._bar.update()
        elif self._plain and (now - self._told >= LINE_EVERY_S or self._step == self._steps):
            rate = (self._samples - self._samples_told) / max(now - self._told, 1e-9)
            left = (now - self._began) / (self._step - self._first) * (self._steps - self._step)
            self._say(
                f"step {self._step}/{self._steps}, {rate:,.0f} samples/s, loss {loss:.4f}{self._validation}, "
                f"{duration(left)} left"
            )
            self._told, self._samples_told = now, self._samples

    def validated(self, auc: float, better: bool, seconds: float) -> None:
        """A validation is done, which took so long; ``better``: than ever before."""
        self._validation = f", validation AUC {auc:.4f}"
        self._began, self._told = self._began + seconds, self._told + seconds  # the speed is that of training
        if self._plain:
            self._say(f"step {self._step}/{self._steps}{self._validation}{', the best so far' if better else ''}")

    @property
    def samples_per_s(self) -> float:
        """Of all ranks together since the start, validations left out."""
        return self._samples / max(time.monotonic() - self._began, 1e-9)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Minutes and seconds, and hours if there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

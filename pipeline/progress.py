"""What the program says while it runs: log lines on standard error, and how far a long piece of work is.

`Progress` is the one display of the program: the stages of `dare prepare`, the steps of `dare train`, the cells of
`dare experiment`. It is a live line on a terminal, elsewhere a log line now and then. What a live line shows goes away
with it; what shall stay is logged, and appears above a live line.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.errors import printable

LINE_EVERY_S = 15.0
"""Seconds between two log lines, where standard error is no terminal."""
REFRESHES_PER_S = 2
"""How often the live line of a terminal is renewed."""

_LOGGER = logging.getLogger("dare.progress")


class _Plain(logging.Formatter):
    """One line, whatever names stand in it; a trace, if there is one, goes below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # logging's name
        return printable(record.message)


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to what is standard error at that moment: a live line puts itself in its place, so that lines go above."""

    def __init__(self) -> None:
        # Not StreamHandler's own: it would keep the stream that is standard error now.
        logging.Handler.__init__(self)
        self.setFormatter(_Plain())

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        raise AttributeError("the stream is always standard error")


def first_rank() -> bool:
    """Whether this process is the one that speaks for all, by the launcher's environment."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def log_to_standard_error(*, quiet: bool | None = None) -> None:
    """Show what is logged below the logger ``dare``, a plain line each; called once, by what starts the process.

    Args:
        quiet: show errors alone; None: where this is a rank after the first one, which does the same things.
    """
    logger = logging.getLogger("dare")
    logger.setLevel(logging.ERROR if (not first_rank() if quiet is None else quiet) else logging.INFO)
    # A terminal that is gone is no reason to print a trace to it.
    logging.raiseExceptions = False
    # The root logger may have handlers of a library; a line would appear twice.
    logger.propagate = False
    logger.handlers = [_StandardError()]


class Progress:
    """Shows how much of a piece of work is done while its block runs, and estimates how long the rest takes.

    Example::

        with Progress(100, lambda it: f"step {it.done}/100{time_left(it.seconds_left)}") as progress:
            for _ in range(100):
                progress.advance()

    Args:
        total: amount of work in all.
        text: what to say of it at a moment. Of several lines, the first stands beside the bar and the others below it;
            in a log they are one line. On a terminal it is called from another thread.
        done: amount that was done before.
        every_s: seconds between two log lines, where standard error is no terminal.
        shown: whether anything is shown at all.
    """

    def __init__(
        self,
        total: float,
        text: Callable[["Progress"], str],
        *,
        done: float = 0,
        every_s: float = LINE_EVERY_S,
        shown: bool = True,
    ) -> None:
        self.total = total
        self.done = done
        """Amount that is done by now."""
        self._text, self._every_s = text, every_s
        self._first = done
        # The first line of a log comes after a whole interval: what takes less time says nothing meanwhile.
        self._began = self._logged = time.monotonic()
        self.live = shown and sys.stderr.isatty()
        """Whether a live line is shown."""
        self.logs = shown and not self.live
        """Whether log lines are written."""
        self._live: Live | None = None

    def advance(self, amount: float = 1) -> None:
        """Note that ``amount`` more is done."""
        self.reach(self.done + amount)

    def reach(self, done: float) -> None:
        """Note that ``done`` of ``total`` is done."""
        self.done = done
        self.tick()

    def reach_share(self, share: float) -> None:
        """Note that ``share`` (0 .. 1) of ``total`` is done."""
        self.reach(share * self.total)

    def tick(self) -> None:
        """Log a line if one is due; for work that takes long between two calls of `advance`."""
        if self.logs and time.monotonic() - self._logged >= self._every_s:
            self.log()

    def log(self) -> None:
        """Log a line now, where lines are logged."""
        if self.logs:
            self._logged = time.monotonic()
            _LOGGER.info("%s", "; ".join(line.strip() for line in self._text(self).splitlines()))

    def pause(self, seconds: float) -> None:
        """Leave ``seconds`` that have just gone by out of all speeds and estimates."""
        self._began += seconds
        self._logged += seconds

    @property
    def seconds(self) -> float:
        """Seconds since the start, pauses left out; never 0."""
        return max(time.monotonic() - self._began, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds to the end, at the average speed since the start; None: nothing is done yet."""
        done = self.done - self._first
        return self.seconds / done * max(0.0, self.total - self.done) if done > 0 else None

    def __enter__(self) -> Self:
        if self.live:
            self._live = Live(
                console=Console(stderr=True, highlight=False),
                get_renderable=self._render,
                refresh_per_second=REFRESHES_PER_S,
                transient=True,
                # Rich would send standard output where the live line is, also if that is a file or a pipe.
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def _render(self) -> RenderableType:
        first, *others = self._text(self).splitlines()
        line = Table.grid(padding=(0, 1))
        line.add_row(ProgressBar(total=self.total, completed=self.done, width=24), Text(printable(first)))
        return Group(line, *(Text(f"  {printable(other)}") for other in others))


@contextmanager
def stage(name: str, total: float = 100, unit: str = "%") -> Iterator[Progress]:
    """Show a stage of a longer piece of work, and log how many seconds it took when it has ended well.

    Args:
        name: what the stage does.
        total: amount of work in all.
        unit: what is counted; ``%``: shares alone are shown.
    """

    def text(progress: Progress) -> str:
        share = progress.done / progress.total if progress.total else 1.0
        amount = f"{share:.0%}" if unit == "%" else f"{progress.done:,.0f} of {progress.total:,.0f} {unit}"
        return f"{name}: {amount}{time_left(progress.seconds_left)}"

    with Progress(total, text) as progress:
        yield progress
    _LOGGER.info("%s: %.1f s", name, progress.seconds)


def time_left(seconds: float | None) -> str:
    """The end of a line: ``, 1:20 left``; nothing where it is not known, or less than a second."""
    return "" if seconds is None or round(seconds) == 0 else f", {duration(seconds)} left"


def duration(seconds: float) -> str:
    """Minutes and seconds, and hours if there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

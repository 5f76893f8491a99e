"""What an online run shows of its days: lines of a table, curves in TensorBoard, a picture."""

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.errors import printable
from pipeline.evaluate.segments import LENGTHS
from pipeline.reporting.plots import panels, png, style, whole_numbers
from pipeline.train.event_file import EventWriter, ahead_of_clock
from schemas.online import WHOLE, LearntDay

METRICS = {"auc": ("AUC", "AUC"), "normalized_entropy": ("NE", "normalised entropy")}
"""Metrics of the picture, with their short names and their names for people."""
PICTURED = (WHOLE, "old items", "new items", "old users", "new users", *LENGTHS)
"""Segments of the picture."""
LEAST_TARGETS, LEAST_OF_A_LABEL = 100, 10
"""Targets, and targets of each label, that a segment of a day has in the picture: of fewer, a metric says little, and
stretches the scale."""

_COLUMNS = ("day", "targets", "AUC", "new items", "new users", "NE", "calib.", "seconds")
_WIDTHS = (14, 9, 6, 9, 9, 6, 6, 7)
"""With two spaces between them these are the 80 columns of a terminal; longer names and numbers stay whole."""


def header() -> str:
    """Names of the columns of `line`."""
    return _aligned(_COLUMNS)


def line(day: LearntDay) -> str:
    """A day as a line of a table: what was measured before it was learnt, of the main task."""
    auc = [metric(day, segment, "auc") for segment in (WHOLE, "new items", "new users")]
    others = metric(day, WHOLE, "normalized_entropy"), metric(day, WHOLE, "calibration")
    shown = ["" if value is None else f"{value:.4f}" for value in (*auc, *others)]
    if day.skipped:
        shown[0] = "skipped"
    return _aligned((printable(day.name), f"{day.targets:,}", *shown, f"{day.seconds:.1f}"))


def metric(day: LearntDay, segment: str, name: str, task: str | None = None) -> float | None:
    """A metric of a day before it was learnt; None where it is not defined, or there was no model yet.

    Args:
        day: that is done.
        segment: one of `pipeline.evaluate.segments.SEGMENTS`.
        name: such as ``auc``.
        task: of the model; None: the main one.
    """
    if not day.before:
        return None
    return day.before[task or next(iter(day.before))][segment][name]


def is_pictured(day: LearntDay, segment: str) -> bool:
    """Whether a segment of a day has so many targets that its metrics are drawn."""
    samples, positives = (metric(day, segment, name) or 0 for name in ("samples", "positives"))
    return samples >= LEAST_TARGETS and LEAST_OF_A_LABEL <= positives <= samples - LEAST_OF_A_LABEL


def _aligned(cells: Sequence[str]) -> str:
    first, *others = zip(cells, _WIDTHS, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])


class DayCurves:
    """Curves of the days for TensorBoard: ``online/auc``, ``online/new items/auc`` and so on; a step is a day's number.

    Other tasks than the main one have their name before the segment. Days of earlier starts are written again.

    Args:
        folder: folder of event files.
        learnt: days that are done.
    """

    def __init__(self, folder: Path, learnt: Sequence[LearntDay]) -> None:
        self._ahead_s = ahead_of_clock(folder)
        # All points of earlier files are hidden.
        self._writer = EventWriter(folder, 0, self._ahead_s)
        for day in learnt:
            self.add(day)

    def add(self, day: LearntDay) -> None:
        """Add the points of a day that is done, and write them."""
        now = time.time() + self._ahead_s
        for number, (task, segments) in enumerate((day.before or {}).items()):
            for segment, metrics in segments.items():
                for name, value in metrics.items():
                    if value is None:
                        continue
                    parts = ["online", *[task] * (number > 0), *[segment] * (segment != WHOLE), name]
                    self._writer.add_scalar("/".join(parts), value, day.number, now)
        if not day.skipped:
            self._writer.add_scalar("online/seconds", day.seconds, day.number, now)
        self._writer.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()


def draw(learnt: Sequence[LearntDay], file: Path) -> None:
    """Draw AUC and normalised entropy by day, of all targets and by segment, see `is_pictured`.

    Args:
        learnt: days that are done.
        file: PNG, which appears whole.
    """
    figure, axes = panels(
        len(METRICS), height=4.2, titles=[f"{short} before learning" for short, _ in METRICS.values()]
    )
    for axis, (name, (_, shown)) in zip(axes, METRICS.items(), strict=True):
        for index, segment in enumerate(PICTURED):
            points = [
                (day.number, value)
                for day in learnt
                if (value := metric(day, segment, name)) is not None and (segment == WHOLE or is_pictured(day, segment))
            ]
            if points:
                width = 2.4 if segment == WHOLE else 1.0
                axis.plot(
                    *zip(*points, strict=True), linewidth=width, label=segment, **style(index) | {"markersize": 3}
                )
        axis.set_xlabel("day")
        axis.set_ylabel(shown)
        whole_numbers(axis.xaxis)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        title = f"segments of {LEAST_TARGETS} targets a day and more, {LEAST_OF_A_LABEL} of each label"
        small: dict[str, Any] = {"ncols": 5, "frameon": False, "fontsize": 8, "title_fontsize": 8}
        figure.legend(handles, labels, title=title, loc="outside lower center", **small)
    png(figure, file)

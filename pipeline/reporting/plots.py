"""The style of every chart of this program: panels, colours, ticks, and SVG that an HTML page can hold.

Figures are made without `matplotlib.pyplot`: pyplot keeps its figures in global state, which is not safe in the thread
that writes the report of an experiment.
"""

import io
import re
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from matplotlib.ticker import (
    Formatter,
    LogFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    ScalarFormatter,
)

from pipeline.files import whole_file

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2f6db5", "#e0812b", "#4c9f70", "#b5483a", "#8064a2", "#8c8c8c"
PALE_GREY = "#c9c9c9"
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, GREY, "#3aa3b0", "#d67bb0", "#8c6d4f", "#a9a93a")
_MARKERS, _DASHES = "os^DvPX*<>", ("-", "--", "-.", ":")

_WIDTH = 12.0
"""Inches of a figure. A page is about 1180 pixels wide, so that text of 10 points is read at 13 to 14 pixels."""
_LABEL = 32
"""Characters of a line of a label; longer ones have several lines."""
MARGIN = 0.06
"""Room before the first and behind the last point, as a part of what an axis spans."""
_SIZES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))

# Text of an SVG is drawn by the browser, which has more fonts than matplotlib measures it with.
warnings.filterwarnings("ignore", message="Glyph .* missing from")


def color(index: int) -> tuple[float, float, float]:
    """The colour of the series of this index: first all of `PALETTE`, then its colours mixed with white."""
    red, green, blue = to_rgb(PALETTE[index % len(PALETTE)])
    white = 0.5 * (index // len(PALETTE) % 2)
    return red + (1 - red) * white, green + (1 - green) * white, blue + (1 - blue) * white


def style(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the series of this index, as arguments of ``Axes.plot``; 200 series differ."""
    turn = index // len(PALETTE)
    return {
        "color": color(index),
        "marker": _MARKERS[turn // 2 % len(_MARKERS)],
        "markersize": 4,
        "linestyle": _DASHES[turn % len(_DASHES)],
    }


def label(text: str) -> str:
    """A name as a label: it has several lines where it is long, and a legend does not take it for a hidden one."""
    lines = textwrap.wrap(text, _LABEL, break_on_hyphens=True) or [""]
    # Legends leave out what begins with an underscore.
    return "\n".join(lines) if not text.startswith("_") else "\N{ZERO WIDTH SPACE}" + "\n".join(lines)


def tick_text(value: float) -> str:
    """A number as the label of a tick: never rounded, with k, M, G or T from a thousand on: 2500 is 2.5k."""
    for size, suffix in _SIZES:
        if abs(value) >= size * (1 - 1e-12):
            return f"{value / size:.12g}{suffix}"
    return f"{value:.12g}"


class Ticks(Formatter):
    """Labels of the ticks of an axis, as `tick_text` writes them; without any suffix, all with equally many digits."""

    def __call__(self, value: float, position: int | None = None) -> str:
        """The label of one tick; what floats are off by, as a part of the ticks' distance, is taken away."""
        distances = np.diff(np.unique(np.asarray(self.locs, float)))
        # On a log axis distances grow with the values: there nothing is as small as a part of the smallest distance.
        unit = distances.min() * 1e-6 if len(distances) else 0.0
        return tick_text(0.0 if abs(value) < unit else value)

    def format_ticks(self, values: Any) -> list[str]:
        """The labels of all ticks."""
        texts: list[str] = super().format_ticks(values)
        if any(not re.fullmatch(r"-?\d+(\.\d+)?", text) for text in texts):
            return texts
        digits = max((len(text.partition(".")[2]) for text in texts), default=0)
        return [f"{float(text):.{digits}f}" for text in texts]


def panels(
    count: int = 1,
    *,
    height: float,
    columns: int | None = None,
    titles: Sequence[str] = (),
    sharey: bool = False,
    grid: Literal["both", "x", "y"] = "both",
) -> tuple[Figure, list[Axes]]:
    """A figure with panels in rows.

    Args:
        count: number of panels.
        height: of a row of panels, in inches.
        columns: panels in a row; None: as many as stay readable beside each other.
        titles: of the panels; none, or one for each.
        sharey: panels have the same y axis.
        grid: axes whose ticks have lines.

    Returns:
        The figure and its panels, row by row.
    """
    columns = columns or (count if count <= 3 else 2 if count == 4 else 3)
    rows = -(-count // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(_WIDTH, height * rows), layout=layout)
    # Names are no formulas: a dollar is a dollar.
    with matplotlib.rc_context({"text.parse_math": False}):
        # A grid may have more places than there are panels.
        axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel().tolist()
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis=grid, alpha=0.25)
        axis.set_axisbelow(True)
        # Room for the markers of the first and the last point; bars keep their base at 0.
        axis.margins(MARGIN)
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(label(title))
    return figure, axes[:count]


def whole_numbers(axis: Axis) -> None:
    """Put ticks at whole numbers alone: of things that are counted or numbered there is no half."""
    axis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def from_zero(axis: Axis) -> None:
    """Let an axis of values above 0 begin at 0, with the usual room behind the largest."""
    most = axis.get_data_interval()[1]
    if np.isfinite(most) and most > 0:
        set_limits = axis.axes.set_xlim if axis is axis.axes.xaxis else axis.axes.set_ylim
        set_limits(0, (1 + MARGIN) * most)


def finish(figure: Figure) -> None:
    """Give all panels the same ticks, and show what would not be seen: a single point, that there is nothing at all.

    `svg` and `png` call it.
    """
    for axes in figure.axes:
        for line in axes.get_lines():
            points = np.unique(np.asarray(line.get_xydata(), float), axis=0)
            # A line of one point has no length.
            if len(points[np.isfinite(points).all(1)]) == 1 and line.get_marker() in ("None", "", None):
                line.set_marker("o")
        if not axes.has_data():
            axes.annotate("no values", (0.5, 0.5), xycoords="axes fraction", ha="center", color=GREY)
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(axis.get_major_locator(), LogLocator):
                _log_ticks(axis)
            if isinstance(axis.get_major_formatter(), (ScalarFormatter, LogFormatter)):
                axis.set_major_formatter(Ticks())
    for text in figure.findobj(Text):
        text.set_parse_math(False)


def _log_ticks(axis: Axis) -> None:
    """Label the ticks of a log axis such that there are at least two or three, however little it spans."""
    low, high = sorted(axis.get_view_interval())
    axis.set_minor_formatter(NullFormatter())
    if high < 10 * low:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axis.set_minor_locator(NullLocator())
    elif high < 1000 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def svg(figure: Figure, name: str) -> Markup:
    """A figure as an SVG element for a page. Its text is text: the browser draws it with the fonts that it has.

    Args:
        figure: as `panels` makes it.
        name: another one for each figure of a page. It begins all ids of the element, for matplotlib gives equal ids to
            equal shapes of different figures, and a browser would take the first one of its name on the page.
    """
    finish(figure)
    image = io.StringIO()
    # Without a salt of our own the ids are drawn anew each time, and the same results would not give the same page.
    with matplotlib.rc_context({"svg.hashsalt": "dare", "svg.fonttype": "none", "text.parse_math": False}):
        figure.savefig(image, format="svg", metadata={"Date": None})
    text = image.getvalue()
    element = text[text.index("<svg") :]  # without the declaration of XML, which has no place in HTML
    return Markup(re.sub(r'((?<!\w)id="|href="#|url\(#)', rf"\g<1>{name}-", element))


def png(figure: Figure, file: Path) -> None:
    """Write a figure as a PNG file, which appears whole or not at all; its folder is made.

    Args:
        figure: as `panels` makes it.
        file: to write. A character that no font of this machine has is written as its code, U+4E2D as u4e2d with a
            backslash before it.
    """
    finish(figure)
    for text in figure.findobj(Text):
        _choose_fonts(text)
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as unfinished, matplotlib.rc_context({"text.parse_math": False}):
        figure.savefig(unfinished, dpi=120, format="png", metadata={"Software": None})


def _choose_fonts(text: Text) -> None:
    """Let a text have a further font for what the usual one lacks, or codes in its place."""
    usual = font_manager.findfont(text.get_fontproperties())
    missing = {letter for letter in text.get_text() if letter.isprintable()} - _letters(usual)
    if not missing:
        return
    for font in font_manager.fontManager.ttflist:
        if missing <= _letters(font.fname):
            text.set_fontfamily([*text.get_fontfamily(), font.name])
            return
    codes = [letter.encode("unicode_escape").decode() if letter in missing else letter for letter in text.get_text()]
    text.set_text("".join(codes))


def _letters(font: str) -> set[str]:
    return {chr(code) for code in font_manager.get_font(font).get_charmap()}

"""The style of every chart of this program: panels, colours, and SVG that an HTML page can hold.

Figures are made without `matplotlib.pyplot`: pyplot keeps its figures in global state, which is not safe in the thread
that writes the report of an experiment.
"""

import io
import re
from collections.abc import Sequence
from typing import Literal

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2f6db5", "#e0812b", "#4c9f70", "#b5483a", "#8064a2", "#8c8c8c"
PALE_GREY = "#c9c9c9"
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, GREY, "#3aa3b0", "#d67bb0", "#8c6d4f", "#a9a93a")

COUNTS = EngFormatter(places=0, sep="")
"""Formats the ticks of an axis of large counts: 20000 as 20k."""

_WIDTH = 12.0
"""Inches of a figure. A page is about 1180 pixels wide, so that text of 10 points is read at 13 to 14 pixels."""


def color(index: int) -> tuple[float, float, float]:
    """The colour of the series of this index: first all of `PALETTE`, then its colours mixed with white."""
    red, green, blue = to_rgb(PALETTE[index % len(PALETTE)])
    white = 0.5 * (index // len(PALETTE) % 2)
    return red + (1 - red) * white, green + (1 - green) * white, blue + (1 - blue) * white


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
    # A grid may have more places than there are panels.
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel().tolist()
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis=grid, alpha=0.25)
        axis.set_axisbelow(True)
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title)
    return figure, axes[:count]


def svg(figure: Figure, name: str) -> Markup:
    """A figure as an SVG element for a page.

    Args:
        figure: as `panels` makes it.
        name: another one for each figure of a page. It begins all ids of the element, for matplotlib gives equal ids to
            equal shapes of different figures, and a browser would take the first one of its name on the page.
    """
    image = io.StringIO()
    # Without a salt of our own the ids are drawn anew each time, and the same results would not give the same page.
    with matplotlib.rc_context({"svg.hashsalt": "dare"}):
        figure.savefig(image, format="svg", metadata={"Date": None})
    text = image.getvalue()
    element = text[text.index("<svg") :]  # without the declaration of XML, which has no place in HTML
    return Markup(re.sub(r'((?<!\w)id="|href="#|url\(#)', rf"\g<1>{name}-", element))

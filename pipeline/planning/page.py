"""A dry run as one HTML file: charts and tables, nothing from the network."""

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from pipeline.planning.dry_run import DryRun
from pipeline.planning.text import GIB, SEARCHES, report
from pipeline.planning.traffic import PHASES

_COLORS = ("#2f6db5", "#e0812b", "#4c9f70", "#b5483a", "#8064a2", "#8c8c8c")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
pre { background: #f6f6f4; padding: 1em; overflow-x: auto; font-size: 12px; line-height: 1.45; }
svg { width: 100%; height: auto; } figcaption { color: #555; font-size: 13px; } figure { margin: 1em 0; }
"""


def write_page(file: Path, run: DryRun, points: Sequence[tuple[dict[str, int], DryRun]] = (), table: str = "") -> None:
    """Write the page.

    Args:
        file: to write.
        run: fits.
        points: of a sweep, if there was one.
        table: the sweep's, as text.
    """
    cluster = run.settings.cluster
    title = f"{run.settings.model.name} on {cluster.name}"
    figures = [
        _figure(lambda axes: _memory(axes, run), 1, 2.6, "Memory of each rank: tables by name, and all else."),
        _figure(lambda axes: _step(axes, run), 1, 2.6, "Time of a step by phase; nothing is taken to overlap."),
        _figure(lambda axes: _parts(axes, run), 1, 3.6, f"The longest parts of a step with search={run.search}."),
    ]
    if points:
        figures.append(
            _figure(lambda axes: _sweep(axes, points), 2, 3.4, "The sweep: time of a step, memory of the fullest rank.")
        )
    body = "\n".join(_with_own_ids(figure, place) for place, figure in enumerate(figures))
    swept = f"<h2>Sweep</h2>\n<pre>{escape(table)}</pre>" if points else ""
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n"
        f"<p>{cluster.ranks:,} ranks, {run.samples_per_second:,.0f} samples/s by the estimate.</p>\n"
        f"{body}\n{swept}\n<h2>The plan</h2>\n<pre>{escape(chr(10).join(report(run)))}</pre>\n</body></html>\n"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page)


def _figure(draw: Callable[[list[Axes]], None], panels: int, height: float, caption: str) -> str:
    drawing, grid = plt.subplots(1, panels, figsize=(10, height), layout="constrained", squeeze=False)
    axes = list(grid[0])
    draw(axes)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    image = io.StringIO()
    drawing.savefig(image, format="svg", metadata={"Date": None})
    plt.close(drawing)
    svg = image.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}<figcaption>{escape(caption)}</figcaption></figure>"


def _with_own_ids(figure: str, place: int) -> str:
    """The ids of a drawing, and what refers to them, made the only ones of their name on the page."""
    return re.sub(r'((?<!\w)id="|href="#|url\(#)', rf"\g<1>chart{place}-", figure)


def _memory(axes: list[Axes], run: DryRun) -> None:
    """Tables' own bytes stacked, the rest (buffers of lookups, search, dense parameters) on top."""
    (axis,), ranks = axes, run.settings.cluster.ranks
    on_cpu = run.settings.cluster.device == "cpu"
    total = np.array([rank.host_bytes if on_cpu else rank.device_bytes for rank in run.ranks]) / GIB
    seen = [table for table in run.tables if table.bytes > 0.01 * sum(each.bytes for each in run.tables)]
    largest = sorted(seen, key=lambda table: table.bytes, reverse=True)[:4]
    place, below = np.arange(ranks), np.zeros(ranks)
    for table, color in zip(largest, _COLORS, strict=False):
        held = np.zeros(ranks)
        if not table.on_host:
            for rank, rows in zip(table.ranks, table.shard_rows, strict=True):
                held[rank] += rows * (table.bytes / table.rows) / GIB
        axis.fill_between(place, below, below + held, step="mid", color=color, label=table.name, linewidth=0)
        below += held
    axis.fill_between(place, below, np.maximum(total, below), step="mid", color="#c9c9c9", label="buffers and others")
    cluster = run.settings.cluster
    there = cluster.host_memory / cluster.devices_per_node if on_cpu else cluster.device_memory
    if there / GIB < 6 * total.max():
        axis.axhline(there / GIB, color="#b5483a", linestyle="--", label="memory there is")
    if ranks == 1:
        axis.set_xlim(-0.5, 0.5)
    else:
        axis.set_xlim(0 if ranks > 16 else -0.5, ranks - (1 if ranks > 16 else 0.5))
    axis.set_ylim(0)
    axis.set_xlabel("rank")
    axis.set_ylabel("GiB")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _step(axes: list[Axes], run: DryRun) -> None:
    (axis,) = axes
    left = np.zeros(len(SEARCHES))
    for phase, color in zip(PHASES, _COLORS, strict=True):
        ms = np.array([run.steps[where].phases()[phase].ms for where in SEARCHES])
        axis.barh(SEARCHES, ms, left=left, color=color, label=phase)
        left += ms
    for where, total in zip(SEARCHES, left, strict=True):
        axis.annotate(f" {total:,.1f} ms", (total, where), va="center")
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel("ms")
    axis.set_ylabel("search")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _parts(axes: list[Axes], run: DryRun) -> None:
    (axis,) = axes
    parts: dict[tuple[str, str], float] = {}
    for cost in run.step.costs:
        parts[cost.phase, cost.what] = parts.get((cost.phase, cost.what), 0) + cost.ms
    longest = sorted(parts.items(), key=lambda part: part[1], reverse=True)[:10]
    names = [f"{phase}: {what}" for (phase, what), _ in longest]
    colors = [_COLORS[PHASES.index(phase)] for (phase, _), _ in longest]
    axis.barh(names, [ms for _, ms in longest], color=colors)
    for name, (_, ms) in zip(names, longest, strict=True):
        axis.annotate(f" {ms:,.2f}", (ms, name), va="center", fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.set_xlabel("ms")


def _sweep(axes: list[Axes], points: Sequence[tuple[dict[str, int], DryRun]]) -> None:
    """A line for each combination of all axes but the first."""
    along = next(iter(points[0][0]))
    lines: dict[tuple[tuple[str, int], ...], list[tuple[int, float, float]]] = {}
    for point, run in points:
        rest = tuple((name, value) for name, value in point.items() if name != along)
        if run.feasible:
            on_cpu = run.settings.cluster.device == "cpu"
            fullest = max(rank.host_bytes if on_cpu else rank.device_bytes for rank in run.ranks)
            lines.setdefault(rest, []).append((point[along], run.step.ms, fullest / GIB))
    for (rest, values), color in zip(lines.items(), _COLORS * (len(lines) // len(_COLORS) + 1), strict=False):
        label = ", ".join(f"{name} {value:,}" for name, value in rest) or None
        where = [value for value, _, _ in values]
        for axis, column in zip(axes, (1, 2), strict=True):
            axis.plot(where, [value[column] for value in values], color=color, marker="o", label=label)
    for axis, name in zip(axes, ("ms a step", "GiB of the fullest rank"), strict=True):
        axis.set_xscale("log", base=2)
        ticks = sorted({point[along] for point, _ in points})
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel(along)
        axis.set_ylabel(name)
        axis.set_ylim(0)
    if any(rest for rest in lines):
        axes[-1].legend(frameon=False)

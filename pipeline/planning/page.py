"""A dry run as an HTML page: charts of memory, of a step and of a sweep, and the plan as text."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from numpy.typing import NDArray

from embeddings.planning import size_text, size_unit
from pipeline.files import write_whole
from pipeline.planning.dry_run import DryRun
from pipeline.planning.planned_tables import PlannedTable
from pipeline.planning.text import GIB, SEARCHES, fullest, report, sweep_lines
from pipeline.planning.traffic import PHASES
from pipeline.reporting.page import Chart, Page, Section, html
from pipeline.reporting.plots import (
    PALE_GREY,
    PALETTE,
    RED,
    from_zero,
    label,
    panels,
    style,
    svg,
    whole_numbers,
)

LARGEST = 4
"""Tables that have a colour of their own."""
LONGEST = 10
"""Parts of a step that have a bar."""
MOST_BARS = 64
"""Ranks up to which each has a bar of its own."""


def write_page(file: Path, run: DryRun, points: Sequence[tuple[dict[str, int], DryRun]] = ()) -> None:
    """Write the page.

    Args:
        file: the HTML file to write.
        run: a dry run that fits.
        points: the dry runs of a sweep, each with the values of the swept settings; empty: there was no sweep.

    Raises:
        OSError: the file cannot be written.
    """
    cluster = run.settings.cluster
    kind = "Host" if cluster.device == "cpu" else "Device"
    longest = _longest(run)
    share = sum(ms for _, ms in longest) / run.step.ms
    charts = [
        Chart(_memory(run), f"{kind} memory of each rank. The two panels have different scales."),
        Chart(_step(run), "Time of a step by phase; nothing is taken to overlap."),
        Chart(
            _parts(run),
            f"The {len(longest)} longest parts of a step with search={run.search}: {share:.0%} of its time.",
        ),
    ]
    sections = [Section(charts=charts)]
    if points:
        fitting = sum(of_point.feasible for _, of_point in points)
        caption = "Time of a step and memory of the fullest rank."
        if fitting < len(points):
            caption += f" {len(points) - fitting} of {len(points)} combinations do not fit and have no point."
        swept = [Chart(_sweep(points), caption)] if fitting else []
        sections.append(
            Section(
                "Sweep",
                "" if fitting else "None of the combinations fits.",
                charts=swept,
                text="\n".join(sweep_lines(points)),
            )
        )
    sections.append(Section("The plan", text="\n".join(report(run))))
    lead = [f"{cluster.ranks:,} ranks, {run.samples_per_second:,.0f} samples/s by the estimate."]
    page = Page(f"{run.settings.model.name} on {cluster.name}", lead, sections)
    write_whole(file, html(page))


def _memory(run: DryRun) -> Markup:
    """Memory of each rank: on the left all of it, on the right the tables alone, which may be small beside buffers."""
    figure, (of_all, of_tables) = panels(2, height=3.4, titles=("all memory", "tables alone"))
    cluster, ranks, on_cpu = run.settings.cluster, run.settings.cluster.ranks, run.settings.cluster.device == "cpu"
    total_R = np.array([rank.host_bytes if on_cpu else rank.device_bytes for rank in run.ranks], float)
    fullest = int(total_R.argmax())
    held = {table.name: _held(table, ranks) for table in run.tables if on_cpu or not table.on_host}
    # As many as there are colours that nobody mixes up; all others are one part.
    largest = sorted(held, key=lambda name: held[name].sum(), reverse=True)[:LARGEST]
    parts = {name: held[name] for name in largest}
    if len(held) > LARGEST:
        parts[f"{len(held) - LARGEST} smaller tables"] = sum(
            (held[name] for name in held if name not in largest), np.zeros(ranks)
        )
    tables_R = sum(parts.values(), np.zeros(ranks))
    # Never negative, should the tables here add up to more than the planner's figure.
    parts["buffers and others"] = np.maximum(total_R - tables_R, 0)
    colors = [*PALETTE[: len(parts) - 1], PALE_GREY]
    there = cluster.host_memory / cluster.devices_per_node if on_cpu else cluster.device_memory
    # Far above, the line would press everything else to the ground.
    limit = there if there < 6 * total_R.max() else 0
    only_tables = {name: parts[name] for name in list(parts)[:-1]}
    for axis, shown, most in ((of_all, parts, max(total_R.max(), limit)), (of_tables, only_tables, tables_R.max())):
        size, unit = size_unit(most)
        below_R = np.zeros(ranks)
        for (name, held_R), color in zip(shown.items(), colors, strict=False):
            _bars(axis, below_R / size, held_R / size, color, f"{label(name)}: {size_text(held_R[fullest])}")
            below_R = below_R + held_R
        axis.set_ylim(0, 1.06 * max(most, 1) / size)
        axis.set_ylabel(unit)
        axis.set_xlabel("rank")
        axis.set_xlim(-0.6, ranks - 0.4)
        whole_numbers(axis.xaxis)
    if limit:
        size, _ = size_unit(max(total_R.max(), limit))
        of_all.axhline(limit / size, color=RED, linestyle="--", label=f"memory there is: {size_text(there)}")
    handles, labels = of_all.get_legend_handles_labels()
    title = "rank 0" if ranks == 1 else f"rank {fullest}, the fullest: {size_text(total_R[fullest])}"
    figure.legend(handles, labels, title=title, loc="outside lower center", ncols=3, frameon=False)
    return svg(figure, "memory")


def _held(table: PlannedTable, ranks: int) -> NDArray[np.float64]:
    """Bytes of a table on each rank."""
    held_R = np.zeros(ranks)
    for rank, rows in zip(table.ranks, table.shard_rows, strict=True):
        held_R[rank] += rows * (table.bytes / table.rows)
    return held_R


def _bars(axis: Axes, below_R: NDArray[np.float64], held_R: NDArray[np.float64], color: str, text: str) -> None:
    """A part of the stack of each rank: bars, or one outline where there are too many of them."""
    if len(held_R) <= MOST_BARS:
        axis.bar(np.arange(len(held_R)), held_R, bottom=below_R, color=color, label=text)
    else:
        edges = np.arange(len(held_R) + 1) - 0.5
        axis.stairs(below_R + held_R, edges, baseline=below_R, fill=True, color=color, label=text, linewidth=0)


def _step(run: DryRun) -> Markup:
    figure, (axis,) = panels(height=2.6, grid="x")
    left = np.zeros(len(SEARCHES))
    for phase, color in zip(PHASES, PALETTE, strict=False):
        ms = np.array([run.steps[search].phases()[phase].ms for search in SEARCHES])
        axis.barh(SEARCHES, ms, left=left, color=color, label=phase)
        left += ms
    for search, total in zip(SEARCHES, left, strict=True):
        axis.annotate(f" {total:,.2f} ms", (total, search), va="center")
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel("ms")
    axis.set_ylabel("search")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return svg(figure, "step")


def _longest(run: DryRun) -> list[tuple[tuple[str, str], float]]:
    """Phase, name and milliseconds of the longest parts of a step."""
    parts: dict[tuple[str, str], float] = {}
    for cost in run.step.costs:
        parts[cost.phase, cost.what] = parts.get((cost.phase, cost.what), 0) + cost.ms
    return sorted(parts.items(), key=lambda part: part[1], reverse=True)[:LONGEST]


def _parts(run: DryRun) -> Markup:
    figure, (axis,) = panels(height=3.8, grid="x")
    longest = _longest(run)
    names = [f"{phase}: {what}" for (phase, what), _ in longest]
    phases: tuple[str, ...] = PHASES
    colors = [PALETTE[phases.index(phase)] for (phase, _), _ in longest]
    axis.barh(names, [ms for _, ms in longest], color=colors)
    for name, (_, ms) in zip(names, longest, strict=True):
        axis.annotate(f" {ms:,.2f}", (ms, name), va="center", fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.set_xlabel("ms")
    return svg(figure, "parts")


def _sweep(points: Sequence[tuple[dict[str, int], DryRun]]) -> Markup:
    """A line for each combination of all swept settings but the first, which is the x axis."""
    along = next(iter(points[0][0]))
    lines: dict[tuple[tuple[str, int], ...], list[tuple[int, float, float]]] = {}
    for point, run in points:
        # What does not fit has no point.
        rest = tuple((name, value) for name, value in point.items() if name != along)
        if run.feasible:
            lines.setdefault(rest, []).append((point[along], run.step.ms, fullest(run)))
    columns = 4
    figure, (of_time, of_memory) = panels(2, height=3.6 + 0.22 * -(-len(lines) // columns))
    for index, (rest, values) in enumerate(lines.items()):
        text = ", ".join(f"{name} {value:,}" for name, value in rest) or None
        x, ms, held = zip(*sorted(values), strict=True)
        of_time.plot(x, ms, label=text, **style(index))
        of_memory.plot(x, np.array(held) / GIB, label=text, **style(index))
    for axis, name in ((of_time, "ms a step"), (of_memory, "GiB of the fullest rank")):
        axis.set_xscale("log", base=2)
        ticks = sorted({point[along] for point, _ in points})
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
        # Also if there is one value alone: it is in the middle.
        axis.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)
        axis.set_xlabel(along)
        axis.set_ylabel(name)
        from_zero(axis.yaxis)
    if any(rest for rest in lines):
        handles, labels = of_time.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return svg(figure, "sweep")

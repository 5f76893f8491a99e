"""A dry run as an HTML page: charts of memory, of a step and of a sweep, and the plan as text."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from markupsafe import Markup

from pipeline.files import write_whole
from pipeline.planning.dry_run import DryRun
from pipeline.planning.text import GIB, SEARCHES, report
from pipeline.planning.traffic import PHASES
from pipeline.reporting.page import Chart, Page, Section, html
from pipeline.reporting.plots import PALE_GREY, PALETTE, RED, panels, svg


def write_page(file: Path, run: DryRun, points: Sequence[tuple[dict[str, int], DryRun]] = (), table: str = "") -> None:
    """Write the page.

    Args:
        file: the HTML file to write.
        run: a dry run that fits.
        points: the dry runs of a sweep, each with the values of the swept settings; empty: there was no sweep.
        table: the same sweep as text.

    Raises:
        OSError: the file cannot be written.
    """
    cluster = run.settings.cluster
    charts = [
        Chart(_memory(run), "Memory of each rank: the largest tables by name, and all else."),
        Chart(_step(run), "Time of a step by phase; nothing is taken to overlap."),
        Chart(_parts(run), f"The longest parts of a step with search={run.search}."),
    ]
    sections = [Section(charts=charts)]
    if points:
        swept = Chart(_sweep(points), "Time of a step and memory of the fullest rank.")
        sections.append(Section("Sweep", charts=[swept], text=table))
    sections.append(Section("The plan", text="\n".join(report(run))))
    lead = [f"{cluster.ranks:,} ranks, {run.samples_per_second:,.0f} samples/s by the estimate."]
    page = Page(f"{run.settings.model.name} on {cluster.name}", lead, sections)
    write_whole(file, html(page))


def _memory(run: DryRun) -> Markup:
    """Tables' own bytes stacked, the rest (buffers of lookups, search, dense parameters) on top."""
    figure, (axis,) = panels(height=2.8)
    ranks, on_cpu = run.settings.cluster.ranks, run.settings.cluster.device == "cpu"
    total = np.array([rank.host_bytes if on_cpu else rank.device_bytes for rank in run.ranks]) / GIB
    # Tables too small to be seen are left to the grey rest.
    seen = [table for table in run.tables if table.bytes > 0.01 * sum(each.bytes for each in run.tables)]
    largest = sorted(seen, key=lambda table: table.bytes, reverse=True)[:4]
    rank_R, below_R = np.arange(ranks), np.zeros(ranks)
    for table, color in zip(largest, PALETTE, strict=False):
        held_R = np.zeros(ranks)
        if not table.on_host:
            for rank, rows in zip(table.ranks, table.shard_rows, strict=True):
                held_R[rank] += rows * (table.bytes / table.rows) / GIB
        axis.fill_between(rank_R, below_R, below_R + held_R, step="mid", color=color, label=table.name, linewidth=0)
        below_R += held_R
    # Never negative, should the tables here add up to more than the planner's figure.
    rest_R = np.maximum(total, below_R)
    axis.fill_between(rank_R, below_R, rest_R, step="mid", color=PALE_GREY, label="buffers and others", linewidth=0)
    cluster = run.settings.cluster
    there = cluster.host_memory / cluster.devices_per_node if on_cpu else cluster.device_memory
    # Far above, the line would press everything else to the ground.
    if there / GIB < 6 * total.max():
        axis.axhline(there / GIB, color=RED, linestyle="--", label="memory there is")
    if ranks == 1:
        axis.set_xlim(-0.5, 0.5)
    else:
        # `step="mid"` draws half a rank at both ends; with many ranks that is narrower than a line.
        axis.set_xlim(0 if ranks > 16 else -0.5, ranks - (1 if ranks > 16 else 0.5))
    axis.set_ylim(0)
    axis.set_xlabel("rank")
    axis.set_ylabel("GiB")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return svg(figure, "memory")


def _step(run: DryRun) -> Markup:
    figure, (axis,) = panels(height=2.6)
    left = np.zeros(len(SEARCHES))
    for phase, color in zip(PHASES, PALETTE, strict=False):
        ms = np.array([run.steps[search].phases()[phase].ms for search in SEARCHES])
        axis.barh(SEARCHES, ms, left=left, color=color, label=phase)
        left += ms
    for search, total in zip(SEARCHES, left, strict=True):
        axis.annotate(f" {total:,.1f} ms", (total, search), va="center")
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel("ms")
    axis.set_ylabel("search")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return svg(figure, "step")


def _parts(run: DryRun) -> Markup:
    figure, (axis,) = panels(height=3.8)
    parts: dict[tuple[str, str], float] = {}
    for cost in run.step.costs:
        parts[cost.phase, cost.what] = parts.get((cost.phase, cost.what), 0) + cost.ms
    longest = sorted(parts.items(), key=lambda part: part[1], reverse=True)[:10]
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
    figure, (of_time, of_memory) = panels(2, height=3.6)
    along = next(iter(points[0][0]))
    lines: dict[tuple[tuple[str, int], ...], list[tuple[int, float, float]]] = {}
    for point, run in points:
        # What does not fit has no point.
        rest = tuple((name, value) for name, value in point.items() if name != along)
        if run.feasible:
            on_cpu = run.settings.cluster.device == "cpu"
            fullest = max(rank.host_bytes if on_cpu else rank.device_bytes for rank in run.ranks)
            lines.setdefault(rest, []).append((point[along], run.step.ms, fullest / GIB))
    for (rest, values), color in zip(lines.items(), cycle(PALETTE), strict=False):
        label = ", ".join(f"{name} {value:,}" for name, value in rest) or None
        x, ms, gib = zip(*values, strict=True)
        of_time.plot(x, ms, color=color, marker="o", label=label)
        of_memory.plot(x, gib, color=color, marker="o", label=label)
    for axis, name in ((of_time, "ms a step"), (of_memory, "GiB of the fullest rank")):
        axis.set_xscale("log", base=2)
        ticks = sorted({point[along] for point, _ in points})
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel(along)
        axis.set_ylabel(name)
        axis.set_ylim(0)
    if any(rest for rest in lines):
        of_memory.legend(frameon=False)
    return svg(figure, "sweep")

"""A dry run as lines of text for people, and as a JSON object for programs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from embeddings.planning import RESERVED, size_text
from embeddings.workload import Search
from pipeline.planning.dry_run import DryRun
from pipeline.reporting.text_table import prose_lines, table_lines

GIB = 1 << 30
SEARCHES: tuple[Search, ...] = ("shard", "local")
LARGEST_ID = 2**31 - 1
"""The largest id of a data set, whose ids are int32."""


def as_dict(run: DryRun) -> dict[str, Any]:
    """The dry run as the object of ``dare plan --json``; see docs/planning.md."""
    document: dict[str, Any] = {
        "feasible": run.feasible,
        "ranks": run.settings.cluster.ranks,
        "seconds": round(run.seconds, 3),
        "tables": [
            {
                "name": table.name,
                "rows": table.rows,
                "dim": table.dim,
                "sharding_type": table.sharding_type,
                "compute_kernel": table.compute_kernel,
                "shards": len(table.ranks),
                "bytes": table.bytes,
            }
            for table in run.tables
        ],
    }
    if run.lack is not None:
        return document | {
            "lack": vars(run.lack),
            "max_device_gib": None,
            "step_ms": None,
            "bytes_per_sample": None,
        }
    # Of a model that fits. Keys are part of the interface: programs read them.
    hours = device_hours(run)
    price = run.settings.cluster.price
    return document | {
        "rows": sum(table.rows for table in run.tables),
        "max_device_gib": round(max(rank.device_bytes for rank in run.ranks) / GIB, 3),
        "max_host_gib": round(max(rank.host_bytes for rank in run.ranks) / GIB, 3),
        "search": run.search,
        "step_ms": {where: round(step.ms, 3) for where, step in run.steps.items()},
        "bytes_per_sample": {where: round(step.bytes_per_sample) for where, step in run.steps.items()},
        "phases_ms": {
            where: {phase: round(cost.ms, 3) for phase, cost in step.phases().items()}
            for where, step in run.steps.items()
        },
        "samples_per_second": round(run.samples_per_second),
        "device_hours": round(hours, 3),
        "cost": None if price is None else round(hours * price, 2),
    }


def fullest(run: DryRun) -> int:
    """Bytes of the rank that has most, of the device's memory or, on a CPU, of the host's."""
    on_cpu = run.settings.cluster.device == "cpu"
    return max(rank.host_bytes if on_cpu else rank.device_bytes for rank in run.ranks)


def device_hours(run: DryRun) -> float:
    """Hours of all devices together until the settings' samples are trained on."""
    return run.settings.workload.samples / run.samples_per_second / 3600 * run.settings.cluster.ranks


def report(run: DryRun, width: int | None = None) -> Iterator[str]:
    """Lines of text about a dry run: its tables, memory, a step, and what training takes.

    Args:
        run: one that does not fit gives the lines about the memory that lacks alone.
        width: columns that a line may have; None: any number.
    """
    for part in _report(run):
        yield from prose_lines(part, width) if isinstance(part, str) else part.lines(width)


@dataclass(frozen=True)
class _Table:
    rows: list[list[str]]
    """The header, and the rows below it."""
    left: tuple[int, ...] = (0,)

    def lines(self, width: int | None) -> Iterator[str]:
        header, *rows = self.rows
        return table_lines(header, rows, left=self.left, width=width)


def _report(run: DryRun) -> Iterator[str | _Table]:
    cluster, settings = run.settings.cluster, run.settings
    nodes = f"{cluster.nodes:,} nodes" if cluster.nodes > 1 else "1 node"
    yield (
        f"{settings.model.name} on {cluster.name}: {cluster.ranks:,} ranks, {nodes} x {cluster.devices_per_node} "
        f"{cluster.device_name}"
    )
    yield f"figures of the cluster: {cluster.measured or 'from data sheets, not measured'}"
    if run.lack is not None:
        yield f"does not fit: {run.lack}"
        return
    load = settings.workload
    yield f"a history serves {load.targets_per_user:.3g} targets of a batch, and fills {load.filled:.0%} of its length"
    yield f"fits; planned in {run.seconds:.1f} s"
    yield ""
    yield from _tables(run)
    yield ""
    yield from _memory(run)
    yield ""
    yield from _step(run)
    yield ""
    yield from _training(run)
    yield from _remarks(run)


def _tables(run: DryRun) -> Iterator[_Table]:
    rows = [["table", "rows", "dim", "sharding", "kernel", "ranks", "rows a shard", "size", "optimizer"]]
    for table in run.tables:
        where = f"{len(table.ranks):,}" if len(table.ranks) > 1 else f"rank {table.ranks[0]}"
        rows.append(
            [
                table.name,
                f"{table.rows:,}",
                str(table.dim),
                table.sharding_type,
                table.compute_kernel,
                where,
                f"{max(table.shard_rows):,}",
                size_text(table.weight_bytes),
                size_text(table.state_bytes),
            ]
        )
    declared = sum(table.rows for table in run.tables)
    total = sum(table.weight_bytes for table in run.tables), sum(table.state_bytes for table in run.tables)
    rows.append(["all", f"{declared:,}", "", "", "", "", "", size_text(total[0]), size_text(total[1])])
    yield _Table(rows, left=(0, 3, 4))


def _memory(run: DryRun) -> Iterator[str | _Table]:
    cluster = run.settings.cluster
    rows = [["memory of a rank", "least", "mean", "most", "there is"]]
    host_share = cluster.host_memory / cluster.devices_per_node
    for name, loads, there in (
        ("device", [rank.device_bytes for rank in run.ranks], cluster.device_memory),
        ("host", [rank.host_bytes for rank in run.ranks], host_share),
    ):
        # A CPU has no device memory: no row about nothing.
        if there:
            mean = sum(loads) / len(loads)
            rows.append([name, size_text(min(loads)), size_text(mean), size_text(max(loads)), size_text(there)])
    yield _Table(rows)
    shares = [rank.lookups for rank in run.ranks]
    yield (
        f"rows looked up: the busiest rank {max(shares):.3%} of all, {max(shares) * len(shares):.2f} x the mean; "
        f"{RESERVED:.0%} of the memory stays free"
    )


def _step(run: DryRun) -> Iterator[str | _Table]:
    head = ["a step of a rank"]
    for where in SEARCHES:
        # Both searches side by side, of the same plan: what the other would cost.
        head += [f"search={where}: ms", f"{where}: in node", f"{where}: between"]
    rows = [head]
    phases = {where: step.phases() for where, step in run.steps.items()}
    for phase in phases["shard"]:
        row = [str(phase)]
        for where in SEARCHES:
            cost = phases[where][phase]
            row += [f"{cost.ms:,.2f}", size_text(cost.within_node), size_text(cost.between_nodes)]
        rows.append(row)
    totals = ["all"]
    for where in SEARCHES:
        costs = run.steps[where].costs
        totals += [
            f"{run.steps[where].ms:,.2f}",
            size_text(sum(cost.within_node for cost in costs)),
            size_text(sum(cost.between_nodes for cost in costs)),
        ]
    yield _Table([*rows, totals])
    shard, local = (run.steps[where] for where in SEARCHES)
    yield (
        f"sent for a sample: {size_text(shard.bytes_per_sample)} with search=shard, "
        f"{size_text(local.bytes_per_sample)} with search=local; "
        f"a step of search=local takes {local.ms / shard.ms:.2f} x as long"
    )
    if run.searched != "shard":
        yield f"{run.settings.model.name} searches {run.searched}: search=shard changes nothing"
    # The three that are worth a thought, by name.
    slowest = sorted(run.step.costs, key=lambda cost: cost.ms, reverse=True)[:3]
    parts = ", ".join(f"{cost.what} ({cost.phase}) {cost.ms:,.2f} ms" for cost in slowest)
    yield f"slowest with search={run.search}: {parts}"


def _training(run: DryRun) -> Iterator[str]:
    settings, hours = run.settings, device_hours(run)
    days = hours / settings.cluster.ranks / 24
    samples = f"{settings.workload.samples:,} samples"
    price = settings.cluster.price
    cost = "" if price is None else f", {hours * price:,.2f} at {price:,.2f} a device-hour"
    yield (f"{run.samples_per_second:,.0f} samples/s; {samples} in {_time(days)}, {hours:,.1f} device-hours{cost}")


def _remarks(run: DryRun) -> Iterator[str]:
    largest = max(run.tables, key=lambda table: table.rows)
    if largest.rows - 1 > LARGEST_ID:
        yield (
            f"note: table {largest.name} has more rows than the int32 ids of a data set can name ({LARGEST_ID:,}); "
            "this plan is of the memory and the traffic"
        )


def sweep_lines(points: Sequence[tuple[dict[str, int], DryRun]], width: int | None = None) -> Iterator[str]:
    """Lines of a table of a sweep: a row for each dry run, with the values that it is of.

    Args:
        points: at least one.
        width: columns that a line may have; None: any number.
    """
    names = list(points[0][0])
    header = [*names, "fits", "memory", *(f"{search}: ms" for search in SEARCHES)]
    header += [*(f"{search}: sent for a sample" for search in SEARCHES), "samples/s"]
    rows = []
    for point, run in points:
        row = [*(f"{value:,}" for value in point.values()), "yes" if run.feasible else "no"]
        if run.feasible:
            steps = [run.steps[search] for search in SEARCHES]
            row += [size_text(fullest(run)), *(f"{step.ms:,.2f}" for step in steps)]
            row += [*(size_text(step.bytes_per_sample) for step in steps), f"{run.samples_per_second:,.0f}"]
        rows.append(row + ["-"] * (len(header) - len(row)))
    return table_lines(header, rows, left=(), labels=len(names), width=width)


def _time(days: float) -> str:
    if days >= 2:
        return f"{days:,.1f} days"
    hours, minutes = days * 24, days * 1440
    return (
        f"{hours:,.1f} hours" if hours >= 2 else f"{minutes:,.1f} minutes" if minutes >= 2 else f"{minutes * 60:,.1f} s"
    )

"""A summary as tables to read: framed on a terminal, plain elsewhere."""

from datetime import UTC, datetime
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.inspect.summary import QUANTILES, Histogram, Summary, describe


def print_summary(folder: Path, summary: Summary, console: Console) -> None:
    """Print counts, distributions, targets of each split and columns."""
    framed = console.is_terminal
    for table in (_counts(folder, summary), _distributions(summary), _targets(summary), _columns(summary)):
        table.box = box.ROUNDED if framed else None
        table.title_justify = "left"
        console.print(table)
        console.print()


def _counts(folder: Path, summary: Summary) -> Table:
    counts = summary.counts
    table = _table(str(folder), "", "count", "")
    average = f"{counts.behaviors / max(counts.users, 1):.1f} a user"
    period = f"{_day(counts.first_timestamp)} to {_day(counts.last_timestamp)}"
    table.add_row("events read", f"{counts.events:,}", period)
    if summary.skipped:
        table.add_row("input files left out", f"{len(summary.skipped):,}", summary.skipped[0])
    table.add_row("users", f"{counts.users:,}", f"{counts.users_left_out:,} left out")
    table.add_row("behaviours", f"{counts.behaviors:,}", average)
    table.add_row("items", f"{counts.items:,}", f"{counts.items_with_changed_category:,} changed category")
    table.add_row("categories", f"{counts.categories:,}", "")
    table.add_row("shards", f"{summary.shards:,}", f"{summary.row_groups:,} row groups")
    per_user = f"{summary.bytes / max(counts.users, 1):,.1f} a user"
    per_behavior = f"{summary.bytes / max(counts.behaviors, 1):.2f} a behaviour"
    table.add_row("bytes of shards", f"{summary.bytes:,}", f"{per_user}, {per_behavior}")
    table.add_row("bytes of dictionaries", f"{summary.dictionary_bytes:,}", "")
    return table


def _distributions(summary: Summary) -> Table:
    table = _table("distributions", "", *QUANTILES)
    _describe(table, "behaviours of a user", summary.lengths)
    for name, split in summary.splits.items():
        _describe(table, f"{name} targets of a user", split.per_user)
    for name, split in summary.splits.items():
        _describe(table, f"behaviours before a {name} target", split.history_end)
    return table


def _describe(table: Table, name: str, histogram: Histogram) -> None:
    table.add_row(
        name, *(f"{value:,.2f}" if key == "mean" else f"{value:,}" for key, value in describe(histogram).items())
    )


def _targets(summary: Summary) -> Table:
    table = _table("targets", "", "targets", "positives", "label rate")
    for name, split in summary.splits.items():
        rate = f"{split.positives / split.targets:.4f}" if split.targets else "-"
        table.add_row(name, f"{split.targets:,}", f"{split.positives:,}", rate)
    return table


def _columns(summary: Summary) -> Table:
    table = _table(
        "columns of the shards", "", "bytes", "share", "bytes a value", "compressed to", "encoding", "compression"
    )
    total = max(sum(column.bytes for column in summary.columns.values()), 1)
    for name, column in summary.columns.items():
        table.add_row(
            name,
            f"{column.bytes:,}",
            f"{column.bytes / total:.1%}",
            f"{column.bytes / max(column.values, 1):.2f}",
            f"{column.bytes / max(column.uncompressed, 1):.0%}",
            ", ".join(sorted(column.encodings)),
            ", ".join(sorted(column.compressions)),
        )
    return table


def _table(title: str, *columns: str) -> Table:
    """A table whose first column holds names and whose others hold numbers, or text after a number."""
    table = Table(title=title)
    for position, column in enumerate(columns):
        text = position == 0 or column in ("", "encoding", "compression")
        table.add_column(column, justify="left" if text else "right", no_wrap=True)
    return table


def _day(timestamp: int) -> str:
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d")

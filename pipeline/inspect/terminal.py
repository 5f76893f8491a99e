"""A summary as tables to read."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.inspect.features import FeatureSummary, Numbers
from pipeline.inspect.summary import QUANTILES, Histogram, Summary, describe
from pipeline.reporting.text_table import table_lines
from schemas.manifest import Chain, LogCounts

_HEIGHTS = " .:-=+*#"
_LONGEST = 30
"""Letters of a raw value that are shown."""


def summary_lines(folder: Path, summary: Summary, width: int | None = None) -> Iterator[str]:
    """Lines of counts, distributions, targets of each split, features and columns.

    Args:
        folder: the data set.
        summary: of the same data set.
        width: columns that a line may have; None: any number.
    """
    for (header, *rows), left in (
        (_counts(folder, summary), (0, 2)),
        (_distributions(summary), (0,)),
        (_targets(summary), (0,)),
        (_features(summary), (0, 1, 2, 6)),
        (_columns(summary), (0, 5, 6)),
    ):
        yield from table_lines(header, rows, left=left, width=width)
        yield ""


def _counts(folder: Path, summary: Summary) -> list[Sequence[str]]:
    counts = summary.counts
    average = f"{counts.behaviors / max(counts.users, 1):.1f} a user"
    period = f"{_day(counts.first_timestamp)} to {_day(counts.last_timestamp)}"
    per_user = f"{summary.bytes / max(counts.users, 1):,.1f} a user"
    per_behavior = f"{summary.bytes / max(counts.behaviors, 1):.2f} a behaviour"
    skipped = [("input files left out", f"{len(summary.skipped):,}", summary.skipped[0])] if summary.skipped else []
    reasons = [f"{number:,} {reason.replace('_', ' ')}" for reason, number in counts.users_left_out_by_reason.items()]
    users_left_out = f"{counts.users_left_out:,} left out" + (f": {', '.join(reasons)}" if reasons else "")
    return [
        (str(folder), "count", ""),
        *([("events", f"{counts.events:,}", period)] if counts.events_read is None else []),
        *(row for log in counts.logs() for row in _lines(log, period if log.role == "events" else "")),
        *skipped,
        ("users", f"{counts.users:,}", users_left_out),
        ("behaviours", f"{counts.behaviors:,}", average),
        ("items", f"{counts.items:,}", f"{counts.items_with_changed_category:,} changed category"),
        ("categories", f"{counts.categories:,}", ""),
        ("shards", f"{summary.shards:,}", f"{summary.row_groups:,} row groups"),
        ("bytes of shards", f"{summary.bytes:,}", f"{per_user}, {per_behavior}"),
        ("bytes of dictionaries", f"{summary.dictionary_bytes:,}", ""),
        *_chain(summary.chain),
    ]


def _chain(chain: Chain | None) -> list[Sequence[str]]:
    """What a day of a chain has brought."""
    if chain is None:
        return []
    layers = ", ".join(
        f"{layer.first_day}" if layer.first_day == layer.last_day else f"{layer.first_day} to {layer.last_day}"
        for layer in chain.layers
    )
    table = []
    if chain.rows is not None:
        note = f"{chain.rows_given:,} given on this day, {chain.rows_free:,} free, {chain.evicted:,} items evicted"
        table = [("rows of the item table", f"{chain.rows:,}", note)]
    return [
        ("day of the chain", f"{chain.number:,}", f"{_day(chain.first_timestamp)} to {_day(chain.last_timestamp)}"),
        ("  new items", f"{chain.new_items:,}", ""),
        ("  new users", f"{chain.new_users:,}", ""),
        *table,
        ("layers of histories", f"{len(chain.layers):,}", f"of days {layers}" if layers else "no day can follow"),
    ]


def _lines(log: LogCounts, note: str) -> list[Sequence[str]]:
    """What became of the lines of a log."""
    return [
        (f"{log.role} read", f"{log.read:,}", note),
        *(
            (f"  {why.replace('_', ' ')}", f"{number:,}", f"{number / log.read:.1%}")
            for why, number in log.left_out.items()
        ),
        ("  kept", f"{log.kept:,}", f"{log.repeated:,} with user, item and time of another one"),
    ]


def _distributions(summary: Summary) -> list[Sequence[str]]:
    return [
        ("distribution of", *QUANTILES),
        _described("behaviours of a user", summary.lengths),
        *(_described(f"{name} targets of a user", split.per_user) for name, split in summary.splits.items()),
        *(
            _described(f"behaviours before a {name} target", split.history_end)
            for name, split in summary.splits.items()
        ),
    ]


def _described(name: str, histogram: Histogram) -> Sequence[str]:
    # Of nothing there is no smallest and no mean: not 0, which would be a value.
    if not histogram.seen:
        return name, *["-"] * len(QUANTILES)
    return name, *(f"{value:,.2f}" if key == "mean" else f"{value:,}" for key, value in describe(histogram).items())


def _targets(summary: Summary) -> list[Sequence[str]]:
    rates = {name: _rate(split.positives, split.targets) for name, split in summary.splits.items()}
    # The main label's rate is the first one.
    more = dict(list(summary.features.labels.items())[1:])
    return [
        ("split", "targets", "positives", "label rate", *(f"{label} rate" for label in more)),
        *(
            (
                name,
                f"{split.targets:,}",
                f"{split.positives:,}",
                rates[name],
                *(_rate(more[label][name].positives, more[label][name].known) for label in more),
            )
            for name, split in summary.splits.items()
        ),
    ]


def _rate(part: int, of: int) -> str:
    return f"{part / of:.4f}" if of else "-"


def _features(summary: Summary) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for name, feature in summary.features.of.items():
        record, missing = feature.record, feature.missing_share
        rows.append(
            (
                name,
                record.of,
                f"{record.kind}, {record.encoding}",
                "-" if record.is_number else f"{record.rows:,}",
                "-" if missing is None else f"{missing:.1%}",
                f"{record.below_min_count / record.values:.1%}" if record.values else "-",
                _values(feature),
            )
        )
    if summary.features.weights is not None:
        rows.append(("weight", "impression", "number", "-", "-", "-", _spread(summary.features.weights)))
    return [("feature", "of", "kind", "rows", "missing", "rare", "most frequent, or how numbers are spread"), *rows]


def _values(feature: FeatureSummary) -> str:
    if feature.numbers is not None:
        return _spread(feature.numbers)
    if feature.record.edges is not None:
        edges = feature.record.edges
        return f"{_bars(feature.count_V[1:])} quantiles from {edges[0]:g} to {edges[-1]:g}"
    places = max(feature.places, 1)
    return ", ".join(f"{_short(value)} {count / places:.1%}" for value, count in feature.frequent) or "-"


def _spread(numbers: Numbers) -> str:
    said = numbers.to_json()
    if not numbers.seen:
        return "-"
    return f"{_bars(numbers.count_B)} min {said['min']:g}, mean {said['mean']:g}, max {said['max']:g}"


def _bars(count_B: NDArray[np.int64]) -> str:
    """A histogram as one letter a bin: the higher, the more."""
    heights = np.ceil(count_B * (len(_HEIGHTS) - 1) / max(count_B.max(initial=0), 1)).astype(int)
    return "[" + "".join(_HEIGHTS[height] for height in heights) + "]"


def _short(value: str) -> str:
    return value if len(value) <= _LONGEST else value[:_LONGEST] + "..."


def _columns(summary: Summary) -> list[Sequence[str]]:
    total = max(sum(column.bytes for column in summary.columns.values()), 1)
    return [
        ("column", "bytes", "share", "bytes a value", "of raw size", "encoding", "codec"),
        *(
            (
                name,
                f"{column.bytes:,}",
                f"{column.bytes / total:.1%}",
                f"{column.bytes / max(column.values, 1):.2f}",
                f"{column.bytes / max(column.uncompressed, 1):.0%}",
                ", ".join(sorted(column.encodings)),
                ", ".join(sorted(column.compressions)),
            )
            for name, column in summary.columns.items()
        ),
    ]


def _day(timestamp: int) -> str:
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d")

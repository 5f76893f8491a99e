"""Exact distribution of small integers: memory grows with the largest value, not with how many there are.

How frequency is spread over items and categories, and over ranges of ids, from the dictionaries.

W = equal ranges of dense ids, as row-wise sharding cuts a table.

Numbers of a data set, from one pass over its row groups that reads labels, splits and the lengths of lists.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from schemas.errors import UserError
from schemas.manifest import Counts, Manifest
from schemas.shards import SPLITS


class Histogram:
    """How often each value 0, 1, 2, ... was seen."""

    def __init__(self) -> None:
        self.count_V: NDArray[np.int64] = np.zeros(0, np.int64)

    def add(self, values: NDArray[Any]) -> None:
        """Count values, integers of any type and at least 0."""
        count_V = np.bincount(values, minlength=len(self.count_V)).astype(np.int64)
        count_V[: len(self.count_V)] += self.count_V
        self.count_V = count_V

    @property
    def seen(self) -> int:
        """How many values were counted."""
        return int(self.count_V.sum())

    @property
    def sum(self) -> int:
        """Sum of the values."""
        return int(self.count_V @ np.arange(len(self.count_V)))

    def quantiles(self, fractions: Sequence[float]) -> list[int]:
        """For each fraction (0 .. 1), the smallest value that so many do not exceed; 0 where none was counted."""
        if not self.seen:
            return [0] * len(fractions)
        needed = np.maximum(np.ceil(np.asarray(fractions) * self.seen), 1)
        quantiles: list[int] = np.searchsorted(np.cumsum(self.count_V), needed).tolist()
        return quantiles


@dataclass(frozen=True)
class Popularity:
    """Of one dictionary."""

    frequency_F: NDArray[np.int64]
    """The different frequencies, falling."""
    ids_F: NDArray[np.int64]
    """How many ids have each."""
    load_W: NDArray[np.int64]
    """Sum of the frequencies in each range of ids."""

    @property
    def imbalance(self) -> float:
        """The largest load over the mean: 1 is perfect."""
        mean = self.load_W.mean()
        return float(self.load_W.max() / mean) if mean else 1.0


def read_popularity(path: Path, ids: int, ranges: int) -> Popularity:
    """Read a dictionary, batch by batch; memory grows with the number of different frequencies only.

    Args:
        path: dictionary with the columns id and frequency.
        ids: number of dense ids but 0, which is the unknown.
        ranges: W.

    Raises:
        UserError: the file cannot be read, or holds an id above ``ids``.
    """
    rows_of_range = -(-(ids + 1) // ranges)
    load_W = np.zeros(ranges, np.int64)
    frequency_F = ids_F = np.zeros(0, np.int64)
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=["id", "frequency"]):
                id_B, frequency_B = batch["id"].to_numpy(), batch["frequency"].to_numpy()
                if len(id_B) and not 1 <= id_B.min() <= id_B.max() <= ids:
                    raise UserError(f"ids from {id_B.min()} to {id_B.max()}, the manifest says 1 to {ids}")
                np.add.at(load_W, id_B // rows_of_range, frequency_B)
                frequency_F, index = np.unique(np.concatenate([frequency_F, frequency_B]), return_inverse=True)
                ids_F = _sums(index, np.concatenate([ids_F, np.ones(len(id_B), np.int64)]), len(frequency_F))
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read ({reason}); prepare the data set again") from None
    return Popularity(frequency_F[::-1], ids_F[::-1], load_W)


def _sums(index: NDArray[np.int64], values: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    sums = np.zeros(size, np.int64)
    np.add.at(sums, index, values)
    return sums


QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "mean": None, "p90": 0.9, "p99": 0.99, "max": 1.0}
"""What is told of a distribution: values that a fraction does not exceed, and the mean."""


@dataclass
class SplitSummary:
    """Targets of a split."""

    targets: int = 0
    positives: int = 0
    per_user: Histogram = field(default_factory=Histogram)
    """Targets of each user, those without any included."""
    history_end: Histogram = field(default_factory=Histogram)
    """Behaviours before each target."""


@dataclass
class ColumnSummary:
    """A column of the shards, all of them together."""

    encodings: set[str] = field(default_factory=set)
    compressions: set[str] = field(default_factory=set)
    bytes: int = 0
    """In the files, compressed."""
    uncompressed: int = 0
    """Encoded, but not compressed."""
    values: int = 0


@dataclass
class Summary:
    """What ``dare inspect`` tells."""

    counts: Counts
    shards: int
    row_groups: int
    bytes: int
    """Of the shards."""
    dictionary_bytes: int
    """Of the other files."""
    lengths: Histogram
    """Behaviours of each user."""
    splits: dict[str, SplitSummary]
    columns: dict[str, ColumnSummary]
    skipped: tuple[str, ...]
    """Corrupt input files that were left out, with the reason."""

    def to_json(self) -> dict[str, Any]:
        """The numbers as JSON's types."""
        users, behaviors = max(self.counts.users, 1), max(self.counts.behaviors, 1)
        return {
            **self.counts.model_dump(mode="json", exclude=set(SPLITS)),
            "shards": self.shards,
            "row_groups": self.row_groups,
            "bytes": self.bytes,
            "dictionary_bytes": self.dictionary_bytes,
            "skipped_files": len(self.skipped),
            "bytes_per_user": round(self.bytes / users, 2),
            "bytes_per_behavior": round(self.bytes / behaviors, 3),
            "history_length": describe(self.lengths),
            "splits": {
                name: {
                    "targets": split.targets,
                    "label_rate": round(split.positives / split.targets, 6) if split.targets else None,
                    "per_user": describe(split.per_user),
                    "history_end": describe(split.history_end),
                }
                for name, split in self.splits.items()
            },
            "columns": {
                name: {
                    "encodings": sorted(column.encodings),
                    "compressions": sorted(column.compressions),
                    "bytes": column.bytes,
                    "uncompressed": column.uncompressed,
                    "values": column.values,
                }
                for name, column in self.columns.items()
            },
        }


def describe(histogram: Histogram) -> dict[str, float]:
    """``QUANTILES`` of a distribution."""
    fractions = [fraction for fraction in QUANTILES.values() if fraction is not None]
    quantiles = iter(histogram.quantiles(fractions))
    mean = round(histogram.sum / max(histogram.seen, 1), 2)
    return {name: mean if fraction is None else next(quantiles) for name, fraction in QUANTILES.items()}


def summarize(folder: Path, *, verify: bool = False) -> Summary:
    """Read a data set.

    Args:
        folder: the data set, as ``dare prepare`` writes it.
        verify: compare the checksums of all files as well.

    Raises:
        UserError: not a data set, or one whose files are damaged or do not hold what the manifest says.
    """
    manifest = Manifest.read(folder)
    if verify:
        manifest.verify(folder)
    summary = Summary(
        manifest.counts,
        len(manifest.shards),
        sum(shard.row_groups for shard in manifest.shards),
        sum(shard.bytes for shard in manifest.shards),
        sum(file.bytes for file in manifest.files),
        Histogram(),
        {name: SplitSummary() for name in SPLITS},
        {},
        manifest.skipped,
    )
    for shard in manifest.shards:
        path = folder / shard.path
        try:
            with pq.ParquetFile(path) as file:
                _add_columns(summary, file.metadata)
                for row_group in range(file.num_row_groups):
                    _add_users(summary, file, row_group)
        except (OSError, KeyError, IndexError, ValueError, pa.ArrowException) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path}: cannot be read ({reason}); prepare the data set again") from None
    _compare(folder, summary)
    return summary


def _add_columns(summary: Summary, metadata: pq.FileMetaData) -> None:
    for row_group in range(metadata.num_row_groups):
        for position in range(metadata.num_columns):
            chunk = metadata.row_group(row_group).column(position)
            column = summary.columns.setdefault(chunk.path_in_schema.split(".")[0], ColumnSummary())
            # Levels of lists are always run lengths: not what the values are encoded as.
            column.encodings |= {encoding for encoding in chunk.encodings if encoding != "RLE"}
            column.compressions.add(chunk.compression)
            column.bytes += chunk.total_compressed_size
            column.uncompressed += chunk.total_uncompressed_size
            column.values += chunk.num_values


def _add_users(summary: Summary, file: pq.ParquetFile, row_group: int) -> None:
    # Parquet keeps the lengths of lists beside their values: the smallest history column gives them most cheaply.
    smallest = min(
        (name for name in summary.columns if name.startswith("history_")), key=lambda name: summary.columns[name].bytes
    )
    names = [smallest, "target_label", "target_split", "target_history_end"]
    table = file.read_row_group(row_group, columns=names).combine_chunks()
    lists = {name: table[name].chunk(0) for name in names if table[name].num_chunks}
    if not lists:
        return
    summary.lengths.add(np.diff(lists[smallest].offsets.to_numpy()))
    label, split, history_end = (lists[name].flatten().to_numpy() for name in names[1:])
    user = np.repeat(np.arange(len(table)), np.diff(lists["target_split"].offsets.to_numpy()))
    for code, found in enumerate(summary.splits.values()):
        chosen = split == code
        found.targets += int(chosen.sum())
        found.positives += int((label[chosen] != 0).sum())
        found.per_user.add(np.bincount(user[chosen], minlength=len(table)))
        found.history_end.add(history_end[chosen])


def _compare(folder: Path, summary: Summary) -> None:
    """The manifest tells the truth about the shards."""
    told = summary.counts
    pairs = {
        "users": (summary.lengths.seen, told.users),
        "behaviours": (summary.lengths.sum, told.behaviors),
    }
    for name, split in summary.splits.items():
        pairs[f"{name} targets"] = (split.targets, getattr(told, name).targets)
        pairs[f"{name} positives"] = (split.positives, getattr(told, name).positives)
    for name, (found, expected) in pairs.items():
        if found != expected:
            raise UserError(
                f"{folder}: the shards hold {found} {name}, the manifest says {expected}; prepare the data set again"
            )

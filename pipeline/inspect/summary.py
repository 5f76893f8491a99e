"""What is in a data set: counts and distributions, from one pass over features, labels, splits and lengths of lists.

Distributions are exact: a histogram has an entry for each value, so that memory grows with the largest value and not
with the number of users or targets.

V = values 0, 1, 2, ... of a histogram.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.inspect.features import Features
from pipeline.stream.data_set import DataSet
from pipeline.stream.row_group import flat_column, list_column
from pipeline.stream.shard_file import ShardFile
from schemas.errors import UserError
from schemas.manifest import Chain, Counts, Manifest
from schemas.shards import SPLITS

QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "mean": None, "p90": 0.9, "p99": 0.99, "max": 1.0}
"""What is said of a distribution: values that a fraction does not exceed, and the mean."""


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
        # At least one value: the fraction 0 asks for the smallest that was seen.
        needed = np.maximum(np.ceil(np.asarray(fractions) * self.seen), 1)
        return [int(value) for value in np.searchsorted(np.cumsum(self.count_V), needed)]


@dataclass
class SplitSummary:
    """Targets of a split."""

    targets: int = 0
    positives: int = 0
    per_user: Histogram = field(default_factory=Histogram)
    """Number of targets of each user; users without any count as 0."""
    history_end: Histogram = field(default_factory=Histogram)
    """Number of behaviours before each target."""


@dataclass
class ColumnSummary:
    """A column, over all shards."""

    encodings: set[str] = field(default_factory=set)
    compressions: set[str] = field(default_factory=set)
    bytes: int = 0
    """Size in the files, compressed."""
    uncompressed: int = 0
    """Size when encoded, but not compressed."""
    values: int = 0


@dataclass
class Summary:
    """What ``dare inspect`` says about a data set."""

    counts: Counts
    shards: int
    row_groups: int
    bytes: int
    """Size of the shards."""
    dictionary_bytes: int
    """Size of the other files."""
    lengths: Histogram
    """Number of behaviours of each user."""
    splits: dict[str, SplitSummary]
    columns: dict[str, ColumnSummary]
    features: Features
    skipped: tuple[str, ...]
    """Corrupt input files that were left out, with the reason."""
    chain: Chain | None
    """The days that the data set continues; None: no day can follow."""

    def to_json(self) -> dict[str, Any]:
        """The numbers in types that JSON knows."""
        users, behaviors = max(self.counts.users, 1), max(self.counts.behaviors, 1)
        return {
            **self.counts.model_dump(mode="json", exclude=set(SPLITS)),
            "shards": self.shards,
            "row_groups": self.row_groups,
            "bytes": self.bytes,
            "dictionary_bytes": self.dictionary_bytes,
            "skipped_files": len(self.skipped),
            "chain": None if self.chain is None else self.chain.summary(),
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
            "labels": {
                label: {
                    split: {
                        "known": of.known,
                        "positive_share": round(of.positives / of.known, 6) if of.known else None,
                    }
                    for split, of in of_splits.items()
                }
                for label, of_splits in self.features.labels.items()
            },
            "weights": None if self.features.weights is None else self.features.weights.to_json(),
            "features": {name: feature.to_json() for name, feature in self.features.of.items()},
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
    """The `QUANTILES` and the mean of a distribution."""
    fractions = [fraction for fraction in QUANTILES.values() if fraction is not None]
    quantiles = iter(histogram.quantiles(fractions))
    mean = round(histogram.sum / max(histogram.seen, 1), 2)
    return {name: mean if fraction is None else next(quantiles) for name, fraction in QUANTILES.items()}


def summarize(folder: Path, *, verify: bool = False) -> Summary:
    """Read a data set and count what it holds.

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
        Features(manifest, SPLITS),
        manifest.skipped,
        manifest.chain,
    )
    for shard in manifest.shards:
        path = folder / shard.path
        with ShardFile(path, shard) as file:
            _check_columns(path, file.schema, manifest)
            # Sizes and encodings are in the footer. Items and times are not read.
            _add_columns(summary, file.metadata)
            for row_group in range(file.metadata.num_row_groups):
                _add_users(path, summary, file, row_group)
    # Counted above, stated in the manifest: a data set whose parts were exchanged does not pass.
    _compare(folder, summary)
    summary.features.finish(DataSet.open(folder))
    return summary


def _check_columns(path: Path, schema: pa.Schema, manifest: Manifest) -> None:
    missing = [name for name in manifest.shard_schema.names if name not in schema.names]
    if missing:
        raise UserError(f"{path}: column {missing[0]} is missing; prepare the data set again")


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


def _add_users(path: Path, summary: Summary, file: ShardFile, row_group: int) -> None:
    # Parquet keeps the lengths of lists beside their values: the smallest history column gives them most cheaply.
    smallest = min(
        (name for name in summary.columns if name.startswith("history_")), key=lambda name: summary.columns[name].bytes
    )
    names = list(dict.fromkeys([smallest, "target_split", "target_history_end", *summary.features.all_columns]))
    table = file.read(row_group, names)
    # A row group without rows has nothing to count.
    if not len(table):
        return
    flat: dict[str, NDArray[Any]] = {}
    offsets: dict[str, NDArray[np.int64]] = {}
    try:
        for name in names:
            if pa.types.is_list(table.schema.field(name).type):
                offsets[name], flat[name] = list_column(name, table[name])
            else:
                flat[name] = flat_column(name, table[name]).to_numpy()
        label, split, history_end = flat["target_label"], flat["target_split"], flat["target_history_end"]
        if len(history_end) and history_end.min() < 0:
            raise UserError("column target_history_end points outside of the user's history")
        summary.features.add(flat, split)
    except UserError as error:
        raise UserError(f"{path}: {error}; prepare the data set again") from None
    summary.lengths.add(np.diff(offsets[smallest]))
    # Flat over all users: whose each target is.
    user = np.repeat(np.arange(len(table)), np.diff(offsets["target_split"]))
    for code, of_split in enumerate(summary.splits.values()):
        # Codes are in the order of the splits (`schemas.shards.Split`).
        chosen = split == code
        of_split.targets += int(chosen.sum())
        of_split.positives += int((label[chosen] > 0).sum())
        of_split.per_user.add(np.bincount(user[chosen], minlength=len(table)))
        of_split.history_end.add(history_end[chosen])


def _compare(folder: Path, summary: Summary) -> None:
    """Make sure that the manifest tells the truth about the shards."""
    stated = summary.counts
    pairs = {
        "users": (summary.lengths.seen, stated.users),
        "behaviours": (summary.lengths.sum, stated.behaviors),
    }
    for name, split in summary.splits.items():
        pairs[f"{name} targets"] = (split.targets, getattr(stated, name).targets)
        pairs[f"{name} positives"] = (split.positives, getattr(stated, name).positives)
    for name, (counted, expected) in pairs.items():
        if counted != expected:
            raise UserError(
                f"{folder}: the shards hold {counted} {name}, the manifest says {expected}; prepare the data set again"
            )

"""What each feature of a data set holds, counted where it stands: behaviours, items, users, impressions.

V = ids of a feature, the unknown 0 included; B = bins of a histogram, with B - 1 edges between them; X = any number of
values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.stream.data_set import DataSet
from pipeline.stream.row_group import check_values
from schemas.manifest import Manifest
from schemas.shards import FeatureRecord, label_column

MOST_FREQUENT = 5
"""Raw values that are named."""
_DEVIATIONS = np.arange(-3, 3.5, 0.5)
"""Edges between the bins of scaled numbers: standard deviations from the mean."""
_WEIGHTS = 2.0 ** np.arange(-6, 7)
"""Edges between the bins of weights."""


class Numbers:
    """How numbers are spread: over bins, and the least, the mean and the greatest of them.

    Args:
        edges: between the bins, rising; a bin has its lower edge. The first and the last bin are open.
    """

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = tuple(float(edge) for edge in edges)
        self.count_B: NDArray[np.int64] = np.zeros(len(self.edges) + 1, np.int64)
        self.least, self.greatest, self._sum = np.inf, -np.inf, 0.0

    def add(self, values_X: NDArray[Any]) -> None:
        """Count numbers."""
        if not len(values_X):
            return
        values_X = values_X.astype(np.float64)
        bin_X = np.searchsorted(np.array(self.edges), values_X, side="right")
        self.count_B += np.bincount(bin_X, minlength=len(self.count_B))
        self.least, self.greatest = min(self.least, values_X.min()), max(self.greatest, values_X.max())
        self._sum += float(values_X.sum())

    @property
    def seen(self) -> int:
        """How many were counted."""
        return int(self.count_B.sum())

    def to_json(self) -> dict[str, Any]:
        """``min``, ``mean``, ``max`` and the bins; None where nothing was counted."""
        said = (self.least, self._sum / max(self.seen, 1), self.greatest) if self.seen else (None,) * 3
        return {
            **{name: _short(value) for name, value in zip(("min", "mean", "max"), said, strict=True)},
            "histogram": bins(self.edges, self.count_B),
        }


def bins(edges: Sequence[float], count_B: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Bins as JSON knows them: ``from`` and ``to``, None where a bin is open, and ``count``."""
    ends = [None, *map(_short, edges), None]
    return [
        {"from": low, "to": high, "count": int(count)}
        for low, high, count in zip(ends[:-1], ends[1:], count_B, strict=True)
    ]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


@dataclass
class FeatureSummary:
    """A feature, over all places that it was counted in."""

    record: FeatureRecord
    count_V: NDArray[np.int64]
    """How many places have each id; of sets, each number of a set until `finish`, and then each id. Empty for numbers
    that stay numbers."""
    numbers: Numbers | None
    """How numbers that stay numbers are spread, as they were before they were scaled; None: the feature has ids."""
    places: int = 0
    """Behaviours, items, users or impressions that were counted."""
    unknown: int = 0
    """Those without a value that a model could tell from others: missing, or too rare."""
    frequent: list[tuple[str, int]] = field(default_factory=list)
    """The most frequent raw values, or buckets of hashes, and how many places have them."""

    @classmethod
    def of(cls, record: FeatureRecord) -> "FeatureSummary":
        """The summary of a feature of which nothing was counted yet."""
        numbers = None
        if record.is_number:
            edges = (record.mean or 0.0) + _DEVIATIONS * (record.deviation or 1.0)
            # Where numbers are 0 or more, an edge below them has nothing on its other side.
            numbers = Numbers((np.expm1(edges[edges > 0]) if record.scale == "log" else edges).tolist())
        largest = record.rows if record.bags is None else record.bags
        return cls(record, np.zeros(0 if record.is_number else largest + 1, np.int64), numbers)

    def add(self, name: str, values_X: NDArray[Any]) -> None:
        """Count a column.

        Args:
            name: of the column, for messages.
            values_X: of it, as a data set has them.

        Raises:
            UserError: values that the manifest does not allow.
        """
        record = self.record
        check_values(name, values_X, None if record.is_number else len(self.count_V) - 1)
        self.places += len(values_X)
        if self.numbers is not None:
            raw_X = values_X.astype(np.float64) * (record.deviation or 1.0) + (record.mean or 0.0)
            self.numbers.add(np.expm1(raw_X) if record.scale == "log" else raw_X)
            return
        self.count_V += np.bincount(values_X, minlength=len(self.count_V))

    def finish(self, data_set: DataSet) -> None:
        """Count ids in the place of sets, and look up the most frequent raw values.

        Raises:
            UserError: a file beside the shards cannot be read, or is not what the manifest says.
        """
        record = self.record
        if self.numbers is not None:
            return
        self.unknown = int(self.count_V[0])
        if record.bags is not None:
            bags = data_set.bags({record.name})[record.name]
            # As often as each set was seen, each of its ids was.
            seen_E = np.repeat(self.count_V, np.diff(bags.offset_B1.numpy()))
            self.count_V = np.bincount(bags.id_E.numpy(), seen_E, record.rows + 1).astype(np.int64)
        if record.encoding == "buckets":
            return
        count_V = np.append(0, self.count_V[1:])
        # Of those that are equally frequent, the least id: the same ones each time.
        best = np.argsort(-count_V, kind="stable")[:MOST_FREQUENT]
        best = best[count_V[best] > 0]
        if record.encoding == "hash":
            values = [f"bucket {id}" for id in best.tolist()]
        else:
            values = [str(value) for value in data_set.names(record.name).take(pa.array(best)).to_pylist()]
        self.frequent = list(zip(values, count_V[best].tolist(), strict=True))

    def to_json(self) -> dict[str, Any]:
        """The numbers in types that JSON knows."""
        record = self.record
        said = {
            "of": record.of,
            "kind": record.kind,
            "encoding": record.encoding,
            "rows": record.rows,
            "sets": record.bags,
            "places": self.places,
            "missing_share": self.missing_share,
            "below_min_count": record.below_min_count,
            "rare": record.rare,
            "changed": record.changed,
            "collisions": record.collisions,
            "most_frequent": [
                {"value": value, "share": round(count / max(self.places, 1), 6)} for value, count in self.frequent
            ],
        }
        if self.numbers is not None:
            said |= self.numbers.to_json()
        elif record.edges is not None:
            said["histogram"] = bins(record.edges, self.count_V[1:])
        return said

    @property
    def missing_share(self) -> float | None:
        """Share of places without a value: as the manifest says, or what was counted, if that cannot be rare values."""
        record = self.record
        if record.values:
            return round(record.missing / record.values, 6)
        return None if record.is_number or not self.places else round(self.unknown / self.places, 6)


@dataclass
class LabelSummary:
    """A label of the targets of a split."""

    known: int = 0
    """Targets that have it."""
    positives: int = 0


class Features:
    """Counts what each feature, label and weight of a data set is.

    Args:
        manifest: of the data set.
        splits: names of the splits, in the order of their codes.
    """

    def __init__(self, manifest: Manifest, splits: Sequence[str]) -> None:
        self._manifest = manifest
        self.of = {record.name: FeatureSummary.of(record) for record in manifest.declared}
        self.labels = {label: {split: LabelSummary() for split in splits} for label in manifest.labels}
        self.weights = Numbers(_WEIGHTS.tolist()) if manifest.weighted else None
        places = {"user": "user", "behavior": "history", "impression": "target"}
        self.columns = {
            f"{places[record.of]}_{record.name}": record.name for record in manifest.declared if record.of != "item"
        }
        """Columns of the shards that are counted, and the features that they are of."""
        self.label_columns = {label_column(manifest.labels, label): label for label in manifest.labels}

    @property
    def all_columns(self) -> list[str]:
        """Columns of the shards that `add` needs."""
        return [*self.columns, *self.label_columns, *(["target_weight"] if self.weights is not None else [])]

    def add(self, table: Mapping[str, NDArray[Any]], split_T: NDArray[Any]) -> None:
        """Count a row group.

        Args:
            table: columns by name, flat.
            split_T: split of each target, as its code.

        Raises:
            UserError: values that the manifest does not allow.
        """
        for column, name in self.columns.items():
            self.of[name].add(column, table[column])
        for column, label in self.label_columns.items():
            for code, of_split in enumerate(self.labels[label].values()):
                label_T = table[column][split_T == code]
                of_split.known += int((label_T >= 0).sum())
                of_split.positives += int((label_T > 0).sum())
        if self.weights is not None:
            self.weights.add(table["target_weight"])

    def finish(self, data_set: DataSet) -> None:
        """Count what belongs to items, and look up the most frequent raw values.

        Raises:
            UserError: a file beside the shards cannot be read, or is not what the manifest says.
        """
        if self._manifest.schema_version < 3:
            path = self._manifest.verified(data_set.folder, "items.parquet")
            columns = {"category": pq.read_table(path, columns=["category"])["category"].to_numpy()}
        else:
            # Row 0 is no item.
            columns = {name: column_I[1:] for name, column_I in data_set.item_features().columns_I.items()}
        for name, column_I in columns.items():
            self.of[name].add(name, column_I)
        for feature in self.of.values():
            feature.finish(data_set)

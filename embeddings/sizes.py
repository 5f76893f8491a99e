"""Sizes of the data, which decide the shapes of a model; what each feature belongs to; whether a batch stays within.

N = longest window of a sequence, X = figures of a batch.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from embeddings.batch import Batch
from embeddings.intervals import INTERVAL_BUCKETS
from schemas.errors import UserError
from schemas.manifest import Manifest
from schemas.model import Feature, ModelSettings
from schemas.shards import FeatureRecord, Kind, Side
from schemas.stream import StreamSettings

if TYPE_CHECKING:
    # Training need not load it.
    from schemas.served import ServedData, ServedStream

BUILT_IN: tuple[Feature, ...] = ("item", "position", "interval")
"""Features that every data set has."""

FIRST_INHERENT: tuple[Feature, ...] = ("item", "category")
FIRST_CROSS: tuple[Feature, ...] = ("position", "interval", "behavior", "scene")
"""Features that come before all others, in this order whatever the order of the settings: so a model's inputs, and with
them its first weights, are those of earlier versions."""


@dataclass(frozen=True)
class FeatureSize:
    """What a model needs to know of a feature of the data."""

    of: Side
    kind: Kind = "id"
    """``number`` is one that stays a number; one that was cut into buckets is an ``id``."""
    rows: int = 0
    """The largest id; 0 for numbers."""
    bags: int = 0
    """For ``ids``, the largest number of a bag."""
    target: bool = False
    """Targets have it too, though it belongs to behaviours."""

    @classmethod
    def of_record(cls, record: FeatureRecord) -> Self:
        """What a manifest says of it."""
        kind: Kind = "number" if record.is_number else "ids" if record.kind == "ids" else "id"
        return cls(record.of, kind, record.rows, record.bags or 0, record.target)


@dataclass(frozen=True)
class FeatureSides:
    """The features that a model uses, by what they belong to."""

    inherent: tuple[Feature, ...]
    """What belongs to the item, whoever meets it ("inherent features", TWIN, arXiv 2302.02352, section 3.1).
    ``item`` comes first."""
    cross: tuple[Feature, ...]
    """What belongs to the meeting of user and item ("user-item cross features", TWIN, section
    3.1); the tables are small."""
    context: tuple[Feature, ...]
    """What belongs to users or impressions and has a table; the prediction alone sees it."""
    numbers: tuple[Feature, ...]
    """What belongs to items or behaviours and stays a number: without a table, and without a part in the score."""
    context_numbers: tuple[Feature, ...]
    """What belongs to users or impressions and stays a number."""
    scored: frozenset[Feature]
    """Those that behaviours may be scored by."""
    bags: frozenset[Feature]
    """Those of several values: a number stands for a set of ids, and the mean of their rows is its row."""
    carried: frozenset[Feature]
    """Those that targets have a value of their own of; of the other cross features a target has row 0."""
    of_users: frozenset[Feature]
    """Those of users."""

    def inherent_of(self, scored: bool) -> tuple[Feature, ...]:
        """The inherent features that have a table, or those of them that behaviours are scored by."""
        return tuple(feature for feature in self.inherent if feature in self.scored or not scored)

    def cross_of(self, scored: bool) -> tuple[Feature, ...]:
        """The cross features that have a table, or those of them that behaviours are scored by."""
        return tuple(feature for feature in self.cross if feature in self.scored or not scored)


@dataclass(frozen=True)
class DataSizes:
    """Numbers of distinct ids, the unknown id 0 not counted, and the lengths of the sequences."""

    items: int
    lengths: Mapping[str, int]
    """N by sequence."""
    features: Mapping[Feature, FeatureSize] = field(default_factory=dict)
    """What the data declare beside item, position and interval."""

    @classmethod
    def of(cls, manifest: "Manifest | ServedData", stream: "StreamSettings | ServedStream") -> Self:
        """Read the sizes of a prepared data set off its manifest, or an exported model's, and its stream."""
        sequences = stream.sequences
        return cls(
            items=manifest.largest_item,
            lengths={name: sequence.length for name, sequence in sequences.items()}
            if sequences
            else {"history": stream.history_length},
            features={record.name: FeatureSize.of_record(record) for record in manifest.declared},
        )

    @classmethod
    def counted(
        cls,
        items: int,
        categories: int,
        lengths: Mapping[str, int],
        behaviors: int | None = None,
        scenes: int | None = None,
    ) -> Self:
        """Sizes of data with categories, and with behaviour types and scenes where their numbers are given."""
        features = {
            "category": FeatureSize("item", rows=categories),
            "behavior": FeatureSize("behavior", rows=behaviors or 0),
            "scene": FeatureSize("behavior", rows=scenes or 0, target=True),
        }
        left_out = {name for name, count in (("behavior", behaviors), ("scene", scenes)) if count is None}
        return cls(items, lengths, {name: size for name, size in features.items() if name not in left_out})

    def used(self, names: Iterable[Feature]) -> Self:
        """The sizes of what a model uses alone.

        Raises:
            UserError: a feature that the data does not have.
        """
        features = {}
        for name in names:
            if name in self.features:
                features[name] = self.features[name]
            elif name not in BUILT_IN:
                known = ", ".join([*BUILT_IN, *self.features])
                raise UserError(f"model.features: {name} is not in this data set, which has {known}")
        return replace(self, features=features)

    def with_bags(self, batch: Batch) -> Self:
        """The sizes with the numbers of bags that the batch's data set has, which need not be that trained on."""
        bags = {
            name: replace(size, bags=len(batch.bags[name]) - 1)
            for name, size in self.features.items()
            if size.kind == "ids"
        }
        return replace(self, features={**self.features, **bags}) if bags else self

    def sides(self, settings: ModelSettings) -> FeatureSides:
        """The features of the settings, by what they belong to.

        Raises:
            UserError: a feature that the data does not have, or settings of a table for one that has none.
        """
        sizes = self.used(settings.feature_names).features

        def named(of: tuple[Side, ...], first: tuple[Feature, ...], number: bool = False) -> tuple[Feature, ...]:
            names = [name for name, size in sizes.items() if size.of in of and (size.kind == "number") == number]
            names += [name for name in first if name in BUILT_IN and name in settings.feature_names]
            # In the order of the settings, but for those that come first.
            order = [*first, *settings.feature_names]
            return tuple(sorted(names, key=order.index))

        sides = FeatureSides(
            inherent=named(("item",), FIRST_INHERENT),
            cross=named(("behavior",), FIRST_CROSS),
            context=named(("user", "impression"), ()),
            numbers=named(("item", "behavior"), (), number=True),
            context_numbers=named(("user", "impression"), (), number=True),
            scored=frozenset(settings.scored_features),
            bags=frozenset(name for name, size in sizes.items() if size.kind == "ids"),
            carried=frozenset(name for name, size in sizes.items() if size.target or size.of == "item"),
            of_users=frozenset(name for name, size in sizes.items() if size.of == "user"),
        )
        of_behaviors, of_context = {*sides.inherent, *sides.cross}, set(sides.context)
        for role, tables in (("attention", of_behaviors), ("representation", of_behaviors), ("context", of_context)):
            for feature in getattr(settings, role).features:
                if feature in settings.feature_names and feature not in tables:
                    raise UserError(f"model.{role}.features.{feature}: there is no such table: {self._why(feature)}")
        return sides

    def _why(self, feature: Feature) -> str:
        size = self.features.get(feature, FeatureSize("behavior"))
        return f"{feature} belongs to {size.of}s" + (", and stays a number" if size.kind == "number" else "")

    def rows(self, feature: Feature, sequence: str | None = None) -> int:
        """Rows of a table of ``feature``, row 0 included; position needs to know the ``sequence``."""
        # Counts without row 0, which is added below.
        built_in = {
            "item": self.items,
            "position": self.lengths.get(sequence or "", 0),
            "interval": INTERVAL_BUCKETS - 1,
        }
        return 1 + (built_in[feature] if feature in built_in else self.features[feature].rows)

    def values(self, feature: Feature) -> int:
        """How many different values a column of ``feature`` may have, 0 included: rows, or numbers of bags."""
        size = self.features.get(feature)
        return self.rows(feature) if size is None or size.kind != "ids" else size.bags + 1


def check_categories(name: str, sizes: DataSizes) -> None:
    """Refuse a model that searches by category where this would be no search.

    Args:
        name: of the model.
        sizes: of what the model uses.

    Raises:
        UserError: no feature ``category`` that belongs to items, or but one category.
    """
    category = sizes.features.get("category")
    if category is None:
        raise UserError(f"model.features: {name} searches by category; add category to the features")
    if category.of != "item" or category.kind == "number":
        raise UserError(
            f"model.name: {name} searches by category, which in these data is none of items; choose another"
        )
    # With one category every behaviour matches, so the search would be `latest` under another name.
    count = sizes.values("category") - 1
    if count < 2:
        raise UserError(
            f"model.name: {name} searches by category, and these data have {count} of them; choose another model"
        )


def check_bounds(batch: Batch, sizes: DataSizes) -> None:
    """Refuse a batch that would read from outside of a table; on a GPU this costs one transfer to the host.

    Args:
        batch: the targets and their histories.
        sizes: of what the model uses.

    Raises:
        UserError: the batch lacks a sequence or a feature, has ids that the tables do not have, or a window that is
            longer than N or outside of its behaviours.
    """
    check_extremes(extremes(batch, sizes).tolist(), batch.origin, sizes.with_bags(batch))


def extremes(batch: Batch, sizes: DataSizes) -> Tensor:
    """The least and the greatest of all that points into something, int64 (X,), for `check_extremes`.

    FBGEMM would refuse a wrong id too, but could not say which batch it is of, and a search would read foreign memory.

    Raises:
        UserError: the batch lacks a sequence or a feature.
    """
    for sequence in sizes.lengths:
        if sequence not in batch.histories:
            raise UserError(
                f"model.retrieved.{sequence}: not a sequence of {batch.origin}; it has {', '.join(batch.histories)}"
            )
    checked = []
    for feature, where in _columns(sizes):
        column = _column(batch, feature, where)
        number = feature in sizes.features and sizes.features[feature].kind == "number"
        # Of numbers, whether one is none: 1 then, else 0.
        checked.append((~column.isfinite()).to(torch.uint8) if number else column)
    for sequence in sizes.lengths:
        history = batch.histories[sequence]
        checked += [history.end_T - history.start_T, history.start_T, len(history.item_M) - history.end_T]
    for name, size in sizes.features.items():
        if size.kind == "ids":
            _check_bags(batch, name, size)
    # All figures in one tensor: a GPU is waited for once. `aminmax` of nothing is an error, and 0 is within all bounds.
    zero = batch.timestamp_T.new_zeros(())
    pairs = [values.aminmax() if len(values) else (zero, zero) for values in checked]
    return torch.stack([extreme.long() for pair in pairs for extreme in pair])


def figures(sizes: DataSizes) -> int:
    """How many figures `extremes` returns: X."""
    return 2 * (len(list(_columns(sizes))) + 3 * len(sizes.lengths))


def check_extremes(figures: list[int], origin: str, sizes: DataSizes) -> None:
    """Refuse a batch by its `extremes`.

    Args:
        figures: the extremes, as numbers.
        origin: what to call the batch.
        sizes: of the data, with the batch's bags.

    Raises:
        UserError: it has ids that the tables do not have, or a window that is longer than N or outside of its
            behaviours.
    """
    pairs = list(zip(figures[::2], figures[1::2], strict=True))
    columns = list(_columns(sizes))
    for (feature, _), (low, high) in zip(columns, pairs, strict=False):
        size = sizes.features.get(feature, FeatureSize("item"))
        # Preparing the data leaves none.
        assert size.kind != "number" or high == 0, f"{origin}: a {feature} that is not a finite number"
        allowed = sizes.values(feature) if size.kind != "number" else 1
        if low < 0 or high >= allowed:
            wrong = low if low < 0 else high
            there = f"there are {allowed} bags" if size.kind == "ids" else f"the {feature} tables have {allowed} rows"
            raise UserError(f"{origin}: {feature} {wrong}, but {there}")
    windows = pairs[len(columns) :]
    for number, (sequence, longest_allowed) in enumerate(sizes.lengths.items()):
        (shortest, longest), (first, _), (behind, _) = windows[3 * number : 3 * number + 3]
        if longest > longest_allowed:
            raise UserError(
                f"{origin}: a history of {longest} behaviours in {sequence}; the model was built for {longest_allowed}"
            )
        if shortest < 0 or first < 0 or behind < 0:
            raise UserError(f"{origin}: a window of {sequence} is outside of its behaviours")


def _columns(sizes: DataSizes) -> Iterator[tuple[Feature, str | None]]:
    """What of a batch is checked: features of targets and users (None), and those of each sequence's behaviours."""
    of_behaviors = ["item", *(name for name, size in sizes.features.items() if size.of in ("item", "behavior"))]
    others = [name for name, size in sizes.features.items() if size.of != "behavior" or size.target]
    for feature in ("item", *others):
        yield feature, None
    for sequence in sizes.lengths:
        for feature in of_behaviors:
            yield feature, sequence


def _column(batch: Batch, feature: Feature, sequence: str | None) -> Tensor:
    if sequence is not None:
        history = batch.histories[sequence]
        found, where = history.item_M if feature == "item" else history.features_M.get(feature), "histories"
    elif feature == "item":
        found, where = batch.item_T, "targets"
    else:
        found, where = batch.features_T.get(feature, batch.features_U.get(feature)), "targets"
    if found is None:
        raise UserError(f"model.features: {feature} is not in the {where} of {batch.origin}")
    return found


def _check_bags(batch: Batch, name: Feature, size: FeatureSize) -> None:
    """The bags of a data set are read once, and checked once."""
    largest = batch.bags[name].largest
    if largest > size.rows:
        raise UserError(f"{batch.origin}: {name} {largest}, but the {name} tables have {size.rows + 1} rows")

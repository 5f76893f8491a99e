"""Features of a data set, found with an engine: what belongs to items and users, and ids of all raw values.

What counts as frequent: an item's or a user's value as often as the item or user is among the events; a behaviour's as
often as it is among them; an impression's as often as it is shown.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.files import link_or_copy
from pipeline.ingest import definition
from pipeline.ingest.chain import ITEM_VALUES, Base
from pipeline.ingest.columns import feature_column, feature_type, user_column
from pipeline.ingest.encodings import Encoded, Former, hashed, measured, numbered, numbered_sets
from pipeline.ingest.engine import Engine
from schemas.features import FeatureSettings
from schemas.prepare import PrepareSettings
from schemas.shards import FeatureRecord

BYTES_PER_VALUE = 100
"""Memory that the dictionary of a feature takes at its peak for each raw value."""
COPIES_OF_TEXT = 8
"""How often raw values that are text are in memory at the peak."""

CATEGORY = "category"
"""The feature of items that every data set has: models search by it."""


class FeatureTable(NamedTuple):
    """A file of features as the engine has it."""

    features: tuple[FeatureSettings, ...]
    table: ir.Table
    """Raw ids, called `columns.FEATURE_KEY`, and a column for each of ``features``."""


class Features:
    """Makes ids of raw values, feature by feature, and writes the dictionaries of a data set.

    Args:
        settings: declare the features.
        engine: computes.
        folder: of the data set.
        work: of files that the engine reads.
        base: what ids go on from; None: nothing.
    """

    def __init__(
        self, settings: PrepareSettings, engine: Engine, folder: Path, work: Path, base: Base | None = None
    ) -> None:
        self._settings, self._engine, self._folder, self._work = settings, engine, folder, work
        self._base = base
        self._encoded: dict[str, FeatureRecord] = {}
        self._ids: dict[str, ir.Table] = {}
        self._kept = 0
        self.files: list[str] = []
        """Names of files that were written."""

    @property
    def records(self) -> tuple[FeatureRecord, ...]:
        """What is known of the features so far, in the order of their names."""
        return tuple(self._encoded[name] for name in sorted(self._encoded))

    def of(self, *sides: str) -> list[FeatureRecord]:
        """Records of the features of some sides."""
        return [record for record in self.records if record.of in sides]

    def belonging(
        self, side: Literal["item", "user"], logs: Sequence[ir.Table], files: Sequence[FeatureTable]
    ) -> tuple[ir.Table, ir.Table]:
        """Find what belongs to each item or user, and encode it.

        Args:
            side: which of them.
            logs: events and, where there are some, impressions.
            files: files of features; those of other sides are passed over.

        Returns:
            (key, frequency, last_seen, columns of features with ids and raw numbers) of every one, and in a chain of
            days what `definition.with_former_items` has besides; and the same with raw values.
        """
        declared = [each for each in self._settings.declared_features if each.of == side]
        in_logs = [feature_column(each.name) for each in declared if each.file is None]
        lines = definition.seen(logs, f"{side}_id", in_logs)
        table = definition.extremes(lines, in_logs)
        for of_file in files:
            if of_file.features[0].of == side:
                names = [feature_column(each.name) for each in of_file.features]
                texts = {name: self._engine.texts(name) for name in names}
                table = definition.with_file(table, of_file.table, names, texts)
        columns = [feature_column(each.name) for each in declared]
        given = {each.name for of_file in files for each in of_file.features}
        for each in declared:
            if each.file is not None and each.name not in given:
                # A day may say nothing new of items or users.
                nothing = ibis.null(ibis.dtype(feature_type(each)))
                name = feature_column(each.name)
                table = table.mutate(**{f"low_{name}": nothing, f"high_{name}": nothing})
        table = self._engine.materialize(f"{side}s", table, lambda _: None)
        changed = self._row(definition.changes(table, columns))
        last = {
            name: definition.last_values(lines, table, name, self._engine.texts(name))
            for name in in_logs
            if changed[name]
        }
        settled = definition.settled(table, columns, last)
        if last:
            settled = self._engine.materialize(f"{side}s_settled", settled, lambda _: None)
        number = changed["number"]
        if self._base is not None and not self._base.closed and side == "item":
            # Values of all items, so that a value that is frequent enough now gets an id wherever it stands.
            settled = self._with_former(settled, columns)
            number = self._row(definition.size(settled, "key"))["number"]
        for feature in declared:
            several = changed[feature_column(feature.name)]
            self._encode(feature, settled, "frequency", "places", values=number, changed=several)
        if side == "item" and CATEGORY not in self._encoded:
            self._no_category(number)
        encoded = self._applied(settled, self.of(side))
        if self._base is not None and self._base.closed and side == "item":
            encoded = self._with_former(encoded, [feature_column(each.name) for each in self.of("item")])
        return encoded, settled

    def _with_former(self, items: ir.Table, columns: Sequence[str]) -> ir.Table:
        """Items with what the data set before says of them; see `definition.with_former_items`."""
        assert self._base is not None
        former = self._engine.open_ids(self._base.renamed("items.parquet", self._work))
        key = "id" if self._settings.items.hash_buckets is not None else "raw_id"
        known = {name: former[name] for name in ("last_seen", "row", "row_day") if name in former.columns}
        missing = {name: ibis.literal(0, "int64") for name in ("last_seen", "row", "row_day") if name not in known}
        # Where nothing is added, how frequent an item is says this data set alone.
        frequency = ibis.literal(0, "int64") if self._base.closed else former["frequency"]
        former = former.select(former_key=former[key], id=former["id"], frequency=frequency, **known, **missing)
        values = None
        if columns and not self._base.closed:
            values = self._engine.open_ids(self._base.renamed(ITEM_VALUES, self._work)).rename(former_key="key")
        table = definition.with_former_items(items, former, values, columns)
        return self._engine.materialize("items_of_all_days", table, lambda _: None)

    def of_lines(self, logs: Sequence[ir.Table], lines: Sequence[int]) -> None:
        """Encode the features of behaviours and impressions.

        Args:
            logs: events and, where there are some, impressions.
            lines: how many each has.
        """
        for feature in self._settings.declared_features:
            column = feature_column(feature.name)
            if feature.of == "impression":
                self._encode(feature, logs[1], None, "frequency", values=lines[1], target=True)
            elif feature.of == "behavior":
                # With targets cut from events, a target has the value of its event.
                target = feature.on_targets
                read = logs if target else logs[:1]
                table = definition.seen(read, "item_id", [column])
                self._encode(feature, table, "weight", "frequency", values=sum(lines[: len(read)]), target=target)

    def on_lines(self, log: ir.Table) -> ir.Table:
        """A log with ids in the place of raw values, and without what belongs to items and users."""
        others = {feature_column(each.name) for each in self._settings.declared_features if each.of in ("item", "user")}
        kept = log.select([name for name in log.columns if name not in others])
        return self._applied(kept, self.of("behavior", "impression"))

    def users(self, logs: Sequence[ir.Table], files: Sequence[FeatureTable]) -> tuple[ir.Table | None, ir.Table | None]:
        """Find what belongs to each user; the arguments are those of `belonging`.

        Returns:
            (key, columns as those of lines are called) of every user, with `definition.USER_ORDER` where users have
            codes; None: neither is there. And `definition.user_order`; None: users have no codes.
        """
        users = order = None
        if any(each.of == "user" for each in self._settings.declared_features):
            belonging, _ = self.belonging("user", logs, files)
            users = belonging.select(
                "key", **{user_column(each.name): feature_column(each.name) for each in self.of("user")}
            )
        if (texts := self._engine.texts("user_id")) is not None:
            order = definition.user_order(texts, self._settings.seed)
            order = self._engine.materialize("user_order", order, lambda _: None)
            users = definition.with_order(users, order)
        if users is not None:
            users = self._engine.materialize("users_encoded", users, lambda _: None)
        return users, order

    def _encode(self, feature: FeatureSettings, table: ir.Table, weight: str | None, of_each: str, **more: Any) -> None:
        column, seed = feature_column(feature.name), self._settings.seed
        if feature.hash_buckets is not None and feature.kind == "id":
            self._keep(hashed(feature, self._row(definition.hash_counts(table, column, feature.hash_buckets)), **more))
            return
        # Computed before it is fetched: the engine must give back the memory that it takes here.
        found = definition.decoded(definition.raw_counts(table, column, weight), {"value": self._engine.texts(column)})
        found = self._engine.materialize(f"counts_of_{feature.name}", found, lambda _: None)
        record = None if self._base is None else self._base.record(feature.name)
        entries, length = (0, 0) if self._base is None or record is None else self._base.memory_of(record)
        self.reserve(found, "value", BYTES_PER_VALUE, besides=entries * BYTES_PER_VALUE + length * COPIES_OF_TEXT)
        counts = self._engine.fetch(found)
        former = self._former(feature)
        if feature.kind == "number":
            self._keep(measured(feature, counts, of_each, former, **more))
        elif feature.kind == "ids":
            self._keep(numbered_sets(feature, counts, seed, former, **more))
        else:
            self._keep(numbered(feature, counts, seed, former, **more))

    def _former(self, feature: FeatureSettings) -> Former | None:
        """What a feature's ids go on from; None: no day came before and none follows."""
        if self._base is None:
            return Former() if self._settings.history.keep is not None else None
        record = self._base.record(feature.name)
        assert record is not None, "settings agree with those of the data set before"
        # An item's value is that of all its events, whenever it got it; others count what a day has.
        return self._base.former(record, counted_anew=feature.of == "item")

    def reserve(
        self, table: ir.Table, column: str, bytes_of_each: int, *, besides: int = 0, kept: bool = False
    ) -> None:
        """Have the engine leave memory for the rows of a table.

        Args:
            table: is computed already.
            column: its raw values.
            bytes_of_each: memory of a row, without that of text.
            besides: memory for other things.
            kept: it is needed until the end; else until the next call.

        Raises:
            UserError: the memory limit is too small for that.
        """
        rows = self._row(definition.size(table, column))
        memory = rows["number"] * bytes_of_each + rows["length"] * COPIES_OF_TEXT + besides
        self._engine.reserve(self._kept + memory)
        self._kept += memory if kept else 0

    def _keep(self, encoded: Encoded) -> None:
        """Write an encoding at once: only its record stays in memory."""
        record = encoded.record
        self._encoded[record.name] = record
        self.files += encoded.write(self._folder)
        if record.dictionary is not None and record.dictionary not in self.files:
            # Nothing was added to the dictionary of the data set before.
            assert self._base is not None
            link_or_copy(self._base.verified(record.dictionary), self._folder / record.dictionary)
            self.files.append(record.dictionary)
        if encoded.ids is not None:
            column = feature_column(record.name)
            path = self._work / f"{column}.parquet"
            value = self._engine.codes(column, encoded.ids["value"].combine_chunks())
            pq.write_table(encoded.ids.set_column(0, "value", value), path)
            self._ids[record.name] = self._engine.open_ids(path)

    def _no_category(self, items: int) -> None:
        """Say that no item has a category."""
        kind = pa.string() if self._settings.events.text_category else pa.int64()
        feature = FeatureSettings(
            name=CATEGORY, of="item", column=CATEGORY, type="text" if kind == pa.string() else "integer"
        )
        nothing = pa.table({"value": pa.nulls(0, kind), **dict.fromkeys(("frequency", "places"), pa.nulls(0, "int64"))})
        self._keep(numbered(feature, nothing, self._settings.seed, self._former(feature), values=items))

    def _applied(self, table: ir.Table, records: list[FeatureRecord]) -> ir.Table:
        buckets = {each.name: each.rows for each in records if each.encoding == "hash"}
        return definition.encoded(table, records, self._ids, buckets)

    def _row(self, table: ir.Table) -> dict[str, int]:
        """The only row of a table of counts; a sum of nothing is 0."""
        return {name: int(value or 0) for name, value in self._engine.fetch(table).to_pylist()[0].items()}

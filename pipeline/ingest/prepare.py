"""From logs of events to a data set: read, check, sort, write. The data set appears whole or not at all."""

import logging
from collections.abc import Callable
from pathlib import Path

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.machine import check_threads, host_memory
from pipeline.errors import SPACE
from pipeline.files import output_folder
from pipeline.ingest import definition
from pipeline.ingest.chain import ITEM_VALUES, Base, write_batches
from pipeline.ingest.columns import FEATURE_KEY, event_columns, feature_column, impression_columns, label_column
from pipeline.ingest.counts import check, check_keys, check_zones, counts_of, cuts, nothing_left, notices
from pipeline.ingest.day_settings import without_missing_labels
from pipeline.ingest.definition import UNKNOWN_LABEL
from pipeline.ingest.dictionaries import (
    BYTES_PER_FEATURE,
    BYTES_PER_ITEM,
    Dictionary,
    build_dictionary,
)
from pipeline.ingest.engine import Engine
from pipeline.ingest.features import Features, FeatureTable
from pipeline.ingest.item_days import BYTES_PER_ITEM_OF_DAYS, ItemDay, build_beside, build_day
from pipeline.ingest.layers import Gathered, KeptLayers, gather, keep_layers, layer_of
from pipeline.ingest.recorded import recorded
from pipeline.ingest.shards import ShardBuilder, WrittenShard
from pipeline.ingest.sources import FeatureFiles, LogFiles, feature_files, log_files
from pipeline.ingest.times import LATEST
from pipeline.progress import stage
from schemas.errors import UserError
from schemas.manifest import (
    MANIFEST,
    ROW_GROUP_INDEX,
    Chain,
    Counts,
    File,
    Layer,
    Manifest,
    Shard,
    Source,
    fingerprint,
)
from schemas.prepare import DateSplit, ImpressionSplit, PrepareSettings
from schemas.shards import ITEM_FEATURES, ITEM_PLACE, ROW_GROUPS, SCHEMA_VERSION, SPLITS, shard_schema
from schemas.storage import RemotePath

CONTENTS = (
    "shard-*.parquet",
    "history-*.arrow",
    "items.parquet",
    ITEM_VALUES,
    ITEM_FEATURES,
    "feature-*.parquet",
    "bags-*.arrow",
    "categories.parquet",  # of schema versions 1 and 2
    ROW_GROUP_INDEX,
    MANIFEST,
)
"""Names of a data set's files."""

ITEM_IDS = "item_ids.parquet"
"""The work file of what stands on lines for an item, and its dense id."""
MOST_SHARDS = 100_000
"""Shards that five digits can number."""

_LOGGER = logging.getLogger("dare.data")


def prepare(settings: PrepareSettings, out: Path, *, overwrite: bool = False, base: Base | None = None) -> Manifest:
    """Write the data set that ``settings`` describe into the folder ``out``.

    The same input and seed give the same bytes, whatever the engine, its threads or the order of the files.

    Args:
        settings: of all of it.
        out: the folder.
        overwrite: ``out`` may hold an earlier output.
        base: the day of a chain that this one follows, or the owner of the dictionaries; None: there is none.

    Raises:
        UserError: a fault of the settings or of the input, or a full disk; says what to do about it.
        OSError: no right to write.
    """
    if settings.threads is not None:
        check_threads("threads", settings.threads)
    if settings.memory_limit > host_memory():
        raise UserError(
            f"memory_limit: {settings.memory_limit.human_readable()} is more than this machine has, "
            f"{host_memory() / 2**30:.1f}GiB"
        )
    # Names, formats, columns and types of all files first: no engine starts on a log that cannot be right.
    skip = settings.on_corrupt == "skip"
    if settings.without_events:
        if base is None:
            raise UserError("events.files: unchanged: stands for the events of --extend alone; name files")
        base = base.to_score()
    events = log_files("events", settings.events, event_columns(settings), skip_corrupt=skip)
    impressions = None
    if settings.impressions is not None:
        columns = impression_columns(settings)
        impressions = log_files("impressions", settings.impressions, columns, skip_corrupt=skip)
        if settings.without_events:
            settings = without_missing_labels(settings, impressions)
    features = feature_files(settings)
    if base is not None:
        base.check(settings, out, [events, *([] if impressions is None else [impressions])])
    engine_class = _engine_class(settings)
    with output_folder(out, CONTENTS, overwrite=overwrite, last=MANIFEST) as folder:
        # With a dot: `output_folder` removes it before the data set gets its name.
        work = folder / ".work"
        work.mkdir()
        engine = engine_class(work, settings.memory_limit, settings.threads)
        try:
            manifest = _Preparation(settings, engine, folder, work, base).run(events, impressions, features)
        except OSError as error:
            if error.errno in SPACE:
                where, choose = out, "choose another --out"
                if isinstance(out, RemotePath):
                    where, choose = folder.parent, "set TMPDIR to a folder on another"
                raise UserError(f"no space left on the disk of {where}; free some or {choose}") from None
            raise
        finally:
            engine.close()
    for notice in notices(manifest, settings):
        _LOGGER.info("%s", notice)
    return manifest


class _Preparation:
    def __init__(self, settings: PrepareSettings, engine: Engine, folder: Path, work: Path, base: Base | None) -> None:
        self._settings, self._engine, self._folder, self._work = settings, engine, folder, work
        self._base = base
        self._day = 0 if base is None or base.closed else base.day
        # Beside what is closed nothing is kept for later days.
        self._keep = None if base is not None and base.closed else settings.history.keep

    def run(
        self, event_files: LogFiles, impression_files: LogFiles | None, feature_files: list[FeatureFiles]
    ) -> Manifest:
        settings, engine = self._settings, self._engine
        # What comes from the days before has texts.
        tables, coded = [], self._base is None
        for of_file in feature_files:
            table, _ = engine.load(of_file.files, lambda _: None, coded=coded)
            check_keys(of_file.files, engine.fetch(definition.without_key(table)))
            # Users are not hashed: only items are in buckets.
            buckets = settings.items.hash_buckets if of_file.features[0].of == "item" else None
            tables.append(FeatureTable(of_file.features, definition.in_buckets(table, buckets, FEATURE_KEY)))
        # Each log is read once into a table of the engine's own: later passes do not parse text again. And faults are
        # looked for before anything is built on it: one is a line for the user, not a wrong data set.
        with stage("read events") as running:
            events, read = engine.load(event_files, running.reach_share, coded=coded)
        counted = check(event_files, read, engine.fetch(definition.faults(events)))
        logs, lines, moments, shown, spans = [events], [counted["lines"]], None, None, [counted]
        if impression_files is not None and settings.impressions is not None:
            with stage("read impressions") as running:
                impressions, shown = engine.load(impression_files, running.reach_share, coded=coded)
            check_zones([(settings.events, event_files, read), (settings.impressions, impression_files, shown)])
            of_shown = check(impression_files, shown, engine.fetch(definition.faults(impressions)))
            lines.append(of_shown["lines"])
            spans.append(of_shown)
            shown.update({name: number for name, number in of_shown.items() if name.startswith(UNKNOWN_LABEL)})
            moments = self._cuts(impressions)
            logs.append(impressions)
        else:
            check_zones([(settings.events, event_files, read)])
        spans = [each for each in spans if each["lines"]]
        span = min(each["first"] for each in spans), max(each["last"] for each in spans)
        counted = {"first": span[0], "last": span[1]} | counted
        if self._base is not None:
            self._base.check_later(span[0])

        with stage("dictionaries"):
            collisions = self._item_collisions(logs)
            logs = [definition.in_buckets(log, settings.items.hash_buckets) for log in logs]
            features = Features(settings, engine, self._folder, self._work, self._base)
            dictionary = self._dictionary(features, logs, tables, span[1])
            users, order = features.users(logs, tables)
            features.of_lines(logs, lines)
        gathered = self._gathered(logs)
        if gathered is not None and gathered.users is not None and users is not None:
            users = definition.with_earlier_users(users, gathered.users)
        builder = ShardBuilder(
            dictionary,
            features.records,
            self._labels,
            settings.split,
            settings.shards,
            settings.seed,
            shard_schema(
                features.records,
                user_type=settings.events.user_type,
                labels=self._labels,
                weighted=settings.weighted,
                line=len(logs) > 1,
            ),
            self._folder,
            self._keep,
            self._day,
        )
        with stage("sort and write shards", sum(lines), "lines") as running:
            sorted_lines = self._lines(features, logs, users, moments, counted["lines"], gathered)
            written, tally = engine.write_shards(
                sorted_lines, definition.line_order(sorted_lines), order, builder, running.advance
            )
        counts = counts_of(written, dictionary, features.records, counted, read, shown, tally, collisions)
        own = layer_of(written, self._day)
        # Some shards may have histories alone, whose users have no target; a later day may have no others.
        written = [file for file in written if file.users]
        if not written and not self._day:
            raise UserError(nothing_left(settings, counts))
        # Last of all the manifest: a folder without one is no data set.
        inputs = [event_files, *([impression_files] if impression_files is not None else [])]
        inputs += [of_file.files for of_file in feature_files]
        chain, layer_files = self._chain(dictionary, span, own, tally["users"] if gathered is None else gathered.new)
        manifest = self._manifest(written, counts, features, dictionary, inputs, chain, layer_files)
        manifest.write(self._folder)
        return manifest

    @property
    def _labels(self) -> tuple[str, ...]:
        """Names of the targets' labels: those of events that are taken for targets, and no label, have the first."""
        return tuple(self._settings.labels) or ("label",)

    def _lines(
        self,
        features: Features,
        logs: list[ir.Table],
        users: ir.Table | None,
        moments: tuple[int, int] | None,
        events: int,
        gathered: Gathered | None,
    ) -> ir.Table:
        """Both logs as lines with dense ids, which the engine sorts and the builder turns into shards."""
        settings, carried = self._settings, None
        if gathered is not None:
            carried, events = gathered.lines, events + gathered.behaviors
        shards = max(1, -(-events // settings.shards.behaviors_per_shard))
        if shards > MOST_SHARDS:
            raise UserError(
                f"shards.behaviors_per_shard={settings.shards.behaviors_per_shard} makes {shards:,} shards of "
                f"{events:,} events; at most {MOST_SHARDS:,} are possible, so raise it"
            )
        if len(logs) > 1:
            labels = [label_column(number, name) for number, name in enumerate(self._labels)]
            if self._day and "split" in logs[1].columns:
                # What a later day brings is there to be learnt, all of it.
                logs = [logs[0], logs[1].drop("split")]
            logs = [logs[0], definition.shown(logs[1], moments, labels)]
        ids = None if settings.items.hash_buckets else self._engine.open_ids(self._work / ITEM_IDS)
        lines = definition.lines([features.on_lines(log) for log in logs], ids, users, carried)
        return definition.in_shards(lines, seed=settings.seed, shards=shards)

    def _gathered(self, logs: list[ir.Table]) -> Gathered | None:
        """What the days before know of the users of this one; None: there are none."""
        if self._base is None or not self._base.followed:
            return None
        with stage("gather histories"):
            touched = definition.touched(logs, self._settings.seed)
            touched = self._engine.materialize("touched", touched, lambda _: None)
            return gather(self._engine, touched, self._base.folder, self._base.manifest, self._work)

    def _item_collisions(self, logs: list[ir.Table]) -> int | None:
        """How many more raw items there are than buckets that have any; None: items are numbered."""
        buckets = self._settings.items.hash_buckets
        if buckets is None:
            return None
        hashes = definition.hash_counts(definition.item_hashes(logs), "item_id", buckets)
        counted = self._engine.fetch(hashes).to_pylist()[0]
        return int(counted["hashes"] - counted["buckets"])

    def _cuts(self, impressions: ir.Table) -> tuple[int, int] | None:
        """Timestamps at which validation and test begin; None: a column says so, or there is nothing to train on."""
        settings = self._settings
        split, log = settings.split, settings.impressions
        assert log is not None
        if self._day:
            return LATEST + 1, LATEST + 1
        if settings.without_events:
            # Nobody learns from what is there to be scored.
            return 0, 0
        if log.split is not None or not settings.labels:
            return None
        if isinstance(split, DateSplit):
            return split.validation_from, split.test_from
        # At moments that hold out the wanted shares.
        assert isinstance(split, ImpressionSplit), "settings are validated"
        return cuts(self._engine.fetch(definition.timestamp_counts(impressions)), split)

    def _dictionary(self, features: Features, logs: list[ir.Table], tables: list[FeatureTable], now: int) -> Dictionary:
        """Write the dictionary of items, with what belongs to them; ``now`` is the last moment of the logs."""
        engine, settings, base = self._engine, self._settings, self._base
        items, raw = features.belonging("item", logs, tables)
        if self._keep is not None:
            self._write_item_values(features, raw)
        if (texts := engine.texts("item_id")) is not None:
            items = engine.materialize("items_named", definition.decoded(items, {"key": texts}), lambda _: None)
        of_items, kind, seed = features.of("item"), settings.events.item_type, settings.seed
        numbered = settings.items.hash_buckets is None
        of_days = base is not None or (self._keep is not None and numbered)
        # Before the arrays are made: the engine must give the memory back first.
        of_each = BYTES_PER_ITEM + BYTES_PER_FEATURE * (len(of_items) - 1) + BYTES_PER_ITEM_OF_DAYS * of_days
        features.reserve(items, "key", of_each, kept=True)
        fetched = engine.fetch((items if of_days else items.drop("last_seen")).order_by("key"))
        if base is not None and base.closed:
            known, largest = base.item_features(), base.manifest.largest_item
            ids = base.manifest.counts.items
            dictionary = build_beside(fetched, of_items, settings.items, kind, seed, known, ids, largest)
        elif of_days and numbered:
            ids, rows = (0, 0) if base is None else (base.manifest.counts.items, base.rows)
            dictionary = build_day(fetched, of_items, settings.items, kind, seed, ItemDay(self._day, now, ids, rows))
        else:
            dictionary = build_dictionary(fetched, of_items, settings.items, kind, seed)
        dictionary.write(self._folder)
        if numbered:
            raw_I, id_I = dictionary.items["raw_id"].combine_chunks(), dictionary.items["id"]
            pq.write_table(pa.table({"raw_id": engine.codes("item_id", raw_I), "id": id_I}), self._work / ITEM_IDS)
        return dictionary

    def _write_item_values(self, features: Features, items: ir.Table) -> None:
        """Write the raw values of items' features, which later days go on from."""
        names = [feature_column(each.name) for each in self._settings.declared_features if each.of == "item"]
        if not names:
            return
        texts = {name: self._engine.texts(name) for name in names} | {"key": self._engine.texts("item_id")}
        table = definition.decoded(items.select("key", *names), texts).order_by("key")
        write_batches(self._engine.batches(table), table.schema().to_pyarrow(), self._folder / ITEM_VALUES)
        features.files.append(ITEM_VALUES)

    def _chain(
        self, dictionary: Dictionary, span: tuple[int, int], own: Layer, new_users: int
    ) -> tuple[Chain | None, tuple[File, ...]]:
        """What the days that follow must know, None where none can; and the files that they go on from."""
        keep, base = self._keep, self._base
        layers, rows = KeptLayers((), ()), dictionary.rows
        if keep is not None:
            folder, manifest = (None, None) if base is None else (base.folder, base.manifest)
            layers = keep_layers(folder, manifest, own, self._folder, keep)
        elif base is not None and base.followed and base.manifest.chain is not None:
            rows = base.manifest.chain.rows
        else:
            return None, ()
        chain = Chain(
            days=() if base is None else base.days,
            first_timestamp=span[0],
            last_timestamp=span[1],
            rows=rows,
            new_items=dictionary.new_items,
            new_users=new_users,
            evicted=dictionary.evicted,
            rows_given=dictionary.rows_given,
            rows_free=dictionary.rows_free,
            layers=layers.layers,
        )
        return chain, layers.files

    def _manifest(
        self,
        written: list[WrittenShard],
        counts: Counts,
        features: Features,
        dictionary: Dictionary,
        inputs: list[LogFiles],
        chain: Chain | None,
        layer_files: tuple[File, ...],
    ) -> Manifest:
        # The index of row groups: from it a stream plans its epochs without opening a shard.
        index = pa.table(
            [
                pa.array(np.repeat(np.arange(len(written)), [len(file.users) for file in written]), pa.int32()),
                pa.array([group for file in written for group in range(len(file.users))], pa.int32()),
                pa.array([users for file in written for users in file.users], pa.int64()),
                pa.array([behaviors for file in written for behaviors in file.behaviors], pa.int64()),
                *(
                    pa.array([targets[code] for file in written for targets in file.targets], pa.int64())
                    for code in range(len(SPLITS))
                ),
            ],
            schema=ROW_GROUPS,
        )
        pq.write_table(index, self._folder / ROW_GROUP_INDEX, compression="zstd")
        shown = [files for files in inputs if files.numbered]
        log = self._settings.impressions
        return Manifest(
            schema_version=SCHEMA_VERSION,
            seed=self._settings.seed,
            counts=counts,
            impression_files=tuple(name for files in shown for name in files.names),
            labeled=log is None or bool(self._settings.labels),
            features=features.records,
            labels=self._labels,
            weighted=self._settings.weighted,
            user_type=self._settings.events.user_type,
            item_type=self._settings.events.item_type,
            item_rows=dictionary.table_rows,
            placed_items=ITEM_PLACE in dictionary.features.column_names,
            chain=chain,
            dictionaries_of=self._base.fingerprint if self._base is not None and self._base.closed else None,
            settings=recorded(self._settings),
            sources=_sources(inputs),
            skipped=tuple(reason for files in inputs for reason in files.skipped),
            shards=tuple(self._shard(file) for file in written),
            files=(
                *(
                    File.of(self._folder / name)
                    for name in ("items.parquet", ITEM_FEATURES, *sorted(features.files), ROW_GROUP_INDEX)
                ),
                *layer_files,
            ),
        )

    def _shard(self, file: WrittenShard) -> Shard:
        return Shard.of(
            self._folder / file.name,
            users=sum(file.users),
            behaviors=sum(file.behaviors),
            row_groups=len(file.users),
        )


def _engine_class(settings: PrepareSettings) -> Callable[[Path, int, int | None], Engine]:
    # Imported only here: an engine that is not used need not be installed, nor waited for.
    if settings.engine == "spark":
        from pipeline.ingest.spark_engine import SparkEngine

        return SparkEngine
    from pipeline.ingest.duckdb_engine import DuckDBEngine

    return DuckDBEngine


def _sources(inputs: list[LogFiles]) -> tuple[Source, ...]:
    sources = {
        Source(name=path.name, bytes=path.stat().st_size, fingerprint=fingerprint(path))
        for files in inputs
        for path in files.paths
    }
    return tuple(sorted(sources, key=lambda source: (source.name, source.fingerprint)))

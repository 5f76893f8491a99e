"""From logs of events to a data set: read, check, sort, write. The data set appears whole or not at all."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.machine import check_threads, host_memory
from pipeline.errors import SPACE
from pipeline.files import output_folder
from pipeline.ingest import definition
from pipeline.ingest.counts import check, check_zones, counts_of, lines_kept, nothing_left, notices
from pipeline.ingest.dictionaries import BYTES_PER_ITEM, Dictionaries, build_dictionaries
from pipeline.ingest.engine import Engine
from pipeline.ingest.shards import ShardBuilder, WrittenShard
from pipeline.ingest.sources import LogFiles, feature_files, log_files
from pipeline.progress import stage
from schemas.errors import UserError
from schemas.events import event_schema, impression_schema
from schemas.manifest import (
    MANIFEST,
    ROW_GROUP_INDEX,
    Counts,
    File,
    Manifest,
    Shard,
    Source,
    fingerprint,
)
from schemas.prepare import DateSplit, ImpressionSplit, PrepareSettings
from schemas.shards import ROW_GROUPS, SCHEMA_VERSION, SPLITS, history_schema
from schemas.storage import RemotePath

CONTENTS = ("shard-*.parquet", "items.parquet", "categories.parquet", ROW_GROUP_INDEX, MANIFEST)
"""Names of a data set's files."""

MOST_SHARDS = 100_000
"""Shards that five digits can number."""

_LOGGER = logging.getLogger("dare.data")


def prepare(settings: PrepareSettings, out: Path, *, overwrite: bool = False) -> Manifest:
    """Write the data set that ``settings`` describe into the folder ``out``.

    The same input and seed give the same bytes, whatever the engine, its threads or the order of the files.

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
    events = log_files("events", settings.events, skip_corrupt=skip)
    impressions = None
    if settings.impressions is not None:
        impressions = log_files("impressions", settings.impressions, skip_corrupt=skip)
    features = None
    if settings.events.item_features is not None:
        text = settings.events.text_category
        features = feature_files(settings.events.item_features, text_category=text, skip_corrupt=skip)
    engine_class = _engine_class(settings)
    with output_folder(out, CONTENTS, overwrite=overwrite, last=MANIFEST) as folder:
        # With a dot: `output_folder` removes it before the data set gets its name.
        work = folder / ".work"
        work.mkdir()
        engine = engine_class(work, settings.memory_limit, settings.threads)
        try:
            manifest = _Preparation(settings, engine, folder, work).run(events, impressions, features)
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
    def __init__(self, settings: PrepareSettings, engine: Engine, folder: Path, work: Path) -> None:
        self._settings, self._engine, self._folder, self._work = settings, engine, folder, work

    def run(self, event_files: LogFiles, impression_files: LogFiles | None, feature_files: LogFiles | None) -> Manifest:
        settings, engine = self._settings, self._engine
        kind = "string" if settings.events.text_category else "int64"
        features = None
        if feature_files is not None:
            features, _ = engine.load(feature_files, lambda _: None)
            contradicted = engine.fetch(definition.contradicted(features))["items"][0].as_py()
            if contradicted:
                _LOGGER.info("items: %d items with several categories; the largest of each counts", contradicted)
        # First the log of behaviours, read once into a table of the engine's own: later passes do not parse text again.
        with stage("read events") as running:
            raw, read = engine.load(event_files, running.reach_share)
        events = definition.with_category(raw, kind, features)
        if features is not None:
            events = engine.materialize("events", events, lambda _: None)
            without = engine.fetch(events.agg(events=events["category_id"].isnull().sum()))["events"][0].as_py()
            if without:
                _LOGGER.info("items: %d events are of items without a category there; theirs is the unknown", without)
        assert set(events.columns) == set(
            event_schema(
                text_category=settings.events.text_category,
                behavior=settings.events.behavior is not None,
                scene=settings.events.scene is not None,
            ).names
        )
        # Before anything is built on the log: a fault is one line for the user, not a wrong data set.
        counted = check(event_files, read, engine.fetch(definition.faults(events)))
        impressions, cuts, shown = None, None, None
        if impression_files is not None and settings.impressions is not None:
            with stage("read impressions") as running:
                raw, shown = engine.load(impression_files, running.reach_share)
            impressions = definition.with_category(raw, kind, features)
            assert set(impressions.columns) == set(
                impression_schema(
                    text_category=settings.impressions.text_category,
                    scene=settings.impressions.scene is not None,
                    label=settings.impressions.label is not None,
                    split=settings.impressions.split is not None,
                ).names
            )
            check_zones([(settings.events, event_files, read), (settings.impressions, impression_files, shown)])
            check(impression_files, shown, engine.fetch(definition.faults(impressions)))
            cuts = self._cuts(impressions)
        else:
            check_zones([(settings.events, event_files, read)])
        lines_in_all = sum(lines_kept(tally) for tally in (read, shown) if tally is not None)

        with stage("dictionaries"):
            dictionaries, vocabularies = self._dictionaries(events, impressions)
        # Both logs as lines with dense ids, which the engine sorts and the builder turns into shards.
        shards = -(-counted["lines"] // settings.shards.behaviors_per_shard)
        if shards > MOST_SHARDS:
            raise UserError(
                f"shards.behaviors_per_shard={settings.shards.behaviors_per_shard} makes {shards:,} shards of "
                f"{counted['lines']:,} events; at most {MOST_SHARDS:,} are possible, so raise it"
            )
        lines = definition.lines(
            events,
            impressions,
            engine.open_ids(self._folder / "items.parquet"),
            {name: engine.open_ids(self._work / f"{name}.parquet") for name in vocabularies},
            cuts,
            seed=settings.seed,
            shards=shards,
        )
        builder = ShardBuilder(
            dictionaries,
            settings.split,
            settings.shards,
            settings.seed,
            history_schema(
                behavior="behavior" in vocabularies, scene="scene" in vocabularies, line=impressions is not None
            ),
            self._folder,
        )
        with stage("sort and write shards", lines_in_all, "lines") as running:
            written, tally = engine.write_shards(lines, definition.line_order(lines), builder, running.advance)
        counts = counts_of(written, dictionaries, counted, read, shown, tally)
        if not written:
            raise UserError(nothing_left(settings, counts))
        # Last of all the manifest: a folder without one is no data set.
        inputs = [files for files in (event_files, impression_files, feature_files) if files is not None]
        manifest = self._manifest(written, counts, vocabularies, inputs)
        manifest.write(self._folder)
        return manifest

    def _cuts(self, impressions: ir.Table) -> tuple[int, int] | None:
        """Timestamps at which validation and test begin; None: a column says so, or there is nothing to train on."""
        split, log = self._settings.split, self._settings.impressions
        assert log is not None
        if log.split is not None or log.label is None:
            return None
        if isinstance(split, DateSplit):
            return split.validation_from, split.test_from
        # At moments that hold out the wanted shares.
        return _cuts(self._engine.fetch(definition.timestamp_counts(impressions)), split)

    def _dictionaries(
        self, events: ir.Table, impressions: ir.Table | None
    ) -> tuple[Dictionaries, dict[str, list[str]]]:
        """Write the dictionaries of items and categories, and the ids of behaviour types and scenes for the engine."""
        engine = self._engine
        items = engine.materialize("items", definition.items(events, impressions), lambda _: None)
        # Before the arrays are made: the engine must give the memory back first.
        engine.reserve(BYTES_PER_ITEM * engine.fetch(items.agg(number=items.count()))["number"][0].as_py())
        changed = definition.changed_categories(events, impressions, items)
        dictionaries = build_dictionaries(engine.fetch(items), engine.fetch(changed), self._settings.seed)
        dictionaries.write(self._folder)
        vocabularies = {}
        for name in ("behavior", "scene"):
            if name not in events.columns:
                continue
            tables = [events] if impressions is None or name not in impressions.columns else [events, impressions]
            # Sorted, because the engines give distinct values in orders of their own.
            values = sorted(engine.fetch(definition.vocabulary(tables, name))["value"].to_pylist())
            ids = pa.array(range(1, len(values) + 1), pa.int32())
            pq.write_table(
                pa.table({"value": pa.array(values, pa.string()), "id": ids}), self._work / f"{name}.parquet"
            )
            vocabularies[name] = values
        return dictionaries, vocabularies

    def _manifest(
        self, written: list[WrittenShard], counts: Counts, vocabularies: dict[str, list[str]], inputs: list[LogFiles]
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
            labeled=log is None or log.label is not None,
            behaviors=tuple(vocabularies["behavior"]) if "behavior" in vocabularies else None,
            scenes=tuple(vocabularies["scene"]) if "scene" in vocabularies else None,
            settings=_without_paths(self._settings),
            sources=_sources(inputs),
            skipped=tuple(reason for files in inputs for reason in files.skipped),
            shards=tuple(self._shard(file) for file in written),
            files=tuple(
                File.of(self._folder / name) for name in ("items.parquet", "categories.parquet", ROW_GROUP_INDEX)
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


def _cuts(counts: pa.Table, split: Any) -> tuple[int, int]:
    """Timestamps at which validation and test begin, so that about the wanted share of impressions lies behind each."""
    assert isinstance(split, ImpressionSplit), "settings are validated"
    timestamps = counts["timestamp"].to_numpy()
    before = np.cumsum(counts["lines"].to_numpy())
    bounds = []
    for held_out in (split.test_fraction + split.validation_fraction, split.test_fraction):
        # All impressions of a second are on one side of the cut, so shares are met only about.
        position = int(np.searchsorted(before, before[-1] * (1 - held_out), side="right"))
        bounds.append(int(timestamps[position]) if position < len(timestamps) else int(timestamps[-1]) + 1)
    return bounds[0], bounds[1]


def _sources(inputs: list[LogFiles]) -> tuple[Source, ...]:
    sources = {
        Source(name=path.name, bytes=path.stat().st_size, fingerprint=fingerprint(path))
        for files in inputs
        for path in files.paths
    }
    return tuple(sorted(sources, key=lambda source: (source.name, source.fingerprint)))


def _without_paths(settings: PrepareSettings) -> dict[str, Any]:
    """What decides the content: no paths, and not how it was computed."""
    # Engines, threads and memory change no byte, and the same log may lie elsewhere: the manifest must not tell them
    # apart.
    content = settings.model_dump(mode="json", exclude={"engine", "memory_limit", "threads"})
    for log in (content["events"], content["events"]["item_features"], content["impressions"]):
        if log is not None:
            del log["files"]
    return content

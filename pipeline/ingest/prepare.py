"""From logs of events to a data set: read, check, sort, write. The data set appears whole or not at all."""

from pathlib import Path
from typing import Any

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SPACE
from pipeline.files import output_folder
from pipeline.ingest import definition
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
    TargetCounts,
    fingerprint,
    sha256,
)
from schemas.prepare import ImpressionSplit, PrepareSettings
from schemas.shards import ROW_GROUPS, SCHEMA_VERSION, SPLITS, history_schema

CONTENTS = ("shard-*.parquet", "items.parquet", "categories.parquet", ROW_GROUP_INDEX, MANIFEST)
"""Names of a data set's files."""

LATEST = 253_402_300_799
"""The last second of the year 9999."""


def prepare(settings: PrepareSettings, out: Path, *, overwrite: bool = False) -> Manifest:
    """Write the data set that ``settings`` describe into the folder ``out``.

    The same input and seed give the same bytes, whatever the engine, its threads or the order of the files.

    Raises:
        UserError: a fault of the settings or of the input, or a full disk; says what to do about it.
        OSError: no right to write.
    """
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
    with output_folder(out, CONTENTS, overwrite=overwrite) as folder:
        # With a dot: `output_folder` removes it before the data set gets its name.
        work = folder / ".work"
        work.mkdir()
        engine = _engine(settings, work)
        try:
            return _Preparation(settings, engine, folder, work).run(events, impressions, features)
        except OSError as error:
            if error.errno in SPACE:
                raise UserError(f"no space left on the disk of {out}; free some or choose another --out") from None
            raise
        finally:
            engine.close()


class _Preparation:
    def __init__(self, settings: PrepareSettings, engine: Engine, folder: Path, work: Path) -> None:
        self._settings, self._engine, self._folder, self._work = settings, engine, folder, work

    def run(self, event_files: LogFiles, impression_files: LogFiles | None, feature_files: LogFiles | None) -> Manifest:
        settings, engine = self._settings, self._engine
        # First the log of behaviours, read once into a table of the engine's own: later passes do not parse text again.
        features = None if feature_files is None else engine.read(feature_files)
        with stage("read events") as running:
            raw = engine.read(event_files)
            events = engine.materialize(
                "events", definition.events(raw, settings.events, features), running.reach_share
            )
        assert set(events.columns) == set(
            event_schema(
                text_category=settings.events.text_category,
                behavior=settings.events.behavior is not None,
                scene=settings.events.scene is not None,
            ).names
        )
        # Before anything is built on the log: a fault is one line for the user, not a wrong data set.
        counted = _check("events", event_files, engine.fetch(definition.faults(events)))
        impressions, cuts, lines_in_all = None, None, counted["lines"]
        if impression_files is not None and settings.impressions is not None:
            with stage("read impressions") as running:
                raw = engine.read(impression_files)
                impressions = definition.impressions(raw, settings.impressions)
                impressions = engine.materialize("impressions", impressions, running.reach_share)
            assert set(impressions.columns) == set(
                impression_schema(
                    text_category=settings.impressions.text_category,
                    scene=settings.impressions.scene is not None,
                    split=settings.impressions.split is not None,
                ).names
            )
            shown = _check("impressions", impression_files, engine.fetch(definition.faults(impressions)))
            lines_in_all += shown["lines"]
            # Without a split of their own, impressions are cut by time, at moments that hold out the wanted shares.
            if settings.impressions.split is None:
                cuts = _cuts(engine.fetch(definition.timestamp_counts(impressions)), settings.split)

        with stage("dictionaries"):
            dictionaries, vocabularies = self._dictionaries(events, impressions)
        # Both logs as lines with dense ids, which the engine sorts and the builder turns into shards.
        shards = -(-counted["lines"] // settings.shards.behaviors_per_shard)
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
            history_schema(behavior="behavior" in vocabularies, scene="scene" in vocabularies),
            self._folder,
        )
        with stage("sort and write shards", lines_in_all, "lines") as running:
            written, users_seen = engine.write_shards(lines, definition.line_order(lines), builder, running.advance)
        if not written:
            raise UserError(_nothing_left(settings, counted["lines"], users_seen))
        # Last of all the manifest: a folder without one is no data set.
        inputs = [files for files in (event_files, impression_files, feature_files) if files is not None]
        manifest = self._manifest(written, users_seen, dictionaries, vocabularies, counted, inputs)
        manifest.write(self._folder)
        return manifest

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
        self,
        written: list[WrittenShard],
        users_seen: int,
        dictionaries: Dictionaries,
        vocabularies: dict[str, list[str]],
        counted: dict[str, int],
        inputs: list[LogFiles],
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
        # Counts come from what was written, not from what was meant to be: `dare inspect` compares them with the files.
        users = sum(sum(file.users) for file in written)
        targets = {
            name: TargetCounts(
                targets=sum(group[code] for file in written for group in file.targets),
                positives=sum(group[code] for file in written for group in file.positives),
            )
            for code, name in enumerate(SPLITS)
        }
        return Manifest(
            schema_version=SCHEMA_VERSION,
            seed=self._settings.seed,
            counts=Counts(
                events=counted["lines"],
                users=users,
                users_left_out=users_seen - users,
                behaviors=sum(sum(file.behaviors) for file in written),
                items=len(dictionaries.items),
                categories=len(dictionaries.categories),
                items_with_changed_category=dictionaries.changed,
                first_timestamp=counted["first"],
                last_timestamp=counted["last"],
                **targets,
            ),
            behaviors=tuple(vocabularies["behavior"]) if "behavior" in vocabularies else None,
            scenes=tuple(vocabularies["scene"]) if "scene" in vocabularies else None,
            settings=_without_paths(self._settings),
            sources=_sources(inputs),
            skipped=tuple(reason for files in inputs for reason in files.skipped),
            shards=tuple(self._shard(file) for file in written),
            files=tuple(
                File(path=name, bytes=(self._folder / name).stat().st_size, sha256=sha256(self._folder / name))
                for name in ("items.parquet", "categories.parquet", ROW_GROUP_INDEX)
            ),
        )

    def _shard(self, file: WrittenShard) -> Shard:
        path = self._folder / file.name
        return Shard(
            path=file.name,
            bytes=path.stat().st_size,
            sha256=sha256(path),
            users=sum(file.users),
            behaviors=sum(file.behaviors),
            row_groups=len(file.users),
        )


def _engine(settings: PrepareSettings, work: Path) -> Engine:
    # Imported only here: an engine that is not used need not be installed, nor waited for.
    if settings.engine == "spark":
        from pipeline.ingest.spark_engine import SparkEngine

        return SparkEngine(work, settings.memory_limit, settings.threads)
    from pipeline.ingest.duckdb_engine import DuckDBEngine

    return DuckDBEngine(work, settings.memory_limit, settings.threads)


def _check(role: str, files: LogFiles, faults: pa.Table) -> dict[str, int]:
    """Counts of a log.

    Raises:
        UserError: no lines, or lines with a fault.
    """
    counted = faults.to_pylist()[0]
    names = ", ".join(str(path) for path in files.paths[:3]) + (", ..." if len(files.paths) > 3 else "")
    if not counted["lines"]:
        raise UserError(f"{role}: no lines in {names} (after the filter, if settings have one in events.keep)")
    for name, number in counted.items():
        kind, _, column = name.partition("_")
        if kind in _FAULTS and number:
            raise UserError(f"{role}: {number} of {counted['lines']} lines in {names} {_FAULTS[kind].format(column)}")
    if counted["first"] < 0 or counted["last"] > LATEST:
        raise UserError(
            f"{role}: timestamps in {names} run from {counted['first']} to {counted['last']} seconds after 1970; "
            f"set {role}.timestamp_unit=ms or us if they are not seconds"
        )
    return {name: int(counted[name]) for name in ("lines", "first", "last")}


_FAULTS = {
    "null": "have no {} (or one that is no date); correct or remove them",
    "negative": "have a negative {}; ids are 0 or more",
    "wrong": "have a wrong {}; labels are 0 or 1, splits are train, validation or test",
}


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


def _nothing_left(settings: PrepareSettings, events: int, users: int) -> str:
    split = settings.split
    return (
        f"none of {users} users ({events} events) has a target: split.min_behaviors={split.min_behaviors} and "
        f"split.min_history={split.min_history} leave nobody; lower them or give longer histories"
    )


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

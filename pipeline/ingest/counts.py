"""What became of the lines of the logs: checks, counts by reason, and what a person should be told of them."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.ingest.columns import FEATURE_KEY
from pipeline.ingest.definition import UNKNOWN_LABEL
from pipeline.ingest.dictionaries import Dictionary
from pipeline.ingest.reading import FILTERED, OUTSIDE_TIME, READ, Tally
from pipeline.ingest.shards import WrittenShard
from pipeline.ingest.sources import LogFiles
from schemas.errors import UserError
from schemas.features import FeatureSettings
from schemas.manifest import LEFT_OUT, Counts, Manifest, TargetCounts
from schemas.prepare import ImpressionSplit, Log, PrepareSettings
from schemas.shards import SPLITS, FeatureRecord


def check(files: LogFiles, read: Tally, faults: pa.Table) -> dict[str, int]:
    """Counts of a log: its lines, and the first and last moment if it has any.

    Raises:
        UserError: no lines, or lines with a fault.
    """
    if not files.paths:
        return {"lines": 0}
    counted = faults.to_pylist()[0]
    role = files.role
    names = ", ".join(str(path) for path in files.paths[:3]) + (", ..." if len(files.paths) > 3 else "")
    if not counted["lines"]:
        # A reason that leaves out all: the settings are likelier to be wrong than the log.
        reasons = [
            f"{read[reason]:,} are {LEFT_OUT[reason].format(role=role)}"
            for reason in (FILTERED, OUTSIDE_TIME)
            if read[reason]
        ]
        of_those = f": of {read[READ]:,} in the files {', '.join(reasons)}" if reasons else ""
        raise UserError(f"{role}: no lines in {names}{of_those}")
    # In the words of the files, whose columns have names of their own.
    sources = {column.name: column.source for column in files.columns}
    for name, number in counted.items():
        kind, _, column = name.partition("_")
        if kind in _FAULTS and number:
            fault = _FAULTS[kind].format(sources.get(column, column))
            raise UserError(f"{role}: {number:,} of {counted['lines']:,} lines in {names} {fault}")
    if counted.get("weighing") == 0:
        raise UserError(f"{role}: all weights in {names} are 0: nothing would be learnt; leave {role}.weight out")
    if counted["impossible_timestamp"]:
        raise UserError(
            f"{role}: timestamps in {names} run from {counted['first']} to {counted['last']} seconds after 1970, "
            f"{counted['impossible_timestamp']:,} of {counted['lines']:,} lines are before 1970 or after 9999; "
            f"set {role}.timestamp_unit=ms or us if they are not seconds, or {role}.since and {role}.until to leave "
            "those lines out"
        )
    kept = [name for name in counted if name in ("lines", "first", "last") or name.startswith(UNKNOWN_LABEL)]
    return {name: int(counted[name]) for name in kept}


def check_keys(files: LogFiles, counted: pa.Table) -> None:
    """Make sure that each line of a file of features says whose it is.

    Args:
        files: which they are.
        counted: `definition.without_key` of them.

    Raises:
        UserError: with the number of lines that do not.
    """
    (row,) = counted.to_pylist()
    if row["without_key"]:
        (key,) = (column.source for column in files.columns if column.name == FEATURE_KEY)
        names = ", ".join(str(path) for path in files.paths)
        fault = _FAULTS["null"].format(key)
        raise UserError(f"{files.role}: {row['without_key']:,} of {row['lines']:,} lines in {names} {fault}")


_FAULTS = {
    "null": "have no {}; correct or remove them",
    "negative": "have a negative {}; ids are 0 or more",
    "tiny": "have a {} above 0 that is 0 as a float32; multiply all of them",
}


def check_zones(logs: list[tuple[Log, LogFiles, Tally]]) -> None:
    """Make sure that times without an offset do not meet others unless somebody has said what they mean.

    Raises:
        UserError: they do; the same words would be other moments.
    """
    absolute = [files.role for log, files, tally in logs if tally["zoned"] or log.timestamp_unit in ("s", "ms", "us")]
    for log, files, tally in logs:
        if tally["local"] and absolute and log.timestamp_zone is None:
            raise UserError(
                f"{files.role}: times without an offset beside ones in {' and '.join(absolute)} that say what moment "
                f"they are; set {files.role}.timestamp_zone, UTC or the zone of those clocks"
            )


def cuts(counts: pa.Table, split: ImpressionSplit) -> tuple[int, int]:
    """Timestamps at which validation and test begin, so that about the wanted share of impressions lies behind each.

    Args:
        counts: `definition.timestamp_counts` of the impressions.
        split: says the shares.
    """
    timestamps = counts["timestamp"].to_numpy()
    before = np.cumsum(counts["lines"].to_numpy())
    bounds = []
    for held_out in (split.test_fraction + split.validation_fraction, split.test_fraction):
        # All impressions of a second are on one side of the cut, so shares are met only about.
        position = int(np.searchsorted(before, before[-1] * (1 - held_out), side="right"))
        bounds.append(int(timestamps[position]) if position < len(timestamps) else int(timestamps[-1]) + 1)
    return bounds[0], bounds[1]


def lines_kept(read: Tally) -> int:
    """Lines of a log that its settings do not leave out."""
    return read[READ] - read[FILTERED] - read[OUTSIDE_TIME]


def counts_of(
    written: list[WrittenShard],
    dictionary: Dictionary,
    features: Sequence[FeatureRecord],
    counted: dict[str, int],
    read: Tally,
    shown: Tally | None,
    tally: Tally,
    collisions: int | None,
) -> Counts:
    """The counts of a data set.

    Args:
        written: its shards.
        dictionary: of its items.
        features: all of them.
        counted: what `check` returned for the events.
        read: what became of the events' lines while they were read.
        shown: the same of the impressions' lines, and how many have no further label; None: there are none.
        tally: what became of users and lines while shards were written.
        collisions: of hashed items; None: they are numbered.
    """
    category = next(each for each in features if each.name == "category")
    # Counts come from what was written, not from what was meant to be: `dare inspect` compares them with the files.
    users = sum(sum(file.users) for file in written)
    targets = {
        name: TargetCounts(
            targets=sum(group[code] for file in written for group in file.targets),
            positives=sum(group[code] for file in written for group in file.positives),
        )
        for code, name in enumerate(SPLITS)
    }
    counts = Counts(
        events=counted["lines"],
        events_read=read[READ],
        events_left_out=_left_out("events", read, tally),
        events_repeated=tally["events repeated"],
        impressions_read=None if shown is None else shown[READ],
        impressions_left_out=_left_out("impressions", shown or Counter(), tally),
        impressions_repeated=tally["impressions repeated"],
        impressions_unlabeled={
            name.removeprefix(UNKNOWN_LABEL): number
            for name, number in (shown or Counter()).items()
            if name.startswith(UNKNOWN_LABEL) and number
        },
        impressions_contradictory=tally["impressions contradictory"],
        users=users,
        users_left_out=tally["users"] - users,
        users_left_out_by_reason=_left_out("users", Counter(), tally),
        behaviors=sum(sum(file.behaviors) for file in written),
        behaviors_carried=sum(file.carried for file in written),
        items=len(dictionary.cumulative_I) - 1,
        items_below_min_count=dictionary.without_row,
        items_collided=collisions,
        categories=category.rows,
        items_with_changed_category=category.changed,
        first_timestamp=counted["first"],
        last_timestamp=counted["last"],
        **targets,
    )
    own = counts.behaviors - counts.behaviors_carried
    assert counts.events_read == own + sum(counts.events_left_out.values())
    assert counts.users_left_out == sum(counts.users_left_out_by_reason.values())
    if counts.impressions_read is not None:
        kept = sum(each.targets for each in targets.values())
        assert counts.impressions_read == kept + sum(counts.impressions_left_out.values())
    return counts


def _left_out(what: str, read: Tally, tally: Tally) -> dict[str, int]:
    """Reason -> how many of ``what`` were left out, while reading and while writing shards."""
    counts = {reason: read[reason] + tally[f"{what}: {reason}"] for reason in LEFT_OUT}
    return {reason: count for reason, count in counts.items() if count}


def notices(manifest: Manifest, settings: PrepareSettings) -> list[str]:
    """What a person should look at: users, events or impressions of which more than half are left out; odd lines."""
    counts = manifest.counts
    said = []
    totals = [("users", counts.users + counts.users_left_out, counts.users_left_out_by_reason)]
    for role, total, reasons in [*totals, *((log.role, log.read, log.left_out) for log in counts.logs())]:
        left = sum(reasons.values())
        if 2 * left > total:
            why = ", ".join(f"{number:,} {_reason(reason, role, settings)}" for reason, number in reasons.items())
            said.append(f"more than half of the {role} are left out, {left:,} of {total:,}: {why}")
    declared = {feature.name: feature for feature in settings.declared_features}
    for record in manifest.features:
        if record.name in declared:
            said += _of_feature(record, declared[record.name], manifest.chain is not None and bool(manifest.chain.days))
    buckets = settings.items.hash_buckets
    if buckets is not None and counts.items_collided:
        said.append(f"items: {counts.items_collided:,} raw ids share one of {buckets:,} buckets with another one")
    for label, number in counts.impressions_unlabeled.items():
        said.append(f"label {label}: {number:,} impressions have none; a task learns from the others alone")
    if counts.impressions_contradictory:
        said.append(f"impressions: {counts.impressions_contradictory:,} times a user, item and time has both labels")
    return said


def _of_feature(record: FeatureRecord, feature: FeatureSettings, later_day: bool) -> list[str]:
    said = []
    if feature.file is not None and record.changed:
        said.append(f"{record.changed:,} {record.of}s have several values in its file; the largest of each counts")
    if feature.file is not None and record.missing:
        # A later day counts what its own file says of users; histories carry what earlier days have said.
        theirs = "that of an earlier day, or the unknown" if later_day and record.of == "user" else "the unknown"
        said.append(f"{record.missing:,} {record.of}s have no value in its file; theirs is {theirs}")
    if record.collisions:
        said.append(f"{record.collisions:,} raw values share one of {record.rows:,} buckets with another one")
    if feature.kind == "number" and record.values and record.missing == record.values:
        said.append("no value at all: it says nothing")
    elif feature.buckets is not None and record.rows < feature.buckets:
        said.append(f"{record.rows} buckets, not {feature.buckets}: some of its quantiles are the same number")
    return [f"feature {record.name}: {text}" for text in said]


def _reason(reason: str, role: str, settings: PrepareSettings) -> str:
    text = LEFT_OUT[reason]
    if role == "users":
        text = text.removeprefix("of users ")
    split = settings.split
    return text.format(role=role, min_behaviors=split.min_behaviors, min_history=split.min_history, kind=split.kind)


def nothing_left(settings: PrepareSettings, counts: Counts) -> str:
    """Why no user has a target, in a line."""
    reasons = [
        f"{number:,} {_reason(reason, 'users', settings)}" for reason, number in counts.users_left_out_by_reason.items()
    ]
    return (
        f"none of {counts.users_left_out:,} users ({counts.events:,} events) has a target: {', '.join(reasons)}; "
        "lower those settings or give longer histories"
    )

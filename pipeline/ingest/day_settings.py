"""Settings of a day of a chain: those of the days before, with files of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.ingest.chain import Base
from pipeline.ingest.columns import label_column
from pipeline.ingest.recorded import recorded, without_files
from pipeline.ingest.sources import LogFiles
from schemas.errors import UserError
from schemas.features import UNCHANGED
from schemas.manifest import Manifest
from schemas.prepare import PrepareSettings
from schemas.settings import flat_values, load_settings

_SPANS = ("events.since", "events.until", "impressions.since", "impressions.until")
_OF_A_DAY = ("on_corrupt", "items.evict", *_SPANS)
"""Settings that each day may have of its own, beside files and those that decide no content."""
_OF_SCORING = ("impressions.label", "impressions.labels", "impressions.weight")
"""Those that impressions without events may have of their own as well."""


def day_settings(
    base: Base,
    files: Sequence[Path | Mapping[str, Any]] = (),
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> PrepareSettings:
    """The settings of the day that follows ``base``; arguments beside it are those of `load_settings`.

    Files of features that are not given are `UNCHANGED`, and so are events where impressions alone are given.

    Raises:
        UserError: what `load_settings` refuses, or a setting that every day must have alike is another one.
    """
    values = dict(values or {})
    where = f"--extend {base.folder}"
    if base.manifest.settings["impressions"] is not None and "files" not in (values.get("impressions") or {}):
        raise UserError(f"{where}: its targets are impressions; name the day's with --impressions")
    of_events = base.manifest.settings["impressions"] is None
    former = _without_day(base.manifest)
    if of_events and values.get("impressions"):
        # Where targets are cut from events, impressions alone are targets of another kind.
        former |= _scored_impressions(former)
    settings = load_settings(PrepareSettings, [former, *files], overrides, values)
    free: tuple[str, ...] = _OF_A_DAY
    if settings.without_events:
        if settings.impressions is None:
            raise UserError(f"{where}: name the day's --events, or --impressions to score them alone")
        free += ("impressions", "split") if of_events else _OF_SCORING
    elif of_events and settings.impressions is not None:
        raise UserError(
            f"{where}: its targets are events, so a day has no impressions; leave them out, or leave out --events to "
            "score them alone"
        )
    there, here = (
        {feature["name"] for feature in content["features"]} for content in (base.manifest.settings, recorded(settings))
    )
    for name in sorted(there ^ here):
        having, lacking = ("here", "there") if name in here else ("there", "here")
        raise UserError(
            f"{where}: feature {name} is declared {having} and not {lacking}; all days of a chain have the same"
        )
    before, own = _values(base.manifest.settings), _values(recorded(settings))
    for key in sorted(before.keys() | own.keys()):
        if before.get(key) != own.get(key) and not any(f"{key}.".startswith(f"{each}.") for each in free):
            raise UserError(
                f"{where}: {key} is {_said(before.get(key))} there and {_said(own.get(key))} here; all days of a chain "
                "have the same: leave it out, or begin another chain"
            )
    return settings


def without_missing_labels(settings: PrepareSettings, files: LogFiles) -> PrepareSettings:
    """Settings of impressions that are scored alone, without labels and weights that their files do not have.

    Args:
        settings: of them.
        files: the impressions' files, with those columns of `impression_columns` that are there.

    Raises:
        UserError: of several labels some are there.
    """
    assert settings.impressions is not None
    there = {column.name for column in files.columns}
    labels = {
        source: label_column(number, name) in there for number, (name, source) in enumerate(settings.labels.items())
    }
    if any(labels.values()) and not all(labels.values()):
        missing = ", ".join(source for source, known in labels.items() if not known)
        raise UserError(f"impressions: {files.paths[0]}: no column {missing}; give all labels, or none")
    none: dict[str, Any] = {} if all(labels.values()) else {"label": None, "labels": None}
    if "weight" not in there:
        none["weight"] = None
    return settings.model_copy(update={"impressions": settings.impressions.model_copy(update=none)})


def _scored_impressions(former: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for impressions on a day of a chain that has none."""
    alike = {key: former["events"][key] for key in ("user_type", "item_type", "text_category")}
    return {
        "impressions": alike,
        "split": {"kind": "impressions", "min_history": former["split"]["min_history"]},
    }


def _without_day(manifest: Manifest) -> dict[str, Any]:
    """Settings of a manifest to lay others over: without what a day has of its own, and with `UNCHANGED` files."""
    content = without_files(manifest.settings, manifest.labels)
    for name in ("events", "impressions"):
        if content[name] is not None:
            content[name] = {key: value for key, value in content[name].items() if key not in ("since", "until")}
    content["events"]["files"] = [UNCHANGED]
    return content


def _values(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key, features by name, in whatever order they are declared; nothing of empty sections."""
    by_name = {**recorded, "features": {feature["name"]: feature for feature in recorded["features"]}}
    return {key: value for key, value in flat_values(by_name).items() if value != {}}


def _said(value: Any) -> str:
    return "null" if value is None else str(value)

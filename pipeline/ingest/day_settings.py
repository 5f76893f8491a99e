"""Settings of a day of a chain: those of the days before, with files of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.ingest.chain import Base
from pipeline.ingest.recorded import recorded, without_files
from schemas.errors import UserError
from schemas.manifest import Manifest
from schemas.prepare import PrepareSettings
from schemas.settings import flat_values, load_settings

_SPANS = ("events.since", "events.until", "impressions.since", "impressions.until")
_OF_A_DAY = ("on_corrupt", "items.evict", *_SPANS)
"""Settings that each day may have of its own, beside files and those that decide no content."""


def day_settings(
    base: Base,
    files: Sequence[Path | Mapping[str, Any]] = (),
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> PrepareSettings:
    """The settings of the day that follows ``base``; arguments beside it are those of `load_settings`.

    Files of features that are not given are `UNCHANGED`.

    Raises:
        UserError: what `load_settings` refuses, or a setting that every day must have alike is another one.
    """
    values = dict(values or {})
    where = f"--extend {base.folder}"
    if base.manifest.settings["impressions"] is not None and "files" not in (values.get("impressions") or {}):
        raise UserError(f"{where}: its targets are impressions; name the day's with --impressions")
    settings = load_settings(PrepareSettings, [_without_day(base.manifest), *files], overrides, values)
    there, here = (
        {feature["name"] for feature in content["features"]} for content in (base.manifest.settings, recorded(settings))
    )
    for name in sorted(there ^ here):
        having, lacking = ("here", "there") if name in here else ("there", "here")
        raise UserError(
            f"{where}: feature {name} is declared {having} and not {lacking}; all days of a chain have the same"
        )
    former, own = _values(base.manifest.settings), _values(recorded(settings))
    for key in sorted(former.keys() | own.keys()):
        if former.get(key) != own.get(key) and not any(f"{key}.".startswith(f"{free}.") for free in _OF_A_DAY):
            raise UserError(
                f"{where}: {key} is {_said(former.get(key))} there and {_said(own.get(key))} here; all days of a chain "
                "have the same: leave it out, or begin another chain"
            )
    return settings


def _without_day(manifest: Manifest) -> dict[str, Any]:
    """Settings of a manifest to lay others over: without what a day has of its own, and with `UNCHANGED` files."""
    content = without_files(manifest.settings, manifest.labels)
    for name in ("events", "impressions"):
        if content[name] is not None:
            content[name] = {key: value for key, value in content[name].items() if key not in ("since", "until")}
    return content


def _values(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key, features by name, in whatever order they are declared; nothing of empty sections."""
    by_name = {**recorded, "features": {feature["name"]: feature for feature in recorded["features"]}}
    return {key: value for key, value in flat_values(by_name).items() if value != {}}


def _said(value: Any) -> str:
    return "null" if value is None else str(value)

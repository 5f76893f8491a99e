"""Settings of ``dare prepare`` as a manifest has them, and back again."""

from collections.abc import Mapping, Sequence
from typing import Any

from schemas.errors import UserError
from schemas.features import UNCHANGED
from schemas.prepare import PrepareSettings
from schemas.settings import validated


def recorded(settings: PrepareSettings) -> dict[str, Any]:
    """What decides the content, as a manifest has it: no paths, and not how it was computed."""
    # Engines, threads and memory change no byte, and the same log may lie elsewhere: the manifest must not tell them
    # apart.
    content = settings.model_dump(mode="json", exclude={"engine", "memory_limit", "threads"})
    for log in (content["events"], content["events"]["item_features"], content["impressions"]):
        if log is not None:
            del log["files"]
    for feature in content["features"]:
        if feature["file"] is not None:
            del feature["file"]["path"]
    return content


def without_files(recorded: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """Settings of a manifest to lay others over: files of features are `UNCHANGED`, logs have none.

    Args:
        recorded: what `recorded` has returned.
        labels: of the manifest: it sorts the keys of its settings, and the first label is the main one.

    Raises:
        UserError: an earlier version of this program has recorded them, and did not say how raw values are read.
    """
    if "features" not in recorded:
        raise UserError(
            "the data set was prepared by an earlier version of this program, which did not record how raw values are "
            "read; prepare the log again"
        )
    content: dict[str, Any] = {**recorded, "features": [dict(feature) for feature in recorded["features"]]}
    for feature in content["features"]:
        # Earlier versions did not say which features have files.
        if feature.get("file") is not None:
            feature["file"] = {**feature["file"], "path": UNCHANGED}
    for name in ("events", "impressions"):
        if content[name] is not None:
            content[name] = dict(content[name])
    events, shown = content["events"], content["impressions"]
    if events["item_features"] is not None:
        events["item_features"] = {**events["item_features"], "files": [UNCHANGED]}
    # Defaults that say something where they are written out.
    if any(feature["name"] == "category" for feature in content["features"]) and events["category_id"] is not None:
        del events["category_id"]
    if shown is not None and shown["labels"] is not None:
        del shown["label"]
        shown["labels"] = {name: shown["labels"][name] for name in labels}
    return content


def settings_of(recorded: Mapping[str, Any], labels: Sequence[str]) -> PrepareSettings:
    """The settings that a manifest has recorded, where all files are `UNCHANGED`; arguments as of `without_files`.

    Raises:
        UserError: another version of this program has written them, and this one does not know what they say.
    """
    content = without_files(recorded, labels)
    for name in ("events", "impressions"):
        if content[name] is not None:
            content[name]["files"] = [UNCHANGED]
    return validated(PrepareSettings, content)

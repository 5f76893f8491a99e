"""Commands about stores of histories: `dare store load`, `dare store append` and `dare store show`."""

import json as json_text
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.options import Config, Json
from pipeline.errors import printable
from schemas.errors import UserError
from schemas.prepare import PRESETS, PrepareSettings
from schemas.settings import load_settings

if TYPE_CHECKING:
    from pipeline.serve.history_store import HistoryStore

StoreUrl = Annotated[
    str, typer.Option("--store", metavar="URL", help="lmdb:PATH, a path, or redis://HOST:PORT/DATABASE?prefix=NAME.")
]
OfUser = Annotated[str, typer.Option("--user", metavar="ID", help="Raw id of the user, as in the log.")]

_SHOWN = 20
"""Events of a user that `dare store show` prints, the last ones."""


def load(
    store: StoreUrl,
    events: Annotated[list[str], typer.Option(help="File or glob of behaviours; repeatable.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings of `dare prepare`, e.g. events.keep=...")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Exported model: columns are those of its data set.")
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Data set: columns are those of its log.")] = None,
    preset: Annotated[str | None, typer.Option(help=f"Settings of a known log: {', '.join(PRESETS)}.")] = None,
    config: Config = None,
    keep: Annotated[
        int | None, typer.Option(min=1, help="The last so many events of each user; 10,000, if the store is new.")
    ] = None,
    json: Json = False,
) -> None:
    """Add a log of behaviours to a store of histories, or make one of it."""
    from pipeline.serve.history_store import printable_url
    from pipeline.serve.load_log import load_log

    settings = _settings(events, overrides or [], model, data, preset, config or [])
    loaded = load_log(store, settings, keep)
    left_out = f"{loaded.filtered:,} filtered, {loaded.outside_time:,} outside time"
    print(
        f"{printable(printable_url(store))}: {loaded.read:,} events read, {left_out}; {loaded.new:,} new, "
        f"{loaded.known:,} there already, {loaded.not_kept:,} not kept: older than the last {loaded.keep:,} of "
        "their user"
    )
    print(
        f"{loaded.users:,} users of the log, {loaded.store_users:,} in the store; {loaded.seconds:.1f} s "
        f"({loaded.read / loaded.seconds:,.0f} events a second)"
    )
    if json:
        print(json_text.dumps(asdict(loaded)))


def append(
    store: StoreUrl,
    user: OfUser,
    events: Annotated[
        str, typer.Option(metavar="FILE", help="JSON, column -> a value of each event; -: standard input.")
    ],
    json: Json = False,
) -> None:
    """Add events of a user to a store of histories."""
    from pipeline.serve.store import open_store

    content = _read_events(events)
    with open_store(store) as opened:
        appended = opened.append(opened.columns.parse_user(user), content)
        print(
            f"user {printable(user)}: {appended:,} new, {appended.known:,} there already, {appended.filtered:,} "
            f"filtered, {appended.not_kept:,} not kept: older than the last {opened.keep:,}"
        )
        if json:
            print(json_text.dumps({"new": int(appended), **vars(appended)}))


def show(store: StoreUrl, user: OfUser, json: Json = False) -> None:
    """Tell what a store of histories has of a user."""
    from pipeline.reporting.text_table import table_lines, terminal_width
    from pipeline.serve.store import open_store

    with open_store(store, read_only=True) as opened:
        parsed = opened.columns.parse_user(user)
        history = opened.history(parsed)
        names = [opened.columns.timestamp, *(column.name for column in opened.columns.behaviors)]
        print(_summary(opened, parsed, len(history[names[0]])))
        for column in opened.columns.users:
            print(f"{printable(column.name)} of the user: {_cell(history.get(column.name))}")
        rows = [[_cell(value) for value in event] for event in zip(*(history[name] for name in names), strict=True)]
        if rows:
            left = [number for number, column in enumerate(opened.columns.behaviors, 1) if column.kind == "text"]
            print("\n".join(table_lines(names, rows[-_SHOWN:], left=left, width=terminal_width())))
        if json:
            print(json_text.dumps(history))


def _summary(opened: "HistoryStore", user: int | str, count: int) -> str:
    size = opened.size(user)
    which = f", the last {_SHOWN} below" if count > _SHOWN else ""
    bytes_each = f" ({size / count:.1f} each)" if count else ""
    return f"user {printable(user)}: {count:,} events of at most {opened.keep:,}{which}; {size:,} bytes{bytes_each}"


def _cell(value: Any) -> str:
    return "-" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _settings(
    events: list[str],
    overrides: list[str],
    model: Path | None,
    data: Path | None,
    preset: str | None,
    config: list[Path],
) -> PrepareSettings:
    """How the log is read, by a model, a data set, or settings of ``dare prepare``."""
    from pipeline.ingest.recorded import without_files
    from schemas.features import UNCHANGED
    from schemas.manifest import Manifest
    from schemas.served import ServedManifest

    if sum(each is not None for each in (model, data, preset)) > 1:
        raise UserError("--model, --data and --preset: each says what the log's columns are; give one of them")
    if preset is not None and preset not in PRESETS:
        raise UserError(f"--preset {preset}: unknown; known are {', '.join(PRESETS)}")
    first: dict[str, Any] | Path = PRESETS[preset or "generic"]
    if model is not None or data is not None:
        if model is not None:
            described = ServedManifest.read(model).data
            recorded, labels = described.settings, described.labels
        else:
            assert data is not None
            manifest = Manifest.read(data)
            recorded, labels = manifest.settings, manifest.labels
        if "features" not in recorded:
            raise UserError(f"{model or data}: its data set was prepared by an earlier version; give --config instead")
        first = without_files(recorded, labels)
        # What a data set leaves out of its log is no matter of the histories that come after it.
        first["events"] = {key: value for key, value in first["events"].items() if key not in ("since", "until")}
        if first["impressions"] is not None:
            first["impressions"]["files"] = [UNCHANGED]
    return load_settings(PrepareSettings, [first, *config], overrides, {"events": {"files": events}})


def _read_events(name: str) -> dict[str, Any]:
    """The events in a file of JSON, or those that standard input has."""
    where = "standard input" if name == "-" else name
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text()
        content = json_text.loads(text, parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise UserError(f"--events {where}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"--events {where}: a folder; give a file of JSON") from None
    except UnicodeDecodeError:
        raise UserError(f"--events {where}: not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--events {where}: no JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f'--events {where}: give an object, column -> list, such as {{"timestamp": [5], ...}}')
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON; null says that a value is missing")

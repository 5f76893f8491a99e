"""`dare serve`: the command and its options."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from schemas.errors import UserError

if TYPE_CHECKING:
    from pipeline.serve.history_store import HistoryStore
    from pipeline.serve.stored_columns import StoredColumns


def serve(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="M...", help="Folders that `dare export` wrote, links to them, or a folder with some."),
    ],
    store: Annotated[
        str | None, typer.Option(help="Histories that `dare store` keeps: a folder, or redis://HOST:PORT/N.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: a free one.")] = 8080,
    watch: Annotated[bool, typer.Option("--watch", help="Take a newer export of M as soon as there is one.")] = False,
    watch_every: Annotated[float, typer.Option(help="Seconds between two looks for a newer export.")] = 1.0,
    root: Annotated[
        Path | None, typer.Option("--models", help="Folder below which POST /reload may name other models.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Requests worked on at once; if not given, one a core.")] = None,
    queue: Annotated[int, typer.Option(help="Requests that may wait; further ones get 503.")] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds until a request gets 504.")] = 10.0,
    max_body: Annotated[int, typer.Option(help="Bytes of a request.")] = 16 * 2**20,
    max_candidates: Annotated[int, typer.Option(help="Candidates of a request.")] = 10_000,
    max_behaviors: Annotated[int, typer.Option(help="Behaviours of a history in a request.")] = 100_000,
) -> None:
    """Answer requests over HTTP: scores of candidates, a page that shows them, metrics.

    The first model answers where a request names none. SIGTERM lets requests that are on their way be answered.
    """
    from schemas.serving import ServeSettings
    from schemas.settings import validated

    settings = validated(
        ServeSettings,
        {
            "host": host,
            "port": port,
            "threads": len(os.sched_getaffinity(0)) if threads is None else threads,
            "queue": queue,
            "timeout": timeout,
            "max_body": max_body,
            "max_candidates": max_candidates,
            "max_behaviors": max_behaviors,
            "watch_every": watch_every,
        },
    )
    for folder in models:
        if not folder.exists():
            raise UserError(f"{folder}: no such folder")

    from pipeline.serve.server import ServerOfModels

    server = ServerOfModels(models, settings, open_store=_opener(store), root=root, watch=watch)
    print(f"listening on {server.address}", flush=True)
    server.run()


def _opener(url: str | None) -> "Callable[[Path], HistoryStore] | None":
    """What opens the store at a URL, or makes one, for an exported model."""
    if url is None:
        return None
    # It is opened when a model says its columns; that it cannot be is known before anybody is told where to ask.
    from pipeline.serve.store import check_place, open_store

    check_place(url)
    return lambda model: open_store(url, _stored_columns(model))


def _stored_columns(model: Path) -> "StoredColumns":
    """The columns of histories that a model was trained on."""
    from pipeline.ingest.recorded import settings_of
    from pipeline.serve.stored_columns import StoredColumns
    from schemas.served import ServedManifest

    data = ServedManifest.read(model).data
    return StoredColumns.of_settings(settings_of(data.settings, data.labels))

"""The routes of the server: what is asked, who works on it, and how it is told what went wrong."""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.errors import description, is_refusal, refusal_reason
from pipeline.serve import bodies
from pipeline.serve.answers import Answers
from pipeline.serve.metrics import Metrics
from pipeline.serve.swap import RefusedError
from pipeline.serve.workers import BusyError, LateError, Workers
from pipeline.versions import versions
from schemas.errors import RequestError, StoreError, UserError
from schemas.serving import ServeSettings

_LOGGER = logging.getLogger("dare.serve")

B = TypeVar("B", bound=bodies.Body)

PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)
"""The page may load nothing, and ask nobody but this server."""
LONGEST_LINE = 1_000
"""Letters of what is said about a request."""
RELOAD_S = 24 * 3600.0
"""Seconds that loading a model may take: it is read as a whole before it answers."""


class FailedError(Exception):
    """A request is answered with an error."""

    def __init__(self, status: int, kind: str, line: str, headers: Mapping[str, str] | None = None) -> None:
        """Remember the answer: its status, the kind of error for the metrics, one line for the sender."""
        super().__init__(line)
        self.status, self.kind, self.line, self.headers = status, kind, line, headers


def application(
    answers: Answers, settings: ServeSettings, metrics: Metrics, workers: Workers, loader: Workers
) -> ASGIApp:
    """The server as an ASGI application.

    Args:
        answers: what is answered; requests are refused with 503 until the models are loaded.
        settings: limits.
        metrics: are counted up.
        workers: answer requests.
        loader: loads models that requests name.
    """
    models = answers.models
    app = FastAPI(
        title="dare serve",
        description="Scores candidates by a user's history.",
        version=versions()["dare"],
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )

    def check_ready() -> None:
        if not models.ready:
            raise FailedError(503, "loading", "the model is being loaded; try again", {"Retry-After": "1"})

    def post(
        path: str,
        kind: type[B],
        answered: type[bodies.Body],
        summary: str,
        work: Callable[[B], bodies.Body],
        threads: Workers = workers,
        seconds: float = settings.timeout,
    ) -> None:
        """Declare a route whose body is read, worked on in a thread, and answered by what comes out.

        The body is parsed on the thread, and by hand: FastAPI would do it on the event loop.
        """

        async def answer(request: Request) -> Response:
            check_ready()
            until = time.monotonic() + seconds
            body = await _read(request, settings)
            try:
                content = await threads.run(
                    lambda: work(bodies.parsed(kind, body)).model_dump_json().encode(), until - time.monotonic()
                )
            except BusyError:
                raise FailedError(503, "busy", "too many requests at once; try again", {"Retry-After": "1"}) from None
            except LateError:
                raise FailedError(504, "timeout", f"not answered within {seconds:g} seconds") from None
            return Response(content, media_type="application/json")

        schema = kind.model_json_schema()
        app.post(
            path,
            name=path.removeprefix("/"),
            summary=summary,
            response_model=answered,
            responses={code: {"model": bodies.Failure, "description": text} for code, text in FAILURES.items()},
            openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
        )(answer)

    def score(body: bodies.ScoreRequest) -> bodies.Scores:
        scores = answers.score(body)
        metrics.candidates.inc(len(body.candidates))
        metrics.unknown_items.inc(scores.unknown_items)
        metrics.without_history.inc(not scores.history)
        return scores

    def append(body: bodies.AppendRequest) -> bodies.Appended:
        appended = answers.append(body)
        metrics.events.inc(appended.appended)
        return appended

    def reload(body: bodies.ReloadRequest) -> bodies.Reloaded:
        try:
            name, now = models.replace(body.name, body.path)
        except UserError:
            metrics.reloads.labels("refused").inc()
            raise
        metrics.reloads.labels("loaded").inc()
        return bodies.Reloaded(name=name, model=now.version)

    post("/score", bodies.ScoreRequest, bodies.Scores, "Score candidates for a user.", score)
    post(
        "/explain",
        bodies.ExplainRequest,
        bodies.Explanations,
        "Show what a candidate's score rests on.",
        answers.explain,
    )
    post("/append", bodies.AppendRequest, bodies.Appended, "Add events of a user to the store.", append)
    post(
        "/history",
        bodies.HistoryRequest,
        bodies.History,
        "Show the events of a user that the store has.",
        answers.history,
    )
    post("/times", bodies.TimesRequest, bodies.Times, "Place the events of a history in time.", answers.times)
    post("/users", bodies.UsersRequest, bodies.Users, "List users of the store.", answers.users)
    post(
        "/reload",
        bodies.ReloadRequest,
        bodies.Reloaded,
        "Load a model again, or another one in its place.",
        reload,
        loader,
        RELOAD_S,
    )

    @app.get("/models", response_model=bodies.Described, summary="Describe what the models take.")
    async def described() -> Response:
        check_ready()
        return _json(answers.described())

    @app.get("/health", response_model=bodies.Health, summary="Say whether requests are answered.")
    async def health() -> Response:
        return _json(answers.health(), 200 if models.ready else 503)

    @app.get("/metrics", summary="Metrics in Prometheus' text format.", response_class=Response)
    async def measured() -> Response:
        metrics.answering({name: model.version for name, model in models.all().items()})
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    page = files("pipeline.serve").joinpath("page.html").read_bytes()

    @app.get("/", summary="A page that shows histories, candidates and what was retrieved.", response_class=Response)
    async def shown() -> Response:
        headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    async def told(request: Request, error: Exception) -> Response:
        failed = _failure(error)
        metrics.errors.labels(failed.kind).inc()
        return _json(bodies.Failure(error=failed.line), failed.status, failed.headers)

    for kind in (FailedError, UserError, HTTPException, RequestValidationError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, told)
    return _Measured(app, metrics)


FAILURES: dict[int | str, str] = {
    400: "The request is not one that can be answered.",
    413: "The body is too large.",
    503: "Too much to do, the store is down, or the model is being loaded.",
    504: "It took too long.",
    500: "A fault of the server; its log has the trace.",
}


async def _read(request: Request, settings: ServeSettings) -> bytes:
    """The body of a request.

    Raises:
        FailedError: it is not JSON by its header, too large, or too slow.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page of another site could send any other type without asking the browser's user.
        raise FailedError(415, "request", "the body must be of Content-Type: application/json")
    too_large = FailedError(413, "too_large", f"the body has more than {settings.max_body} bytes")
    if request.headers.get("content-length", "0").isdecimal():
        length = int(request.headers.get("content-length", "0")[:20])
        if length > settings.max_body:
            raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > settings.max_body:
                    raise too_large
    except TimeoutError:
        raise FailedError(408, "slow", f"the body did not arrive within {settings.timeout:g} seconds") from None
    return bytes(body)


def _failure(error: Exception) -> FailedError:
    """How an exception is answered; a fault is logged with its trace, and the sender is given its number alone."""
    match error:
        case FailedError():
            return error
        case RequestError():
            # A sender may have put a whole body into a name.
            return FailedError(400, "request", description(error)[:LONGEST_LINE])
        case UnicodeEncodeError():
            return FailedError(400, "request", "a text has half a character (a lone surrogate)")
        case StoreError():
            _LOGGER.warning("%s", description(error))
            return FailedError(503, "store", description(error), {"Retry-After": "1"})
        case RefusedError():
            return FailedError(409, "refused", description(error))
        case HTTPException():
            return FailedError(error.status_code, "request", error.detail.lower(), error.headers)
        case ClientDisconnect():
            return FailedError(400, "disconnected", "the sender is gone")
        case OSError() if is_refusal(error):
            # The disk below the store is full or broken; what was not appended can be sent again.
            _LOGGER.error("%s", description(error))
            return FailedError(
                503, "store", f"the store does not take it: {refusal_reason(error)}", {"Retry-After": "1"}
            )
    number = secrets.token_hex(4)
    _LOGGER.error("fault %s: %s", number, description(error), exc_info=error)
    return FailedError(500, "fault", f"the server has a fault; its log says more at {number}")


def _json(body: bodies.Body, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(body.model_dump_json(), status, dict(headers or {}), "application/json")


class _Measured:
    """Counts requests, and swallows what has been told already."""

    def __init__(self, app: FastAPI, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                took = f"total;dur={1000 * (time.perf_counter() - begun):.3f}"
                message["headers"] = [*message.get("headers", ()), (b"server-timing", took.encode())]
            await send(message)

        with self._metrics.in_flight.track_inprogress():
            try:
                await self._app(scope, receive, watched)
            except Exception:
                # Starlette raises again what it has no class of, after it was answered, and logged if it is a fault.
                if not status:
                    raise
            finally:
                # A path that there is not could be any text.
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(route, str(status)).inc()
                self._metrics.seconds.labels(route).observe(time.perf_counter() - begun)

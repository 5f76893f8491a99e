"""A connection of the server: who sends no request is not waited for, and what is no HTTP is refused as all else is."""

import asyncio
from typing import TYPE_CHECKING, Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.serve.bodies import Failure

if TYPE_CHECKING:
    from asyncio import Transport


class Connection(H11Protocol):
    """uvicorn's, with an end for those that keep one open and send nothing, or a header letter by letter.

    The whole header of a request must be there ``timeout_keep_alive`` seconds after the connection, or the end of the
    answer before: uvicorn itself waits for ever once a byte has come, or before the first one.
    """

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: "Transport") -> None:  # type: ignore[override]
        """Begin to wait."""
        super().connection_made(transport)
        self._wait()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        super().connection_lost(exc)
        if self._late is not None:
            self._late.cancel()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        body = Failure(error="the request is not one of HTTP, or its header is too long").model_dump_json().encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        events: list[Any] = [h11.Response(status_code=400, headers=headers, reason=b"Bad Request"), h11.Data(data=body)]
        for event in (*events, h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _wait(self) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late = self.loop.call_later(self.timeout_keep_alive, self._end_if_silent)

    def _end_if_silent(self) -> None:
        # A request that has come is answered, and has time limits of its own.
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

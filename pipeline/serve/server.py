"""`dare serve`: a server from its start to its end.

It listens first and loads then: whoever asks in between is told to wait. SIGTERM and Ctrl-C let the requests that are
on their way be answered, and end it.
"""

import asyncio
import errno
import gc
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

import torch
import uvicorn

from pipeline.errors import description, end_at_once, printable, refusal_reason
from pipeline.serve.answers import Answers, StoreOnDemand
from pipeline.serve.application import application
from pipeline.serve.connection import Connection
from pipeline.serve.metrics import Metrics
from pipeline.serve.predictor import Predictor
from pipeline.serve.swap import Models
from pipeline.serve.workers import Workers
from schemas.errors import StoreError, UserError
from schemas.serving import ServeSettings

if TYPE_CHECKING:
    from types import FrameType

    from pipeline.serve.history_store import HistoryStore

_LOGGER = logging.getLogger("dare.serve")

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_S = 5.0
"""Seconds that requests are given at the end beyond their time limit, and then threads that still work."""


class _Server(uvicorn.Server):
    """A server that ends without an error when it is asked to."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn would raise the signal once more at the end, and the process would die of it. Nor is any other one
        # heard from then on: what is left has time limits, and an interrupt in the midst of it is a trace, or worse.
        def asked(number: int, frame: "FrameType | None") -> None:
            self.force_exit = self.should_exit
            self.should_exit = True

        for number in SIGNALS:
            signal.signal(number, asked)
        try:
            yield
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: the port is taken or may not be had, or this machine has no such address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            # So that a server can follow another at once.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except BaseException:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        number = error.errno if isinstance(error, OSError) else None
        if number == errno.EADDRINUSE:
            raise UserError(
                f"port {port} of {host} is in use; end what listens there, or give another --port"
            ) from None
        if number == errno.EACCES:
            raise UserError(f"port {port} of {host} may not be listened on: {refusal_reason(error)}") from None
        raise UserError(f"{host} is no address of this machine: {error}") from None
    return listener


class ServerOfModels:
    """A server that listens, loads its models, and answers until it is asked to end."""

    def __init__(
        self,
        folders: Sequence[Path],
        settings: ServeSettings,
        *,
        open_store: "Callable[[Path], HistoryStore] | None" = None,
        root: Path | None = None,
        watch: bool = False,
    ) -> None:
        """Listen.

        Args:
            folders: exported models, see `Models`.
            settings: where it listens, and its limits.
            open_store: opens the store of histories, given the first model's folder; None: there is none.
            root: folder below which further models may be loaded by path.
            watch: look for newer models now and then.

        Raises:
            UserError: the port is taken, or two models have one name.
        """
        self._store = None if open_store is None else StoreOnDemand(lambda: open_store(self._models.folder))
        self._models = Models(folders, lambda folder: Predictor.load(folder, self._store), root)
        self._answers = Answers(self._models, settings, self._store)
        self._metrics = Metrics()
        self._settings = settings
        self._workers, self._loader = Workers(settings.threads, settings.queue), Workers(1, 0)
        self._watch = watch
        self._socket = listening(settings.host, settings.port)
        self._ended = Event()
        self._failed: Exception | None = None
        config = uvicorn.Config(
            application(self._answers, settings, self._metrics, self._workers, self._loader),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            loop="asyncio",
            http=Connection,
            timeout_keep_alive=ceil(settings.timeout),
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=int(settings.timeout + GRACE_S) + 1,
        )
        self._server = _Server(config)

    @property
    def address(self) -> str:
        """Where it is reached, as a URL."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> None:
        """Answer until SIGTERM or SIGINT; what is on its way is answered first. Later signals are ignored.

        To be called once, at the end of a process: where a thread still works when its time is over, because a model
        is being loaded or a request came too late, the process ends here, with exit code 0.

        Raises:
            UserError: a model cannot be loaded, or the store is none.
        """
        # Each request may be worked on by several threads of torch.
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(min(torch.get_num_threads(), max(1, cores // self._settings.threads)))
        # A connection is an open file, and the usual limit of 1,024 is soon reached by those that wait.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        worker = Thread(target=self._load_and_look, name="load", daemon=True)
        worker.start()
        try:
            asyncio.run(self._server.serve(sockets=[self._socket]))
        finally:
            self._close(worker)
        if self._failed is not None:
            raise self._failed

    def _close(self, worker: Thread) -> None:
        """Let go of models and store; none may be left when the interpreter ends.

        A thread that comes back from C++ then, from loading or freeing compiled code, is ended by Python in the midst
        of it, and C++ ends the process with SIGABRT.
        """
        self._ended.set()
        until = time.monotonic() + (0 if self._server.force_exit else GRACE_S)
        worker.join(max(0, until - time.monotonic()))
        idle = [each.close(max(0, until - time.monotonic())) for each in (self._workers, self._loader)]
        if worker.is_alive() or not all(idle):
            # No thread can be ended from outside, and what it uses may not be closed. Appended events are on the disk.
            _LOGGER.warning("ended while a model was being loaded or a request worked on")
            end_at_once(0)
        if self._store is not None:
            self._store.close()
        self._models.close()
        gc.collect()

    def _load_and_look(self) -> None:
        try:
            self._models.load_all()
            if self._store is not None:
                try:
                    self._store.opened()
                except StoreError as error:
                    # Requests with a history are answered, and it is asked again.
                    _LOGGER.warning("the store is down: %s", description(error))
        except Exception as error:
            self._failed = error
            self._server.should_exit = True
            return
        _LOGGER.info("ready")
        for name, model in self._models.all().items():
            try:
                # Rows are verified when they are read; here all of them, so that damage is known early.
                model.verify()
            except UserError as error:
                _LOGGER.error("%s: %s", printable(name), description(error))
        while self._watch and not self._ended.wait(self._settings.watch_every):
            try:
                for taken in self._models.look():
                    self._metrics.reloads.labels("loaded" if taken else "refused").inc()
            except Exception as error:
                _LOGGER.error("looking for newer models: %s", description(error), exc_info=error)

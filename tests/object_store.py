"""An S3 server of this process, moto's, which can be told to fail in the ways in which stores fail."""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from pyarrow import fs
from werkzeug.serving import WSGIRequestHandler, make_server

from schemas.storage import RemotePath

Fault = Literal["503", "cut", "stall"]


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_: Any) -> None:
        """Say nothing of requests."""


class ObjectStore:
    """A server with one bucket, ``bucket``. Its address and credentials are in the environment while it runs."""

    def __init__(self) -> None:
        self.fault: Callable[[str, str], Fault | None] = lambda method, path: None
        """Says of a request, by its method and path, how it fails; None: it does not."""
        self.failed: list[tuple[str, str]] = []
        """Requests that were made to fail."""
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._handle, threaded=True, request_handler=_Quiet)
        self.address = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://{self.address}",
            "AWS_ACCESS_KEY_ID": "test-key",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def path(self, name: str) -> RemotePath:
        return RemotePath(f"s3://bucket/{name}")

    def names(self, folder: str) -> set[str]:
        """Names of all files below a folder."""
        return {str(file.relative_to(self.path(folder))) for file in self.path(folder).files()}

    def __enter__(self) -> "ObjectStore":
        self._thread.start()
        options = {"endpoint_override": self.address, "scheme": "http", "region": "us-east-1"}
        keys = {"access_key": "test-key", "secret_key": "test-secret"}
        fs.S3FileSystem(**options, **keys, allow_bucket_creation=True).create_dir("bucket")
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handle(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        fault = self.fault(method, path)
        if fault is None:
            answer: Iterable[bytes] = self._app(environ, start)
            return answer
        self.failed.append((method, path))
        if fault == "503":
            start("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        return self._half(b"".join(self._app(environ, start)), fault)

    def _half(self, content: bytes, fault: Fault) -> Iterator[bytes]:
        yield content[: len(content) // 2]
        if fault == "stall":
            time.sleep(5)
        # The connection breaks here: fewer bytes have come than were announced.
        raise ConnectionResetError


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Run a store, with the environment that finds it."""
    with ObjectStore() as store, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
            patch.delenv(name)
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store

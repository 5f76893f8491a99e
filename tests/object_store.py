"""S3 servers of this machine: moto's, in this process, which can be told to fail as stores do; and Ceph's gateway."""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from pyarrow import fs
from werkzeug.serving import WSGIRequestHandler, make_server

from schemas.storage import RemotePath
from tests.ceph_gateway import ceph_gateway, is_installed

Fault = Literal["503", "cut", "stall"]


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_: Any) -> None:
        """Say nothing of requests."""


class ObjectStore:
    """A server with one bucket, ``bucket``. Its address and credentials are in the environment while it runs."""

    fault: Callable[[str, str], Fault | None] | None = None
    """Says of a request, by its method and path, how it fails; None: it does not. Of Ceph's gateway, always None."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = {**environment, "AWS_EC2_METADATA_DISABLED": "true"}
        self.address = environment["AWS_ENDPOINT_URL"].removeprefix("http://")
        self.failed: list[tuple[str, str]] = []
        """Requests that were made to fail."""

    def make_bucket(self) -> None:
        fs.S3FileSystem(
            endpoint_override=self.address,
            scheme="http",
            region="us-east-1",
            access_key=self.environment["AWS_ACCESS_KEY_ID"],
            secret_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            allow_bucket_creation=True,
        ).create_dir("bucket")

    def path(self, name: str) -> RemotePath:
        return RemotePath(f"s3://bucket/{name}")

    def names(self, folder: str) -> set[str]:
        """Names of all files below a folder."""
        return {str(file.relative_to(self.path(folder))) for file in self.path(folder).files()}


class MotoStore(ObjectStore):
    """moto's server."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._handle, threaded=True, request_handler=_Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        endpoint = f"http://127.0.0.1:{self._server.server_port}"
        keys = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret"}
        super().__init__({"AWS_ENDPOINT_URL": endpoint, **keys})

    def __enter__(self) -> "MotoStore":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handle(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        fault = None if self.fault is None else self.fault(method, path)
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


STORES = ["moto", pytest.param("ceph", marks=pytest.mark.ceph)]


@contextmanager
def object_store(kind: str, folder: Path) -> Iterator[ObjectStore]:
    """Run a store, with the environment that finds it.

    Args:
        kind: ``moto`` or ``ceph``.
        folder: for the server's files.
    """
    with ExitStack() as stack:
        if kind == "ceph":
            if not is_installed():
                pytest.skip("needs `apt-get install radosgw ceph-mon ceph-osd`")
            store = ObjectStore(stack.enter_context(ceph_gateway(folder)))
        else:
            store = stack.enter_context(MotoStore())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
            patch.delenv(name)
        for name, value in store.environment.items():
            patch.setenv(name, value)
        for name in ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"):
            patch.setenv(name, "when_required")
        store.make_bucket()
        for name in ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"):
            patch.delenv(name)
        yield store

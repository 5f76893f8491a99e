"""A server of Redis on this machine, of Debian's package, on loopback alone."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from tests.launcher import free_port

PATIENCE_S = 60.0


def is_installed() -> bool:
    return shutil.which("redis-server") is not None


@contextmanager
def redis_server(folder: Path, *options: str, port: int = 0) -> Iterator[int]:
    """Run it; yields its port, which is a free one if none is given."""
    port = port or free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + PATIENCE_S
        with redis.Redis(port=port) as client:
            while True:
                try:
                    client.ping()
                    break
                except redis.AuthenticationError:
                    break  # it answers
                except redis.ConnectionError:
                    assert process.poll() is None, "the server has ended"
                    assert time.monotonic() < until
                    time.sleep(0.02)
        yield port
    finally:
        process.kill()
        process.wait()

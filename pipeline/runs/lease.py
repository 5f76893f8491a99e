"""A lock for a run at a URL: a file that its holder writes again and again, since a store lets nothing be held."""

import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from schemas.errors import UserError
from schemas.storage import RemotePath

LEASE_S = 45.0
"""Seconds after which a file that was not written again is that of a process that is gone."""
SETTLE_S = 0.5
"""Seconds until a process that has written the file looks whether it is still its own."""

_LOGGER = logging.getLogger("dare.runs")


@contextmanager
def leased(file: RemotePath, refusal: str) -> Iterator[None]:
    """Hold a file for this process, until the block or the process ends.

    After a process that was killed on another machine, it waits for `LEASE_S`. Two that begin in the same moment are
    told apart unless the store takes longer than `SETTLE_S` to show what was written.

    Raises:
        UserError: another process holds it; the store cannot be reached, or refuses.
    """
    _wait_for(file, refusal)
    holder = {"host": platform.node(), "process": os.getpid(), "token": uuid.uuid4().hex}
    _write(file, holder, 0)
    time.sleep(SETTLE_S)
    if (_read(file) or {}).get("token") != holder["token"]:
        raise UserError(refusal)
    ended = threading.Event()

    def renew() -> None:
        beat = 0
        while not ended.wait(LEASE_S / 4):
            beat += 1
            # Where the store is not there for a while, training itself finds out.
            with suppress(UserError):
                _write(file, holder, beat)

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(UserError):
            file.unlink(missing_ok=True)


def is_leased(file: RemotePath) -> bool:
    """Whether a process holds the file; for `LEASE_S` also after a process was killed on another machine."""
    holder = _read(file)
    if holder is None or _is_gone(holder):
        return False
    with suppress(FileNotFoundError):
        return time.time() - file.stat().st_mtime < LEASE_S
    return False


def _wait_for(file: RemotePath, refusal: str) -> None:
    first = now = _read(file)
    until = time.monotonic() + LEASE_S
    while now is not None and not _is_gone(now):
        if now != first:
            raise UserError(refusal)
        if time.monotonic() > until:
            return
        if now is first:
            _LOGGER.info("%s: held by a process on %s; is it alive? (up to %d s)", file, now.get("host"), LEASE_S)
        time.sleep(LEASE_S / 20)
        now = _read(file)


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine, and is no more."""
    if holder.get("host") != platform.node():
        return False
    try:
        os.kill(int(holder["process"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError):
        return False
    return False


def _read(file: RemotePath) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        return {}
    return content if isinstance(content, dict) else {}


def _write(file: RemotePath, holder: dict[str, Any], beat: int) -> None:
    file.write_bytes(json.dumps(holder | {"beat": beat}).encode())

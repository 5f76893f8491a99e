"""What is Redis's own: a server that is down or refuses, and keys of somebody else."""

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from pipeline.serve import redis_store
from pipeline.serve.store import open_store
from schemas.errors import StoreError, UserError
from tests.launcher import free_port
from tests.redis_server import is_installed, redis_server
from tests.serve.test_store import PLAIN


def test_nobody_listens() -> None:
    with pytest.raises(
        StoreError, match=r"^redis://127.0.0.1:[0-9]+/0: the store is down, or refuses: .*refused"
    ) as error:
        open_store(f"redis://me:secret@127.0.0.1:{free_port()}/0", PLAIN)
    assert "secret" not in str(error.value)


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_store, "_ANSWER_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(StoreError, match="the store is down, or refuses: Timeout reading from"):
            open_store(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", PLAIN)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    if not is_installed():
        pytest.skip("needs Debian's redis-server")
    with redis_server(tmp_path_factory.mktemp("redis"), "--requirepass", "secret") as port:
        yield port


@pytest.mark.redis
def test_a_password(port: int) -> None:
    with open_store(f"redis://:secret@127.0.0.1:{port}/0?prefix=password", PLAIN) as store:
        assert store.append("Ann", {"time": [1], "item": [2]}) == 1
        assert "secret" not in store.url
    for credentials in ("", ":wrong-word@"):
        with pytest.raises(StoreError, match="wants a password, or another one; give redis://") as error:
            open_store(f"redis://{credentials}127.0.0.1:{port}/0", PLAIN)
        assert "wrong-word" not in str(error.value)


@pytest.mark.redis
def test_keys_of_somebody_else(port: int) -> None:
    with redis.Redis(port=port, password="secret") as client:
        client.rpush(b"theirs:\x00store", 1)
        with pytest.raises(UserError, match="no store of histories: keys of this prefix hold something else"):
            open_store(f"redis://:secret@127.0.0.1:{port}/0?prefix=theirs", PLAIN)
        for prefix in ("one", "two"):
            with open_store(f"redis://:secret@127.0.0.1:{port}/0?prefix={prefix}", PLAIN) as store:
                store.append(prefix, {"time": [1], "item": [2]})
                assert store.users() == [prefix], "stores of other prefixes are others"
        assert {key.split(b":")[0] for key in client.scan_iter()} >= {b"one", b"two"}


@pytest.mark.redis
def test_a_server_that_goes_away(tmp_path: Path) -> None:
    if not is_installed():
        pytest.skip("needs Debian's redis-server")
    with redis_server(tmp_path) as port:
        store = open_store(f"redis://127.0.0.1:{port}/0", PLAIN)
        store.append("Ann", {"time": [1], "item": [2]})
    began = time.monotonic()
    for ask in (lambda: store.history("Ann"), lambda: store.append("Ann", {"time": [2], "item": [2]}), store.users):
        with pytest.raises(StoreError, match="the store is down, or refuses"):
            ask()
    assert time.monotonic() - began < 60
    with redis_server(tmp_path, port=port):
        # The same object goes on; this server has kept nothing of what the former one had in memory.
        assert store.append("Ann", {"time": [1], "item": [2]}) == 1


@pytest.mark.redis
def test_a_server_that_is_full(tmp_path: Path) -> None:
    if not is_installed():
        pytest.skip("needs Debian's redis-server")
    with redis_server(tmp_path, "--maxmemory", "3mb", "--maxmemory-policy", "noeviction") as port:
        store = open_store(f"redis://127.0.0.1:{port}/0", PLAIN, 1_000_000)
        written = 0
        items = [number * 2**40 for number in range(10_000)]
        with contextlib.suppress(StoreError):
            while written < 100:
                store.append(f"user {written}", {"time": [1] * 10_000, "item": items})
                written += 1
        assert 0 < written < 100
        with pytest.raises(StoreError, match=r"the store is down, or refuses: .*(OOM|maxmemory)"):
            store.append(f"user {written}", {"time": [1] * 10_000, "item": items})
        assert len(store) == written
        assert len(store.history(f"user {written - 1}")["item"]) == 10_000
        assert store.history(f"user {written}")["item"] == [], "nothing by half"

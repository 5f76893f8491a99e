"""`dare serve`: a real server of a real model, asked over HTTP."""

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests

from pipeline.serve.predictor import Predictor
from tests.launcher import PATIENCE_S
from tests.served import Exported
from tests.servers import Server, break_down, count, hold, hold_warming


@pytest.fixture(scope="module")
def store(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store of histories."""
    return tmp_path_factory.mktemp("histories") / "store"


@pytest.fixture(scope="module")
def server(exported: Exported, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that nobody ends or changes."""
    limits = ["--max-body", 100_000, "--max-candidates", 50, "--max-behaviors", 200]
    with Server(tmp_path_factory.mktemp("server"), exported.folder, "--store", store, *limits) as started:
        yield started.ready()


def _accepts(place: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(place) == 0


def test_scores_are_those_of_the_predictor(server: Server, exported: Exported) -> None:
    predictor = Predictor.load(exported.folder)
    answer = server.post("/score", exported.body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == predictor.version
    name, _, milliseconds = answer.headers["Server-Timing"].partition(";dur=")
    assert name == "total"
    assert 0 < float(milliseconds) < 1000 * answer.elapsed.total_seconds()
    np.testing.assert_array_equal(
        answer.json()["scores"], predictor.score(exported.history, exported.candidates).tolist()
    )
    assert answer.json()["history"] == count(exported)
    assert server.post("/score", {"history": exported.history, "candidates": []}).json()["scores"] == []


def test_scores_of_somebody_unknown_say_so(server: Server, exported: Exported) -> None:
    names = ("dare_scores_without_history_total", "dare_candidates_unknown_total")
    before = [server.metric(name) for name in names]
    known = exported.candidates[0]
    body = {"user": 10**6, "candidates": [known, known | {"product": 10**12}, known | {"product": 10**12 + 1}]}
    answer = server.post("/score", body).json()
    assert (len(answer["scores"]), answer["history"], answer["unknown_items"]) == (3, 0, 2)
    assert [server.metric(name) for name in names] == [before[0] + 1, before[1] + 2]


def test_what_was_appended_is_scored_as_if_it_were_sent(server: Server, exported: Exported) -> None:
    user = exported.user
    assert server.post("/append", {"user": user, "events": exported.history}).json()["appended"] == count(exported)
    again = server.post("/append", {"user": user, "events": exported.history}).json()
    assert (again["appended"], again["known"]) == (0, count(exported))
    sent, kept = (
        server.post("/score", {**about, "candidates": exported.candidates}).json()["scores"]
        for about in ({"history": exported.history}, {"user": user})
    )
    assert kept == sent
    shown = server.post("/history", {"user": user}).json()
    assert shown["times"] == sorted(shown["times"])
    assert len(shown["times"]) == count(exported)
    assert user in server.post("/users", {}).json()["users"]


def test_an_explanation_names_the_behaviours(server: Server, exported: Exported) -> None:
    candidate = exported.candidates[0]
    answer = server.post("/explain", {"history": exported.history, "candidate": candidate}).json()
    (model,) = answer["models"]
    (score,) = server.post("/score", {"history": exported.history, "candidates": [candidate]}).json()["scores"]
    assert list(model["scores"].values()) == [score]
    weights = [each["weight"] for each in model["retrieved"]]
    assert weights == sorted(weights, reverse=True)
    assert weights
    times = server.post("/times", {"history": exported.history}).json()["times"]
    assert {each["time"] for each in model["retrieved"]} <= set(times)


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/score", "", 400, "the body is empty"),
        ("/score", "{", 400, "the body is not JSON"),
        ("/score", "[]", 400, "the body is no JSON object"),
        ("/score", b"\xff{}", 400, "not text of UTF-8"),
        ("/score", '{"candidates": NaN}', 400, "the body has NaN"),
        ("/score", '{"candidates": -Infinity}', 400, "the body has -Infinity"),
        ("/score", '{"user": ' + "9" * 5000 + "}", 400, "not JSON"),
        ("/score", "[" * 50_000, 400, "nested too deeply"),
        ("/score", "{}", 400, "candidates: must be given"),
        ("/score", '{"candidates": []}', 400, "give history or user"),
        ("/score", '{"candidates": [], "user": 1, "history": {}}', 400, "give history or user"),
        ("/score", '{"candidates": [], "user": true}', 400, "user: must be text or an integer, not True"),
        ("/score", '{"candidates": [], "user": 1.5}', 400, "user: must be text or an integer, not 1.5"),
        ("/score", '{"candidates": [], "user": 1, "limit": 3}', 400, "'limit': unknown key"),
        ("/score", '{"candidates": {}, "user": 1}', 400, "candidates: "),
        ("/score", '{"candidates": [1], "user": 1}', 400, "candidates[0]: must be an object, not 1"),
        ("/score", '{"candidates": [], "user": 1, "model": "none"}', 400, "there is no none"),
        ("/score", json.dumps({"candidates": [{}] * 51, "user": 1}), 400, "51 are more than the 50"),
        ("/score", json.dumps({"candidates": [], "history": {"a": [1] * 201}}), 400, "a has 201 values"),
        ("/score", " " * 100_001, 413, "more than 100000 bytes"),
        ("/score", json.dumps({"candidates": [], "history": {"a": [1]}}), 400, "history"),
        ("/score", json.dumps({"candidates": [], "user": "\ud800"}), 400, ""),
        ("/append", '{"user": 1, "events": []}', 400, "events: must be an object, not []"),
        ("/append", '{"user": 1, "events": {"a": [1]}}', 400, ""),
        ("/append", '{"user": null, "events": {}}', 400, "user"),
        ("/explain", '{"user": 1, "candidate": []}', 400, "candidate: "),
        ("/users", '{"count": 0}', 400, "count: "),
        ("/reload", '{"path": "other"}', 400, "start it with --models"),
        ("/history", '{"user": 1, "user": 2}', 400, "key 'user' twice"),
        ("/score", '{"candidates": [{"product": 1, "product": 2}], "history": {}}', 400, "key 'product' twice"),
        ("/score", '{"' + "k" * 50_000 + '": 1}', 400, "kkk"),
        ("/nothing", "{}", 404, "not found"),
        ("/health", "{}", 405, "method not allowed"),
    ],
)
def test_malformed_requests(server: Server, path: str, body: str | bytes, status: int, said: str) -> None:
    answer = server.post(path, data=body)
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    line = answer.json()["error"]
    assert said in line
    assert "\n" not in line
    assert len(line) <= 1_000
    assert server.get("/health").json()["status"] == "ready"


@pytest.mark.parametrize(
    ("size", "body"),
    [
        (b"Content-Length: 1000000000000", b""),
        (b"Transfer-Encoding: chunked", (b"8000\r\n" + b" " * 0x8000 + b"\r\n") * 4),
    ],
)
def test_a_body_that_is_too_large_is_not_read(server: Server, size: bytes, body: bytes) -> None:
    with socket.create_connection(server.place(), PATIENCE_S) as connection:
        connection.sendall(
            b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + size + b"\r\n\r\n" + body
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_page_of_another_site_can_send_nothing(server: Server) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = server.post("/append", {"user": 1, "events": {}}, headers={"Content-Type": kind})
        assert answer.status_code == 415
    asked = requests.options(
        server.address() + "/score", headers={"Origin": "http://x", "Access-Control-Request-Method": "POST"}, timeout=60
    )
    assert asked.status_code == 405
    assert not [name for name in asked.headers if name.lower().startswith("access-control")]


def test_what_is_measured(server: Server, exported: Exported) -> None:
    names = ('dare_requests_total{route="/score",status="200"}', 'dare_request_seconds_count{route="/score"}')
    refused, candidates = 'dare_errors_total{kind="request"}', "dare_candidates_total"
    before = [server.metric(name) for name in (*names, refused, candidates)]
    for body in (exported.body, {}):
        server.post("/score", body)
    after = [server.metric(name) for name in (*names, refused, candidates)]
    assert [late - early for early, late in zip(before, after, strict=True)] == [1, 2, 1, len(exported.candidates)]
    version = Predictor.load(exported.folder).version
    assert server.metric(f'dare_model_info{{model="{exported.folder.name}",version="{version}"}}') == 1
    # The request that asks is on its way itself.
    assert server.metric("dare_requests_in_flight") == 1


def test_openapi_says_what_is_asked_and_answered(server: Server) -> None:
    document = server.get("/openapi.json").json()
    score = document["paths"]["/score"]["post"]
    asked = score["requestBody"]["content"]["application/json"]["schema"]
    assert set(asked["properties"]) == {"history", "user", "model", "candidates"}
    assert asked["required"] == ["candidates"]
    assert {"200", "400", "413", "503", "504"} <= set(score["responses"])
    assert "Scores" in document["components"]["schemas"]


def test_a_second_server_on_the_port(server: Server, exported: Exported, tmp_path: Path) -> None:
    _, port = server.place()
    second = Server(tmp_path, exported.folder, "--port", port)
    assert second.ended() == 1
    assert second.said().splitlines()[-1].startswith(f"dare: port {port} of 127.0.0.1 is in use; ")
    assert "Traceback" not in second.said()


def test_it_listens_on_loopback_alone(server: Server) -> None:
    host, port = server.place()
    assert host == "127.0.0.1"
    # Any other address of this machine, such as another one of the loopback network, is not listened on.
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.2", port)) != 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{missing}"], "no such folder"),
        (["{empty}"], "model.json"),
        (["{model}", "{model}"], "two models are called"),
        (["{model}", "--threads", "0"], "threads: "),
        (["{model}", "--timeout", "0"], "timeout: "),
        (["{model}", "--port", "70000"], "port: "),
        (["{model}", "--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["{model}", "--max-body", "1"], "max_body: "),
        (["{model}", "--store", "ftp://nowhere/0"], "ftp"),
        (["{model}", "--store", "{file}"], "file"),
        (["{model}", "--store", "{file}/below"], "file/below: "),
        (["{model}", "--store", "/proc/below"], "/proc/below: "),
    ],
)
def test_what_a_server_cannot_be_started_with(
    exported: Exported, tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    folders = {"model": exported.folder} | {name: tmp_path / name for name in ("missing", "empty", "file")}
    server = Server(tmp_path, *[text.format(**folders) for text in arguments])
    assert server.ended() == 1, server.said()
    last = server.said().splitlines()[-1]
    assert last.startswith("dare: ")
    assert said in last
    assert "Traceback" not in server.said()
    # What needs no model to be seen is seen before anybody is told where to ask.
    assert bool(server.printed()) == (arguments == ["{empty}"])


def test_a_store_that_is_down(exported: Exported, tmp_path: Path) -> None:
    with socket.socket() as taken:
        # Bound, but nobody listens: connections are refused.
        taken.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{taken.getsockname()[1]}/0"
        with Server(tmp_path, exported.folder, "--store", url) as server:
            server.ready()
            with_history = server.post("/score", exported.body)
            assert with_history.status_code == 200
            for path, body in (
                ("/score", {"user": 1, "candidates": exported.candidates}),
                ("/append", {"user": 1, "events": {}}),
                ("/history", {"user": 1}),
            ):
                answer = server.post(path, body)
                assert answer.status_code == 503, answer.text
                assert answer.headers["Retry-After"]
                assert "\n" not in answer.json()["error"]
            assert server.metric('dare_errors_total{kind="store"}') == 3


def test_a_fault_is_told_by_a_number_and_its_trace_is_in_the_log(exported: Exported, tmp_path: Path) -> None:
    with Server(tmp_path, exported.folder, sabotage=break_down) as server:
        server.ready()
        answer = server.post("/score", exported.body)
        assert answer.status_code == 500
        number = answer.json()["error"].rpartition(" ")[2]
        assert "secret" not in answer.text
        assert f"fault {number}" in server.said()
        assert "a secret of the server" in server.said()
        assert server.said().count("Traceback") == 1
        assert server.metric('dare_errors_total{kind="fault"}') == 1


def test_more_requests_than_it_takes_are_refused_and_late_ones_are_told(exported: Exported, tmp_path: Path) -> None:
    limits = ["--threads", 1, "--queue", 1, "--timeout", 5]
    with (
        Server(tmp_path, exported.folder, *limits, sabotage=hold, given=(tmp_path,)) as server,
        ThreadPoolExecutor(2) as senders,
    ):
        server.ready()
        held = senders.submit(server.post, "/score", exported.body)
        server.until((tmp_path / "0").exists)
        queued = senders.submit(server.post, "/score", exported.body)
        # The request that asks is counted, too.
        server.until(lambda: server.metric("dare_requests_in_flight") == 3)
        answer = server.post("/score", exported.body)
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "1"
        assert [held.result().status_code, queued.result().status_code] == [504, 504]
        (tmp_path / "go").touch()
        server.until(lambda: server.post("/score", exported.body).status_code == 200)
        # What had not begun in its time was never begun.
        assert not (tmp_path / "2").exists()


def test_a_body_that_does_not_arrive(exported: Exported, tmp_path: Path) -> None:
    with (
        Server(tmp_path, exported.folder, "--timeout", 0.2) as server,
        socket.create_connection(server.ready().place(), PATIENCE_S) as connection,
    ):
        connection.sendall(
            b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
def test_who_sends_no_request_is_not_waited_for(exported: Exported, tmp_path: Path, sent: bytes) -> None:
    with Server(tmp_path, exported.folder, "--timeout", 0.5) as server:
        with socket.create_connection(server.ready().place(), PATIENCE_S) as connection:
            connection.sendall(sent)
            assert connection.recv(100) == b""
        # One that is used again and again is not ended in between.
        with requests.Session() as session:
            assert {session.get(server.address() + "/health").status_code for _ in range(10)} == {200}


@pytest.mark.parametrize(
    "sent",
    [
        b"\0\xff\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000,
        b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nZ\r\n",
    ],
)
def test_what_is_no_http(server: Server, sent: bytes) -> None:
    with socket.create_connection(server.place(), PATIENCE_S) as connection:
        connection.sendall(sent)
        answer = b""
        while part := connection.recv(1_000):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert list(json.loads(body)) == ["error"]
    assert "Traceback" not in server.said()


def test_what_the_sender_has_done_wrong_leaves_no_trace_in_the_log(server: Server) -> None:
    assert server.post("/append", {"user": "\ud800", "events": {}}).status_code == 400
    assert server.post("/reload", {"path": "\ud800"}).status_code == 400
    assert server.post("/reload", {"path": "a" * 5_000}).status_code == 400
    assert "Traceback" not in server.said()


@pytest.mark.parametrize("interrupt", [False, True])
def test_requests_on_their_way_are_answered_before_it_ends(exported: Exported, tmp_path: Path, interrupt: bool) -> None:
    with Server(tmp_path, exported.folder, sabotage=hold, given=(tmp_path,)) as server, ThreadPoolExecutor(1) as sender:
        place = server.ready().place()
        waiting = sender.submit(server.post, "/score", exported.body)
        server.until((tmp_path / "0").exists)
        server.interrupt() if interrupt else server.terminate()
        server.until(lambda: not _accepts(place))
        assert not waiting.done()
        (tmp_path / "go").touch()
        assert waiting.result().status_code == 200
        assert server.ended() == 0
        assert "Traceback" not in server.said()


def test_signals_again_and_again(exported: Exported, tmp_path: Path) -> None:
    with Server(tmp_path, exported.folder, sabotage=hold, given=(tmp_path,)) as server, ThreadPoolExecutor(1) as sender:
        server.ready()
        sender.submit(server.post, "/score", exported.body)
        server.until((tmp_path / "0").exists)
        # The request is never done: the second one does not wait for it, and those after it are not heard.
        while server.process.is_alive():
            server.interrupt()
            server.process.join(0.01)
        assert server.ended() == 0, server.said()
        assert not any(word in server.said() for word in ("Traceback", "Fatal", "terminate"))


def test_it_is_ready_when_it_has_answered_once(exported: Exported, tmp_path: Path) -> None:
    with Server(tmp_path, exported.folder, sabotage=hold_warming, given=(tmp_path,)) as server:
        server.until((tmp_path / "warming").exists)
        assert server.get("/health").status_code == 503
        assert server.post("/score", {}).status_code == 503
        (tmp_path / "go").touch()
        server.ready()
        assert "may be slow" not in server.said()


def test_a_killed_server_leaves_nothing_to_clean_up(exported: Exported, tmp_path: Path) -> None:
    body = {"user": exported.user, "events": exported.history}
    before = sorted(exported.folder.rglob("*"))
    with Server(tmp_path / "first", exported.folder, "--store", tmp_path / "store") as server:
        assert server.ready().post("/append", body).json()["appended"] == count(exported)
        _, port = server.place()
        server.process.kill()
        server.process.join()
    with Server(tmp_path / "second", exported.folder, "--store", tmp_path / "store", "--port", port) as server:
        assert server.ready().post("/append", body).json()["known"] == count(exported)
    assert sorted(exported.folder.rglob("*")) == before


def test_many_senders(server: Server, exported: Exported) -> None:
    predictor = Predictor.load(exported.folder)
    expected = [predictor.score(exported.history, [each]).tolist() for each in exported.candidates]
    wrong: list[object] = []

    def send(number: int) -> None:
        with requests.Session() as session:
            for turn in range(10):
                at = (number + turn) % len(expected)
                body = {"history": exported.history, "candidates": [exported.candidates[at]]}
                answer = session.post(server.address() + "/score", json=body, timeout=60)
                if answer.status_code != 200 or answer.json()["scores"] != expected[at]:
                    wrong.append(answer.text)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

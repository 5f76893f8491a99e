"""A model takes the place of another while requests are answered."""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from pipeline.serve.predictor import Predictor
from schemas.served import ServedManifest
from tests.served import Exported
from tests.servers import Server, hold, load_in_torch

WATCHED = ["--watch", "--watch-every", 0.1]


class Load:
    """What senders were told: every answer, by status and version."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, str, tuple[float, ...]]] = []
        self.failures: list[str] = []

    def versions(self) -> list[str]:
        return [version for _, version, _ in self.answers]


@contextmanager
def load(server: Server, exported: Exported, senders: int = 4) -> Iterator[Load]:
    """Senders who ask again as soon as they are answered, until the block ends."""
    told, stop = Load(), threading.Event()

    def send() -> None:
        with requests.Session() as session:
            while not stop.is_set():
                try:
                    answer = session.post(server.address() + "/score", json=exported.body, timeout=60)
                    content = answer.json()
                    told.answers.append((answer.status_code, content["model"], tuple(content["scores"])))
                except Exception as error:
                    told.failures.append(repr(error))
                    return

    threads = [threading.Thread(target=send) for _ in range(senders)]
    for thread in threads:
        thread.start()
    try:
        yield told
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def scores(exported: Exported, folder: Path) -> tuple[float, ...]:
    return tuple(Predictor.load(folder).score(exported.history, exported.candidates).tolist())


def version(folder: Path) -> str:
    return ServedManifest.read(folder).version


def damage(folder: Path) -> Path:
    """Change a byte of the largest file of an export."""
    file = max(folder.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    file.write_bytes(content)
    return file


def test_no_request_is_lost_when_models_are_swapped_under_load(exported: Exported, tmp_path: Path) -> None:
    models = {version(folder): scores(exported, folder) for folder in (exported.folder, exported.other)}
    assert len(models) == 2
    root = exported.folder.parent
    with Server(tmp_path, exported.folder, "--models", root) as server:
        server.ready()
        with load(server, exported) as told:
            for turn in range(6):
                until = len(told.answers) + 8
                server.until(lambda until=until: len(told.answers) >= until or bool(told.failures))  # type: ignore[misc]
                path = str((exported.folder, exported.other)[(turn + 1) % 2].relative_to(root))
                answer = server.post("/reload", {"path": path})
                assert answer.status_code == 200, answer.text
                assert answer.json()["model"] == version(root / path)
        assert not told.failures
        assert {status for status, _, _ in told.answers} == {200}
        assert set(told.versions()) == set(models)
        # Each answer is that of one model, whole.
        assert all(models[name] == found for _, name, found in told.answers)
        assert server.metric('dare_reloads_total{outcome="loaded"}') == 6
        assert server.post("/reload", {}).json()["model"] == version(exported.folder)


def test_a_request_on_its_way_is_answered_by_the_model_that_it_began_with(exported: Exported, tmp_path: Path) -> None:
    root, gate = exported.folder.parent, tmp_path
    arguments = [exported.folder, "--models", root, "--threads", 2]
    with Server(tmp_path, *arguments, sabotage=hold, given=(gate,)) as server:
        server.ready()
        answers: list[requests.Response] = []
        thread = threading.Thread(target=lambda: answers.append(server.post("/score", exported.body)))
        thread.start()
        server.until((gate / "0").exists)
        other = str(exported.other.relative_to(root))
        assert server.post("/reload", {"path": other}).json()["model"] == version(exported.other)
        (gate / "go").touch()
        thread.join()
        assert answers[0].json()["model"] == version(exported.folder)
        assert tuple(answers[0].json()["scores"]) == scores(exported, exported.folder)
        assert server.post("/score", exported.body).json()["model"] == version(exported.other)


def test_what_may_not_be_loaded(exported: Exported, tmp_path: Path) -> None:
    root = tmp_path / "models"
    shutil.copytree(exported.folder, root / "now")
    shutil.copytree(exported.other, root / "damaged")
    shutil.copytree(exported.other, tmp_path / "outside")
    (root / "empty").mkdir()
    (root / "out").symlink_to(tmp_path / "outside")
    (root / "circle").symlink_to(root / "circle")
    damaged = damage(root / "damaged")
    with Server(tmp_path, root / "now", "--models", root) as server:
        server.ready()
        for path, status, said in (
            ("damaged", 409, damaged.name),
            ("empty", 400, "no exported model"),
            ("none", 400, "no exported model"),
            ("../outside", 400, "not below"),
            ("out", 400, "not below"),
            (str(tmp_path / "outside"), 400, "not below"),
            ("a\0b", 400, "code 0"),
            ("a" * 5_000, 400, "cannot be read"),
            ("\ud800", 400, "half a character"),
            ("circle", 400, "cannot be read"),
        ):
            answer = server.post("/reload", {"path": path})
            assert (answer.status_code, said in answer.json()["error"]) == (status, True), answer.text
            assert "\n" not in answer.json()["error"]
        assert server.get("/health").json()["model"] == version(exported.folder)
        assert tuple(server.post("/score", exported.body).json()["scores"]) == scores(exported, exported.folder)
        assert server.metric('dare_reloads_total{outcome="refused"}') == 9
        assert server.metric('dare_errors_total{kind="refused"}') == 1
        # What was given is loaded again: it is damaged by now.
        damage(root / "now")
        assert server.post("/reload", {}).status_code == 409
        assert server.post("/score", exported.body).status_code == 200


def test_a_link_is_watched(exported: Exported, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(exported.folder)
    with Server(tmp_path, link, *WATCHED) as server:
        server.ready()
        with load(server, exported, senders=2) as told:
            for folder in (exported.other, exported.folder):
                (tmp_path / "next").symlink_to(folder)
                (tmp_path / "next").rename(link)
                server.until(lambda folder=folder: server.get("/health").json()["model"] == version(folder))  # type: ignore[misc]
        assert not told.failures
        assert {status for status, _, _ in told.answers} == {200}


def test_the_newest_whole_export_of_a_watched_folder_answers(exported: Exported, tmp_path: Path) -> None:
    exports = tmp_path / "exports"
    shutil.copytree(exported.folder, exports / "monday")
    with Server(tmp_path, exports, *WATCHED) as server:
        server.ready()

        def answering() -> str:
            return str(server.get("/health").json()["model"])

        assert answering() == version(exported.folder)
        # Damaged, and newer than what answers.
        shutil.copytree(exported.other, tmp_path / "tuesday")
        damaged = damage(tmp_path / "tuesday")
        (tmp_path / "tuesday/model.json").touch()
        (tmp_path / "tuesday").rename(exports / "tuesday")
        server.wait_for("is refused")
        assert answering() == version(exported.folder)
        assert damaged.name in server.said()
        # Half of an export is none: its manifest comes last.
        shutil.copytree(exported.other, exports / "wednesday", ignore=shutil.ignore_patterns("model.json"))
        time.sleep(0.3)
        assert answering() == version(exported.folder)
        shutil.copy(exported.other / "model.json", exports / "wednesday")
        (exports / "wednesday/model.json").touch()
        server.until(lambda: answering() == version(exported.other))
        # The damaged one was tried once.
        assert server.said().count("is refused") == 1
        # Without the newest one, the one before it answers.
        shutil.rmtree(exports / "wednesday")
        server.until(lambda: answering() == version(exported.folder))


def test_a_server_that_ends_while_it_loads(exported: Exported, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(exported.folder)
    with Server(tmp_path, link, *WATCHED, sabotage=load_in_torch, given=(tmp_path,)) as server:
        server.ready()
        (tmp_path / "next").symlink_to(exported.other)
        (tmp_path / "next").rename(link)
        server.until((tmp_path / "loading").exists)
        # A thread that comes back from C++ when the interpreter has ended is an abort of the process.
        server.interrupt()
        assert server.ended() == 0, server.said()
        assert "Fatal" not in server.said()


def test_a_server_of_two_models(exported: Exported, tmp_path: Path) -> None:
    first, second = exported.folder, exported.other
    with Server(tmp_path, first, second) as server:
        health = server.ready().get("/health").json()
        assert [each["name"] for each in health["models"]] == [first.name, second.name]
        for model, folder in ((None, first), (first.name, first), (second.name, second)):
            body = {**exported.body, "model": model}
            answer = server.post("/score", body).json()
            assert answer["model"] == version(folder)
            assert tuple(answer["scores"]) == scores(exported, folder)
        asked = {"history": exported.history, "candidate": exported.candidates[0]}
        both = server.post("/explain", asked).json()["models"]
        assert [each["name"] for each in both] == [first.name, second.name]
        one = server.post("/explain", {**asked, "model": second.name}).json()["models"]
        assert one == both[1:]


def test_a_damaged_newest_export_at_the_start(exported: Exported, tmp_path: Path) -> None:
    exports = tmp_path / "exports"
    shutil.copytree(exported.folder, exports / "old")
    shutil.copytree(exported.other, exports / "new")
    (exports / "new/model.json").write_text("{")
    with Server(tmp_path, exports) as server:
        assert server.ready().get("/health").json()["model"] == version(exported.folder)
        assert "new is left out" in server.said()

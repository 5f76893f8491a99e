"""Learning day by day: the same end however often it is killed, metrics by segment, what is refused."""

import json
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.evaluate.score import score_run
from pipeline.evaluate.segments import SEGMENTS
from pipeline.online import report
from pipeline.online.days import Arrivals, Day, listed_days
from pipeline.runs.run_folder import settings_text
from schemas.errors import UserError
from schemas.online import LearntDay
from schemas.train import TrainSettings
from tests.datasets import manifest_of, write_manifest
from tests.days import FIRST_S, Online, day_users, end_state, online_settings, row_day, write_chain, write_day
from tests.launcher import run_ranks, wait
from tests.runs import run_dare

DAYS = 3


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_chain(tmp_path_factory.mktemp("days"), DAYS)


@pytest.fixture(scope="module")
def undisturbed(days: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Online]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return {ranks: Online(ranks, online_settings(days), folder / str(ranks)).finish() for ranks in (1, 2)}


def killed_and_finished(
    ranks: int, kills: int, days: list[Path], folder: Path, undisturbed: Online, *overrides: str
) -> None:
    """Kill an online run before random changes of its folder, and let it go on."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(kills):
        run = Online(ranks, online_settings(days, *overrides), folder, die_at=rng.randrange(1, undisturbed.changes))
        (code,) = wait(run.processes[:1])
        run.kill()
        if code == 0:  # what was left had fewer changes than that
            break
        assert code == -9, run.said()
    Online(ranks, online_settings(days, *overrides), folder).finish()
    assert end_state(folder) == end_state(undisturbed.folder)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_runs_end_as_undisturbed_ones(
    ranks: int, days: list[Path], tmp_path: Path, undisturbed: dict[int, Online]
) -> None:
    killed_and_finished(ranks, 2, days, tmp_path / "run", undisturbed[ranks])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_again_and_again(ranks: int, days: list[Path], tmp_path: Path, undisturbed: dict[int, Online]) -> None:
    for number in range(6):
        killed_and_finished(ranks, 5, days, tmp_path / str(number), undisturbed[ranks])


DELTAS = ("checkpoint.every=3", "checkpoint.delta_every=1")
ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["model.attention.optimizer=adagrad", "model.representation.optimizer=sgd"],
        pytest.param(["deterministic=true", "model.representation.optimizer=adam"], marks=ON_CUDA),
        pytest.param(["deterministic=true", "model.representation.precision=fp16"], marks=ON_CUDA),
        pytest.param(["deterministic=true", "model.representation.memory=host"], marks=ON_CUDA),
    ],
)
def test_tables_of_any_kind_with_deltas(overrides: list[str], days: list[Path], tmp_path: Path) -> None:
    settings = (*DELTAS, *overrides)
    undisturbed = Online(1, online_settings(days, *settings), tmp_path / "undisturbed").finish()
    killed_and_finished(1, 3, days, tmp_path / "run", undisturbed, *settings)


def test_what_is_done_is_not_done_again(days: list[Path], tmp_path: Path, undisturbed: dict[int, Online]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[1].folder, folder)
    before = end_state(folder)
    again = Online(1, online_settings(days), folder).finish()
    assert "begins" not in again.said()
    assert end_state(folder) == before
    # Checkpoints of two days stay, one of each.
    kept = [len(list((folder / "days" / day.name / "checkpoints").glob("step-*"))) for day in days]
    assert kept == [0, 1, 1]


def test_curves_and_figure(days: list[Path], undisturbed: dict[int, Online]) -> None:
    folder = undisturbed[1].folder
    assert (folder / "days.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    points = {point.step: point.value for point in events.Scalars("online/auc")}
    learnt = json.loads((folder / "days.json").read_text())["days"]
    assert [day["before"] is None for day in learnt] == [True, False, False]
    assert points == {day["number"]: pytest.approx(day["before"]["label"]["all"]["auc"]) for day in learnt[1:]}
    table = [report.header(), *(report.line(LearntDay.model_validate(day)) for day in learnt)]
    assert {len(line) for line in table} == {80}, "a terminal's columns"
    assert not report.is_pictured(LearntDay.model_validate(learnt[1]), "new items"), "too few for a picture"
    # On day 2 no item is new.
    assert {point.step for point in events.Scalars("online/new items/normalized_entropy")} == {1}


@pytest.mark.parametrize(
    ("samples", "positives", "drawn"), [(100, 10, True), (99, 50, False), (100, 9, False), (100, 91, False)]
)
def test_segments_of_few_targets_are_not_drawn(samples: int, positives: int, drawn: bool) -> None:
    metrics: dict[str, float | int | None] = {"auc": 0.5, "samples": samples, "positives": positives}
    moments = {"first_timestamp": 0, "last_timestamp": 1, "targets": samples}
    day = LearntDay(name="d1", number=1, fingerprint="", chain="", before={"label": {"new items": metrics}}, **moments)
    assert report.is_pictured(day, "new items") is drawn


def scored(run: str, data: str, out: str) -> None:
    score_run(Path(run), "train", "last", Path(data), Path(out), torch.device("cpu"), overwrite=False)


def expected(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of some targets, plainly."""
    label, score = [line["label"] for line in lines], [line["score"] for line in lines]
    positives = sum(label)
    mixed = 0 < positives < len(label)
    users: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        users.setdefault(line["user_id"], []).append(line)
    own = [
        (len(each), roc_auc_score([line["label"] for line in each], [line["logit"] for line in each]))
        for each in users.values()
        if len({line["label"] for line in each}) == 2
    ]
    loss = log_loss(label, score, labels=[0, 1]) if lines else None
    share = positives / len(label) if lines else math.nan
    entropy = -(share * math.log(share) + (1 - share) * math.log(1 - share)) if mixed else math.nan
    return {
        "auc": roc_auc_score(label, [line["logit"] for line in lines]) if mixed else None,
        "gauc": sum(size * auc for size, auc in own) / sum(size for size, _ in own) if own else None,
        "log_loss": loss,
        "normalized_entropy": loss / entropy if mixed and loss is not None else None,
        "calibration": float(np.mean(score)) / share if positives else None,
        "samples": len(lines),
        "positives": positives,
        "users": len(users),
    }


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_segments_are_those_of_the_scored_targets(ranks: int, tmp_path: Path) -> None:
    # Histories of up to 40 behaviours, of which the model sees 12 at most.
    one, other = day_users(0), day_users(1, users=60)
    first = write_day(tmp_path / "d0", one)
    second = write_day(tmp_path / "d1", other, first)
    folder = tmp_path / "run"
    Online(ranks, online_settings([first, second]), folder).finish()
    run_ranks(1, scored, str(folder / "days" / "d0"), str(second), str(tmp_path / "scores"))
    lines = pq.read_table(tmp_path / "scores").to_pylist()

    users = {user.user_id: user for user in other}
    by_segment: dict[str, list[dict[str, Any]]] = {name: [] for name in SEGMENTS}
    for line in lines:
        user = users[line["user_id"]]
        length = sum(when < line["timestamp"] for when in user.timestamp)
        day = None if line["item_id"] is None else row_day(line["item_id"])
        is_new = not any(when < FIRST_S for when in user.timestamp)
        of_item = "items without a row" if day is None else "new items" if day == 1 else "old items"
        bounds = {"history 0": 1, "history 1-9": 10, "history 10-99": 100, "history 100-999": 1000}
        of_length = next((name for name, bound in bounds.items() if length < bound), "history 1000+")
        for segment in ("all", of_item, "new users" if is_new else "old users", of_length):
            by_segment[segment].append(line)
    assert len(lines) == sum(len(user.targets) for user in other)
    filled = [name for name, members in by_segment.items() if len(members) > 10]
    assert len(filled) == 9, filled

    measured = json.loads((folder / "days" / "d1" / "before.json").read_text())["tasks"]["label"]
    assert list(measured) == list(SEGMENTS)
    for segment, members in by_segment.items():
        plain = expected(members)
        for name, value in plain.items():
            found = measured[segment][name]
            assert found == value or found == pytest.approx(value, rel=1e-5), (segment, name, found, value)


def test_days_that_come(days: list[Path], tmp_path: Path, undisturbed: dict[int, Online]) -> None:
    inbox, folder = tmp_path / "inbox", tmp_path / "run"
    inbox.mkdir()
    run = Online(2, online_settings(days[:1]), folder, inbox)

    def done() -> list[str]:
        file = folder / "days.json"
        return [day["name"] for day in json.loads(file.read_text())["days"]] if file.is_file() else []

    def wait_until(names: list[str]) -> None:
        until = time.monotonic() + 300
        while done() != names:
            assert time.monotonic() < until, run.said()
            assert any(process.is_alive() for process in run.processes), run.said()
            time.sleep(0.05)

    wait_until(["d0"])
    # A stranger, and one whose manifest is not there yet.
    write_day(inbox / "a-stranger", day_users(77))
    shutil.copytree(days[1], inbox / "d1", ignore=shutil.ignore_patterns("manifest.json"))
    # The day after next waits for the next one.
    shutil.copytree(days[2], inbox / "d2")
    until = time.monotonic() + 300
    while "a-stranger" not in run.said(0):
        assert time.monotonic() < until, run.said()
        time.sleep(0.05)
    assert done() == ["d0"]
    shutil.copy(days[1] / "manifest.json", inbox / "d1")
    wait_until(["d0", "d1", "d2"])
    run.terminate(1)
    assert run.finish().said(0).count("a-stranger") == 1
    state, plain = end_state(folder), end_state(undisturbed[2].folder)
    assert state == plain


def complaint(settings: Any, folder: Path, follow: Path | None = None) -> str:
    run = Online(1, settings, folder, follow)
    assert run.wait() == [1]
    return run.complaint()


def test_days_that_do_not_follow_each_other(days: list[Path], tmp_path: Path) -> None:
    def refused(*listed: Path, first: str | None = None) -> str:
        with pytest.raises(UserError) as told:
            listed_days([str(day) for day in listed], (), first)
        return str(told.value)

    assert [day.name for day in listed_days([str(days[0].parent / "d*")], (), None)] == ["d0", "d1", "d2"]
    assert "is named twice" in refused(days[0], days[0])
    shutil.copytree(days[1], tmp_path / "again")
    assert "are the same day" in refused(days[0], days[1], tmp_path / "again")
    assert "days must be in order" in refused(days[2], days[1])
    assert "1 day between them missing" in refused(days[0], days[2])
    branch = write_day(tmp_path / "branch", day_users(77), days[1])
    assert "are both day 2 of the chain" in refused(days[0], days[1], days[2], branch)
    stranger = write_chain(tmp_path / "other", 2, first=5)
    assert "of another chain" in refused(days[0], stranger[1])
    assert "have one name" in refused(days[0], write_chain(tmp_path / "same", 1)[0])
    shutil.copytree(days[1], tmp_path / "v1")
    content = manifest_of(tmp_path / "v1")
    write_manifest(tmp_path / "v1", content | {"user_type": "text"})
    assert "type of users: other than in" in refused(days[0], tmp_path / "v1")
    write_manifest(tmp_path / "v1", content | {"chain": None})
    assert "no day can follow" in refused(days[0], tmp_path / "v1")
    assert "not a data set" in refused(tmp_path / "nothing")
    assert "no folder with a data set matches" in refused(tmp_path / "x*")
    assert "does not continue the data set" in refused(days[2], first=Day.open(days[0]).fingerprint)


def test_a_folder_that_is_followed_and_goes_away(days: list[Path], tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    shutil.copytree(days[0], inbox / "d0")
    arrivals = Arrivals(inbox)
    day = arrivals.next([], None)
    assert day is not None
    assert day.name == "d0"
    shutil.rmtree(inbox)
    with pytest.raises(UserError, match="cannot be read any more"):
        arrivals.next([], None)


def test_a_folder_that_is_being_copied(days: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever comes first, and in whatever order, it is waited for; a fault that stays is told of once."""
    inbox = tmp_path / "inbox"
    shutil.copytree(days[0], inbox / "d0")
    arrivals = Arrivals(inbox)

    def looks(count: int) -> list[str]:
        caplog.clear()
        assert all(arrivals.next([], None) is None for _ in range(count))
        return [record.message for record in caplog.records]

    # Its file of targets grows, or has its size before its content; so has the manifest.
    for name in ("shard-00000.parquet", "manifest.json", "row_groups.parquet", "items.parquet"):
        path, content = inbox / "d0" / name, (days[0] / name).read_bytes()
        for size in (0, 20, len(content) // 2):
            path.write_bytes(content[:size])
            assert looks(2) == []
        path.write_bytes(bytes(len(content)))
        (told,) = looks(5)
        assert "not taken as it is: " in told
        assert name in told
        path.unlink()
        looks(1)
        path.write_bytes(content)
    day = arrivals.next([], None)
    assert day is not None
    assert day.name == "d0"


def test_what_is_refused_is_one_line(days: list[Path], tmp_path: Path, undisturbed: dict[int, Online]) -> None:
    folder = tmp_path / "new"
    assert "days: none are given" in complaint(online_settings([]), folder)
    assert "no such folder" in complaint(online_settings([]), folder, tmp_path / "nowhere")
    assert not folder.exists()
    (tmp_path / "something").mkdir()
    (tmp_path / "something" / "else").touch()
    assert "not the folder of `dare online`" in complaint(online_settings(days), tmp_path / "something")

    known = tmp_path / "known"
    shutil.copytree(undisturbed[1].folder, known)
    assert "train.seed is 2, was 1" in complaint(online_settings(days, "seed=2"), known)
    changed = write_chain(tmp_path / "changed", 1, users=30)
    assert "has changed since day 0 was learnt" in complaint(online_settings(changed), known)


def test_a_day_without_targets_is_skipped(days: list[Path], tmp_path: Path) -> None:
    data = tmp_path / "data"
    (empty,) = write_chain(data, 1, first=1, former=days[0], targets=0)
    (last,) = write_chain(data, 1, first=2, former=empty)
    run = Online(1, online_settings([days[0], empty, last]), tmp_path / "run").finish()
    assert "day 1 has no targets; skipped" in run.said()
    learnt = json.loads((tmp_path / "run" / "days.json").read_text())["days"]
    assert [day["skipped"] for day in learnt] == [False, True, False]
    assert learnt[2]["before"]["label"]["all"]["samples"] == learnt[2]["targets"]


def test_days_after_a_run(days: list[Path], tmp_path: Path, undisturbed: dict[int, Online]) -> None:
    """What `first` names takes the place of the first day."""
    first = undisturbed[1].folder / "days" / "d1"
    Online(1, online_settings(days[2:], first=str(first)), tmp_path / "run").finish()
    both = [
        (folder / "days" / "d2" / "before.json").read_text() for folder in (tmp_path / "run", undisturbed[1].folder)
    ]
    assert both[0] == both[1]


def test_the_command(days: list[Path], tmp_path: Path, undisturbed: dict[int, Online]) -> None:
    """Settings from a file, files that it names, and the command line; tables; interrupts while there is nothing."""
    (tmp_path / "recipe.yaml").write_text(settings_text(online_settings(days).train.model_copy(update={"seed": 9})))
    file, run = tmp_path / "online.yaml", tmp_path / "run"
    file.write_text(f"days: {days[0].parent}/d*\nconfig: [{tmp_path}/recipe.yaml]\ntrain: {{seed: 2}}\n")
    code, said, error = run_dare(tmp_path, "online", file, "--run", run, "train.seed=1", "--json")
    assert code == 0, error
    assert end_state(run) == end_state(undisturbed[1].folder)
    lines = said.splitlines()
    assert lines[0].split()[:3] == ["day", "targets", "AUC"]
    learnt = json.loads(lines[-1])["days"]
    assert [line.split()[0] for line in lines[1:4]] == ["d0", "d1", "d2"]
    assert "no targets for validation" not in error, "as on every day"
    code, said, _ = run_dare(tmp_path, "runs", run / "days", "--json")
    listed = json.loads(said.splitlines()[-1])["runs"]
    assert [each["auc_before"] for each in listed] == [
        None if day["before"] is None else day["before"]["label"]["all"]["auc"] for day in learnt
    ]
    assert "AUC before" in said
    assert lines[2].split()[2] == f"{learnt[1]['before']['label']['all']['auc']:.4f}"
    code, said, error = run_dare(tmp_path, "online", file, "--run", run, "train.seed=1", "train.modle=twin")
    assert (code, error) == (
        1,
        f"dare: {file}: train: modle: unknown key; allowed here: {', '.join(sorted(TrainSettings.model_fields))}\n",
    )
    code, said, error = run_dare(tmp_path, "runs", run)
    assert [line.split()[:3] for line in said.splitlines()[1:]] == [
        [f"days/d{day}", "dare", "finished"] for day in range(3)
    ]
    assert not error


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_what_waits(number: int, days: list[Path], tmp_path: Path) -> None:
    run = Online(1, online_settings([]), tmp_path / "run", tmp_path)
    until = time.monotonic() + 300
    while "waits for days" not in run.said():
        assert time.monotonic() < until, run.said()
        time.sleep(0.05)
    assert run.processes[0].pid
    os.kill(run.processes[0].pid, number)
    assert "asked to stop, 0 days are done" in run.finish().said()

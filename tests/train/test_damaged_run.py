"""Damage of a run's files and its checkpoints: found before anything is used, told in a line, nothing is executed."""

import io
import json
import logging
import os
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from embeddings.distributed.process_group import process_group
from pipeline.evaluate import open_run
from pipeline.evaluate.open_run import evaluate_run
from pipeline.runs.checkpoint import RECORD, Checkpoint, best_checkpoint, checkpoints_in, damage_of, last_checkpoint
from pipeline.runs.checkpoint_files import METADATA, load, parse_metadata
from pipeline.runs.checkpoint_writer import CheckpointWriter
from pipeline.runs.comparison import compare
from pipeline.runs.listing import run_state
from pipeline.runs.run_folder import RunFolder
from schemas.documents import _notice, json_document
from schemas.errors import UserError
from schemas.train import TrainSettings
from tests.examples import examples
from tests.launcher import run_ranks
from tests.runs import Run, slow_steps, small_settings
from tests.trainers import CPU


@pytest.fixture(scope="module")
def data(many_users: Path) -> Path:
    return many_users


def run_settings(*overrides: str) -> TrainSettings:
    return small_settings("epochs=1", "checkpoint.every=4", "checkpoint.keep=9", *overrides)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    """A finished run of one rank and one of two."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {ranks: Run(ranks, run_settings(), data, folder / str(ranks)).finish() for ranks in (1, 2)}


def best_of_run(run: Path) -> Checkpoint:
    best = best_checkpoint(run / "checkpoints")
    assert best is not None
    return best


def turn_bit(file: Path, place: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 1 << bit
    file.write_bytes(content)


@contextmanager
def turned(file: Path, place: int, bit: int) -> Iterator[None]:
    """Within the block a bit of a file is another one."""
    turn_bit(file, place, bit)
    try:
        yield
    finally:
        turn_bit(file, place, bit)


# Whatever reads a run.


def evaluated(run: Path) -> Any:
    with process_group(CPU):
        return asdict(evaluate_run(run, "test", "best", None, CPU)["label"])


def listed(run: Path) -> Any:
    state = run_state(run)
    if state.state == "damaged":
        raise UserError(str(state.error))
    return asdict(state)


def compared(run: Path) -> Any:
    return compare([run, run])


READERS = (listed, compared, evaluated)
LISTED = ("losses.jsonl", "validations.jsonl", "progress.json", "test.json")
"""Files that an evaluation does not read."""


@pytest.fixture(scope="module")
def expected(undisturbed: dict[int, Run]) -> list[Any]:
    return [read(undisturbed[1].folder) for read in READERS]


@settings(deadline=None, max_examples=examples(12, 200))
@given(name=st.integers(0), place=st.integers(0), bit=st.integers(0, 7))
def test_any_bit_of_a_run(undisturbed: dict[int, Run], expected: list[Any], name: int, place: int, bit: int) -> None:
    run = undisturbed[1].folder
    best = best_of_run(run).path
    files = [path for path in [*sorted(run.iterdir()), *sorted(best.iterdir())] if path.is_file()]
    file = [path for path in files if path.stat().st_size][name % (len(files) - 1)]
    with turned(file, place, bit):
        for read, result in zip(READERS, expected, strict=True):
            if read is evaluated and file.name in LISTED:
                continue
            try:
                found, said = read(run), None
            except UserError as error:
                said = str(error)
            if said is None:
                assert found == result, file
            else:
                assert file.name in said
                assert str(run) in said
                assert "\n" not in said
                assert ".cc" not in said


# Going on from the newest checkpoint that is whole.


def damage_content(checkpoint: Path) -> None:
    turn_bit(next(checkpoint.glob("__0_*.distcp")), 5000)


def damage_record(checkpoint: Path) -> None:
    turn_bit(checkpoint / RECORD, 150)


def remove_part(checkpoint: Path) -> None:
    next(checkpoint.glob("__0_*.distcp")).unlink()


def cut_off(checkpoint: Path) -> None:
    os.truncate(checkpoint / METADATA, 100)


@pytest.mark.parametrize(
    ("ranks", "damage"),
    [
        (1, (damage_record,)),
        (2, (damage_content, remove_part)),
        pytest.param(2, (cut_off,), marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_from_the_newest_whole_one(
    undisturbed: dict[int, Run], data: Path, tmp_path: Path, ranks: int, damage: tuple[Any, ...]
) -> None:
    stopped = Run(ranks, run_settings(), data, tmp_path / "run", slow_steps, (9,)).finish()
    before = checkpoints_in(stopped.folder / "checkpoints")
    damaged = before[-len(damage) :]
    for how, checkpoint in zip(damage, damaged, strict=True):
        how(checkpoint.path)
    again = Run(ranks, run_settings(), data, tmp_path / "run").finish()
    said = again.said()
    assert f"goes on after step {before[-1 - len(damage)].step} instead" in said
    for checkpoint in damaged:
        assert said.count(f"{checkpoint.path} is damaged: ") == 1
        assert checkpoint.path.with_name(f"damaged-{checkpoint.path.name}").is_dir()
    assert again.logs() == undisturbed[ranks].logs()
    assert (again.folder / "test.json").read_text() == (undisturbed[ranks].folder / "test.json").read_text()
    assert run_state(again.folder).state == "finished"


@pytest.fixture
def stopped(undisturbed: dict[int, Run], tmp_path: Path) -> Path:
    """A copy of a run that lacks its test, and its last checkpoint."""
    subprocess.run(["cp", "-r", undisturbed[1].folder, tmp_path / "run"], check=True)
    (tmp_path / "run/test.json").unlink()
    subprocess.run(["rm", "-r", checkpoints_in(tmp_path / "run/checkpoints")[-1].path], check=True)
    return tmp_path / "run"


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_whole_checkpoint_is_a_refusal(ranks: int, stopped: Path, data: Path) -> None:
    for checkpoint in checkpoints_in(stopped / "checkpoints"):
        damage_content(checkpoint.path)
    names = {path.name for path in (stopped / "checkpoints").iterdir()}
    run = Run(ranks, run_settings(), data, stopped)
    assert set(run.wait()) == {1}
    assert "no checkpoint is whole; restore one from a copy" in run.complaint()
    assert {path.name for path in (stopped / "checkpoints").iterdir()} == names


def test_the_best_is_verified_before_training_goes_on(stopped: Path, data: Path) -> None:
    *_, last = checkpoints_in(stopped / "checkpoints")
    best = best_of_run(stopped)
    assert best.step < last.step
    damage_content(best.path)
    run = Run(1, run_settings(), data, stopped)
    assert run.wait() == [1]
    assert (
        f"{best.path} is damaged (__0_0.distcp differs from its SHA-256), and the test at the end may need it"
        in run.complaint()
    )
    assert not (stopped / "test.json").exists()
    subprocess.run(["rm", "-r", best.path], check=True)
    assert "goes on after step" in Run(1, run_settings(), data, stopped).finish().said()


def damage_the_best(rank: int, folder: Path) -> None:
    """Sabotage: when training is done, the best checkpoint is damaged."""
    from pipeline.train import run

    test = run._test

    def damaged(*arguments: Any) -> Any:
        best = best_of_run(folder)
        damage_content(best.path)
        return test(*arguments)

    run._test = damaged


def test_a_best_checkpoint_that_is_damaged_at_the_end(data: Path, tmp_path: Path) -> None:
    run = Run(1, run_settings("validation.every=100"), data, tmp_path / "run", damage_the_best, (tmp_path / "run",))
    assert run.wait() == [1]
    assert "is damaged (__0_0.distcp differs from its SHA-256); restore it from a copy, or take" in run.complaint()


def damage_seen(folder: Path) -> tuple[str | None, str | None]:
    first, second = checkpoints_in(folder)
    return damage_of(first), damage_of(second)


def test_all_ranks_find_what_one_of_them_finds(tmp_path: Path) -> None:
    with process_group(CPU):
        for step in (1, 2):
            with CheckpointWriter(tmp_path, 9, {f"{name}.txt": name * 1000 for name in "abcde"}) as writer:
                writer.save({"model": {"a": torch.ones(100)}}, step, None)
                writer.wait()
    for place, file in enumerate(sorted(checkpoints_in(tmp_path)[1].path.iterdir())):
        if file.name == RECORD:
            continue
        with turned(file, place, place % 8):
            found = run_ranks(3, damage_seen, tmp_path) if file.name == "b.txt" else [damage_seen(tmp_path)]
        assert set(found) == {(None, f"{file.name} differs from its SHA-256")}


# Choosing a checkpoint.


def test_a_checkpoint_is_named_by_its_step(undisturbed: dict[int, Run]) -> None:
    run = undisturbed[1].folder
    checkpoints = checkpoints_in(run / "checkpoints")
    with process_group(CPU):
        best = evaluate_run(run, "test", "best", None, CPU)["label"]
        by_step = {each.step: evaluate_run(run, "test", str(each.step), None, CPU)["label"] for each in checkpoints}
        step = json.loads((run / "test.json").read_text())["checkpoint_step"]
        assert by_step[step] == best
        assert by_step[checkpoints[-1].step] == evaluate_run(run, "test", "last", None, CPU)["label"]
        assert len({each.log_loss for each in by_step.values()}) == len(by_step)
        steps = ", ".join(str(each.step) for each in checkpoints)
        with pytest.raises(UserError, match=f"no checkpoint '1200'; choose best, last, or one of the steps {steps}$"):
            evaluate_run(run, "test", "1200", None, CPU)


def test_a_live_run_prunes_while_others_read(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen may be gone before it is read: then the newer one is."""
    live = small_settings("epochs=500", "checkpoint.every=1", "checkpoint.keep=1", "validation.every=100000")
    run = Run(1, live, data, tmp_path / "run", slow_steps)
    choices = []

    def counted(*arguments: Any) -> Checkpoint:
        choices.append(choose(*arguments))
        return choices[-1]

    choose = open_run.choose_checkpoint
    monkeypatch.setattr(open_run, "choose_checkpoint", counted)
    try:
        run.wait_for_step(5)
        with process_group(CPU):
            for _ in range(6):
                assert evaluate_run(run.folder, "test", "last", None, CPU)["label"].samples > 0
                assert run_state(run.folder).state == "running"
    finally:
        run.kill()
    assert len(choices) > 6


# Nothing of a checkpoint is executed.


class Trap:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return exec, (f"open({str(self._path)!r}, 'w').close()",)


def test_a_trap_in_the_metadata_is_not_sprung(undisturbed: dict[int, Run], tmp_path: Path) -> None:
    trap = pickle.dumps({"state_dict_metadata": Trap(tmp_path / "sprung")})
    pickle.loads(trap)
    (tmp_path / "sprung").unlink()
    subprocess.run(["cp", "-r", undisturbed[1].folder / "checkpoints", tmp_path / "checkpoints"], check=True)
    found = last_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    (found.path / METADATA).write_bytes(trap)
    with process_group(CPU):
        assert damage_of(found) is not None
        with pytest.raises(UserError, match=r"\.metadata names builtins\.exec, .* nothing of it was executed"):
            load({"model": {}}, found.path)
    assert not (tmp_path / "sprung").exists()


class Getattr:
    """What `getattr` makes of a class and a name, as a pickle says it."""

    def __init__(self, of: object, name: str) -> None:
        self._arguments = of, name

    def __reduce__(self) -> tuple[object, ...]:
        return getattr, self._arguments


class FormerPickler(pickle.Pickler):
    """Writes members of enumerations as Python did up to 3.11.3."""

    def reducer_override(self, value: object) -> object:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_metadata_of_another_python(undisturbed: dict[int, Run]) -> None:
    found = last_checkpoint(undisturbed[1].folder / "checkpoints")
    assert found is not None
    metadata = parse_metadata(found.path, (found.path / METADATA).read_bytes())
    former = io.BytesIO()
    FormerPickler(former).dump(metadata)
    assert b"getattr" in former.getvalue()
    assert parse_metadata(found.path, former.getvalue()) == metadata


@pytest.mark.parametrize(
    ("of", "name"), [(PosixPath, "unlink"), (Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "__class__")]
)
def test_metadata_may_name_members_of_enumerations_alone(tmp_path: Path, of: object, name: str) -> None:
    with pytest.raises(UserError, match=r"names builtins\.getattr, which no checkpoint of this program holds"):
        parse_metadata(tmp_path, pickle.dumps(Getattr(of, name)))


def test_a_trap_in_a_value_is_not_sprung(tmp_path: Path) -> None:
    with process_group(CPU):
        with CheckpointWriter(tmp_path / "checkpoints", 9, {}) as writer:
            writer.save({"progress": {"best": Trap(tmp_path / "sprung")}}, 1, None)
            writer.wait()
        found = last_checkpoint(tmp_path / "checkpoints")
        assert found is not None
        assert damage_of(found) is None
        with pytest.raises(UserError, match=r"__0_0\.distcp is damaged; use another checkpoint"):
            load({"progress": {"best": None}}, found.path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "link"])
def test_metadata_that_leads_out_of_the_folder(undisturbed: dict[int, Run], tmp_path: Path, name: str) -> None:
    found = last_checkpoint(undisturbed[1].folder / "checkpoints")
    assert found is not None
    metadata = parse_metadata(found.path, (found.path / METADATA).read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = name
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/link").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="folder"):
        parse_metadata(tmp_path / "folder", pickle.dumps(metadata))


def test_a_checkpoint_of_an_earlier_version(
    undisturbed: dict[int, Run], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No list of files, no checksums: it is used, and a line says so; damage of it is one line as well."""
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", undisturbed[1].folder, run], check=True)
    for checkpoint in checkpoints_in(run / "checkpoints"):
        record = {"step": checkpoint.step, "score": checkpoint.score, "ranks": 1}
        (checkpoint.path / RECORD).write_text(json.dumps(record) + "\n")
    _notice.cache_clear()
    with process_group(CPU):
        assert asdict(evaluate_run(run, "test", "best", None, CPU)["label"]) == evaluated_before(undisturbed[1])
        (told,) = (text for text in map(logging.LogRecord.getMessage, caplog.records) if "without being" in text)
        assert str(run) in told
        best = best_of_run(run)
        part = next(best.path.glob("*.distcp"))
        os.truncate(part, part.stat().st_size // 2)
        with pytest.raises(UserError, match=r"__0_0\.distcp is damaged; use another checkpoint") as refused:
            evaluate_run(run, "test", "best", None, CPU)
    assert ".cc" not in str(refused.value)


NOT_METRICS = ("checksum", "steps", "checkpoint", "checkpoint_step")


def evaluated_before(run: Run) -> dict[str, Any]:
    """The test that the run has made of its best checkpoint."""
    test = json.loads((run.folder / "test.json").read_text())
    return {name: value for name, value in test.items() if name not in NOT_METRICS}


def test_a_record_that_leads_out_of_its_folder(undisturbed: dict[int, Run], tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", undisturbed[1].folder / "checkpoints", tmp_path / "checkpoints"], check=True)
    found = last_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    assert found.files is not None
    record = {"step": found.step, "score": None, "files": [found.files[0].model_dump() | {"path": "../x"}]}
    (found.path / RECORD).write_text(json_document(json.dumps(record)))
    again = last_checkpoint(tmp_path / "checkpoints")
    assert again is not None
    with process_group(CPU):
        assert "which is not a file of this folder" in str(damage_of(again))


def test_empty_settings_are_not_the_defaults(undisturbed: dict[int, Run], tmp_path: Path) -> None:
    shutil.copytree(undisturbed[1].folder, tmp_path / "run")
    (tmp_path / "run" / "settings.yaml").write_bytes(b"")
    with pytest.raises(UserError, match=r"settings\.yaml is damaged \(empty\)"):
        RunFolder(tmp_path / "run").settings()

"""`validation.patience`: training ends where the validations of a run without it say, however often it goes on."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.runs.listing import run_state
from pipeline.runs.run_folder import read_step_log
from schemas.documents import read_json
from tests.runs import Run, run_dare, slow_steps, small_settings

SETTINGS = ("epochs=6", "validation.every=1", "checkpoint.every=1", "model.representation.learning_rate=0.5")
PATIENCE = 2


@pytest.fixture(scope="module")
def whole(few_users: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run to the end of its epochs."""
    return Run(1, small_settings(*SETTINGS), few_users, tmp_path_factory.mktemp("whole") / "run").finish()


def last_step(validations: list[dict[str, Any]], patience: int) -> int:
    """The step at which training ends."""
    for now in range(patience, len(validations)):
        best_before = max(line["auc"] for line in validations[: now - patience + 1])
        if all(line["auc"] <= best_before for line in validations[now - patience + 1 : now + 1]):
            return validations[now]["step"]
    return validations[-1]["step"]


def patient(patience: int = PATIENCE) -> Any:
    return small_settings(*SETTINGS, f"validation.patience={patience}")


def expected(whole: Run) -> int:
    validations = read_step_log(whole.folder / "validations.jsonl")
    step = last_step(validations, PATIENCE)
    assert PATIENCE < step < validations[-1]["step"], "the data show nothing: choose others"
    return step


def test_it_ends_early_on_one_rank_and_is_finished(whole: Run, few_users: Path, tmp_path: Path) -> None:
    run = Run(1, patient(), few_users, tmp_path / "run").finish()
    step = expected(whole)
    for name in ("validations.jsonl", "losses.jsonl"):
        log = read_step_log(run.folder / name)
        assert log == read_step_log(whole.folder / name)[: len(log)]
        assert log[-1]["step"] == step
    test = read_json(run.folder / "test.json")
    assert (test["steps"], test["ended_early"]) == (step, True)
    assert "ended_early" not in read_json(whole.folder / "test.json")
    state = run_state(run.folder)
    assert (state.state, state.step, state.ended_early) == ("finished", step, True)
    code, said, _ = run_dare(tmp_path, "runs", run.folder)
    assert code == 0
    assert f"ended early at step {step} of {state.steps}" in said
    # The same command finds nothing to do; with more patience it goes on, as if it had never ended.
    Run(1, patient(), few_users, run.folder).finish()
    assert read_json(run.folder / "test.json") == test
    Run(1, small_settings(*SETTINGS), few_users, run.folder).finish()
    assert (run.folder / "losses.jsonl").read_text() == (whole.folder / "losses.jsonl").read_text()


@pytest.mark.slow
def test_two_ranks_end_at_the_same_step(few_users: Path, tmp_path: Path) -> None:
    run = Run(2, patient(1), few_users, tmp_path / "run").finish()
    validations = read_step_log(run.folder / "validations.jsonl")
    assert validations[-1]["step"] == last_step(validations, 1)
    assert run_state(run.folder).ended_early


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_at_the_same_step(whole: Run, few_users: Path, tmp_path: Path) -> None:
    step = expected(whole)
    run = Run(1, patient(), few_users, tmp_path / "run", slow_steps, (step - 2,)).finish()
    assert run_state(run.folder).state == "stopped"
    Run(1, patient(), few_users, run.folder).finish()
    assert read_step_log(run.folder / "losses.jsonl")[-1]["step"] == step
    assert run_state(run.folder).ended_early


@pytest.mark.slow
def test_a_checkpoint_without_a_count_loads(whole: Run, few_users: Path, tmp_path: Path) -> None:
    run = Run(1, small_settings(*SETTINGS), few_users, tmp_path / "run", without_count, (3,)).finish()
    Run(1, small_settings(*SETTINGS), few_users, run.folder).finish()
    assert (run.folder / "losses.jsonl").read_text() == (whole.folder / "losses.jsonl").read_text()


def without_count(rank: int, stop_at: int) -> None:
    """Sabotage: save as the versions before this setting did, and stop."""
    from pipeline.train.trainer import Trainer

    state_dict = Trainer.state_dict

    def former(self: Trainer) -> dict[str, Any]:
        state = state_dict(self)
        del state["progress"]["not_better"]
        return state

    Trainer.state_dict = former  # type: ignore[method-assign]
    slow_steps(rank, stop_at)

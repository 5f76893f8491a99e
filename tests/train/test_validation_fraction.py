"""`validation.fraction`: a run validates on a part of the users, the same on any number of ranks, and tests on all."""

from pathlib import Path

import pytest

from pipeline.runs.run_folder import read_step_log
from schemas.documents import read_json
from schemas.shards import Split
from tests.datasets import random_users, write_dataset
from tests.runs import Run, small_settings

USERS = random_users(120)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fraction") / "data"
    write_dataset(folder, USERS)
    return folder


def of_split(split: Split) -> list[int]:
    """The user of each target."""
    return [user.user_id for user in USERS for target in user.targets if target.split == split]


@pytest.mark.slow
def test_validations_are_of_a_part_and_the_test_of_all(data: Path, tmp_path: Path) -> None:
    settings = small_settings("validation.fraction=0.4", "validation.every=3", "epochs=1")
    found = set()
    for ranks in (1, 2):
        run = Run(ranks, settings, data, tmp_path / str(ranks)).finish().folder
        validations = read_step_log(run / "validations.jsonl")
        assert len(validations) > 1
        found |= {(validation["samples"], validation["users"]) for validation in validations}
        test = read_json(run / "test.json")
        assert (test["samples"], test["users"]) == (len(of_split(Split.TEST)), len(set(of_split(Split.TEST))))
    ((samples, users),) = found
    assert 0 < samples < len(of_split(Split.VALIDATION))
    assert 0 < users < len(set(of_split(Split.VALIDATION)))


def test_a_fraction_without_users_is_refused_before_training(data: Path, tmp_path: Path) -> None:
    run = Run(2, small_settings("validation.fraction=1e-9"), data, tmp_path / "run")
    assert run.wait() == [1, 1]
    assert "a fraction of 1e-09 leaves no user with targets in split validation" in run.complaint()
    assert not (run.folder / "losses.jsonl").exists()

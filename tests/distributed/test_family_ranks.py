"""Every model on two real ranks: losses and weights of one; and after a checkpoint: losses of an undisturbed run."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from embeddings.distributed.process_group import process_group
from embeddings.models import MODELS
from embeddings.tables import specs
from pipeline.runs.checkpoint_writer import CheckpointWriter
from tests.launcher import run_ranks
from tests.runs import small_settings
from tests.tolerance import largest, rounding
from tests.toy_model import MANY, OF_ANOTHER_SIZE, TWO, assert_trained_alike, settings_of, together, train_on_this_rank
from tests.trainers import CPU, Losses, Never, trainer_of

SHAPES = ({"targets": 24}, {"targets": 13}, {"targets": 1}, {"targets": 2, "longest": 1}, {"targets": 24})
"""The shape of each step's batch; one target leaves a rank without targets, short histories without behaviours. In none
of them has a hidden unit an input so near to its kink that rounding decides on which side it is."""


KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "few": (TWO, specs.GATHERED_BYTES),
    "many": (MANY, specs.GATHERED_BYTES),
    "many by id": (MANY, 0),
}
"""Features, and up to how many bytes a table is gathered as a whole."""


def train(name: str, kind: str = "few") -> dict[str, Any]:
    """A few steps; the losses of the global batches, and this rank's part of the model."""
    shape, specs.GATHERED_BYTES = KINDS[kind]
    return train_on_this_rank(settings_of(name, **shape), SHAPES, seed=80)


CASES = [
    *((name, "few") for name in MODELS),
    *((name, "many") for name in MODELS),
    *((name, "many by id") for name in ("dare", "twin", "dare-three-tables", "din", "twin-gradient-normalization")),
]
ON_THREE = [("dare", "many"), ("dare", "many by id"), ("twin-projection", "many by id"), ("sdim", "many")]


QUICK = ("dare", "twin", "sdim", "sim-soft", "din", "twin-projection")
"""With many features, these stand for the others but in `make test-slow`."""


def is_slow(name: str, kind: str) -> bool:
    return name not in QUICK if kind == "many" else name in OF_ANOTHER_SIZE


def train_all(cases: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {case: train(*case) for case in cases}


@cache
def on_ranks(ranks: int, kind: str, slow: bool) -> list[dict[tuple[str, str], dict[str, Any]]]:
    cases = CASES if ranks == 2 else ON_THREE
    return run_ranks(ranks, train_all, [case for case in cases if case[1] == kind and is_slow(*case) == slow])


@pytest.mark.parametrize(
    ("name", "kind", "ranks"),
    [
        *(pytest.param(*case, 2, marks=[pytest.mark.slow] if is_slow(*case) else []) for case in CASES),
        *(pytest.param(*case, 3, marks=[pytest.mark.slow] if case[1] == "many by id" else []) for case in ON_THREE),
    ],
)
def test_several_ranks_train_what_one_trains(name: str, kind: str, ranks: int) -> None:
    with process_group(CPU):
        alone = train(name, kind)
    outcomes = [outcome[name, kind] for outcome in on_ranks(ranks, kind, is_slow(name, kind))]
    ends = together([alone["end"]])
    # Steps add gradients to the weights, the last of which are of weights that the first ones have changed.
    change = largest(*(value - alone["start"][key] for key, value in ends.items()))
    allowed = rounding(len(SHAPES) * alone["summands"], max(1.0, change))
    assert_trained_alike(outcomes, alone, allowed)


@pytest.fixture(scope="module")
def data(few_users: Path) -> Path:
    return few_users


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in OF_ANOTHER_SIZE else []) for name in MODELS]
)
def test_training_goes_on_from_a_checkpoint_exactly(name: str, data: Path, tmp_path: Path) -> None:
    settings = small_settings(f"model={name}", "checkpoint.every=6", "checkpoint.keep=9", *same_tables(name))
    with process_group(CPU):
        undisturbed, trainer = Losses(), trainer_of(settings, data)
        with CheckpointWriter(tmp_path / "checkpoints", 9, {}) as writer:
            trainer.train(writer, undisturbed, Never())  # type: ignore[arg-type]
        first = min((tmp_path / "checkpoints").glob("step-*"))
        resumed, trainer = Losses(), trainer_of(settings, data)
        trainer.resume(first)
        with CheckpointWriter(tmp_path / "others", 9, {}) as writer:
            trainer.train(writer, resumed, Never())  # type: ignore[arg-type]
    assert len(undisturbed.losses) == 12
    assert resumed.losses == undisturbed.losses[6:]


def same_tables(name: str) -> list[str]:
    return [] if name.startswith("dare") or name == "twin-4e" else ["model.attention.dim=8"]

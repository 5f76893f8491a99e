"""Every model on two real ranks: losses and weights of one; and after a checkpoint: losses of an undisturbed run."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from embeddings.distributed.collectives import sum_over_ranks
from embeddings.distributed.process_group import process_group
from embeddings.loss import click_loss
from embeddings.models import MODELS
from embeddings.tables import specs
from pipeline.runs.checkpoint_writer import CheckpointWriter
from tests.launcher import run_ranks
from tests.runs import small_settings
from tests.tolerance import largest, rounding, summands
from tests.toy_batch import part
from tests.toy_model import MANY, TWO, batch_of, local_values, model_of, settings_of, sharded_like, together
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
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shape, specs.GATHERED_BYTES = KINDS[kind]
    settings = settings_of(name, **shape)
    # Weights that are not so large that rounding grows from step to step.
    plain = model_of(settings, tables=10, dense=10)
    sharded = sharded_like(plain)
    optimizer = torch.optim.SGD([value for key, value in sharded.named_parameters() if "_bags" not in key], lr=0.1)
    losses = []
    for step, shape in enumerate(SHAPES):
        batch = part(batch_of(settings, 80 + step, **shape), rank, ranks)
        optimizer.zero_grad()
        loss = click_loss(sharded(batch), batch.label_T)
        loss.backward()
        optimizer.step()
        losses.append(sum_over_ranks(loss.detach()).item() / ranks)
    start, end = plain.state_dict(), local_values(sharded)
    return {"losses": losses, "start": start, "end": end, "summands": summands(plain, batch_of(settings, 80))}


CASES = [
    *((name, "few") for name in MODELS),
    *((name, "many") for name in MODELS),
    *((name, "many by id") for name in ("dare", "twin", "dare-three-tables", "din", "twin-gradient-normalization")),
]
ON_THREE = [("dare", "many"), ("dare", "many by id"), ("twin-projection", "many by id"), ("sdim", "many")]


QUICK = ("dare", "twin", "sdim", "sim-soft", "din", "twin-projection")
"""With many features, these stand for the others but in `make test-slow`."""


def is_slow(name: str, kind: str) -> bool:
    return kind == "many" and name not in QUICK


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
        *((*case, 3) for case in ON_THREE),
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
    assert outcomes[0]["losses"] == pytest.approx(alone["losses"], rel=0, abs=allowed)
    for key, values in together([outcome["end"] for outcome in outcomes]).items():
        atol = allowed + rounding(1, largest(ends[key]))
        torch.testing.assert_close(
            values, ends[key], atol=atol, rtol=0, msg=lambda message, key=key: f"{key}: {message}"
        )


@pytest.fixture(scope="module")
def data(few_users: Path) -> Path:
    return few_users


@pytest.mark.parametrize("name", MODELS)
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

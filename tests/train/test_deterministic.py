"""`deterministic: true`: it reaches torch on every rank, is exact when a run goes on, and changes nothing on a CPU."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from embeddings.loss import click_loss
from tests.model.definitions import DEFINITIONS
from tests.runs import Run, slow_steps, small_settings
from tests.toy_model import TWO, batch_of, model_of, settings_of


@pytest.fixture(scope="module")
def data(many_users: Path) -> Path:
    return many_users


class Refused(TorchDispatchMode):
    """Notes which operators torch would refuse on CUDA when told to be deterministic.

    They are those of the documentation of `torch.use_deterministic_algorithms` that a model of rows could come to use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        self.seen.add(name)
        refused = {
            "cumsum": lambda: args[0].is_floating_point(),
            "bincount": lambda: (args[1] if len(args) > 1 else kwargs.get("weights")) is not None,
            "scatter_reduce": lambda: "prod" in (*args, *kwargs.values()),
            "_embedding_bag": lambda: args[4] == 2,  # the mode: the maximum
            **dict.fromkeys(("put", "histc", "kthvalue", "median", "nll_loss_forward"), lambda: True),
        }.get(name.rstrip("_"))
        if refused is not None and refused():
            self.found.add(name)
        return func(*args, **kwargs)


def tell_of_torch(rank: int, folder: Path) -> None:
    """Sabotage: in each step a rank writes to ``folder/RANK`` what torch has been told, and what it would refuse."""
    from pipeline.train import trainer

    agree, mode = trainer.agree, Refused()
    mode.__enter__()  # until the process ends

    def telling(*arguments: Any) -> Any:
        told = {
            "enabled": torch.are_deterministic_algorithms_enabled(),
            "only_warns": torch.is_deterministic_algorithms_warn_only_enabled(),
            "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
            "refused": sorted(mode.found),
        }
        (folder / str(rank)).write_text(json.dumps(told))
        return agree(*arguments)

    trainer.agree = telling


def told(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / str(rank)).read_text())
    return found


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.slow
def test_it_reaches_torch_on_every_rank_and_changes_nothing_on_a_cpu(ranks: int, data: Path, tmp_path: Path) -> None:
    for name in ("usual", "told"):
        (tmp_path / name).mkdir()
    usual = Run(ranks, small_settings(), data, tmp_path / "a", tell_of_torch, (tmp_path / "usual",)).finish()
    settings = small_settings("deterministic=true")
    deterministic = Run(ranks, settings, data, tmp_path / "b", tell_of_torch, (tmp_path / "told",)).finish()
    for rank in range(ranks):
        assert not told(tmp_path / "usual", rank)["enabled"]
        # Training and validation, with what the shards do for others.
        expected = {"enabled": True, "only_warns": False, "workspace": ":4096:8", "refused": []}
        assert told(tmp_path / "told", rank) == expected
    assert deterministic.logs() == usual.logs()
    assert (deterministic.folder / "test.json").read_text() == (usual.folder / "test.json").read_text()

    stopped = Run(ranks, settings, data, tmp_path / "c", slow_steps, (6,)).finish()
    # What the ranks agree on after a step is looked at after the next one.
    assert "asked to stop, saved at step 7" in stopped.said()
    assert stopped.logs() != usual.logs()
    further = Run(ranks, settings, data, tmp_path / "c").finish()
    assert "goes on after step 7" in further.said()
    assert further.logs() == usual.logs()


def test_the_list_of_refused_operators_finds_them() -> None:
    with Refused() as mode:
        number_N = torch.tensor([2, 1])
        number_N.cumsum(0), number_N.bincount(minlength=3)
        assert not mode.found
        (
            number_N.float().cumsum(0),
            number_N.bincount(number_N.float()),
            number_N.put_(number_N[:1] - 1, number_N[1:].clone()),
        )
    assert mode.found == {"cumsum", "bincount", "put_"}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_step_has_no_operator_that_cuda_refuses(name: str) -> None:
    changes = {} if name == "sdim" else {"search": "local", "auxiliary_loss": True}
    settings = settings_of(name, **TWO, **changes)
    model, batch = model_of(settings), batch_of(settings, seed=2)
    with Refused() as mode:
        click_loss(model(batch), batch.label_T.float()).backward()
    assert "mm" in mode.seen  # it has seen the backward pass too: the first layer's weights have gradients
    assert not mode.found


def test_it_may_not_change_when_a_run_goes_on(data: Path, tmp_path: Path) -> None:
    Run(1, small_settings(), data, tmp_path / "run", slow_steps, (2,)).finish()
    changed = Run(1, small_settings("deterministic=true"), data, tmp_path / "run")
    assert changed.wait() == [1]
    assert "begun with other settings: deterministic is True, was False" in changed.complaint()

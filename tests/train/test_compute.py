"""`compute`: what is computed in bfloat16 and what is not, and that a CPU refuses it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from embeddings.layers.mlp import MLP, GlobalBatchNorm, TaskHeads, compute_in
from schemas.model import Mixture, Task
from schemas.train import MAY_CHANGE
from tests.runs import Run, small_settings


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def predicted(compute: Any) -> tuple[Tensor, MLP, dict[str, torch.dtype]]:
    """Logits of a prediction after its backward pass, the prediction, and the dtype of each layer's output."""
    torch.manual_seed(1)
    mlp = MLP(24, (32, 16))
    compute_in(nn.Sequential(mlp), compute)
    dtypes = {}
    for index, layer in enumerate(mlp.layers):

        def note(layer: nn.Module, given: Any, output: Tensor, name: str = f"{index} {type(layer).__name__}") -> None:
            dtypes[name] = output.dtype

        layer.register_forward_hook(note)
    logit_T = mlp(torch.randn(200, 24))
    torch.nn.functional.binary_cross_entropy_with_logits(logit_T, torch.ones(200)).backward()
    return logit_T, mlp, dtypes


def test_hidden_layers_alone_are_in_bfloat16() -> None:
    logit_T, mlp, dtypes = predicted("bf16")
    half, full = torch.bfloat16, torch.float32
    assert dtypes == {
        "0 GlobalBatchNorm": full,
        "1 Linear": half,
        "2 PReLU": half,
        "3 Linear": half,
        "4 PReLU": half,
        "5 Linear": full,
    }
    assert logit_T.dtype == full
    # Not as few different values as 8 bits have.
    assert len(logit_T.unique()) > 190
    assert all(weight.dtype == weight.grad.dtype == full for weight in mlp.parameters() if weight.grad is not None)
    statistics = mlp.layers[0]
    assert isinstance(statistics, GlobalBatchNorm)
    exact_T, exact, _ = predicted("fp32")
    assert torch.equal(statistics.running_mean_F, exact.layers[0].running_mean_F)
    assert not torch.equal(logit_T, exact_T)
    torch.testing.assert_close(logit_T, exact_T, atol=0.02, rtol=0)


def test_experts_are_in_bfloat16_and_their_gates_are_not() -> None:
    torch.manual_seed(2)
    heads = TaskHeads(24, (16,), [Task(name="click"), Task(name="buy", after="click")], Mixture(experts=3, hidden=(8,)))
    compute_in(nn.Sequential(heads), "bf16")
    assert heads.mixture is not None
    dtypes: dict[str, set[torch.dtype]] = {"experts": set(), "gates": set()}
    for kind, found in dtypes.items():
        for layer in getattr(heads.mixture, kind):
            layer.register_forward_hook(lambda layer, given, output, found=found: found.add(output.dtype))
    logits = heads(torch.randn(200, 24))
    sum(logit_T.sum() for logit_T in logits).backward()
    assert dtypes == {"experts": {torch.bfloat16}, "gates": {torch.float32}}
    assert [logit_T.dtype for logit_T in logits] == [torch.float32] * 2
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in heads.parameters())


@pytest.mark.parametrize("compute", ["fp32", "tf32"])
def test_in_float32_nothing_is_cast(compute: str) -> None:
    _, mlp, dtypes = predicted(compute)
    assert set(dtypes.values()) == {torch.float32}
    mlp.eval()
    input_TI = torch.randn(200, 24)
    assert torch.equal(mlp(input_TI), mlp.layers(input_TI).squeeze(1))
    assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if compute == "tf32" else "ieee")


@pytest.mark.parametrize("compute", ["tf32", "bf16"])
def test_a_cpu_refuses_it(compute: str, many_users: Path, tmp_path: Path) -> None:
    run = Run(1, small_settings(f"compute={compute}"), many_users, tmp_path / "run")
    assert run.wait() == [1]
    assert run.complaint() == f"dare: compute={compute} needs CUDA; on a CPU: compute=fp32"


def test_it_may_not_change_when_a_run_goes_on() -> None:
    assert "compute" not in MAY_CHANGE

"""Batch normalisation over all ranks, with its gradients, against `torch.nn.BatchNorm1d` in float64."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from embeddings.layers.mlp import GlobalBatchNorm
from tests.launcher import run_ranks

FEATURES = 5
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def values_of(count: int) -> Tensor:
    """Columns of different sizes and means; one that is constant, as the target's own position is, and one of zeros."""
    draw = torch.Generator().manual_seed(count)
    values_BF = torch.randn(count, FEATURES, generator=draw, dtype=torch.float64)
    values_BF *= torch.tensor([1.0, 1e-4, 30.0, 0.0, 0.0], dtype=torch.float64)
    return values_BF + torch.tensor([0.5, 3e-4, -7.0, 0.3, 0.0], dtype=torch.float64)


def filled(norm: GlobalBatchNorm | torch.nn.BatchNorm1d) -> None:
    """Weights and running statistics that are not those of the start."""
    draw = torch.Generator().manual_seed(7)
    values = [torch.rand(FEATURES, generator=draw, dtype=torch.float64) + 0.5 for _ in range(4)]
    state = zip([*norm.parameters(), *(buffer for buffer in norm.buffers() if buffer.dim())], values, strict=True)
    for tensor, of_it in state:
        tensor.data.copy_(of_it)


def outcome(norm: GlobalBatchNorm | torch.nn.BatchNorm1d, values_BF: Tensor, factor_BF: Tensor) -> dict[str, Tensor]:
    """Output, gradients of values, weight and bias, and the running statistics, of one step."""
    filled(norm)
    values_BF = values_BF.detach().clone().requires_grad_()
    output_BF = norm(values_BF)
    # Not linear, so that the gradients that arrive differ with the output.
    (output_BF.square() * factor_BF + output_BF).sum().backward()
    buffers = [buffer for buffer in norm.buffers() if buffer.dim()]
    return {
        "output": output_BF.detach(),
        "values": values_BF.grad,
        "weight": norm.weight.grad,
        "bias": norm.bias.grad,
        "mean": buffers[0],
        "variance": buffers[1],
    }


def factor_of(count: int) -> Tensor:
    draw = torch.Generator().manual_seed(100 + count)
    return torch.randn(count, FEATURES, generator=draw, dtype=torch.float64)


def of_torch(values_BF: Tensor) -> dict[str, Tensor]:
    """What torch makes of a whole batch; a batch of one or none is normalised by the running statistics, as they are.

    Those two torch refuses in training.
    """
    norm = torch.nn.BatchNorm1d(FEATURES).double()
    return outcome(norm.train(len(values_BF) > 1), values_BF, factor_of(len(values_BF)))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 40])
def test_values_and_gradients_are_those_of_torch(count: int) -> None:
    found = outcome(GlobalBatchNorm(FEATURES).double(), values_of(count), factor_of(count))
    torch.testing.assert_close(found, of_torch(values_of(count)), **CLOSE)


def of_a_rank(count: int, first: int) -> dict[str, Tensor]:
    """One step of a rank: the first one has ``first`` of the values, the second one the others."""
    mine = slice(None, first) if dist.get_rank() == 0 else slice(first, None)
    return outcome(GlobalBatchNorm(FEATURES).double(), values_of(count)[mine], factor_of(count)[mine])


@pytest.mark.parametrize(("count", "first"), [(40, 13), (40, 0), (2, 1), (1, 0), (0, 0)])
def test_two_ranks_are_as_one(count: int, first: int) -> None:
    ranks, expected = run_ranks(2, of_a_rank, count, first), of_torch(values_of(count))
    for name in ("output", "values"):
        torch.testing.assert_close(torch.cat([of[name] for of in ranks]), expected[name], **CLOSE)
    for name in ("weight", "bias"):
        # Each rank has the gradient of its own loss; ranks add them up later.
        torch.testing.assert_close(ranks[0][name] + ranks[1][name], expected[name], **CLOSE)
    for name in ("mean", "variance"):
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], expected[name], **CLOSE)

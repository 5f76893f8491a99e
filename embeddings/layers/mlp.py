"""The prediction: an MLP, and its batch normalisation over the targets of all ranks.

T = targets of this rank, I = width of the input, h = width of a hidden layer, B = rows of a batch, F = their features.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from embeddings.distributed.collectives import sum_over_ranks
from schemas.train import Compute

SLOPE = 0.1
"""Initial slope of the PReLUs (the authors' code)."""


class MLP(nn.Module):
    """BatchNorm, then Linear and PReLU for each hidden layer, then one logit (DARE, appendix; the authors' code)."""

    def __init__(self, inputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.inputs = inputs
        """I."""
        # The input's columns differ in size by orders of magnitude: rows of about 0.01 make products of about 0.0001.
        layers: list[nn.Module] = [GlobalBatchNorm(inputs)]
        for before, after in pairwise([inputs, *hidden]):
            layers += [nn.Linear(before, after), nn.PReLU(init=SLOPE)]
        layers.append(nn.Linear(hidden[-1], 1))
        self.layers = nn.Sequential(*layers)
        self.hidden_dtype = torch.float32
        """What the hidden layers compute in; the weights and their gradients are float32 in any case."""

    def forward(self, input_TI: Tensor) -> Tensor:
        """Predict logits, float32 (T,). In training, every rank must call it, even with no targets."""
        norm, *hidden, last = self.layers
        hidden_Th = norm(input_TI)
        reduced = self.hidden_dtype != torch.float32
        with torch.autocast(input_TI.device.type, self.hidden_dtype, enabled=reduced):
            for layer in hidden:
                hidden_Th = layer(hidden_Th)
        # The last product in float32: logits of 8 bits would be equal for many targets, and the AUC would count ties.
        logit_T1: Tensor = last(hidden_Th.float())
        return logit_T1.squeeze(1)


def compute_in(model: nn.Module, compute: Compute) -> None:
    """Let a GPU multiply the matrices of ``model`` as `TrainSettings.compute` says; tf32 is for the whole process."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if compute == "tf32" else "ieee"
    for module in model.modules():
        if isinstance(module, MLP):
            module.hidden_dtype = torch.bfloat16 if compute == "bf16" else torch.float32


class GlobalBatchNorm(nn.Module):
    """`torch.nn.BatchNorm1d` whose statistics are those of the global batch, so that ranks do not change the model.

    `torch.nn.SyncBatchNorm` runs on GPUs alone and refuses an empty batch. Here a rank may have no targets at all, and
    a global batch of one or none is normalised by the running statistics.

    It computes in float64. Some columns are constant (the target's own position), and what should cancel in their
    gradients would leave noise in float32, which adaptive optimizers blow up and which differs with the number of
    ranks.
    """

    running_mean_F: Tensor
    running_variance_F: Tensor

    def __init__(self, features: int, momentum: float = 0.1, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.epsilon = momentum, epsilon
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean_F", torch.zeros(features))
        self.register_buffer("running_variance_F", torch.ones(features))

    def forward(self, values_BF: Tensor) -> Tensor:
        """Normalise ``values_BF`` (float32). In training, every rank must call it, even with B = 0."""
        if not self.training:
            # The running statistics are equal on all ranks, so nothing has to be exchanged.
            scale_F = self.weight * torch.rsqrt(self.running_variance_F + self.epsilon)
            return (values_BF - self.running_mean_F) * scale_F + self.bias
        wide_BF = values_BF.double()
        mean_F, variance_F = self._statistics(wide_BF)
        normal_BF = (wide_BF - mean_F) * torch.rsqrt(variance_F + self.epsilon)
        return (normal_BF * self.weight + self.bias).to(values_BF.dtype)

    def _statistics(self, values_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of the global batch; the running statistics (unbiased) move towards them."""
        # The count stays a tensor, so that no branch below has to bring it to the host.
        count = values_BF.new_full((1,), len(values_BF))
        # One all-reduce for count, sums and squares: three would each wait for the slowest rank.
        total = sum_over_ranks(torch.cat([count, values_BF.sum(0), values_BF.square().sum(0)]))
        count, sum_F, square_F = total.split([1, values_BF.shape[1], values_BF.shape[1]])
        several, some = count > 1, count.clamp(min=1)
        # E[x^2] - E[x]^2 can come out below 0 by rounding where a column is constant; in float64 hardly anything is
        # lost to it.
        mean_F = torch.where(several, sum_F / some, self.running_mean_F)
        variance_F = torch.where(several, (square_F / some - mean_F.square()).clamp(min=0), self.running_variance_F)
        with torch.no_grad():
            unbiased_F = torch.where(several, variance_F * count / (count - 1).clamp(min=1), variance_F)
            # All ranks have the same sums, so these stay equal although DistributedModelParallel does not broadcast
            # buffers.
            self.running_mean_F.lerp_(mean_F.to(self.running_mean_F.dtype), self.momentum)
            self.running_variance_F.lerp_(unbiased_F.to(self.running_variance_F.dtype), self.momentum)
        return mean_F, variance_F

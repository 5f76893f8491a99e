"""The prediction: an MLP, or one for each of several tasks, and batch normalisation over the targets of all ranks.

T = targets of this rank, I = width of the input, h = width of a hidden layer, x = width of what a head sees, X =
experts, B = rows of a batch, F = their features.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from embeddings.distributed.collectives import sum_over_ranks
from schemas.model import Mixture, Task
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

    @record_function("dare/dense")
    def forward(self, input_TI: Tensor) -> Tensor:
        """Predict logits, float32 (T,). In training, every rank must call it, even with no targets."""
        norm, *hidden, last = self.layers
        hidden_Th = norm(input_TI)
        with _computing_in(self.hidden_dtype, input_TI):
            for layer in hidden:
                hidden_Th = layer(hidden_Th)
        # The last product in float32: logits of 8 bits would be equal for many targets, and the AUC would count ties.
        logit_T1: Tensor = last(hidden_Th.float())
        return logit_T1.squeeze(1)


class Experts(nn.Module):
    """Experts over one input, and for each task a gate that mixes them (MMoE, Ma et al., KDD 2018).

    The input is normalised once, for experts and gates alike. Task k sees ``sum_i g_k(x)_i f_i(x)``, where ``g_k`` is
    the softmax of a linear map and ``f_i`` an expert: Linear and PReLU for each layer.

    Args:
        inputs: I.
        settings: how many experts, and their layers.
        tasks: how many gates.
    """

    def __init__(self, inputs: int, settings: Mixture, tasks: int) -> None:
        super().__init__()
        self.norm = GlobalBatchNorm(inputs)
        self.experts = nn.ModuleList()
        for _ in range(settings.experts):
            layers: list[nn.Module] = []
            for before, after in pairwise([inputs, *settings.hidden]):
                layers += [nn.Linear(before, after), nn.PReLU(init=SLOPE)]
            self.experts.append(nn.Sequential(*layers))
        self.gates = nn.ModuleList(nn.Linear(inputs, settings.experts, bias=False) for _ in range(tasks))
        self.hidden_dtype = torch.float32
        """What the experts compute in; gates are float32 in any case."""

    @record_function("dare/dense")
    def forward(self, input_TI: Tensor) -> list[Tensor]:
        """What each task sees, float32 (T, h). In training, every rank must call it, even with no targets."""
        normal_TI = self.norm(input_TI)
        with _computing_in(self.hidden_dtype, input_TI):
            outputs = [expert(normal_TI) for expert in self.experts]
        expert_TXh = torch.stack(outputs, dim=1).to(input_TI.dtype)
        return [torch.bmm(gate(normal_TI).softmax(1).unsqueeze(1), expert_TXh).squeeze(1) for gate in self.gates]


class TaskHeads(nn.Module):
    """A head for each task, which is the `MLP` that a single task has.

    Args:
        inputs: I.
        hidden: widths of each head's hidden layers.
        tasks: what is predicted.
        mixture: experts between the input and the heads; None: the heads see the input itself ("shared bottom").
    """

    def __init__(self, inputs: int, hidden: Sequence[int], tasks: Sequence[Task], mixture: Mixture | None) -> None:
        super().__init__()
        self.mixture = Experts(inputs, mixture, len(tasks)) if mixture is not None else None
        seen = mixture.hidden[-1] if mixture is not None else inputs
        self.heads = nn.ModuleList(MLP(seen, hidden) for _ in tasks)
        names = [task.name for task in tasks]
        self._after = [None if task.after is None else names.index(task.after) for task in tasks]
        self.inputs = seen * len(tasks) + (inputs if mixture is not None else 0)
        """Floats that the layers see of each target, all of them together."""

    def forward(self, input_TI: Tensor) -> tuple[Tensor, ...]:
        """Predict the logits of each task, float32 (T,). In training, every rank must call it, even with no targets.

        A task that comes after another one has the logit of both: ``P(click, buy) = P(click) P(buy | click)``, of which
        its head gives the second factor ("entire space", ESMM, arXiv 1804.07931).
        """
        seen = [input_TI] * len(self.heads) if self.mixture is None else self.mixture(input_TI)
        logits = list[Tensor]()
        for head, seen_Tx, after in zip(self.heads, seen, self._after, strict=True):
            logit_T = head(seen_Tx)
            # A task is named before those that come after it, so its own logit is that of all before it already.
            logits.append(logit_T if after is None else logit_of_product(logits[after], logit_T))
        return tuple(logits)


def logit_of_product(one_T: Tensor, other_T: Tensor) -> Tensor:
    """The logit of ``sigmoid(one) * sigmoid(other)``, whose log loss is exact where probabilities round to 0 or 1.

    With ``p = 1 / ((1 + exp(-a)) (1 + exp(-b)))`` the odds are ``p / (1 - p) = 1 / (exp(-a) + exp(-b) + exp(-a - b))``.
    """
    return -torch.logsumexp(torch.stack([-one_T, -other_T, -one_T - other_T]), dim=0)


def make_prediction(
    inputs: int, hidden: Sequence[int], tasks: Sequence[Task], mixture: Mixture | None
) -> MLP | TaskHeads:
    """The layers from what a prediction sees to the tasks' logits; arguments as of `TaskHeads`."""
    # One task has the names of values that it had before there were several, so its checkpoints stay readable.
    if len(tasks) < 2 and mixture is None:
        return MLP(inputs, hidden)
    return TaskHeads(inputs, hidden, tasks or (Task(name="label"),), mixture)


def logits_of(prediction: MLP | TaskHeads, input_TI: Tensor) -> tuple[Tensor, ...]:
    """The logits of each task, float32 (T,), whether there is one or several; every rank must call it."""
    logits: Tensor | tuple[Tensor, ...] = prediction(input_TI)
    return logits if isinstance(logits, tuple) else (logits,)


def _computing_in(dtype: torch.dtype, values: Tensor) -> AbstractContextManager[object]:
    # None where nothing is to change: an exported program would have a part of its own for what is within.
    return nullcontext() if dtype == torch.float32 else torch.autocast(values.device.type, dtype)


def compute_in(model: nn.Module, compute: Compute) -> None:
    """Let a GPU multiply the matrices of ``model`` as `TrainSettings.compute` says; tf32 is for the whole process."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if compute == "tf32" else "ieee"
    for module in model.modules():
        if isinstance(module, MLP | Experts):
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
        normal_BF: Tensor = _Normalize.apply(values_BF, self.weight, self.bias, self._statistics(values_BF.detach()))
        return normal_BF

    @torch.no_grad()
    def _statistics(self, values_BF: Tensor) -> "_Statistics":
        """Mean and deviation of the global batch; the running statistics (unbiased) move towards them."""
        wide_BF = values_BF.double()
        # The count stays a tensor, so that no branch below has to bring it to the host.
        count = wide_BF.new_full((1,), len(wide_BF))
        # One all-reduce for count, sums and squares: three would each wait for the slowest rank.
        total = sum_over_ranks(torch.cat([count, wide_BF.sum(0), wide_BF.square().sum(0)]))
        count, sum_F, square_F = total.split([1, wide_BF.shape[1], wide_BF.shape[1]])
        several, some = count > 1, count.clamp(min=1)
        # E[x^2] - E[x]^2 can come out below 0 by rounding where a column is constant; in float64 hardly anything is
        # lost to it.
        difference_F = square_F / some - (sum_F / some).square()
        mean_F = torch.where(several, sum_F / some, self.running_mean_F)
        variance_F = torch.where(several, difference_F.clamp(min=0), self.running_variance_F)
        unbiased_F = torch.where(several, variance_F * count / (count - 1).clamp(min=1), variance_F)
        # All ranks have the same sums, so these stay equal although DistributedModelParallel does not broadcast
        # buffers.
        self.running_mean_F.lerp_(mean_F.to(self.running_mean_F.dtype), self.momentum)
        self.running_variance_F.lerp_(unbiased_F.to(self.running_variance_F.dtype), self.momentum)
        inverse_F = torch.rsqrt(variance_F + self.epsilon)
        return _Statistics(mean_F, inverse_F, several / some, several & (difference_F >= 0))


class _Statistics(NamedTuple):
    """What a global batch is normalised by, and how the values of the batch change it; all float64."""

    mean_F: Tensor
    inverse_F: Tensor
    """One over the standard deviation."""
    share_of_mean: Tensor
    """By how much a value moves the mean: one over the count; 0 where the running statistics are taken, (1,)."""
    moves_variance_F: Tensor
    """bool: whether the values move the variance; not where the running one is taken, or where it was cut off at 0."""


class _Normalize(torch.autograd.Function):
    """``(x - mean) / deviation * weight + bias``, where mean and deviation are those of all ranks' values.

    Autograd would go through more than sixty operators for it, most of them on all values in float64.
    """

    @staticmethod
    def forward(context: Any, values_BF: Tensor, weight_F: Tensor, bias_F: Tensor, statistics: _Statistics) -> Tensor:
        # The difference is float64, as the mean is, and a tensor of its own: several heads may see the same values.
        normal_BF = (values_BF - statistics.mean_F).mul_(statistics.inverse_F)
        context.save_for_backward(normal_BF, weight_F)
        context.statistics = statistics
        return torch.addcmul(bias_F.double(), normal_BF, weight_F.double()).to(values_BF.dtype)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_BF: Tensor) -> tuple[Tensor | None, ...]:
        normal_BF, weight_F = context.saved_tensors
        statistics: _Statistics = context.statistics
        wide_BF = gradient_BF.double()
        # The gradients of bias and weight, of this rank's values. Those of mean and variance are the same sums over all
        # ranks, times the weight.
        own_2F = torch.stack([wide_BF.sum(0), (wide_BF * normal_BF).sum(0)])
        of_mean_F, of_variance_F = sum_over_ranks(own_2F) * statistics.share_of_mean
        of_variance_F = of_variance_F * statistics.moves_variance_F
        wide_BF = wide_BF - torch.addcmul(of_mean_F, normal_BF, of_variance_F)
        values = wide_BF.mul_(statistics.inverse_F * weight_F).to(gradient_BF.dtype)
        return values, own_2F[1].to(weight_F.dtype), own_2F[0].to(weight_F.dtype), None

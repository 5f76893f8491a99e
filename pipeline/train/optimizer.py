"""The optimizer of the parameters outside of the tables, and the learning rates of a step, those of tables too."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, AdamW
from torchrec.optim.keyed import KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from schemas.train import DenseSettings, ScheduleSettings


def scheduled(settings: ScheduleSettings, step: int, steps: int) -> float:
    """Return by how much the learning rate of a step is multiplied, 0 .. 1.

    It rises in equal steps to 1, which it reaches at step ``warmup_steps``; from there it falls, by a line or by half
    a wave of the cosine, to ``final_fraction``, which it has at the last step. Nothing is remembered from step to step,
    so a run that goes on has the rates that it would have had.

    Args:
        settings: the form of the curve.
        step: number of the step, from 1.
        steps: steps at the end of the run, warm-up included.
    """
    warmup = settings.warmup_steps
    if step < warmup:
        return step / warmup
    if settings.schedule == "constant" or steps <= warmup:
        return 1.0
    done = min(1.0, (step - warmup) / (steps - warmup))
    left = 1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.final_fraction + (1 - settings.final_fraction) * left


class DenseOptimizer(KeyedOptimizerWrapper):
    """Adam or AdamW over the parameters of a model outside of its tables, which learn in the backward pass."""

    def __init__(self, model: nn.Module, settings: DenseSettings) -> None:
        # TorchRec's filter leaves out the tables: they carry a mark that an optimizer is fused into their backward
        # pass, and they never have a ``.grad`` to make a step with.
        kind = {"adam": Adam, "adamw": AdamW}[settings.optimizer]
        super().__init__(
            dict(in_backward_optimizer_filter(model.named_parameters())),
            # Fused: one operator for all parameters, where the plain optimizer has nine for each.
            lambda parameters: kind(
                parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
            ),
        )
        self._settings = settings
        self._steps = 0
        self.steps_of_run = 0
        """Steps at the end of the run, for a learning rate that falls towards it."""
        self.steps_before = 0
        """Steps of other runs that Adam's state has seen: Adam counts them, the schedule of this run does not."""
        self.gradient_norm = torch.zeros(())
        """Norm of all dense gradients together at the last step, before clipping; a scalar on their device."""

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last step, by the schedule."""
        return self._settings.learning_rate * scheduled(self._settings, self._steps, self.steps_of_run)

    def step(self, closure: Any = None) -> None:
        """Clip the gradients, set the learning rate of this step, and make it."""
        self._steps += 1
        # Set here from the count of steps, not by a scheduler: the count comes back with Adam's state, so a checkpoint
        # needs no state of a scheduler besides.
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        limit = self._settings.clip_norm
        # DistributedDataParallel has averaged the gradients over ranks by now: the norm, and so the clipping, is the
        # same on all.
        gradients = [weight.grad for weight in self.params.values() if weight.grad is not None]
        # Measured without clipping too: it is reported, and a norm that is not finite stops the run (`agree`).
        self.gradient_norm = nn.utils.get_total_norm(gradients)
        if limit is not None:
            nn.utils.clip_grads_with_norm_(self.params.values(), limit, self.gradient_norm)
        super().step(closure)

    def load_state_dict(self, state_dict: Any) -> None:
        """Go on from a saved state; the place in the schedule follows from Adam's own step count."""
        super().load_state_dict(state_dict)
        self._steps = max((int(state["step"]) - self.steps_before for state in self.state.values()), default=0)

    def prepare_to_load(self) -> None:
        """Make the state that the first step would make, so that a checkpoint can be loaded into it.

        Parameters change: load them afterwards.
        """
        # Adam makes its state lazily, and TorchRec's optimizers refuse to load into one that has none. The step that
        # makes it has gradients of zero, but weight decay still moves the parameters.
        self.init_state()
        self.zero_grad()


class TableRates:
    """Sets the learning rates of the tables, whose optimizers are fused into the backward pass.

    Args:
        optimizer: TorchRec's, of all tables of this rank (`DistributedModelParallel.fused_optimizer`).
        settings: the form of the curve, the same for all tables; each table's own rate is that of its settings.
    """

    def __init__(self, optimizer: KeyedOptimizer, settings: ScheduleSettings) -> None:
        self._optimizer, self._settings = optimizer, settings
        self._full = [group["lr"] for group in optimizer.param_groups]
        """The learning rate of each group of tables, as its settings have it."""
        self.fraction = 1.0
        """What the rates were multiplied by at last."""

    def set(self, step: int, steps: int) -> None:
        """Set the rates of the step that is about to be made; arguments as of `scheduled`."""
        fraction = scheduled(self._settings, step, steps)
        if fraction == self.fraction:
            return
        self.fraction = fraction
        for group, full in zip(self._optimizer.param_groups, self._full, strict=True):
            group["lr"] = full * fraction
        # It makes no step, which is made in the backward pass: TorchRec tells FBGEMM's kernels their rates here.
        self._optimizer.step()

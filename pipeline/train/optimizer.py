"""The optimizer of the parameters outside of the tables: warm-up, clipping, Adam."""

from typing import Any

import torch
from torch import nn
from torch.optim import Adam, AdamW
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from schemas.train import DenseSettings


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
        self.gradient_norm = torch.zeros(())
        """Norm of all dense gradients together at the last step, before clipping; a scalar on their device."""

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last step, warm-up included."""
        warmup = self._settings.warmup_steps
        return self._settings.learning_rate * (min(1.0, self._steps / warmup) if warmup else 1.0)

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
        """Go on from a saved state; the place in the warm-up is that of Adam's own step count."""
        super().load_state_dict(state_dict)
        self._steps = max((int(state["step"]) for state in self.state.values()), default=0)

    def prepare_to_load(self) -> None:
        """Make the state that the first step would make, so that a checkpoint can be loaded into it.

        Parameters change: load them afterwards.
        """
        # Adam makes its state lazily, and TorchRec's optimizers refuse to load into one that has none. The step that
        # makes it has gradients of zero, but weight decay still moves the parameters.
        self.init_state()
        self.zero_grad()

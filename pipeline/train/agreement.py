"""What the ranks agree on after each step: the loss, whether to go on, and whose numbers are wrong."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.train.click_task import StepOutput


class Agreement(NamedTuple):
    """The same on all ranks."""

    loss: float
    """Of the global batch."""
    targets: int
    """Of the global batch."""
    stop: bool
    """A rank was asked to stop."""


def agree(step: int, output: StepOutput, gradient_norm: Tensor, stop: bool) -> Agreement:
    """One small all-reduce; all ranks must call it after each step.

    Args:
        step: for the message.
        output: this rank's.
        gradient_norm: of the dense parameters, scalar.
        stop: this rank was asked to stop.

    Raises:
        ValueError: the loss or the gradients are not finite, on all ranks; names the step and the batch of the ranks
            concerned.
    """
    device = output.loss.device
    sound = torch.isfinite(output.loss) & torch.isfinite(gradient_norm)
    numbers = torch.tensor([0, output.targets, stop, 0], dtype=torch.float64, device=device)
    numbers[0], numbers[3] = torch.where(sound, output.loss, 0), ~sound
    dist.all_reduce(numbers)
    loss, targets, stops, faults = numbers.tolist()
    if faults:
        _raise(step, output, bool(sound))
    return Agreement(loss / dist.get_world_size(), int(targets), stops > 0)


def _raise(step: int, output: StepOutput, sound: bool) -> None:
    origins: list[str | None] = [None] * dist.get_world_size()
    lost = None if sound else f"{output.origin} (loss {output.loss.item():g})"
    dist.all_gather_object(origins, lost)
    found = [origin for origin in origins if origin]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    raise ValueError(
        f"step {step}: loss or gradients are not finite, in {found[0]}{more}; this step is not saved; "
        "begin a new run, in another folder, with lower learning rates or with dense.clip_norm"
    )

"""What a step of training computes, in the form that TorchRec's train pipeline runs."""

from typing import NamedTuple

from torch import Tensor, nn

from embeddings.batch import Batch
from embeddings.loss import click_loss


class StepOutput(NamedTuple):
    """Of a step, on one rank."""

    loss: Tensor
    """Scalar, detached: the mean over ranks is the loss of the global batch."""
    targets: int
    origin: str
    """Of the batch."""


class ClickTask(nn.Module):
    """Loss of a batch; the tables' optimizers run in its backward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, StepOutput]:
        """Loss with gradient, and what there is to report."""
        loss = click_loss(self.model(batch), batch.label_T)
        return loss, StepOutput(loss.detach(), len(batch), batch.origin)

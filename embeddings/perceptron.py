"""The prediction: a multi-layer perceptron.

T = targets, I = width of the input.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from embeddings.batch_norm import GlobalBatchNorm

SLOPE = 0.1
"""Initial slope of the PReLUs (the authors' code)."""


class Perceptron(nn.Module):
    """BatchNorm, then Linear and PReLU for each hidden layer, then one logit (DARE, appendix; the authors' code)."""

    def __init__(self, inputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.inputs = inputs
        """I."""
        layers: list[nn.Module] = [GlobalBatchNorm(inputs)]
        for before, after in pairwise([inputs, *hidden]):
            layers += [nn.Linear(before, after), nn.PReLU(init=SLOPE)]
        layers.append(nn.Linear(hidden[-1], 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, input_TI: Tensor) -> Tensor:
        """Logits, float32 (T,). In training, every rank must call it, with as few targets as none."""
        logit_T1: Tensor = self.layers(input_TI)
        return logit_T1.squeeze(1)

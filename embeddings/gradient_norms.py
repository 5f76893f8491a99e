"""How strong the gradients are that attention and representation send to the embeddings (DARE, figure 2)."""

import torch
from torch import Tensor

from embeddings.collective import ranks, sum_over_ranks
from embeddings.rows import Concern, Rows


class GradientNorms:
    """A tap of a `CtrModel` that measures the gradient of each concern, apart even where they share a table.

    Example:
        model.tap = GradientNorms()
        click_loss(model(batch), batch.label_T).backward()
        model.tap.norms()  # {"attention": ..., "representation": ...}
        model.tap = None
    """

    def __init__(self) -> None:
        self._squares: dict[Concern, Tensor] = {}

    def __call__(self, concern: Concern, rows: Rows) -> Rows:
        """The same rows; what comes back through them is counted as ``concern``'s."""

        def measured(part: Tensor) -> Tensor:
            # A view of its own: a hook on the rows themselves would see the gradients of both concerns.
            view = part.view_as(part)
            view.register_hook(lambda gradient: self._count(concern, gradient))
            return view

        return rows.map(measured)

    def _count(self, concern: Concern, gradient: Tensor) -> None:
        square = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float64).square()
        self._squares[concern] = self._squares.get(concern, torch.zeros_like(square)) + square

    def norms(self) -> dict[Concern, float]:
        """Norm of the gradients of the looked-up rows, by concern, over the global batch; every rank must call it."""
        # A rank's loss is that of the global batch times the number of ranks.
        nothing = torch.zeros_like(next(iter(self._squares.values())))  # a model need not learn its attention
        totals = sum_over_ranks(
            torch.stack([self._squares.get("attention", nothing), self._squares.get("representation", nothing)])
        )
        attention, representation = (totals.sqrt() / ranks()).tolist()
        return {"attention": attention, "representation": representation}

"""The inputs of a top-K search, and whether they fit together.

R = rows of the table, D = dim, M = behaviours of all users, T = targets, W = (target, behaviour) pairs: the sum of the
windows' lengths.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class TopKInputs:
    """Rows of a table, behaviours that name rows, and targets whose windows [start_T[t], end_T[t]) are searched.

    A target scores each behaviour m of its window ``<rows_RD[ids_M[m]], query_TD[t]> * scale_R[ids_M[m]] + additive``,
    where ``additive`` is the pair's own entry of ``additive_W``.
    """

    rows_RD: Tensor
    """float32, float16, bfloat16 or int8: the rows of the attention table."""
    ids_M: Tensor
    """int32 or int64, 0 .. R - 1: the row of each behaviour."""
    start_T: Tensor
    """int64: where each target's window begins, counted in M."""
    end_T: Tensor
    """int64: where it ends. Windows may be empty, and may overlap."""
    query_TD: Tensor
    """float32, float16 or bfloat16: the targets' rows, already divided by the root of the dim."""
    additive_W: Tensor
    """float32: a score of each pair that is added to the product; the first target's window, the second's, ..."""
    k: int
    """Behaviours to keep of each target, at least 1."""
    # int8 rows, and half-precision ones, are for read-only copies of attention rows: a search reads every row of a
    # window, so its time is that of the bytes it reads. Tables in training are float32 or float16 and have no scale.
    scale_R: Tensor | None = None
    """float32: what each int8 row is multiplied by; None for rows of floats."""

    @cached_property
    def length_T(self) -> Tensor:
        """int64: behaviours in each target's window."""
        return self.end_T - self.start_T

    @cached_property
    def first_pair_T(self) -> Tensor:
        """int64: which of the W pairs is the first of each target."""
        return self.length_T.cumsum(0) - self.length_T

    def check_kinds(self) -> None:
        """Check k, shapes, types and devices. It reads no values, so that compilers may call it with fake tensors.

        Raises:
            ValueError: naming the argument, and what it should be.
        """
        if self.k < 1:
            raise ValueError(f"k: at least 1 (not {self.k})")
        rows_RD, scale_R = self.rows_RD, self.scale_R
        quantized = rows_RD.dtype == torch.int8
        # Kernels take whatever memory they are given, so every tensor's kind is checked before they see it.
        for name, tensor, dimensions, dtypes in (
            ("rows_RD", rows_RD, 2, (*FLOATS, torch.int8)),
            ("ids_M", self.ids_M, 1, INTEGERS),
            ("start_T", self.start_T, 1, (torch.int64,)),
            ("end_T", self.end_T, 1, (torch.int64,)),
            ("query_TD", self.query_TD, 2, FLOATS),
            ("additive_W", self.additive_W, 1, (torch.float32,)),
            *([] if scale_R is None else [("scale_R", scale_R, 1, (torch.float32,))]),
        ):
            if tensor.dim() != dimensions:
                raise ValueError(f"{name}: must have {dimensions} dimensions (not {tensor.dim()})")
            if tensor.dtype not in dtypes:
                raise ValueError(f"{name}: must be {' or '.join(map(_plain, dtypes))} (not {_plain(tensor.dtype)})")
            if tensor.device != rows_RD.device:
                raise ValueError(f"{name}: on {tensor.device}, but the rows are on {rows_RD.device}")
        if quantized != (scale_R is not None):
            raise ValueError(f"scale_R: {'needed for' if quantized else 'only for'} int8 rows")
        if scale_R is not None and len(scale_R) != len(rows_RD):
            raise ValueError(f"scale_R: {len(scale_R)} scales for {len(rows_RD)} rows")
        if self.query_TD.shape[1] != rows_RD.shape[1]:
            raise ValueError(f"query_TD: dim {self.query_TD.shape[1]}, but the rows have dim {rows_RD.shape[1]}")
        if not len(self.start_T) == len(self.end_T) == len(self.query_TD):
            raise ValueError(
                f"targets: {len(self.query_TD)} queries, but {len(self.start_T)} starts and {len(self.end_T)} ends"
            )

    def check_values(self) -> int:
        """Check that nothing lies outside of what it points into; on a GPU this costs one transfer to the host.

        Returns:
            The length of the longest window.

        Raises:
            ValueError: ids that are no rows, windows outside of the behaviours, more or fewer additive scores than
                pairs.
        """
        # All figures travel in one tensor: each `.item()` of its own would wait for the GPU once more.
        low, high, shortest, longest, first, last, pairs = (
            int(figure)
            for figure in torch.stack(
                [
                    *_extremes(self.ids_M),
                    *_extremes(self.length_T),
                    _extremes(self.start_T)[0],
                    _extremes(self.end_T)[1],
                    self.length_T.sum(),
                ]
            ).tolist()
        )
        rows, behaviors = len(self.rows_RD), len(self.ids_M)
        if low < 0 or high >= rows > 0 or behaviors > 0 == rows:
            raise ValueError(f"ids_M: row {low if low < 0 else high}, but the table has {rows} rows")
        if shortest < 0 or first < 0 or last > behaviors:
            raise ValueError(f"windows: must lie within the {behaviors} behaviours, and end no earlier than they start")
        if pairs != len(self.additive_W):
            raise ValueError(
                f"additive_W: {len(self.additive_W)} scores, but the windows have {pairs} behaviours together"
            )
        return longest


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest value, int64; zeros if there are no values."""
    least, greatest = torch.aminmax(values if len(values) else values.new_zeros(1))
    return least.long(), greatest.long()


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

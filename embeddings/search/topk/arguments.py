"""What top-K search accepts.

R = rows of the table, D = dim, M = ids of all users, T = targets, W = sum of window lengths.
"""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)


def check_kinds(
    rows_RD: Tensor,
    ids_M: Tensor,
    start_T: Tensor,
    end_T: Tensor,
    query_TD: Tensor,
    additive_W: Tensor,
    k: int,
    scale_R: Tensor | None,
) -> None:
    """Check shapes, types and devices; reads no values.

    Raises:
        ValueError: saying which argument should be what.
    """
    if k < 1:
        raise ValueError(f"k: at least 1 (not {k})")
    quantized = rows_RD.dtype == torch.int8
    for name, tensor, dimensions, dtypes in (
        ("rows_RD", rows_RD, 2, (*FLOATS, torch.int8)),
        ("ids_M", ids_M, 1, INTEGERS),
        ("start_T", start_T, 1, (torch.int64,)),
        ("end_T", end_T, 1, (torch.int64,)),
        ("query_TD", query_TD, 2, FLOATS),
        ("additive_W", additive_W, 1, (torch.float32,)),
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
    if query_TD.shape[1] != rows_RD.shape[1]:
        raise ValueError(f"query_TD: dim {query_TD.shape[1]}, but the rows have dim {rows_RD.shape[1]}")
    if not len(start_T) == len(end_T) == len(query_TD):
        raise ValueError(f"targets: {len(query_TD)} queries, but {len(start_T)} starts and {len(end_T)} ends")


def check_values(rows_RD: Tensor, ids_M: Tensor, start_T: Tensor, end_T: Tensor, additive_W: Tensor) -> int:
    """Check that nothing is outside of what it points into; one transfer from the device.

    Returns:
        The longest window's length.

    Raises:
        ValueError: ids that are no rows, windows outside of the ids, more or fewer additive scores than pairs.
    """
    length_T = end_T - start_T
    figures = [
        *_extremes(ids_M),
        *_extremes(length_T),
        _extremes(start_T)[0],
        _extremes(end_T)[1],
        length_T.sum(),
    ]
    low, high, shortest, longest, first, last, pairs = torch.stack([figure.long() for figure in figures]).tolist()
    if low < 0 or high >= len(rows_RD) > 0 or len(ids_M) > 0 == len(rows_RD):
        raise ValueError(f"ids_M: row {low if low < 0 else high}, but the table has {len(rows_RD)} rows")
    if shortest < 0 or first < 0 or last > len(ids_M):
        raise ValueError(f"windows: must lie within the {len(ids_M)} behaviours, and end no earlier than they start")
    if pairs != len(additive_W):
        raise ValueError(f"additive_W: {len(additive_W)} scores, but the windows have {pairs} behaviours together")
    return longest


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest; zeros if there are no values."""
    return torch.aminmax(values if len(values) else values.new_zeros(1))


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

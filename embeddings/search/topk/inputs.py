"""The inputs of a top-K search, whether they fit together, and the keys that its results are ordered by.

A key is a score and a column as one integer, so that an ordinary top K of integers breaks ties as the search must. The
kernels in `cpu_kernel` and `cuda` make the same keys in languages of their own.

R = rows of a table, D = dim, M = behaviours of all users, T = targets, W = (target, behaviour) pairs: the sum of the
windows' lengths, d = dim of a small table, Q = queries of it (one, or one a target), X = any leading shape, K = kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)

NOTHING = torch.iinfo(torch.int64).min
"""Less than any key: padding."""
_LOW = 0xFFFFFFFF


class PartKind(IntEnum):
    """How a target and a behaviour find their row of a small table."""

    VALUE = 0
    """The behaviour's value is the row."""
    POSITION = 1
    """The target's value less the behaviour's, modulo a power of two; without a column, less the behaviour's index."""
    INTERVAL = 2
    """The bucket of the seconds from the behaviour's value to the target's (`embeddings.intervals.interval_bucket`)."""
    MATCH = 3
    """Row 1 if both values are equal, else row 0."""


@dataclass(frozen=True)
class ScorePart:
    """A part of the score that a small table makes: ``<row, query>``.

    The row depends on behaviour and target, so that one float a pair would have to be written if the kernels did not
    find it by themselves.
    """

    kind: PartKind
    rows_Rd: Tensor
    """float32: all rows of the table."""
    query_Qd: Tensor
    """float32: a query for each target, or one for all, (1, d)."""
    column_M: Tensor | None = None
    """int32, int64 for an interval: the behaviours' values."""
    value_T: Tensor | None = None
    """int64: the targets' values; None for `PartKind.VALUE`."""
    mask: int = -1
    """What a position is modulo, less 1; -1: nothing."""

    @property
    def score_R(self) -> Tensor | None:
        """float32 (R,): the score of each row where one query serves all targets, so that pairs look it up; else None.

        All targets' queries times all rows would be more than the pairs where a table is not tiny.
        """
        return torch.mv(self.rows_Rd, self.query_Qd[0]) if len(self.query_Qd) == 1 else None


@dataclass(frozen=True)
class TopKInputs:
    """Rows of a table, behaviours that name rows, and targets whose windows [start_T[t], end_T[t]) are searched.

    A target scores each behaviour m of its window ``<rows_RD[ids_M[m]], query_TD[t]> * scale_R[ids_M[m]]``, plus the
    ``parts``, plus the pair's own entry of ``additive_W``.
    """

    rows_RD: Tensor
    """float32, float16, bfloat16 or int8: the rows of the attention table; D may be 0."""
    ids_M: Tensor
    """int32 or int64, 0 .. R - 1: the row of each behaviour."""
    start_T: Tensor
    """int64: where each target's window begins, counted in M."""
    end_T: Tensor
    """int64: where it ends. Windows may be empty, and may overlap."""
    query_TD: Tensor
    """float32, float16 or bfloat16: the targets' rows, already divided by the root of the dim."""
    k: int
    """Behaviours to keep of each target, at least 1."""
    parts: Sequence[ScorePart] = ()
    """What small tables add to the product."""
    additive_W: Tensor | None = None
    """float32: a score of each pair, for what no kernel can make; the first target's window, the second's, ..."""
    # int8 rows, and half-precision ones, are for read-only copies of attention rows: a search reads every row of a
    # window, so its time is that of the bytes it reads. Tables in training are float32 or float16 and have no scale.
    scale_R: Tensor | None = None
    """float32: what each int8 row is multiplied by; None for rows of floats."""
    longest: int | None = None
    """No window is longer. From callers who have checked all ids, values and windows already; None: they are checked,
    for which the host waits for a GPU."""

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
        checked: list[tuple[str, Tensor | None, int, Sequence[torch.dtype]]] = [
            ("rows_RD", rows_RD, 2, (*FLOATS, torch.int8)),
            ("ids_M", self.ids_M, 1, INTEGERS),
            ("start_T", self.start_T, 1, (torch.int64,)),
            ("end_T", self.end_T, 1, (torch.int64,)),
            ("query_TD", self.query_TD, 2, FLOATS),
            ("additive_W", self.additive_W, 1, (torch.float32,)),
            ("scale_R", scale_R, 1, (torch.float32,)),
        ]
        for number, part in enumerate(self.parts):
            column = torch.int64 if part.kind == PartKind.INTERVAL else torch.int32
            checked += [
                (f"parts[{number}].rows_Rd", part.rows_Rd, 2, (torch.float32,)),
                (f"parts[{number}].query_Qd", part.query_Qd, 2, (torch.float32,)),
                (f"parts[{number}].column_M", part.column_M, 1, (column,)),
                (f"parts[{number}].value_T", part.value_T, 1, (torch.int64,)),
            ]
        for name, tensor, dimensions, dtypes in checked:
            if tensor is None:
                continue
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
        for number, part in enumerate(self.parts):
            self._check_part(f"parts[{number}]", part)

    def _check_part(self, name: str, part: ScorePart) -> None:
        targets, behaviors = len(self.start_T), len(self.ids_M)
        if part.rows_Rd.shape[1] != part.query_Qd.shape[1]:
            raise ValueError(
                f"{name}: queries of dim {part.query_Qd.shape[1]}, but the rows have dim {part.rows_Rd.shape[1]}"
            )
        if len(part.query_Qd) not in (1, targets):
            raise ValueError(f"{name}: {len(part.query_Qd)} queries for {targets} targets")
        if part.column_M is None and part.kind != PartKind.POSITION:
            raise ValueError(f"{name}: a {part.kind.name.lower()} needs column_M")
        if part.column_M is not None and len(part.column_M) != behaviors:
            raise ValueError(f"{name}: {len(part.column_M)} values for {behaviors} behaviours")
        if (part.value_T is None) != (part.kind == PartKind.VALUE):
            raise ValueError(f"{name}: value_T is {'needed' if part.value_T is None else 'not'} for {part.kind.name}")
        if part.value_T is not None and len(part.value_T) != targets:
            raise ValueError(f"{name}: {len(part.value_T)} values for {targets} targets")
        if len(part.rows_Rd) < (2 if part.kind == PartKind.MATCH else 1):
            raise ValueError(f"{name}: {len(part.rows_Rd)} rows are too few")

    def check_values(self) -> int:
        """Check that nothing lies outside of what it points into; on a GPU this costs one transfer to the host.

        Positions and intervals beyond their table's last row have that row, so only values are checked.

        Returns:
            The length of the longest window.

        Raises:
            ValueError: ids or values that are no rows, windows outside of the behaviours, more or fewer additive scores
                than pairs.
        """
        values = [(number, part) for number, part in enumerate(self.parts) if part.kind == PartKind.VALUE]
        # All figures travel in one tensor: each `.item()` of its own would wait for the GPU once more.
        figures = torch.stack(
            [
                *_extremes(self.ids_M),
                *_extremes(self.length_T),
                _extremes(self.start_T)[0],
                _extremes(self.end_T)[1],
                self.length_T.sum(),
                *(extreme for _, part in values if part.column_M is not None for extreme in _extremes(part.column_M)),
            ]
        ).tolist()
        low, high, shortest, longest, first, last, pairs = figures[:7]
        rows, behaviors = len(self.rows_RD), len(self.ids_M)
        _check_rows("ids_M", low, high, rows, behaviors)
        for (number, part), low, high in zip(values, figures[7::2], figures[8::2], strict=True):
            _check_rows(f"parts[{number}].column_M", low, high, len(part.rows_Rd), behaviors)
        if shortest < 0 or first < 0 or last > behaviors:
            raise ValueError(f"windows: must lie within the {behaviors} behaviours, and end no earlier than they start")
        if self.additive_W is not None and pairs != len(self.additive_W):
            raise ValueError(
                f"additive_W: {len(self.additive_W)} scores, but the windows have {pairs} behaviours together"
            )
        return int(longest)


def _check_rows(name: str, low: int, high: int, rows: int, behaviors: int) -> None:
    if low < 0 or high >= rows > 0 or behaviors > 0 == rows:
        raise ValueError(f"{name}: row {low if low < 0 else high}, but the table has {rows} rows")


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest value, int64; zeros if there are no values."""
    least, greatest = torch.aminmax(values if len(values) else values.new_zeros(1))
    return least.long(), greatest.long()


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ordered(score_X: Tensor, column_X: Tensor) -> Tensor:
    """int64 keys that sort as (score, earlier column first): the float's bits made monotonic, above the column.

    NaN sorts above infinity; -0.0 equals 0.0.

    Args:
        score_X: float32.
        column_X: integer below 2^32, broadcast against the scores.
    """
    # NaNs come in many bit patterns, of both signs; here they become one, which is positive and above infinity's.
    comparable_X = torch.where(score_X.isnan(), math.nan, score_X + 0.0)  # + 0.0 makes 0.0 of -0.0
    return (_monotonic(comparable_X.view(torch.int32)).to(torch.int64) << 32) | (_LOW - column_X)


def decoded(key_TK: Tensor, start_T: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The scores and indices of descending keys, padded to K columns.

    Args:
        key_TK: int64, at most K columns.
        start_T: int64, the index of column 0.
        k: K.

    Returns:
        score_TK: float32; -inf for padding.
        index_TK: int64; -1 for padding.
    """
    targets, kept = key_TK.shape
    score_TK = torch.full((targets, k), -torch.inf, device=key_TK.device)
    index_TK = torch.full((targets, k), -1, dtype=torch.int64, device=key_TK.device)
    valid_TK = key_TK != NOTHING
    # The shift is arithmetic, so the upper half keeps its sign.
    score = _monotonic((key_TK >> 32).to(torch.int32)).view(torch.float32)
    score_TK[:, :kept] = torch.where(valid_TK, score, -torch.inf)
    index_TK[:, :kept] = torch.where(valid_TK, start_T[:, None] + _LOW - (key_TK & _LOW), -1)
    return score_TK, index_TK


def _monotonic(bits_X: Tensor) -> Tensor:
    """Bits of floats as integers that sort as the floats do, and back: it is its own inverse.

    The bits of positive floats sort as the floats do. Those of negative floats sort the other way round, and turning
    all their bits but the sign turns their order.
    """
    return torch.where(bits_X < 0, bits_X ^ 0x7FFFFFFF, bits_X)

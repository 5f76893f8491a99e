"""Top-K search on a GPU: one pass over the rows; up to a K of `MANY` nothing of size (T, N) is written.

R = rows of a table, D = dim, M = behaviours of all users, T = targets, N = longest window, K = kept, P = parts of the
score, d = dim of a small table, X = keys of a target: those of its whole window, or the best of each share of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from embeddings.search.topk import cuda_kernel
from embeddings.search.topk.inputs import ScorePart, TopKInputs, decoded


class Mode(NamedTuple):
    """How a program goes over a window: each mode is compiled once for each type of rows."""

    kept: int
    """Keys that stay in registers, a power of two; for more than that all keys are written, and torch selects."""
    block_n: int
    """Behaviours that are scored at a time, a power of two; 32 threads for 32 of them."""

    @property
    def warps(self) -> int:
        """Groups of 32 threads."""
        return max(1, self.block_n // 32)


SHORT = Mode(32, 32)
"""For windows of one block of 32: on many shards, few behaviours of a window are a shard's own. No K can be more."""
FEW, MANY = Mode(32, 128), Mode(128, 128)
"""For longer windows; larger blocks would not stay in registers."""
PROGRAMS = 1024
"""Windows are cut into shares as long as there are no more programs than this, so that few targets fill a GPU too."""
KEY_BYTES = 256 << 20
"""Keys that are written at a time."""

_VECTOR_BYTES = 16


def top_k_cuda(inputs: TopKInputs, longest: int) -> tuple[Tensor, Tensor]:
    """The search of `embeddings.search.topk.api.top_k`; inputs are checked, and no window is longer than ``longest``.

    The host does not wait for the GPU.
    """
    start_T, k, targets = inputs.start_T, inputs.k, len(inputs.start_T)
    if not targets or not longest:
        return decoded(start_T.new_empty(targets, 0), start_T, k)
    mode = SHORT if longest <= SHORT.block_n else _long_mode(k)
    # A program searches one share of one target's window.
    shares = max(1, min(PROGRAMS // targets, triton.cdiv(longest, mode.block_n)))
    share = triton.cdiv(triton.cdiv(longest, shares), mode.block_n) * mode.block_n
    launch = _Launch(inputs, mode, shares, share)
    if k > mode.kept and mode is not SHORT:
        columns = longest
    elif shares > 1:
        columns = shares * mode.kept
    else:
        # One program sees all keys of a target: what it keeps is the answer, already sorted.
        score_TK = torch.empty(targets, k, device=start_T.device)
        index_TK = torch.empty(targets, k, dtype=torch.int64, device=start_T.device)
        launch(0, targets, 0, index_TK, score_TK, index_TK)
        return score_TK, index_TK
    best = []
    # So many targets at a time that their keys, of 8 bytes, stay within the limit.
    step = max(1, KEY_BYTES // (8 * columns))
    for first in range(0, targets, step):
        key_TX = start_T.new_empty(min(step, targets - first), columns)
        launch(first, len(key_TX), columns, key_TX, launch.no_floats, key_TX)
        # Keys sort as the search must, so an ordinary top K of integers merges the shares.
        best.append(key_TX.topk(min(k, columns)).values)
    return decoded(torch.cat(best), start_T, k)


def warm(k: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile and load all that searches of this K in rows of this type can need: none compiles later.

    Dims, parts, numbers and lengths do not matter: the compiler takes no notice of them.

    Args:
        k: K.
        dtype: of the rows that will be searched.
        device: a CUDA device.
    """
    # A window for each mode, and one target, whose long window is cut into shares.
    for longest in (1, 2 * _long_mode(k).block_n):
        inputs = TopKInputs(
            rows_RD=torch.zeros(1, 1, dtype=dtype, device=device),
            ids_M=torch.zeros(longest, dtype=torch.int32, device=device),
            start_T=torch.zeros(1, dtype=torch.int64, device=device),
            end_T=torch.full((1,), longest, device=device),
            query_TD=torch.zeros(1, 1, device=device),
            k=k,
            scale_R=torch.ones(1, device=device) if dtype == torch.int8 else None,
        )
        top_k_cuda(inputs, longest)


def _long_mode(k: int) -> Mode:
    return FEW if k <= FEW.kept else MANY


class _Launch:
    """Starts the kernel with the inputs of a search; it keeps the tensors whose addresses the kernel is given."""

    def __init__(self, inputs: TopKInputs, mode: Mode, shares: int, share: int) -> None:
        rows_RD, targets = inputs.rows_RD, len(inputs.start_T)
        # A slice of a table's columns is searched as it lies, if only the values of a row are neighbours.
        self._rows_RD = rows_RD if rows_RD.stride(1) == 1 else rows_RD.contiguous()
        self._ids_M = inputs.ids_M.contiguous()
        self._start_T, self._end_T = inputs.start_T.contiguous(), inputs.end_T.contiguous()
        self._query_TD = inputs.query_TD.float().contiguous()
        self.no_floats = torch.empty(0, device=rows_RD.device)
        """For what is neither read nor written: a missing tensor would make a variant of its own."""
        self._scale_R = self.no_floats if inputs.scale_R is None else inputs.scale_R.contiguous()
        self._additive_W = self.no_floats if inputs.additive_W is None else inputs.additive_W.contiguous()
        self._first_pair_T = self._start_T if inputs.additive_W is None else inputs.first_pair_T
        self._has_additive, self._parts, self._k = inputs.additive_W is not None, len(inputs.parts), inputs.k
        self._part_PF, self._of_parts = _described(inputs.parts, targets, self._start_T)
        self._mode, self._shares, self._share = mode, shares, share

    def __call__(
        self, first_target: int, targets: int, columns: int, key_TX: Tensor, score_TK: Tensor, index_TK: Tensor
    ) -> None:
        """Search the windows of some targets; see `cuda_kernel.search` for what is written where."""
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device_of(self._rows_RD):
            cuda_kernel.search[(targets, self._shares)](
                self._rows_RD,
                self._rows_RD.stride(0),
                int(_in_vectors(self._rows_RD)),
                self._scale_R,
                self._ids_M.data_ptr(),
                int(self._ids_M.dtype == torch.int64),
                self._start_T,
                self._end_T,
                self._query_TD,
                self._query_TD.shape[1],
                self._part_PF,
                self._parts,
                self._first_pair_T,
                self._additive_W,
                int(self._has_additive),
                first_target,
                columns,
                self._share,
                self._k,
                key_TX,
                score_TK,
                index_TK,
                kept=self._mode.kept,
                block_n=self._mode.block_n,
                num_warps=self._mode.warps,
            )


def _described(parts: Sequence[ScorePart], targets: int, like_T: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What the kernel is told of the parts: (P, `cuda_kernel.PART_FIELDS`), and the tensors whose addresses it has."""
    if not parts:
        return like_T, []
    described: list[list[int]] = []
    tensors: list[Tensor] = []

    def address(tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        tensors.append(tensor)
        return tensor.data_ptr()

    for part in parts:
        score_R, query_Qd = part.score_R, None
        rows_Rd = _with_vectors(part.rows_Rd) if score_R is None else score_R[:, None]
        if score_R is None:
            query_Qd = _with_vectors(part.query_Qd)
            assert len(query_Qd) == targets
        described.append(
            [
                int(part.kind),
                address(rows_Rd),
                rows_Rd.stride(0),
                len(rows_Rd),
                address(query_Qd),
                0 if query_Qd is None else query_Qd.stride(0),
                rows_Rd.shape[1],
                address(None if part.column_M is None else part.column_M.contiguous()),
                address(None if part.value_T is None else part.value_T.contiguous()),
                part.mask,
            ]
        )
    # From pinned memory, so that the host does not wait until the GPU has it.
    part_PF = torch.tensor(described, pin_memory=like_T.is_cuda).to(like_T.device, non_blocking=True)
    return part_PF, tensors


def _in_vectors(rows_Rd: Tensor) -> bool:
    """Whether each row begins and ends at a multiple of 16 bytes."""
    row_bytes, stride_bytes = rows_Rd.shape[1] * rows_Rd.itemsize, rows_Rd.stride(0) * rows_Rd.itemsize
    return all(count % _VECTOR_BYTES == 0 for count in (rows_Rd.data_ptr(), row_bytes, stride_bytes))


def _with_vectors(rows_Rd: Tensor) -> Tensor:
    """The rows as they lie if vectors fit them; else a copy, whose dims are filled up with zeros."""
    if rows_Rd.stride(1) == 1 and _in_vectors(rows_Rd):
        return rows_Rd
    return pad(rows_Rd, (0, -rows_Rd.shape[1] % (_VECTOR_BYTES // rows_Rd.itemsize))).clone()

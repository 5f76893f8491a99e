"""A score and a column as one integer, so that an ordinary top K of integers breaks ties as the search must.

The kernels in `cpu_kernel` and `cuda` make the same keys in languages of their own.

X = any leading shape, K = kept, T = targets.
"""

import math

import torch
from torch import Tensor

NOTHING = torch.iinfo(torch.int64).min
"""Less than any key: padding."""
_LOW = 0xFFFFFFFF


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

"""Time between a behaviour and a target, in logarithmic buckets."""

import torch
from torch import Tensor

INTERVAL_BUCKETS = 34
"""Rows of an interval table: 0 for padding, 33 for spans up to 2^33 seconds (272 years)."""


def interval_bucket(seconds: Tensor) -> Tensor:
    """Bucket 1 + floor(log2(1 + seconds)), at most 33: 1 = the same second, 2 = 1-2 s, 3 = 3-6 s, ...

    Args:
        seconds: int64, any shape; negative spans count as 0.

    Returns:
        int32 of the same shape, 1 .. 33.
    """
    # frexp is exact: x = m 2^e with m in [0.5, 1), so e = 1 + floor(log2(x)). float64 holds integers up to 2^53.
    _, exponent = torch.frexp((seconds.clamp(min=0) + 1).to(torch.float64))
    return exponent.clamp(max=INTERVAL_BUCKETS - 1).to(torch.int32)

"""Buckets of the time between a behaviour and a target.

In a file of its own that needs torch alone, as the top-K search does.
"""

import torch
from torch import Tensor

INTERVAL_BUCKETS = 34
"""Rows of an interval table: row 0 for targets and padding, and 33 for spans up to 2^33 seconds (272 years)."""


def interval_bucket(seconds: Tensor) -> Tensor:
    """The logarithmic bucket of a time between behaviour and target: 1 + floor(log2(1 + seconds)), at most 33.

    Bucket 1 is the same second, 2 is 1-2 s, 3 is 3-6 s, ...

    Args:
        seconds: int64, any shape; negative spans count as 0.

    Returns:
        int32 of the same shape, 1 .. 33.
    """
    # frexp is exact: x = m 2^e with m in [0.5, 1), so e = 1 + floor(log2(x)). float64 holds integers up to 2^53.
    _, exponent = torch.frexp((seconds.clamp(min=0) + 1).to(torch.float64))
    return exponent.clamp(max=INTERVAL_BUCKETS - 1).to(torch.int32)

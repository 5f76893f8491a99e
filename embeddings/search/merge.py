"""The K best of what several shards have found.

T = targets, S = shards, F = found: of shard 0 for the first target, for the second, ..., then of shard 1, ...,
K = kept, C = most that was found for a target.
"""

import torch
from torch import Tensor

from embeddings.search.key import NOTHING, ordered
from embeddings.search.selection import Selection


def merged(count_ST: Tensor, score_F: Tensor, behavior_F: Tensor, k: int) -> Selection:
    """The K best of each target; of equal scores the earlier behaviour wins.

    Exact, if each shard found its own K best: the best K of a union are among the best K of its parts.

    Args:
        count_ST: int64, how many each shard found for each target.
        score_F: float32.
        behavior_F: int64, below 2^32.
        k: K.
    """
    S, T = count_ST.shape
    count_T = count_ST.sum(0)
    longest = max(k, int(count_T.max()) if T else 0)
    flat_ST = count_ST.flatten()
    before_F = (count_ST.cumsum(0) - count_ST).flatten() - (flat_ST.cumsum(0) - flat_ST)
    column_F = torch.arange(len(score_F), device=score_F.device) + before_F.repeat_interleave(flat_ST)
    target_F = torch.arange(T, device=score_F.device).repeat(S).repeat_interleave(flat_ST)
    key_TC = torch.full((T, longest), NOTHING, device=score_F.device)
    key_TC[target_F, column_F] = ordered(score_F, behavior_F)
    key_TK = key_TC.topk(k, dim=1).values
    valid_TK = key_TK != NOTHING
    return Selection(torch.where(valid_TK, 0xFFFFFFFF - (key_TK & 0xFFFFFFFF), 0), valid_TK)

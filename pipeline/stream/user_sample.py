"""A part of the users of a split, the same ones in every epoch, on any number of ranks and in any order of the files.

U = users of a row group, M = their targets of all splits, G = row groups.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.hashing import mix
from pipeline.stream.data_set import DataSet
from pipeline.stream.reader import RowGroupReader
from pipeline.stream.row_group import flat_column, list_column
from schemas.errors import UserError
from schemas.shards import Split

I64 = NDArray[np.int64]

_SALT = 0x5A3D
"""Fixed, so that runs with different seeds are validated on the same users. Nothing else is drawn with it."""


class UserSample(NamedTuple):
    """About ``fraction`` of all users: those whose hashed raw id is below it. 1 keeps everyone."""

    fraction: float = 1.0

    def keeps(self, user_id_U: I64) -> NDArray[np.bool_]:
        """Whether each user, by raw id, is in the sample, (U,)."""
        # The upper 53 bits as a number in [0, 1), which float64 holds exactly.
        return (mix(user_id_U, _SALT) >> np.uint64(11)) * 2.0**-53 < self.fraction


def sampled_targets(data_set: DataSet, split: Split, sample: UserSample, threads: int) -> I64:
    """Targets of the sample's users in each row group, (G,); reads two columns of the row groups that have any.

    Raises:
        UserError: a row group that cannot be read, or no user at all is in the sample.
    """
    # The index counts the targets of all users. All ranks must know how many are left before the first step, because
    # they make the same number of steps.
    targets_G = data_set.targets_G[split.name.lower()].copy()
    groups = np.flatnonzero(targets_G)
    schema = pa.schema([data_set.schema.field(name) for name in ("user_id", "target_split")])

    def count(table: pa.Table, index: int) -> int:
        offset_U, split_M = list_column("target_split", table["target_split"])
        kept_M = np.repeat(sample.keeps(flat_column("user_id", table["user_id"]).to_numpy()), np.diff(offset_U))
        return int(np.count_nonzero(kept_M & (split_M == split)))

    addresses = [data_set.address(int(group)) for group in groups]
    with RowGroupReader(addresses, schema, count, threads=threads, ahead=2 * threads) as reader:
        targets_G[groups] = [next(reader) for _ in groups]
    if not targets_G.any():
        raise UserError(
            f"{data_set.folder}: a fraction of {sample.fraction:g} leaves no user with targets in split "
            f"{split.name.lower()}; choose a larger one"
        )
    return targets_G

"""How events are spread over items or categories, and over the row-wise shards of their table; from a dictionary.

F = different frequencies, W = equal ranges of dense ids, as row-wise sharding cuts a table, B = rows of a batch of the
file.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from schemas.errors import UserError


@dataclass(frozen=True)
class Popularity:
    """How often the items or the categories of a data set were seen."""

    frequency_F: NDArray[np.int64]
    """The different frequencies, falling."""
    ids_F: NDArray[np.int64]
    """How many ids have each frequency."""
    load_W: NDArray[np.int64]
    """Sum of the frequencies in each range of ids."""

    @property
    def imbalance(self) -> float:
        """The largest load of a range over the mean: 1 is perfect."""
        mean = self.load_W.mean()
        return float(self.load_W.max() / mean) if mean else 1.0


def read_popularity(path: Path, ids: int, ranges: int) -> Popularity:
    """Read a dictionary, batch by batch; memory grows with the number of different frequencies only.

    Args:
        path: dictionary with the columns id and frequency.
        ids: number of dense ids, not counting 0, which is the unknown.
        ranges: W, the number of equal ranges of ids.

    Raises:
        UserError: the file cannot be read, or holds an id above ``ids``.
    """
    # As row-wise sharding cuts the table, whose row 0 is the unknown.
    rows_of_range = -(-(ids + 1) // ranges)
    load_W = np.zeros(ranges, np.int64)
    frequency_F = ids_F = np.zeros(0, np.int64)
    try:
        with pq.ParquetFile(path) as file:
            missing = {"id", "frequency"} - set(file.schema_arrow.names)
            if missing:
                raise UserError(f"{path}: column {min(missing)} is missing; prepare the data set again")
            for batch in file.iter_batches(columns=["id", "frequency"]):
                id_B, frequency_B = batch["id"].to_numpy(), batch["frequency"].to_numpy()
                # Values that are not admitted yet are counted on under the id 0.
                id_B, frequency_B = id_B[id_B != 0], frequency_B[id_B != 0]
                if len(id_B) and not 1 <= id_B.min() <= id_B.max() <= ids:
                    raise UserError(
                        f"{path}: ids from {id_B.min()} to {id_B.max()}, the manifest says 1 to {ids}; "
                        "prepare the data set again"
                    )
                # Not load_W[...] +=, which adds once where a range comes several times.
                np.add.at(load_W, id_B // rows_of_range, frequency_B)
                # What was seen so far and this batch, put together by frequency again.
                frequency_F, index = np.unique(np.concatenate([frequency_F, frequency_B]), return_inverse=True)
                ids_F = _sums(index, np.concatenate([ids_F, np.ones(len(id_B), np.int64)]), len(frequency_F))
    except (OSError, pa.ArrowException) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read ({reason}); prepare the data set again") from None
    return Popularity(frequency_F[::-1], ids_F[::-1], load_W)


def _sums(index: NDArray[np.int64], values: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    sums = np.zeros(size, np.int64)
    np.add.at(sums, index, values)
    return sums

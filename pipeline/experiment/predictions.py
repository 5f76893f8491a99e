"""The predictions of a run, as `dare score` wrote them.

N = samples, U = users.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray


@dataclass(frozen=True)
class Predictions:
    """Samples of a split."""

    user_id_U: NDArray[np.int64]
    """Ascending."""
    user_N: NDArray[np.int64]
    """Place in ``user_id_U``."""
    label_N: NDArray[np.bool_]
    score_N: NDArray[np.float32]

    @property
    def users(self) -> int:
        """U."""
        return len(self.user_id_U)

    @classmethod
    def read(cls, folder: Path) -> "Predictions":
        """Read what `pipeline.score.score_run` wrote into ``folder``."""
        table = pq.read_table(folder, columns=["user_id", "label", "score"])
        user_id_U, user_N = np.unique(table["user_id"].to_numpy(), return_inverse=True)
        return cls(user_id_U, user_N, table["label"].to_numpy().astype(bool), table["score"].to_numpy())

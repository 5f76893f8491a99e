"""A data set's folder as the stream sees it: manifest, index of row groups, and where to read.

G = row groups, in file order.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.stream.reader import RowGroupAddress
from schemas.errors import UserError
from schemas.manifest import MANIFEST, ROW_GROUP_INDEX, Manifest
from schemas.shards import ROW_GROUPS, SPLITS

I64 = NDArray[np.int64]


@dataclass(frozen=True)
class DataSet:
    """Manifest and index of row groups, checked against each other."""

    folder: Path
    manifest: Manifest
    fingerprint: str
    """SHA-256 of the manifest, which holds the checksums of all other files."""
    file_G: I64
    """The shard's index in the manifest."""
    row_group_G: I64
    """Number of the row group in its shard."""
    users_G: I64
    behaviors_G: I64
    """Behaviours of the row group's users, all together."""
    targets_G: dict[str, I64]
    """Number of targets, by split."""

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read the manifest and the index of ``folder``; shards are not opened.

        Raises:
            UserError: not a data set, of another schema version, or its parts do not match.
        """
        manifest = Manifest.read(folder)
        index = _read_index(manifest.verified(folder, ROW_GROUP_INDEX))
        columns = {name: index[name].to_numpy().astype(np.int64) for name in ROW_GROUPS.names}
        file_G, users_G = columns["file"], columns["users"]
        shards = len(manifest.shards)
        counts = manifest.counts
        # The range of file numbers comes first: numpy's bincount raises on a negative one, and the rest is not looked
        # at.
        agrees = (
            bool(np.all((file_G >= 0) & (file_G < shards)))
            and np.array_equal(np.bincount(file_G, minlength=shards), [shard.row_groups for shard in manifest.shards])
            and np.array_equal(np.bincount(file_G, users_G, shards), [shard.users for shard in manifest.shards])
            and int(columns["behaviors"].sum()) == counts.behaviors
            and all(int(columns[split].sum()) == getattr(counts, split).targets for split in SPLITS)
        )
        if not agrees:
            raise UserError(f"{folder}: {ROW_GROUP_INDEX} does not match {MANIFEST}; prepare the data set again")
        return cls(
            folder,
            manifest,
            # Of the bytes on disk, not of what was parsed: any other manifest is another data set.
            hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest(),
            file_G,
            columns["row_group"],
            users_G,
            columns["behaviors"],
            {split: columns[split] for split in SPLITS},
        )

    def schema(self, *, lines: bool = False) -> pa.Schema:
        """Arrow schema of what is read of the shards.

        Args:
            lines: with ``target_line``, where the data set has it.
        """
        return pa.schema([field for field in self.manifest.shard_schema if lines or field.name != "target_line"])

    def address(self, group: int) -> RowGroupAddress:
        """Say where row group ``group`` (in file order over all shards) is."""
        shard = self.manifest.shards[self.file_G[group]]
        return RowGroupAddress(self.folder / shard.path, int(self.row_group_G[group]), shard)

    def dictionaries(self) -> dict[str, Any]:
        """What gives ids their meaning, as JSON knows it: checksums of the dictionary files, and the vocabularies."""
        checksums = {file.path: file.sha256 for file in self.manifest.files}
        behaviors, scenes = self.manifest.behaviors, self.manifest.scenes
        return {
            "items": checksums.get("items.parquet"),
            "categories": checksums.get("categories.parquet"),
            "behaviors": None if behaviors is None else list(behaviors),
            "scenes": None if scenes is None else list(scenes),
        }

    def largest_ids(self) -> dict[str, int]:
        """The largest id that each kind of id can have: item, category; behavior and scene where the data have them."""
        # Ids begin at 1, with 0 for the unknown: the largest one is the number of different values.
        largest = {"item": self.manifest.counts.items, "category": self.manifest.counts.categories}
        if self.manifest.behaviors is not None:
            largest["behavior"] = len(self.manifest.behaviors)
        if self.manifest.scenes is not None:
            largest["scene"] = len(self.manifest.scenes)
        return largest


def _read_index(path: Path) -> pa.Table:
    try:
        index = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; prepare the data set again") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); prepare the data set again") from None
    wrong = [
        field.name for field in ROW_GROUPS if not index.schema.equals(ROW_GROUPS) and field not in list(index.schema)
    ]
    if wrong:
        raise UserError(f"{path}: columns missing or of another type: {', '.join(wrong)}; prepare the data set again")
    return index

"""Small data sets for tests: a folder of shards, index and manifest, made from plain Python lists or from a seed."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.ingest.shards import shard_encoding
from schemas.documents import json_document
from schemas.manifest import MANIFEST, ROW_GROUP_INDEX, Counts, File, Manifest, Shard, TargetCounts
from schemas.shards import ROW_GROUPS, SPLITS, Split, dictionary_schema, history_schema
from schemas.storage import sha256

CONTENTS = ("users", "behaviors", "row_groups")
"""What a shard holds."""
ITEMS = 50
CATEGORIES = 7


@dataclass(frozen=True)
class Target:
    item: int
    category: int
    timestamp: int
    label: int
    split: Split
    history_end: int
    scene: int = 0


@dataclass(frozen=True)
class User:
    """A user: behaviours as parallel lists in time order, and targets."""

    user_id: int
    item: list[int]
    category: list[int]
    timestamp: list[int]
    targets: list[Target]
    behavior: list[int] = field(default_factory=list)
    scene: list[int] = field(default_factory=list)


def random_users(
    count: int,
    seed: int = 0,
    *,
    longest: int = 40,
    most_targets: int = 9,
    behaviors: int = 0,
    scenes: int = 0,
    splits: Sequence[Split] = tuple(Split),
) -> list[User]:
    """Users with 0 .. ``longest`` behaviours (timestamps with ties) and 0 .. ``most_targets`` targets in random splits.

    ``behaviors`` and ``scenes`` are how many names there are; 0: the data has no such column. Every target of a user
    has a timestamp of its own, so (user, timestamp) names a target.
    """
    rng = np.random.default_rng(seed)
    users = []
    for user_id in rng.permutation(10 * count)[:count].tolist():
        length = int(rng.integers(0, longest + 1))
        timestamp = np.sort(rng.integers(0, 2 * longest, length)) * 1000
        shown = np.sort(rng.permutation(4 * longest)[: rng.integers(0, most_targets + 1)]) * 500
        targets = [
            Target(
                item=int(rng.integers(0, ITEMS + 1)),
                category=int(rng.integers(0, CATEGORIES + 1)),
                timestamp=int(when),
                label=int(rng.integers(0, 2)),
                split=Split(int(rng.choice(splits))),
                history_end=int(np.searchsorted(timestamp, when)),
                scene=int(rng.integers(0, scenes + 1)),
            )
            for when in shown
        ]
        users.append(
            User(
                user_id,
                rng.integers(0, ITEMS + 1, length).tolist(),
                rng.integers(0, CATEGORIES + 1, length).tolist(),
                timestamp.tolist(),
                targets,
                rng.integers(0, behaviors + 1, length).tolist(),
                rng.integers(0, scenes + 1, length).tolist(),
            )
        )
    return users


def write_dataset(
    folder: Path,
    users: Sequence[User],
    *,
    users_per_row_group: int = 4,
    row_groups_per_shard: int = 3,
    behaviors: tuple[str, ...] | None = None,
    scenes: tuple[str, ...] | None = None,
) -> Manifest:
    """Write ``users`` as a data set of schema version 2, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    schema = history_schema(behavior=behaviors is not None, scene=scenes is not None)
    groups = [users[first : first + users_per_row_group] for first in range(0, len(users), users_per_row_group)]
    shards, index = [], []
    for number, first in enumerate(range(0, len(groups), row_groups_per_shard)):
        members = groups[first : first + row_groups_per_shard]
        path = folder / f"shard-{number:05}.parquet"
        with pq.ParquetWriter(path, schema, **shard_encoding(schema)) as writer:
            for group in members:
                writer.write_table(_table(group, schema))
        for row_group, group in enumerate(members):
            targets = [sum(t.split == split for u in group for t in u.targets) for split in Split]
            index.append([number, row_group, len(group), sum(len(u.item) for u in group), *targets])
        shards.append(
            Shard.of(
                path,
                users=sum(map(len, members)),
                behaviors=sum(len(u.item) for group in members for u in group),
                row_groups=len(members),
            )
        )
    columns = [list(column) for column in zip(*index, strict=True)] or [[] for _ in ROW_GROUPS]
    pq.write_table(
        pa.table([pa.array(c, f.type) for c, f in zip(columns, ROW_GROUPS, strict=True)], schema=ROW_GROUPS),
        folder / ROW_GROUP_INDEX,
    )
    files = [folder / ROW_GROUP_INDEX]
    for name, count in (("items", ITEMS), ("categories", CATEGORIES)):
        ids = list(range(1, count + 1))
        schema = dictionary_schema(text=False, of_items=name == "items")
        content = [ids, ids, [1] * count, [1 + i % CATEGORIES for i in ids]][: len(schema)]
        pq.write_table(pa.table(content, schema=schema), folder / f"{name}.parquet")
        files.append(folder / f"{name}.parquet")
    manifest = Manifest(
        schema_version=2,
        seed=0,
        counts=_counts(users),
        behaviors=behaviors,
        scenes=scenes,
        settings={},
        sources=(),
        shards=tuple(shards),
        files=tuple(map(File.of, files)),
    )
    manifest.write(folder)
    return manifest


def rewrite_shard(
    folder: Path, name: str, change: Callable[[pa.Table], pa.Table], users_per_row_group: int = 4
) -> None:
    """Change the content of a shard and make the manifest agree with the new file, as if it had been written so."""
    table = change(pq.read_table(folder / name))
    pq.write_table(table, folder / name, row_group_size=users_per_row_group)
    reseal(folder, name)


def reseal(folder: Path, name: str) -> None:
    """Make the manifest agree with a file that a test has changed."""
    content = manifest_of(folder)
    for file in content["shards"] + content["files"]:
        if file["path"] != name:
            continue
        file |= _file(folder / name)
        if file in content["shards"]:
            try:
                file |= Shard.of(folder / name, **{key: file[key] for key in CONTENTS}).model_dump(mode="json")
            except pa.ArrowException:  # nothing of parquet is left: as if an earlier version had written it
                file |= {"footer_sha256": None, "row_group_crc32": None}
    write_manifest(folder, content)


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest as JSON, without its checksum."""
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    del content["checksum"]
    return content


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write a manifest that a test has changed, with its checksum."""
    (folder / MANIFEST).write_text(json_document(json.dumps(content)))


def _table(users: Sequence[User], schema: pa.Schema) -> pa.Table:
    def column(name: str) -> list[object]:
        if name == "user_id":
            return [user.user_id for user in users]
        side, attribute = name.split("_", 1)
        if side == "history":
            return [getattr(user, attribute) for user in users]
        return [[getattr(target, attribute) for target in user.targets] for user in users]

    return pa.table({name: column(name) for name in schema.names}, schema=schema)


def _counts(users: Sequence[User]) -> Counts:
    times = [when for user in users for when in user.timestamp] or [0]
    by_split = {
        name: [target.label for user in users for target in user.targets if target.split == split]
        for name, split in zip(SPLITS, Split, strict=True)
    }
    return Counts(
        events=sum(len(user.item) for user in users),
        users=len(users),
        users_left_out=0,
        behaviors=sum(len(user.item) for user in users),
        items=ITEMS,
        categories=CATEGORIES,
        items_with_changed_category=0,
        first_timestamp=min(times),
        last_timestamp=max(times),
        **{name: TargetCounts(targets=len(labels), positives=sum(labels)) for name, labels in by_split.items()},
    )


def _file(path: Path) -> dict[str, Any]:
    return {"path": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}

"""A data set of schema version 3 with a feature of every kind on every side, made from raw values.

Ids depend on a seed, raw values do not: two data sets of one log differ in their ids alone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.hashing import hash_values
from pipeline.ingest.shards import shard_encoding
from schemas.manifest import ROW_GROUP_INDEX, Chain, Counts, Day, File, Manifest, Shard, TargetCounts
from schemas.row_layout import RowLayout
from schemas.shards import (
    ITEM_FEATURES,
    ROW_GROUPS,
    SPLITS,
    FeatureRecord,
    RawType,
    Split,
    dictionary_schema,
    raw_type,
    shard_schema,
    value_type,
)

LABELS = ("click", "buy")
HASHED = 5
"""Buckets of ``brand``."""
EDGES = (2.5, 5.0, 7.5)
"""Of ``price``: quantiles 1 .. 4."""
MEAN, DEVIATION = 3.0, 2.0
"""Of all scaled numbers."""
KINDS: dict[str, tuple[str, str, str, str | None]] = {
    # name: (side, kind, encoding, type of raw values)
    "category": ("item", "id", "dictionary", "integer"),
    "brand": ("item", "id", "hash", "text"),
    "tags": ("item", "ids", "dictionary", "text"),
    "price": ("item", "number", "buckets", None),
    "mass": ("item", "number", "scale", None),
    "action": ("behavior", "id", "dictionary", "text"),
    "scene": ("behavior", "id", "dictionary", "text"),
    "topics": ("behavior", "ids", "dictionary", "integer"),
    "dwell": ("behavior", "number", "scale", None),
    "city": ("user", "id", "dictionary", "text"),
    "langs": ("user", "ids", "dictionary", "text"),
    "age": ("user", "number", "scale", None),
    "slot": ("impression", "id", "dictionary", "integer"),
    "bid": ("impression", "number", "scale", None),
}
WORDS = {
    "category": [10, 20, 30, 40],
    "brand": ["acme", "zoë", "1", "x" * 20, ""],
    "tags": ["red", "new", "big", "old"],
    "action": ["view", "cart", "buy"],
    "scene": ["feed", "ads"],
    "topics": [1, 2, 3, 50],
    "city": ["Rom", "Ürümqi", "Oslo"],
    "langs": ["de", "fi"],
    "slot": [1, 2],
}


def raw_value(rng: np.random.Generator, name: str) -> Any:
    """A raw value of a feature; None where it is missing."""
    if name not in WORDS:
        return None if rng.random() < 0.2 else float(rng.integers(0, 10))
    if KINDS[name][1] == "ids":
        return sorted(set(rng.choice(WORDS[name], rng.integers(0, 4)).tolist()))
    return None if rng.random() < 0.2 else rng.choice(np.array(WORDS[name], object))


def raw_values(rng: np.random.Generator, *sides: str) -> dict[str, Any]:
    """Of every feature of some sides; ``target`` are those that targets have beside their item's."""
    of_targets = ("slot", "bid", "scene")
    return {
        name: raw_value(rng, name)
        for name, (side, *_) in KINDS.items()
        if side in sides or ("target" in sides and name in of_targets)
    }


@dataclass
class Log:
    """Raw values of users, with their behaviours and targets, and of items."""

    users: list[dict[str, Any]]
    items: dict[Any, dict[str, Any]]
    rare: set[Any]
    """Items that have no row of their own."""

    @classmethod
    def random(cls, users: int, seed: int = 0, *, items: int = 30, text: bool = True) -> "Log":
        """Of so many users; every target of a user has a timestamp of its own."""
        rng = np.random.default_rng(seed)
        names = [f"item {number}" if text else number for number in range(items)]
        catalog = {name: raw_values(rng, "item") for name in names}
        rows = []
        for user in rng.permutation(10 * users)[:users].tolist():
            times = np.sort(rng.integers(0, 80, rng.integers(0, 30))) * 1000
            history = [
                {"item": names[rng.integers(0, items)], "timestamp": int(when), **raw_values(rng, "behavior")}
                for when in times
            ]
            shown = np.sort(rng.permutation(160)[: rng.integers(0, 8)]) * 500
            targets = [
                {
                    "item": names[rng.integers(0, items)],
                    "timestamp": int(when),
                    "label": int(rng.integers(0, 2)),
                    "label_buy": int(rng.integers(-1, 2)),
                    "weight": float(rng.integers(0, 4)) / 2,
                    "split": int(rng.integers(0, 3)),
                    "history_end": int(np.searchsorted(times, when)),
                    "line": int(rng.integers(1, 1000)),
                    **raw_values(rng, "target"),
                }
                for when in shown
            ]
            name = f"user {user}" if text else user
            rows.append({"id": name, "history": history, "targets": targets, **raw_values(rng, "user")})
        return cls(rows, catalog, set(names[:: max(2, items // 4)]))


class Encoder:
    """Raw values to ids and back, as one data set has them.

    Args:
        log: raw values.
        seed: decides the ids.
        words: values of each feature that are known.
        former: the day before: its ids stay, and new items and values get the next ones.
    """

    def __init__(
        self, log: Log, seed: int, words: dict[str, list[Any]] = WORDS, former: "Encoder | None" = None
    ) -> None:
        rng = np.random.default_rng(seed)

        def shuffled(values: list[Any], first: int = 1) -> dict[Any, int]:
            ids = first + rng.permutation(len(values))
            return {value: int(id) for value, id in zip(values, ids, strict=True)}

        def grown(values: list[Any], known: dict[Any, int]) -> dict[Any, int]:
            return known | shuffled([value for value in values if value not in known], 1 + len(known))

        known = former.item if former else {}
        common = grown([name for name in log.items if name not in log.rare], known)
        self.rows = len(common)
        self.item = grown([name for name in log.items if name in log.rare], common)
        self.ids = {
            name: grown(words[name], former.ids[name] if former else {})
            for name in WORDS
            if KINDS[name][2] == "dictionary"
        }
        self.row: dict[Any, int] | None = None
        """Rows of items, where they have places of their own; 0: none."""
        self.row_day: dict[Any, int] = {}
        self.largest_row = 0
        self.bags: dict[str, list[list[int]]] = {}
        for name, (_, kind, _, _) in KINDS.items():
            if kind == "ids":
                sets = {tuple(sorted(self.ids[name][value] for value in row[name])) for row in _rows(log, name)}
                self.bags[name] = [[], *map(list, sorted(sets - {()}))]

    def with_rows(self, row: dict[Any, int], row_day: dict[Any, int], largest: int) -> "Encoder":
        """Give items rows, as a day of a chain does; those that are not named have none."""
        self.row = {name: row.get(name, 0) for name in self.item}
        self.row_day = {name: row_day.get(name, 0) for name in self.item}
        self.largest_row = largest
        return self

    def place(self, item: Any) -> int:
        """Where an item lies in the table; 0: nowhere."""
        if self.row is None:
            return self.item[item] if self.item[item] <= self.rows else 0
        return int(RowLayout.of(self.largest_row).place(np.array([self.row[item]]))[0])

    def id(self, name: str, value: Any) -> int | float:
        """What a data set holds of a raw value."""
        _, kind, encoding, _ = KINDS[name]
        if kind == "ids":
            return self.bags[name].index(sorted(self.ids[name][each] for each in value))
        if encoding == "scale":
            return 0.0 if value is None else float(np.float32((value - MEAN) / DEVIATION))
        if value is None:
            return 0
        if encoding == "buckets":
            return 1 + int(np.searchsorted(EDGES, value, side="right"))
        if encoding == "hash":
            return 1 + int(hash_values(pa.array([value]))[0].as_py() % HASHED)
        return self.ids[name][value]

    def record(self, name: str) -> FeatureRecord:
        """What the manifest says of a feature."""
        side, kind, encoding, type = KINDS[name]
        rows = {"dictionary": len(self.ids.get(name, ())), "hash": HASHED, "buckets": len(EDGES) + 1, "scale": 0}
        scaled = {"mean": MEAN, "deviation": DEVIATION, "scale": "standard"} if encoding == "scale" else {}
        return FeatureRecord(
            name=name,
            of=side,  # type: ignore[arg-type]
            kind=kind,  # type: ignore[arg-type]
            encoding=encoding,  # type: ignore[arg-type]
            type=type,  # type: ignore[arg-type]
            rows=rows[encoding],
            bags=len(self.bags[name]) - 1 if kind == "ids" else None,
            target=side == "impression" or name == "scene",
            edges=EDGES if encoding == "buckets" else None,
            **scaled,  # type: ignore[arg-type]
        )


def _rows(log: Log, name: str) -> list[dict[str, Any]]:
    """Whatever has a value of a feature."""
    side = KINDS[name][0]
    if side == "item":
        return list(log.items.values())
    if side == "user":
        return log.users
    places = ("history",) * (side == "behavior") + ("targets",) * (side == "impression" or name == "scene")
    return [row for user in log.users for place in places for row in user[place]]


def write_featured(
    folder: Path,
    log: Log,
    seed: int = 0,
    *,
    users_per_row_group: int = 4,
    row_groups_per_shard: int = 3,
    labels: tuple[str, str] = LABELS,
    encoder: Encoder | None = None,
    days: tuple[Day, ...] = (),
) -> Manifest:
    """Write a log as a data set whose ids are decided by ``seed``, its two labels by the names that are given.

    Where ``encoder`` has given items rows, it is a day of a chain; ``days`` are those before it.
    """
    folder.mkdir(parents=True)
    encoder = encoder or Encoder(log, seed)
    placed = encoder.row is not None
    records = tuple(encoder.record(name) for name in KINDS)
    user_type: RawType = "text" if isinstance(log.users[0]["id"], str) else "integer"
    item_type: RawType = "text" if isinstance(next(iter(log.items)), str) else "integer"
    schema = shard_schema(records, user_type=user_type, labels=labels, weighted=True, line=True)

    def cell(row: dict[str, Any], name: str) -> Any:
        if name == "item":
            return encoder.item[row["item"]]
        return encoder.id(name, row[name]) if name in KINDS else row[name]

    def value(user: dict[str, Any], column: str) -> Any:
        side, name = column.split("_", 1)
        name = "label_buy" if name == f"label_{labels[1]}" else name
        if side == "user":
            return cell(user, name)
        return [cell(row, name) for row in user["history" if side == "history" else "targets"]]

    shards, index = [], []
    groups = [log.users[first : first + users_per_row_group] for first in range(0, len(log.users), users_per_row_group)]
    for number, first in enumerate(range(0, len(groups), row_groups_per_shard)):
        path, held = folder / f"shard-{number:05}.parquet", groups[first : first + row_groups_per_shard]
        with pq.ParquetWriter(path, schema, **shard_encoding(schema)) as writer:
            for row_group, users in enumerate(held):
                columns = {name: [value(user, name) for user in users] for name in schema.names}
                writer.write_table(pa.table(columns, schema=schema))
                splits = [target["split"] for user in users for target in user["targets"]]
                behaviors = sum(len(user["history"]) for user in users)
                index.append([number, row_group, len(users), behaviors, *(splits.count(split) for split in Split)])
        of_shard = [row for row in index if row[0] == number]
        shards.append(
            Shard.of(
                path,
                users=sum(row[2] for row in of_shard),
                behaviors=sum(row[3] for row in of_shard),
                row_groups=len(held),
            )
        )
    index_table = pa.table([list(column) for column in zip(*index, strict=True)], schema=ROW_GROUPS)
    pq.write_table(index_table, folder / ROW_GROUP_INDEX)

    items = dictionary_schema(text=item_type == "text", of_days=placed)
    raw = sorted(encoder.item)
    columns_of_items: list[list[Any]] = [raw, [encoder.item[name] for name in raw], [1] * len(raw)]
    if encoder.row is not None:
        columns_of_items += [[0] * len(raw), *([of[name] for name in raw] for of in (encoder.row, encoder.row_day))]
    pq.write_table(pa.table(columns_of_items, schema=items), folder / "items.parquet")
    by_id = {id: name for name, id in encoder.item.items()}
    of_items = [record for record in records if record.of == "item"]
    columns = {
        record.name: pa.array(
            [0, *(encoder.id(record.name, log.items[by_id[id]][record.name]) for id in range(1, len(by_id) + 1))],
            value_type(record),
        )
        for record in of_items
    }
    if placed:
        columns["item"] = pa.array([0, *(encoder.place(by_id[id]) for id in range(1, len(by_id) + 1))], pa.int32())
    _write_arrow(folder / ITEM_FEATURES, pa.table(columns))
    names = [ROW_GROUP_INDEX, "items.parquet", ITEM_FEATURES]
    for record in records:
        if record.dictionary is not None:
            ids, text = encoder.ids[record.name], record.type == "text"
            raw = sorted(ids)
            table = pa.table(
                [pa.array(raw, raw_type("text" if text else "integer")), [ids[each] for each in raw], [1] * len(raw)],
                schema=dictionary_schema(text=text),
            )
            pq.write_table(table, folder / record.dictionary)
            names.append(record.dictionary)
        if record.bag_file is not None:
            bags = pa.array(encoder.bags[record.name], pa.list_(pa.int32()))
            _write_arrow(folder / record.bag_file, pa.table({"ids": bags}))
            names.append(record.bag_file)
    targets = [(target["split"], target["label"]) for user in log.users for target in user["targets"]]
    manifest = Manifest(
        schema_version=4 if placed else 3,
        seed=seed,
        counts=Counts(
            events=sum(row[3] for row in index),
            users=len(log.users),
            users_left_out=0,
            behaviors=sum(row[3] for row in index),
            items=len(encoder.item),
            categories=len(WORDS["category"]),
            items_with_changed_category=0,
            first_timestamp=0,
            last_timestamp=0,
            **{
                name: TargetCounts(
                    targets=sum(of == split for of, _ in targets),
                    positives=sum(of == split and label > 0 for of, label in targets),
                )
                for name, split in zip(SPLITS, Split, strict=True)
            },
        ),
        features=records,
        labels=labels,
        weighted=True,
        user_type=user_type,
        item_type=item_type,
        item_rows=RowLayout.of(encoder.largest_row).places - 1 if placed else encoder.rows,
        placed_items=placed,
        chain=Chain(days=days, first_timestamp=0, last_timestamp=0, rows=encoder.largest_row, layers=())
        if placed
        else None,
        settings={},
        sources=(),
        impression_files=("impressions.csv",),
        shards=tuple(shards),
        files=tuple(File.of(folder / name) for name in names),
    )
    manifest.write(folder)
    return manifest


def _write_arrow(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)

"""Raw logs with features of every kind, as files for ``dare prepare`` and in the words of requests."""

import math
import random
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.serve.encoding import RequestEncoder
from pipeline.serve.vocabulary import Vocabulary
from pipeline.stream.data_set import DataSet
from schemas.prepare import PrepareSettings
from schemas.served import ServedData, ServedStream
from schemas.stream import StreamSettings

Row = dict[str, Any]
WORDS = ["", "a", "b", "a b", "é\x1f", "\x1e0", "b a b"]
UUIDS = {name: uuid.uuid5(uuid.NAMESPACE_URL, name) for name in "ijkl"}
NUMBERS = {"i": 7, "j": 70, "k": 700, "l": 2**40}

FEATURES: list[dict[str, Any]] = [
    {"name": "tags", "of": "item", "kind": "ids", "column": "tags", "min_count": 3},
    {"name": "tags_hashed", "of": "item", "kind": "ids", "column": "tags", "hash_buckets": 2},
    {"name": "price", "of": "item", "kind": "number", "column": "price", "buckets": 3},
    {"name": "mass", "of": "item", "kind": "number", "column": "price", "scale": "standard"},
    {"name": "brand", "of": "item", "column": "brand", "file": "items.parquet"},
    {"name": "kind", "of": "behavior", "column": "kind", "min_count": 2},
    {"name": "dwell", "of": "behavior", "kind": "number", "column": "price", "scale": "log"},
    {"name": "words", "of": "behavior", "kind": "ids", "column": "query", "separator": " "},
    {"name": "numbers", "of": "behavior", "kind": "ids", "column": "numbers", "type": "integer", "min_count": 2},
    {"name": "place", "of": "behavior", "column": "place", "impression_column": "where"},
    {"name": "hour", "of": "behavior", "time": "hour"},
    {"name": "age", "of": "user", "column": "age"},
    {"name": "hobbies", "of": "user", "kind": "ids", "column": "tags"},
    {"name": "income", "of": "user", "kind": "number", "column": "income", "file": "users.csv", "scale": "standard"},
    {"name": "query", "of": "impression", "kind": "ids", "column": "query", "separator": " "},
    {"name": "slot", "of": "impression", "column": "slot", "type": "integer", "hash_buckets": 3},
    {"name": "bid", "of": "impression", "kind": "number", "column": "price", "buckets": 4},
    {"name": "weekday", "of": "impression", "time": "weekday"},
]


def random_lines(seed: int, count: int = 150) -> list[Row]:
    """Raw lines with few moments and items, so that many are equal."""
    draw = random.Random(seed)

    def some(values: Sequence[Any]) -> list[Any] | None:
        return None if draw.random() < 0.2 else draw.choices(values, k=draw.randint(0, 3))

    return [
        {
            "user": draw.choice(["u", "v", "w\n"]),
            "item": draw.choice(list(UUIDS)),
            "time": 1_500_000_000 + draw.randint(0, 12) * 40_000,
            "tags": some(["x", "y", "z", "\x1f"]),
            "numbers": some([-2, 0, 1, 3]),
            "price": draw.choice([None, 0.0, 0.5, 2.5, 1e9, math.nan]),
            "kind": draw.choice([None, "click", "click", "buy", "cart"]),
            "place": draw.choice([None, "home", "mail"]),
            "where": draw.choice([None, "home", "list"]),
            "age": draw.choice([None, "old", "young"]),
            "query": draw.choice(WORDS),
            "slot": draw.choice([None, 0, 1, 2, 3, 4]),
            "click": draw.random() < 0.5,
        }
        for _ in range(count)
    ]


LOG_TYPES = pa.schema(
    {
        **dict.fromkeys(("user", "kind", "place", "where", "age", "query"), pa.string()),
        "slot": pa.int64(),
        "price": pa.float64(),
        "click": pa.bool_(),
        "tags": pa.list_(pa.string()),
        "numbers": pa.list_(pa.int64()),
    }
)


class Logs:
    """Events and impressions of one data set, in files and as requests have them.

    Args:
        folder: of the files.
        lines: raw lines; every third is an impression, or none where ``shown`` is False.
        items: what raw ids of items are: ``text``, ``integer``, ``uuid``, ``hashed``.
        unit: of the times.
        shown: whether there are impressions.
    """

    def __init__(self, folder: Path, lines: list[Row], items: str, unit: str, *, shown: bool) -> None:
        self.folder, self.items, self.unit = folder, items, unit
        self.shown = lines[::3] if shown else None
        self.events = [row for number, row in enumerate(lines) if not shown or number % 3]
        for name, log in (("events", self.events), ("shown", self.shown)):
            if log is not None:
                self._write(folder / f"{name}.parquet", log)
        brands = {"i": "A", "j": "B", "k": "A"}
        ids = [self.item(name) for name in brands]
        stored = pa.array([each.bytes for each in ids], pa.binary(16)) if items == "uuid" else pa.array(ids)
        pq.write_table(pa.table({"item": stored, "brand": list(brands.values())}), folder / "items.parquet")
        (folder / "users.csv").write_text("user,income\nu,5\nv,7.5\nnobody,1e30\n")
        self.income = {"u": 5, "v": "7.5"}

    def item(self, name: str) -> Any:
        if self.items == "uuid":
            return UUIDS[name]
        return NUMBERS[name] if self.items in ("integer", "hashed") else name

    def time(self, seconds: int) -> Any:
        if self.unit == "datetime":
            return np.datetime_as_string(np.datetime64(seconds, "s"))
        return seconds * {"s": 1, "ms": 1000}[self.unit]

    def _write(self, path: Path, log: list[Row]) -> None:
        table = pa.Table.from_pylist(log, LOG_TYPES)
        ids = [self.item(row["item"]) for row in log]
        stored = pa.array([each.bytes for each in ids], pa.binary(16)) if self.items == "uuid" else pa.array(ids)
        table = table.append_column("item", stored)
        pq.write_table(table.append_column("time", pa.array([self.time(row["time"]) for row in log])), path)

    def settings(self, **more: Any) -> PrepareSettings:
        kind = "integer" if self.items in ("integer", "hashed") else "text"
        names = {"user_id": "user", "item_id": "item", "timestamp": "time", "category_id": None}
        log = names | {"user_type": "text", "item_type": kind, "timestamp_unit": self.unit}
        if self.unit == "datetime":
            log["timestamp_zone"] = "Asia/Kathmandu"
        features = [
            each | ({"file": str(self.folder / each["file"])} if "file" in each else {})
            for each in FEATURES
            if self.shown is not None or each["of"] != "impression"
        ]
        if self.shown is None:
            features = [
                each | {"impression_column": "place"} if "impression_column" in each else each for each in features
            ]
            impressions: Row | None = None
            split: Row = {"kind": "paper", "min_behaviors": 2, "negatives": 0, "train_stride": 1}
        else:
            impressions = {"files": [str(self.folder / "shown.parquet")], "label": "click"} | log
            split = {"kind": "impressions", "min_history": 0}
        items: Row = {"hash_buckets": 3} if self.items == "hashed" else {"min_count": 2}
        return PrepareSettings.model_validate(
            {
                "events": {"files": [str(self.folder / "events.parquet")]} | log | more,
                "impressions": impressions,
                "split": split,
                "features": features,
                "items": items,
            }
        )

    def history(self, user: str, order: random.Random) -> dict[str, Any]:
        """A user's history in the words of the log, in any order."""
        lines = [row for row in self.events if row["user"] == user]
        order.shuffle(lines)
        names = ["tags", "price", "kind", "place", "query", "numbers", "age"]
        columns: dict[str, Any] = {name: [row[name] for row in lines] for name in names}
        columns["item"] = [self.word(row["item"]) for row in lines]
        columns["time"] = [self.time(row["time"]) for row in lines]
        # As users' features are in the log, too, and its impressions may have said the last value.
        both = lines if self.shown is None else [*lines, *(row for row in self.shown if row["user"] == user)]
        columns["age"] = last([(row["time"], row["age"]) for row in both])
        sets = [(row["time"], tuple(sorted(set(row["tags"] or ())))) for row in both]
        columns["tags"] = [row["tags"] for row in lines]
        columns["user.hobbies"] = list(last([(time, each or None) for time, each in sets]) or [])
        columns["income"] = self.income.get(user)
        return columns

    def candidate(self, row: Row, item: Any) -> Row:
        names = ["where", "query", "slot", "price"] if self.shown is not None else ["place"]
        return {"item": item, "time": self.time(row["time"])} | {name: row[name] for name in names}

    def word(self, name: str) -> Any:
        item = self.item(name)
        return str(item) if isinstance(item, uuid.UUID) and name == "i" else item


def last(values: list[tuple[int, Any]]) -> Any:
    """The last of the values that are there; of equal times the largest."""
    there = [each for each in values if each[1] is not None]
    return max(there)[1] if there else None


class ByValue:
    """Ids of a dictionary of a data set, found in a dict."""

    def __init__(self, names: pa.Array) -> None:
        self._ids = {raw: id for id, raw in enumerate(names.to_pylist()) if raw is not None}
        self._type = names.type

    def ids(self, values: pa.Array) -> Any:
        assert values.type == self._type or not values.is_valid().to_numpy(zero_copy_only=False).any()
        return np.array([self._ids.get(raw, 0) for raw in values.to_pylist()], np.int32)


def encoder_of(folder: Path, stream: StreamSettings, read: Sequence[str] | None = None) -> RequestEncoder:
    """What encodes requests as a data set says; ``read``: features that a model reads, None: all."""
    data_set = DataSet.open(folder)
    manifest = data_set.manifest
    declared = [each.name for each in manifest.declared]
    data = ServedData(
        fingerprint=data_set.fingerprint,
        schema_version=manifest.schema_version,
        features=manifest.declared,
        read=tuple(declared if read is None else read),
        labels=manifest.labels,
        user_type=manifest.user_type,
        item_type=manifest.item_type,
        items=manifest.counts.items,
        item_rows=manifest.largest_item,
        items_hashed=manifest.settings["items"]["hash_buckets"] is not None,
        placed_items=manifest.placed_items,
        settings=manifest.settings,
    )
    coded = [each.name for each in manifest.declared if each.encoding == "dictionary"]
    if not data.items_hashed:
        coded.append("item")
    words = {name: ByValue(data_set.names(name)) for name in coded}
    bags = data_set.bags()
    of_items = {name: (each.offset_B1.numpy(), each.id_E.numpy()) for name, each in bags.items()}
    vocabulary = Vocabulary(data, words, data_set.item_features().columns_I, data_set.item_places(), of_items)
    return RequestEncoder(vocabulary, ServedStream(history_length=stream.history_length, sequences=stream.sequences))

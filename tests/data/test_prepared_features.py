"""`dare prepare`, then the stream: batches have the raw values of logs with features of every kind."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.hashing import hash_values
from pipeline.ingest.prepare import prepare
from pipeline.stream.data_set import DataSet
from pipeline.stream.history_stream import HistoryStream
from pipeline.stream.translation import Translation
from schemas.errors import UserError
from schemas.prepare import PrepareSettings
from schemas.shards import SPLITS
from schemas.stream import StreamSettings
from tests.featured import KINDS, Log

LOG = Log.random(40, seed=8)
HASHED, QUANTILES = 50, 4


def declared(folder: Path) -> list[dict[str, Any]]:
    """Every feature of `KINDS` but the category, which has a short form."""
    features = []
    for name, (side, kind, encoding, type) in KINDS.items():
        if name == "category":
            continue
        each: dict[str, Any] = {"name": name, "of": side, "kind": kind, "column": name}
        if kind == "number":
            each |= {"buckets": QUANTILES} if encoding == "buckets" else {"scale": "standard"}
        else:
            each["type"] = type
        if encoding == "hash":
            each["hash_buckets"] = HASHED
        if side in ("item", "user"):
            each |= {"file": str(folder / f"{side}s.parquet"), "key": "id"}
        if name == "scene":
            each["impression_column"] = "scene"
        features.append(each)
    return features


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    events = [{"user_id": user["id"], **row} for user in LOG.users for row in user["history"]]
    shown = [
        {"user_id": user["id"], **row, "split": SPLITS[row["split"]]}
        for user in LOG.users
        for row in user["targets"]
        if row["label_buy"] >= 0
    ]
    for row in (*events, *shown):
        row["item_id"] = row.pop("item")
        row["category_id"] = LOG.items[row["item_id"]]["category"]
    pq.write_table(table(events), folder / "events.parquet")
    pq.write_table(table(shown), folder / "shown.parquet")
    items = [{"id": name, **row} for name, row in LOG.items.items()]
    users = [{"id": user["id"], **{name: user[name] for name in ("city", "langs", "age")}} for user in LOG.users]
    pq.write_table(table(items), folder / "items.parquet")
    pq.write_table(table(users), folder / "users.parquet")
    kinds = {"user_type": "text", "item_type": "text"}
    labels = {"labels": {"click": "label", "buy": "label_buy"}, "weight": "weight", "split": "split"}
    content = {
        "events": {"files": [str(folder / "events.parquet")], **kinds},
        "impressions": {"files": [str(folder / "shown.parquet")], **kinds, **labels},
        "items": {"min_count": 12},
        "features": declared(folder),
        "split": {"kind": "impressions", "min_history": 1},
        "shards": {"behaviors_per_shard": 120, "users_per_row_group": 5},
    }
    prepare(PrepareSettings.model_validate(content), folder / "data")
    return folder / "data"


class Decoder:
    """Values of batches as raw ones, or as what must be equal for equal raw values."""

    def __init__(self, data_set: DataSet) -> None:
        self._data_set = data_set
        self._names = {
            each.name: data_set.names(each.name).to_pylist()
            for each in data_set.manifest.declared
            if each.encoding == "dictionary"
        }
        self._bags = data_set.bags()

    def found(self, name: str, value: Any) -> Any:
        record = self._data_set.feature(name)
        if record.bags is not None:
            offset, ids = self._bags[name].offset_B1, self._bags[name].id_E
            return sorted(self._names[name][id] for id in ids[offset[value] : offset[value + 1]].tolist())
        return self._names[name][value] if record.encoding == "dictionary" else value

    def expected(self, name: str, raw: Any) -> Any:
        record = self._data_set.feature(name)
        if record.bags is not None:
            return sorted(raw)
        if record.encoding == "dictionary":
            return raw
        if record.encoding == "scale":
            assert record.mean is not None
            return 0.0 if raw is None else pytest.approx((raw - record.mean) / record.deviation, abs=1e-6)
        if raw is None or raw == "":
            return 0
        if record.encoding == "hash":
            return 1 + hash_values(pa.array([raw]))[0].as_py() % HASHED
        return 1 + int(np.searchsorted(record.edges or (), raw, side="right"))


@pytest.mark.parametrize("split", range(3))
def test_batches_have_the_raw_values_of_the_logs(folder: Path, split: int) -> None:
    data_set = DataSet.open(folder)
    decoder, items = Decoder(data_set), data_set.names("item").to_pylist()
    users = {user["id"]: user for user in LOG.users}
    frequency: dict[Any, int] = {}
    for user in LOG.users:
        for row in user["history"]:
            frequency[row["item"]] = frequency.get(row["item"], 0) + 1
    expected = {
        (user["id"], target["timestamp"])
        for user in LOG.users
        for target in user["targets"]
        if target["split"] == split and target["label_buy"] >= 0 and target["history_end"] >= 1
    }
    settings, seen = StreamSettings(batch_size=16, history_length=7), set()
    with HistoryStream(folder, SPLITS[split], settings, seed=0, shuffle=True, lines=True) as stream:
        batches = list(stream)
    for batch in batches:
        history = batch.histories["history"]
        assert batch.user_text_U is not None

        def check(columns: Any, place: int, row: dict[str, Any]) -> None:
            raw = row | LOG.items[row["item"]] if "item" in row else row
            for name, column in columns.items():
                assert decoder.found(name, column[place].item()) == decoder.expected(name, raw[name]), name

        for t in range(len(batch)):
            user = users[batch.user_text_U[int(batch.user_T[t])].as_py()]
            (target,) = (row for row in user["targets"] if row["timestamp"] == batch.timestamp_T[t])
            seen.add((user["id"], target["timestamp"]))
            assert batch.own_item_T is not None
            assert items[int(batch.own_item_T[t])] == target["item"]
            rare = frequency.get(target["item"], 0) < 12
            assert bool(batch.item_T[t] == 0) == rare
            check(batch.features_T, t, target)
            check(batch.features_U, int(batch.user_T[t]), user)
            assert [values[t] for values in batch.labels_T.values()] == [target["label"], target["label_buy"]]
            assert batch.weight_T is not None
            assert batch.weight_T[t] == target["weight"]
            window = range(int(history.start_T[t]), int(history.end_T[t]))
            earlier = user["history"][: target["history_end"]][-7:]
            when = [row["timestamp"] for row in earlier]
            assert [int(history.timestamp_M[place]) for place in window] == when
            # Behaviours of one moment are in the order of their items' ids.
            for moment in {*when}:
                places = [place for place in window if history.timestamp_M[place] == moment]
                rows = [row for row in user["history"] if row["timestamp"] == moment]
                if len(rows) == len(places) == 1:
                    check(history.features_M, places[0], rows[0])
    assert seen == expected
    assert len({*frequency.values()}) > 1
    assert 0 < data_set.manifest.largest_item < data_set.manifest.counts.items


def test_hashed_items_have_the_same_ids_everywhere(folder: Path, tmp_path: Path) -> None:
    def hashed(name: str, buckets: int, seed: int) -> DataSet:
        content = {
            "events": {"files": [str(folder.parent / "events.parquet")], "user_type": "text", "item_type": "text"},
            "items": {"hash_buckets": buckets},
            "split": {
                "kind": "by_timestamp",
                "min_history": 2,
                "test_groups": 1,
                "validation_groups": 1,
                "negatives": 0,
            },
            "seed": seed,
        }
        prepare(PrepareSettings.model_validate(content), tmp_path / name)
        return DataSet.open(tmp_path / name)

    one, other, fewer = hashed("one", 20, 1), hashed("other", 20, 2), hashed("fewer", 10, 1)
    assert one.names("item").null_count == 21
    assert Translation.between(one, other).ids["item"].tolist() == list(range(21))
    with pytest.raises(UserError, match=r"items\.hash_buckets is 20, and 10 in .*fewer; prepare both alike"):
        Translation.between(one, fewer)
    with HistoryStream(one.folder, "train", StreamSettings(batch_size=16), seed=0, shuffle=True) as stream:
        assert 0 < max(int(batch.item_T.max()) for batch in stream) <= 20

"""What `dare inspect` says of features, labels and weights, against a recount of the raw values."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.app import app
from pipeline.inspect.summary import summarize
from schemas.errors import UserError
from schemas.shards import SPLITS
from tests.data.test_stream_features import change_arrow, with_column
from tests.datasets import random_users, rewrite_shard, write_dataset
from tests.featured import EDGES, HASHED, KINDS, Encoder, Log, write_featured

LOG = Log.random(60)
PLACES = {
    "item": list(LOG.items.values()),
    "behavior": [row for user in LOG.users for row in user["history"]],
    "user": LOG.users,
    "impression": [row for user in LOG.users for row in user["targets"]],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspected") / "data"
    write_featured(folder, LOG, 1)
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_a_feature_equals_a_recount(folder: Path, name: str) -> None:
    said: dict[str, Any] = summarize(folder).to_json()["features"][name]
    side, kind, encoding, _ = KINDS[name]
    values = [row[name] for row in PLACES[side]]
    assert (said["of"], said["kind"], said["encoding"], said["places"]) == (side, kind, encoding, len(values))
    if encoding == "scale":
        raw = np.array([3.0 if value is None else value for value in values])  # what is missing is the mean
        assert (said["min"], said["max"]) == (raw.min(), raw.max())
        assert said["mean"] == pytest.approx(raw.mean(), rel=1e-5)
    else:
        missing = sum(value is None or value == [] for value in values)
        assert said["missing_share"] == round(missing / len(values), 6)
    for bin in said.get("histogram", []):
        low, high = (
            value if value is not None else sign * np.inf for value, sign in ((bin["from"], -1), (bin["to"], 1))
        )
        known = [3.0 if value is None else value for value in values if encoding == "scale" or value is not None]
        assert bin["count"] == sum(low <= value < high for value in known)
    if encoding == "buckets":
        assert len(said["histogram"]) == len(EDGES) + 1
    each = [value for place in values for value in (place if kind == "ids" else [place]) if value is not None]
    if encoding == "hash":
        encoder = Encoder(LOG, 1)
        each = [f"bucket {encoder.id(name, value)}" for value in each]
        assert said["rows"] == HASHED
    if encoding in ("dictionary", "hash"):
        counted = Counter(map(str, each))
        shares = {value: round(count / len(values), 6) for value, count in counted.items()}
        assert [one["share"] for one in said["most_frequent"]] == sorted(shares.values(), reverse=True)[:5]
        assert all(shares[one["value"]] == one["share"] for one in said["most_frequent"])


def test_labels_and_weights_equal_a_recount(folder: Path) -> None:
    said = summarize(folder).to_json()
    targets = PLACES["impression"]
    for label, column in (("click", "label"), ("buy", "label_buy")):
        for code, split in enumerate(SPLITS):
            known = [row[column] for row in targets if row["split"] == code and row[column] >= 0]
            share = round(sum(known) / len(known), 6)
            assert said["labels"][label][split] == {"known": len(known), "positive_share": share}
    weights = [row["weight"] for row in targets]
    assert said["weights"]["mean"] == pytest.approx(np.mean(weights), rel=1e-5)
    assert (said["weights"]["min"], said["weights"]["max"]) == (min(weights), max(weights))
    counted = {bin["from"]: bin["count"] for bin in said["weights"]["histogram"] if bin["count"]}
    expected = Counter({None: weights.count(0), 0.5: weights.count(0.5), 1.0: weights.count(1) + weights.count(1.5)})
    assert counted == expected


def test_all_of_it_is_shown(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["inspect", str(folder), "--json", "--figure", str(tmp_path / "all.png")], standalone_mode=False)
    printed = capsys.readouterr().out
    for text in ("buy rate", "quantiles from 2.5 to 7.5", "Ürümqi", "bucket ", "min 0, mean "):
        assert text in printed
    assert set(json.loads(printed.splitlines()[-1])["features"]) == set(KINDS)
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_earlier_versions_have_features_too(tmp_path: Path) -> None:
    users = random_users(40, behaviors=2, scenes=2)
    write_dataset(tmp_path / "data", users, behaviors=("click", "buy"), scenes=("home", "search"))
    said = summarize(tmp_path / "data").to_json()
    assert list(said["features"]) == ["category", "behavior", "scene"]
    kinds = [kind for user in users for kind in user.behavior]
    shares = {value["value"]: value["share"] for value in said["features"]["behavior"]["most_frequent"]}
    assert shares == {name: round(kinds.count(id) / len(kinds), 6) for name, id in (("click", 1), ("buy", 2))}
    assert said["features"]["behavior"]["missing_share"] == round(kinds.count(0) / len(kinds), 6)
    assert said["features"]["category"]["places"] == 50
    assert said["weights"] is None
    assert set(said["labels"]) == {"label"}


def test_wrong_values_are_told(tmp_path: Path) -> None:
    write_featured(tmp_path / "data", LOG, 1)

    def change(table: Any) -> Any:
        return with_column(table, "user_city", [9] * len(table))

    rewrite_shard(tmp_path / "data", "shard-00000.parquet", change)
    with pytest.raises(UserError, match=r"shard-00000.parquet: column user_city has ids from 9 to 9.*prepare the data"):
        summarize(tmp_path / "data")
    write_featured(tmp_path / "other", LOG, 1)
    change_arrow(tmp_path / "other", "item_features.arrow", lambda table: table.drop_columns(["tags"]))
    with pytest.raises(UserError, match=r"item_features\.arrow: column tags is missing"):
        summarize(tmp_path / "other")

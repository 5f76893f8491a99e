"""`dare inspect`: its numbers equal a slow recount, and what is wrong is told in one line."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.app import app
from jobs.cli import main
from pipeline.inspect.popularity import read_popularity
from pipeline.inspect.summary import Histogram, summarize
from pipeline.inspect.terminal import summary_lines
from pipeline.stream.history_stream import HistoryStream
from schemas.shards import SPLITS, Split
from schemas.stream import StreamSettings
from tests.datasets import User, manifest_of, random_users, reseal, write_dataset, write_manifest


@pytest.fixture
def users() -> list[User]:
    return random_users(60, seed=4, behaviors=2, scenes=2)


@pytest.fixture
def folder(tmp_path: Path, users: list[User]) -> Path:
    write_dataset(tmp_path / "data", users, behaviors=("click", "buy"), scenes=("home", "search"))
    return tmp_path / "data"


def inspected(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    app(["inspect", *arguments, "--json"], standalone_mode=False)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_numbers_equal_a_recount(folder, users, capsys):
    summary = inspected([str(folder), "--verify"], capsys)
    lengths = sorted(len(user.item) for user in users)
    assert summary["users"] == len(users)
    assert summary["behaviors"] == sum(lengths)
    assert summary["history_length"] == {
        "min": lengths[0],
        "p10": lengths[5],
        "p50": lengths[29],
        "mean": round(sum(lengths) / 60, 2),
        "p90": lengths[53],
        "p99": lengths[59],
        "max": lengths[-1],
    }
    for split in Split:
        targets = [[target for target in user.targets if target.split == split] for user in users]
        flat = [target for of_user in targets for target in of_user]
        of_split = summary["splits"][SPLITS[split]]
        assert of_split["targets"] == len(flat) > 0
        assert of_split["label_rate"] == round(sum(target.label for target in flat) / len(flat), 6)
        assert of_split["per_user"]["max"] == max(map(len, targets))
        assert of_split["per_user"]["mean"] == round(len(flat) / 60, 2)
        ends = sorted(target.history_end for target in flat)
        assert of_split["history_end"]["p50"] == ends[(len(ends) + 1) // 2 - 1]
        assert of_split["history_end"]["mean"] == round(sum(ends) / len(ends), 2)


def test_bytes_and_encodings_are_those_of_the_files(folder, users, capsys):
    summary = inspected([str(folder)], capsys)
    shards = sorted(folder.glob("shard-*.parquet"))
    assert summary["shards"] == len(shards) > 1
    assert summary["bytes"] == sum(path.stat().st_size for path in shards)
    assert summary["bytes_per_user"] == round(summary["bytes"] / 60, 2)
    assert summary["bytes_per_behavior"] == round(summary["bytes"] / summary["behaviors"], 3)
    assert set(summary["columns"]) == set(pq.read_schema(shards[0]).names)
    assert summary["columns"]["history_timestamp"]["encodings"] == ["DELTA_BINARY_PACKED"]
    assert summary["columns"]["history_item"]["encodings"] == ["PLAIN"]
    in_columns = sum(column["bytes"] for column in summary["columns"].values())
    assert 0 < in_columns < summary["bytes"]
    assert all(column["compressions"] == ["ZSTD"] for column in summary["columns"].values())


def test_tables_are_plain_where_nobody_looks(folder, capsys):
    app(["inspect", str(folder)], standalone_mode=False)
    printed = capsys.readouterr().out
    assert printed.isascii()
    for name in ("behaviours of a user", "test", "history_category", "left out", "changed category"):
        assert name in printed


def test_figure(folder, tmp_path, capsys):
    app(["inspect", str(folder), "--figure", str(tmp_path / "plots" / "data.png")], standalone_mode=False)
    assert (tmp_path / "plots" / "data.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"end its name in \.png"):
        app(["inspect", str(folder), "--figure", str(tmp_path / "data.svg")], standalone_mode=False)
    capsys.readouterr()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data\.png cannot be written"):
        app(["inspect", str(folder), "--figure", str(tmp_path / "file/data.png")], standalone_mode=False)
    assert capsys.readouterr().out == "", "refused before the report"


def test_data_set_without_targets(tmp_path, capsys):
    write_dataset(tmp_path / "data", random_users(3, most_targets=0))
    arguments = [str(tmp_path / "data"), "--figure", str(tmp_path / "data.png")]
    assert inspected(arguments, capsys)["splits"]["test"]["label_rate"] is None


def test_popularity_and_load(tmp_path):
    frequency = [50, 1, 1, 7, 1, 7, 0, 3, 2]
    pq.write_table(pa.table({"id": [3, 9, 1, 2, 4, 8, 5, 6, 7], "frequency": frequency}), tmp_path / "items.parquet")
    popularity = read_popularity(tmp_path / "items.parquet", 10, 5)
    assert popularity.frequency_F.tolist() == [50, 7, 3, 2, 1, 0]
    assert popularity.ids_F.tolist() == [1, 2, 1, 1, 3, 1]
    assert popularity.load_W.tolist() == [8, 51, 12, 1, 0], "rows 0-2, 3-5, 6-8, 9-10, none"
    assert popularity.imbalance == pytest.approx(51 * 5 / 72)
    with pytest.raises(ValueError, match="ids from 1 to 9, the manifest says 1 to 8"):
        read_popularity(tmp_path / "items.parquet", 8, 5)


def test_histogram_adds_up():
    histogram = Histogram()
    assert histogram.quantiles([0, 0.5, 1]) == [0, 0, 0]
    values = np.random.default_rng(0).integers(0, 300, 1000)
    for part in np.split(np.sort(values), [0, 10, 500]):
        histogram.add(part)
    histogram.add(np.array([2]))
    values = np.sort(np.append(values, 2))
    assert (histogram.seen, histogram.sum) == (1001, values.sum())
    assert histogram.quantiles([0, 0.5, 0.9, 1]) == [values[0], values[500], values[900], values[-1]]


def damage(path: Path) -> None:
    """Change bytes in the middle of a file, not its size."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[4:middle] = bytes(middle - 4)
    path.write_bytes(content)


def test_damage_is_told(folder):
    damage(folder / "shard-00001.parquet")
    with pytest.raises(ValueError, match=r"shard-00001.parquet.* cannot be read \(.*prepare the data set again"):
        summarize(folder)
    with pytest.raises(ValueError, match=r"shard-00001.parquet .*checksum"):
        summarize(folder, verify=True)


def test_manifest_that_does_not_match_is_told(folder, users):
    content = manifest_of(folder)
    content["counts"]["behaviors"] += 1
    write_manifest(folder, content)
    with pytest.raises(ValueError, match=r"the shards hold [0-9]+ behaviours, the manifest says"):
        summarize(folder)


def test_missing_column_is_told(folder):
    name = "shard-00000.parquet"
    pq.write_table(pq.read_table(folder / name).drop_columns(["target_label"]), folder / name)
    reseal(folder, name)
    with pytest.raises(ValueError, match=r"shard-00000.parquet: column target_label is missing"):
        summarize(folder)


def test_not_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dare", "inspect", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^dare: .*: no manifest.json: not a data set, .*$"):
        main()


def test_a_data_set_of_schema_version_1_is_read(tmp_path: Path) -> None:
    users = random_users(9)
    manifest = write_dataset(tmp_path, users)
    manifest.model_copy(update={"schema_version": 1}).write(tmp_path)
    with HistoryStream(tmp_path, "train", StreamSettings(batch_size=7), seed=1, shuffle=True) as stream:
        seen = sum(len(batch) for batch in stream)
    assert seen == sum(target.split == Split.TRAIN for user in users for target in user.targets)
    lines = "\n".join(summary_lines(tmp_path, summarize(tmp_path), 200))
    assert re.search(rf"^events +{sum(len(user.item) for user in users):,} ", lines, re.MULTILINE)

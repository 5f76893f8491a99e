"""Bad input of `dare prepare --extend`: one clear line, nothing half-written, the day before as it was; odd input."""

import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from schemas.manifest import MANIFEST, Manifest
from schemas.shards import ITEM_FEATURES
from schemas.storage import sha256
from tests.data.conftest import Dare
from tests.datasets import manifest_of, write_manifest
from tests.runs import run_dare, start_dare

DAY = 86_400
SPLIT = ["split.kind=paper", "split.min_behaviors=1", "split.negatives=1", "split.train_targets=2"]
SETTINGS = [*SPLIT, "history.keep=50"]
Line = tuple[object, int, int, int]


def write(path: Path, lines: Iterable[Line]) -> Path:
    text = "".join(f"{user},{item},{category},{time}\n" for user, item, category, time in lines)
    path.write_text(f"user_id,item_id,category_id,timestamp\n{text}")
    return path


def lines_of(day: int, users: Iterable[int] = (1, 2, 3), items: int = 8) -> list[Line]:
    return [(user, (7 * user + 3 * k) % items, k % 3, day * DAY + 100 * k + user) for user in users for k in range(6)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the first day of a chain, ``d0``, its log, and that of the next day."""
    from pipeline.ingest.prepare import prepare
    from schemas.prepare import PrepareSettings
    from schemas.settings import load_settings

    folder = tmp_path_factory.mktemp("chain")
    write(folder / "e0.csv", lines_of(0))
    write(folder / "e1.csv", lines_of(1, (2, 3, 4), 11))
    files = {"events": {"files": [str(folder / "e0.csv")]}}
    prepare(load_settings(PrepareSettings, [], SETTINGS, files), folder / "d0")
    return folder


@pytest.fixture
def chain(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "chain")
    return tmp_path / "chain"


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def refuse(dare: Dare, chain: Path, *arguments: object, log: str = "e1.csv", out: Path | None = None) -> str:
    """Adding a day must fail and change nothing; returns the message."""
    before = content(chain)
    out = chain / "d1" if out is None else out
    code, message = dare("prepare", "--extend", chain / "d0", "--events", chain / log, "--out", out, *arguments)
    assert code == 1
    assert content(chain) == before, "nothing half-written, and the day before as it was"
    return message


def test_a_day_must_be_later_than_the_last(chain: Path, dare: Dare) -> None:
    late = write(chain / "late.csv", [*lines_of(1), (1, 1, 1, 502)])
    message = refuse(dare, chain, log="late.csv")
    assert "last event or impression is of 1970-01-01 00:08:23 UTC (503)" in message
    assert "the day's first of 1970-01-01 00:08:22 UTC (502)" in message
    assert "events.since=504" in message
    code, _ = dare("prepare", "--extend", chain / "d0", "--events", late, "--out", chain / "d1", "events.since=504")
    assert code == 0
    assert Manifest.read(chain / "d1").counts.events_left_out == {"outside_time": 1}


def test_impressions_alone(chain: Path, dare: Dare) -> None:
    """They are scored on a day before: there must be one, earlier than they are, and what is meant must be clear."""
    for name, moment in (("late", DAY), ("early", 502)):
        (chain / f"{name}.csv").write_text(f"user_id,item_id,category_id,timestamp\n1,2,0,{moment}\n")
    before = content(chain)
    for arguments, expected in (
        (["--extend", chain / "d0"], "name the day's --events, or --impressions to score them alone"),
        (
            ["--extend", chain / "d0", "--events", chain / "e1.csv", "--impressions", chain / "late.csv"],
            "its targets are events, so a day has no impressions",
        ),
        (["--extend", chain / "d0", "--impressions", chain / "early.csv"], "leave them out with impressions.since=504"),
        (
            ["--extend", chain / "d0", "--impressions", chain / "late.csv", "impressions.labels={a: a, b: item_id}"],
            "late.csv: no column a; give all labels, or none",
        ),
        (
            ["--dictionaries", chain / "d0", "--impressions", chain / "late.csv", "--events", "unchanged:"],
            "it has no histories to score with; name --events",
        ),
        (
            ["--impressions", chain / "late.csv", "--events", "unchanged:"],
            "unchanged: stands for the events of --extend alone",
        ),
    ):
        code, message = dare("prepare", *arguments, "--out", chain / "out")
        assert code == 1
        assert expected in message
        assert content(chain) == before


def test_the_same_day_twice(chain: Path, dare: Dare) -> None:
    shutil.copy(chain / "e0.csv", chain / "renamed.csv")
    assert "renamed.csv is in day 0 of the chain already" in refuse(dare, chain, log="renamed.csv")
    # A log of several days, cut by time.
    both = write(chain / "both.csv", [*lines_of(0), *lines_of(1)])
    first = ["prepare", "--events", both, "--out", chain / "c0", *SETTINGS, f"events.until={DAY}"]
    assert dare(*first)[0] == 0
    code, _ = dare("prepare", "--extend", chain / "c0", "--events", both, "--out", chain / "c1", f"events.since={DAY}")
    assert code == 0
    assert Manifest.read(chain / "c1").counts.events == len(lines_of(1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("items.min_count=2", "items.min_count is 1 there and 2 here"),
        ("split.negatives=3", "split.negatives is 1 there and 3 here"),
        ("history.keep=60", "history.keep is 50 there and 60 here"),
        ("seed=1", "seed is 0 there and 1 here"),
        ("events.behavior=kind", "events.behavior is null there and kind here"),
        ("features=[{name: age, of: user, column: age}]", "feature age is declared here and not there"),
    ],
)
def test_all_days_have_the_same_settings(chain: Path, dare: Dare, given: str, message: str) -> None:
    assert message in refuse(dare, chain, given)


def test_settings_that_are_given_again_or_are_of_a_day(chain: Path, dare: Dare) -> None:
    (chain / "again.yaml").write_text("split: {kind: paper, min_behaviors: 1, negatives: 1}\nhistory: {keep: 50}\n")
    code, _ = dare(
        *("prepare", "--extend", chain / "d0", "--events", chain / "e1.csv", "--out", chain / "d1"),
        *("--config", chain / "again.yaml", "items.evict.rows=5", "on_corrupt=skip", "memory_limit=2GiB", "threads=1"),
        f"events.until={2 * DAY}",
    )
    assert code == 0
    read = Manifest.read(chain / "d1").chain
    assert read is not None
    assert read.rows == 8
    assert read.rows_free == 3


def test_the_main_label_is_that_of_the_chain(chain: Path, dare: Dare) -> None:
    """Of several labels the first one is the main one, in whatever order manifests or later days write their names."""
    (chain / "other.yaml").write_text("impressions: {labels: {clicked: none, sold: one}}\n")
    write(chain / "e2.csv", lines_of(2))
    write(chain / "e3.csv", lines_of(3))
    again: dict[int, list[object]] = {
        2: ["impressions.labels={clicked: none, sold: one}"],
        3: ["--config", chain / "other.yaml"],
    }
    shown = chain / "shown.csv"
    labels = {"sold": "one", "clicked": "none"}
    for day in range(4):
        rows = [f"{user},{item},{day * DAY + 50 * item},1,0\n" for user in (1, 2, 3) for item in range(10)]
        shown.write_text("user_id,item_id,timestamp,one,none\n" + "".join(rows))
        settings = ["split.kind=impressions", "split.min_history=1", "history.keep=50", "events.category_id=null"]
        given = f"impressions.labels={{{', '.join(f'{name}: {column}' for name, column in labels.items())}}}"
        former = chain / f"c{day - 1}"
        begun = ("--extend", former, *again.get(day, [])) if day else (given, "impressions.category_id=null", *settings)
        log = ("--events", chain / f"e{day}.csv", "--impressions", shown)
        assert dare("prepare", *log, "--out", chain / f"c{day}", *begun)[0] == 0
        manifest = Manifest.read(chain / f"c{day}")
        assert manifest.labels == ("sold", "clicked")
        assert manifest.counts.train.positives == manifest.counts.train.targets > 0


def test_what_no_day_can_follow(chain: Path, dare: Dare, tmp_path: Path) -> None:
    code, _ = dare("prepare", "--events", chain / "e0.csv", "--out", chain / "single", *SPLIT)
    assert code == 0
    for name, change, message in (
        ("single", {}, "no day can follow it; begin a chain with `dare prepare history.keep=NUMBER`"),
        ("d0", {"schema_version": 3}, "schema version 3, which knows no days that follow each other"),
        ("d0", {"schema_version": 9}, "schema version 9"),
    ):
        folder = tmp_path / "odd"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(chain / name, folder)
        if change:
            write_manifest(folder, manifest_of(folder) | change)
        code, said = dare("prepare", "--extend", folder, "--events", chain / "e1.csv", "--out", chain / "d1")
        assert code == 1
        assert message in said
    assert not (chain / "d1").exists()
    assert "no manifest.json" in dare("prepare", "--extend", chain, "--events", "e", "--out", chain / "d1")[1]


@pytest.mark.parametrize("name", ["items.parquet", "feature-category.parquet", "item_values.parquet", MANIFEST])
def test_a_damaged_day_is_refused(chain: Path, dare: Dare, name: str) -> None:
    file = chain / "d0" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    # By name: the copy may share its bytes with others.
    file.unlink()
    file.write_bytes(data)
    assert name in refuse(dare, chain)


@pytest.mark.parametrize("name", ["gone.arrow", "../e0.csv"])
def test_layers_have_the_data_sets_own_files(chain: Path, dare: Dare, name: str) -> None:
    manifest = manifest_of(chain / "d0")
    manifest["chain"]["layers"][0]["files"] = [name]
    write_manifest(chain / "d0", manifest)
    assert f"chain.layers: '{name}' is none of its files" in refuse(dare, chain)


def test_folders_that_are_in_each_others_way(chain: Path, dare: Dare) -> None:
    (chain / "link").symlink_to("d0")
    for out in (chain / "d0", chain / "d0" / "d1", chain / "link" / "d1"):
        assert "which stays as it is; choose another folder" in refuse(dare, chain, "--overwrite", out=out)
    assert "give one" in refuse(dare, chain, "--dictionaries", chain / "d0")


def test_a_day_without_lines(chain: Path, dare: Dare) -> None:
    write(chain / "none.csv", [])
    assert "events: no lines in" in refuse(dare, chain, log="none.csv")


def test_a_day_of_new_users_and_out_of_order_lines(chain: Path, dare: Dare) -> None:
    new = [(user, item, item % 3, DAY + 50 - item) for user in (8, 9) for item in range(3)]
    write(chain / "new.csv", new)
    common = ("prepare", "--extend", chain / "d0", "--out")
    assert dare(*common, chain / "d1", "--events", chain / "new.csv")[0] == 0
    read = Manifest.read(chain / "d1")
    assert read.chain is not None
    assert (read.chain.new_users, read.counts.users, read.counts.behaviors) == (2, 2, 6)
    write(chain / "sorted.csv", sorted(new, key=lambda line: line[3]))
    assert dare(*common, chain / "e1", "--events", chain / "sorted.csv")[0] == 0
    ours, theirs = content(chain / "d1"), content(chain / "e1")
    assert {name for name in ours if ours[name] != theirs[name]} == {MANIFEST}, "the order of lines changes nothing"


def test_a_day_without_targets_is_one_that_others_follow(chain: Path, dare: Dare) -> None:
    write(chain / "one.csv", [(77, 1, 1, DAY)])
    code, _ = dare("prepare", "--extend", chain / "d0", "--events", chain / "one.csv", "--out", chain / "d1")
    assert code == 0
    read = Manifest.read(chain / "d1")
    assert (read.counts.train.targets, read.shards) == (0, ())
    assert dare("inspect", chain / "d1", "--verify")[0] == 0
    write(chain / "two.csv", [(77, 2, 2, 2 * DAY)])
    code, _ = dare("prepare", "--extend", chain / "d1", "--events", chain / "two.csv", "--out", chain / "d2")
    assert code == 0
    assert Manifest.read(chain / "d2").counts.behaviors == 2


def test_a_killed_day_leaves_the_one_before(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    write(chain / "large.csv", (line for k in range(400) for line in lines_of(1, range(k, k + 5), 2000)))
    before = content(chain)
    said = tmp_path_factory.mktemp("said")
    command = ["prepare", "--extend", chain / "d0", "--out", chain / "d1", "--events", chain / "large.csv"]
    for delay in (0.0, 0.2):
        process = start_dare(said, *command)
        while process.is_alive() and not (chain / ".d1.partial").exists():
            time.sleep(0.01)
        time.sleep(delay)
        assert process.is_alive(), "it was slow enough to be killed"
        process.kill()
        process.join()
        assert not (chain / "d1").exists()
    code, _, errors = run_dare(said, *command)
    assert code == 0, errors
    Manifest.read(chain / "d1").verify(chain / "d1")
    after = {name: sum for name, sum in content(chain).items() if not name.startswith("d1/")}
    assert after == before


def test_chains_of_hashed_items(chain: Path, dare: Dare) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    hashed = [*SETTINGS, "items.hash_buckets=4", "split.negatives=0"]
    assert dare("prepare", "--events", chain / "e0.csv", "--out", chain / "h0", *hashed)[0] == 0
    code, _ = dare("prepare", "--extend", chain / "h0", "--events", chain / "e1.csv", "--out", chain / "h1")
    assert code == 0
    both = write(chain / "both.csv", [*lines_of(0), *lines_of(1, (2, 3, 4), 11)])
    assert dare("prepare", "--events", both, "--out", chain / "all", *hashed)[0] == 0
    assert pq.read_table(chain / "h1" / "items.parquet").equals(pq.read_table(chain / "all" / "items.parquet"))
    read = Manifest.read(chain / "h1")
    assert read.chain is not None
    assert (read.chain.rows, read.placed_items, read.item_rows) == (None, False, 4)
    with pa.ipc.open_file(str(chain / "h1" / ITEM_FEATURES)) as file:
        assert file.read_all().column_names == ["category"]

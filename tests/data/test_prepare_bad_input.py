"""Bad input of `dare prepare`: one clear line, a non-zero exit, nothing lost or half-written; odd input that works."""

import gzip
import json
import os
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.manifest import Manifest
from tests.data.conftest import Dare
from tests.datasets import manifest_of, write_manifest
from tests.launcher import wait
from tests.runs import run_dare, start_dare

HEADER = "user_id,item_id,category_id,timestamp\n"
GOOD = HEADER + "".join(f"{user},{item},{item % 3},{item}\n" for user in (1, 2) for item in range(10 + user))
LENIENT = ["split.min_behaviors=1", "split.negatives=0"]


def refuse(dare: Dare, folder: Path, *arguments: object) -> str:
    """Prepare must fail and leave nothing behind; returns the message."""
    before = set(folder.iterdir())
    code, message = dare("prepare", "--out", folder / "out", *LENIENT, *arguments)
    assert code == 1
    assert set(folder.iterdir()) == before, "nothing half-written"
    return message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("columns.csv", GOOD + "1,2,3\n", "columns.csv, line 25: 3 columns, 4 are expected"),
        ("more.csv", GOOD + "1,2,3,4,5\n", "more.csv, line 25: 5 columns, 4 are expected"),
        ("text.csv", GOOD + "1,abc,3,4\n", "text.csv, line 25: column item_id: 'abc' is not an integer"),
        ("fraction.csv", GOOD + "1,2,3,4\n1,2,3,2024-05-01\n", "line 26: column timestamp: '2024-05-01' is not"),
        ("part.csv", GOOD + "1,1.5,3,4\n", "part.csv, line 25: column item_id: '1.5' is not an integer"),
        ("second.csv", GOOD + "1,2,3,1e-1\n", "second.csv, line 25: column timestamp: '1e-1' is not an integer"),
        ("ms.csv", GOOD + "1,2,3,1700000000000000\n", "set events.timestamp_unit=ms or us if they are not seconds"),
        ("before.csv", GOOD + "1,2,3,-5\n", "timestamps in {path} run from -5 to"),
        ("null.csv", GOOD + "1,,3,4\n", "1 of 24 lines in {path} have no item_id"),
        ("user.csv", GOOD + ",2,3,4\n,2,3,4\n", "2 of 25 lines in {path} have no user_id"),
        ("time.csv", GOOD + "1,2,3,\n", "1 of 24 lines in {path} have no timestamp"),
        ("negative.csv", GOOD + "1,-2,3,4\n", "1 of 24 lines in {path} have a negative item_id"),
        ("column.csv", GOOD.replace("item_id", "item"), "no column item_id; it has user_id, item, category_id"),
        ("empty.csv", "", "empty.csv is empty"),
        ("header.csv", HEADER, "no lines in {path}"),
        (
            "large.csv",
            GOOD + "1,99999999999999999999,3,4\n",
            "item_id: '99999999999999999999' does not fit",
        ),
        ("digits.csv", GOOD + f"1,{'9' * 5000},3,4\n", "digits.csv, line 25: column item_id: '99999"),
        ("mac.csv", GOOD.replace("\n", "\r"), "mac.csv, line 1: cannot be read (new-line"),
        ("binary.csv", b"\xff\xfe\x00\x01" * 50, "not a text file"),
        ("events.json", "{}", "unknown format"),
        ("fake.parquet", "PAR1 no parquet", "fake.parquet: not a readable Parquet file"),
    ],
)
def test_refused(dare: Dare, tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message.format(path=path) in refuse(dare, tmp_path, "--events", path)


def test_a_fraction_is_named_in_its_own_column(dare: Dare, tmp_path: Path) -> None:
    lines = ["user_id,item_id,category_id,timestamp,price", "1,2,3,4,1.5", "1,21,3,5,1.50", "1,1.5,3,6,9.9"]
    (tmp_path / "events.csv").write_text("\n".join(lines) + "\n")
    message = refuse(dare, tmp_path, "--events", tmp_path / "events.csv")
    assert "events.csv, line 4: column item_id: '1.5' is not an integer" in message


def test_columns_that_are_not_wanted_may_share_a_name_or_have_none(dare: Dare, tmp_path: Path) -> None:
    lines = ["user_id,item_id,category_id,timestamp,a,a,,", *(f"1,{item},3,{item},x,y,z," for item in range(5))]
    (tmp_path / "events.csv").write_text("\n".join(lines) + "\n")
    assert dare("prepare", "--out", tmp_path / "out", *LENIENT, "--events", tmp_path / "events.csv")[0] == 0


def test_an_ending_in_capitals_and_names_that_are_no_utf8(dare: Dare, tmp_path: Path) -> None:
    (tmp_path / "LOG.CSV.GZ").write_bytes(gzip.compress(GOOD.encode()))
    assert dare("prepare", "--out", tmp_path / "out", *LENIENT, "--events", tmp_path / "LOG.CSV.GZ")[0] == 0
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / os.fsdecode(b"\xff.csv")).write_text(GOOD)
    assert "the name is not UTF-8" in refuse(dare, tmp_path, "--events", tmp_path / "folder")
    assert "the name is not UTF-8" in refuse(dare, tmp_path, "--events", tmp_path / os.fsdecode(b"\xff.csv"))


def test_missing_file(dare: Dare, tmp_path: Path) -> None:
    assert "absent.csv: no such file" in refuse(dare, tmp_path, "--events", tmp_path / "absent.csv")


def test_nobody_has_a_target(dare: Dare, tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(GOOD)
    message = refuse(dare, tmp_path, "--events", tmp_path / "events.csv", "split.min_history=500")
    assert "none of 2 users (23 events) has a target" in message


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("split.negativs=1", "split.negativs: unknown key; allowed here: kind, min_behaviors"),
        ("sede=1", "sede: unknown key; allowed here: engine, events"),
        ("seed=-1", "seed: input should be greater than or equal to 0 (not -1)"),
        (f"seed={10**30}", f"(not {10**30})"),
        ("threads=1000", "threads: at most"),
        ("memory_limit=900TiB", "memory_limit: 900.0TiB is more than this machine has"),
        ("split.negatives=100000000", "split.negatives: input should be less than or equal to 10000"),
        ("split.train_targets=100000000", "split.train_targets: input should be less than or equal to 1000000"),
        ("shards.users_per_row_group=1e12", "shards.users_per_row_group: input should be less than"),
        ("split.kind=last", "expected tags: 'paper', 'by_timestamp', 'impressions'"),
        ("events.since=20171125", "events.since: seconds since 1970, or a date?"),
        ("events.since=true", "events: since: true and false are no value of this setting"),
        (f"events.until={10**20}", "events.until: input should be less than or equal to 253402387199"),
        ("split.negatives=x", "split.negatives: input should be a valid integer"),
        ("memory_limit=1MiB", "memory_limit: at least 1GiB is needed, written with its unit (not '1MiB')"),
        ("memory_limit=3XB", "memory_limit: not a number of bytes with or without a unit, such as 3GiB"),
        ("second.csv", "if it is a file: --events and --impressions take one each, so repeat the option"),
        ("seed", "an override is written key=value"),
        ("events.header=false", "file_columns must name the columns"),
    ],
)
def test_settings(dare: Dare, tmp_path: Path, argument: str, message: str) -> None:
    (tmp_path / "events.csv").write_text(GOOD)
    assert message in refuse(dare, tmp_path, "--events", tmp_path / "events.csv", argument)


def test_unknown_preset_and_settings_file(dare: Dare, tmp_path: Path) -> None:
    assert "known are completejourney, generic, movielens, taobao, tmall" in refuse(dare, tmp_path, "--preset", "taoba")
    assert "absent.yaml: no such settings file" in refuse(dare, tmp_path, "--config", tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    assert "settings cannot be read" in refuse(dare, tmp_path, "--config", tmp_path / "broken.yaml")


def test_large_ids_unsorted_lines_and_one_user_work(dare: Dare, tmp_path: Path) -> None:
    top = 2**63 - 1
    ids = [2**31, 2**40 + 1, top, 5, 6]
    lines = [f"{top},{item},{2**33},{time}\n" for time, item in enumerate(ids)]
    (tmp_path / "events.csv").write_text(HEADER + "".join(reversed(lines)))
    arguments = ["--events", tmp_path / "events.csv", "--json", "split.min_behaviors=1", "split.negatives=0"]
    code, output = dare("prepare", "--out", tmp_path / "out", *arguments)
    assert code == 0
    result = json.loads(output.splitlines()[-1])
    assert {name: result[name] for name in ("users", "items", "categories", "test")} == {
        "users": 1,
        "items": 5,
        "categories": 1,
        "test": 1,
    }
    assert {"train", "validation", "bytes", "seconds", "peak_mib"} <= result.keys()
    raw = dict(pq.read_table(tmp_path / "out" / "items.parquet").select(["id", "raw_id"]).to_pandas().values.tolist())
    row = pq.read_table(tmp_path / "out" / "shard-00000.parquet").to_pylist()[0]
    assert row["user_id"] == top
    assert [raw[item] for item in row["history_item"]] == ids


def test_one_user_cannot_have_negatives(dare: Dare, tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(HEADER + "7,1,1,1\n7,2,1,2\n")
    assert "user 7 touched every item" in refuse(
        dare, tmp_path, "--events", tmp_path / "events.csv", "split.negatives=1"
    )


def parquet_files(folder: Path) -> tuple[Path, Path]:
    """A good file, and one whose data pages are damaged but whose footer is not."""
    good, bad = folder / "good.parquet", folder / "bad.parquet"
    columns = {name: list(range(10_000)) for name in ("item_id", "category_id", "timestamp")}
    table = pa.table({"user_id": [n % 50 for n in range(10_000)], **columns})
    for path in (good, bad):
        pq.write_table(table, path, compression="zstd")
    content = bytearray(bad.read_bytes())
    content[5_000:20_000] = b"\x5a" * 15_000
    bad.write_bytes(content)
    return good, bad


def test_corrupt_parquet(dare: Dare, tmp_path: Path) -> None:
    good, bad = parquet_files(tmp_path)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(good.read_bytes()[:-1_000])
    assert "cut.parquet: not a readable Parquet file" in refuse(dare, tmp_path, "--events", good, "--events", cut)
    message = refuse(dare, tmp_path, "--events", good, "--events", bad)
    assert f"events: {bad}: corrupt" in message
    assert "on_corrupt=skip" in message
    arguments = ["--events", good, "--events", bad, "--events", cut, "--json", "on_corrupt=skip", *LENIENT]
    code, output = dare("prepare", "--out", tmp_path / "out", *arguments)
    assert code == 0
    assert json.loads(output.splitlines()[-1])["skipped_files"] == 2
    skipped = " ".join(Manifest.read(tmp_path / "out").skipped)
    assert "bad.parquet" in skipped
    assert "cut.parquet" in skipped


def test_parquet_of_the_wrong_type(dare: Dare, tmp_path: Path) -> None:
    columns = {"user_id": ["a"], "item_id": [1], "category_id": [1], "timestamp": [1]}
    pq.write_table(pa.table(columns), tmp_path / "events.parquet")
    message = refuse(dare, tmp_path, "--events", tmp_path / "events.parquet")
    assert "events.parquet, row 1: column user_id: 'a' is not an integer" in message


def test_output_is_not_overwritten_unasked(dare: Dare, tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(GOOD)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    assert "is not empty; choose another folder or pass --overwrite" in refuse(
        dare, tmp_path, "--events", tmp_path / "events.csv"
    )
    (tmp_path / "broken.csv").write_text(GOOD + "1,2\n")
    refuse(dare, tmp_path, "--events", tmp_path / "broken.csv", "--overwrite")
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious", "a failed run leaves the former content"
    assert "holds 'mine.txt', which this command did not write" in refuse(
        dare, tmp_path, "--events", tmp_path / "events.csv", "--overwrite"
    )
    (tmp_path / "out" / "mine.txt").unlink()
    for _ in range(2):
        code, _ = dare(
            "prepare", "--out", tmp_path / "out", "--events", tmp_path / "events.csv", "--overwrite", *LENIENT
        )
        assert code == 0
    Manifest.read(tmp_path / "out").verify(tmp_path / "out")


def test_no_space_left(dare: Dare, tmp_path: Path, small_disk: Path) -> None:
    lines = (f"{n % 999},{n * 7919 % 1_000_003},1,{n}\n" for n in range(200_000))
    (tmp_path / "events.csv").write_text(HEADER + "".join(lines))
    code, message = dare("prepare", "--events", tmp_path / "events.csv", "--out", small_disk / "out", *LENIENT)
    assert code == 1
    assert "no space left" in message.lower()
    assert list(small_disk.iterdir()) == []


@pytest.fixture
def data_set(dare: Dare, tmp_path: Path) -> Path:
    (tmp_path / "events.csv").write_text(GOOD)
    assert dare("prepare", "--out", tmp_path / "out", "--events", tmp_path / "events.csv", *LENIENT)[0] == 0
    return tmp_path / "out"


def test_manifest_must_be_there_and_fit(data_set: Path) -> None:
    manifest = manifest_of(data_set)
    shard = data_set / "shard-00000.parquet"
    content = shard.read_bytes()

    def message() -> str:
        with pytest.raises(ValueError) as error:
            Manifest.read(data_set).verify(data_set)
        return str(error.value)

    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "shard-00000.parquet differs from the checksum" in message()
    shard.write_bytes(content[:-1])
    assert f"shard-00000.parquet is {len(content) - 1} bytes" in message()
    shard.unlink()
    assert "shard-00000.parquet is missing" in message()
    shard.write_bytes(content)
    Manifest.read(data_set).verify(data_set)
    write_manifest(data_set, {**manifest, "schema_version": 99})
    assert "schema version 99, this program reads 1 and 2" in message()
    write_manifest(data_set, {**manifest, "shards": 3})
    assert "shards: " in message()
    (data_set / "manifest.json").write_text("{")
    assert "manifest.json is damaged (" in message()
    (data_set / "manifest.json").unlink()
    assert "no manifest.json: not a data set" in message()


def test_a_real_process_prints_one_line(tmp_path: Path) -> None:
    code, told, errors = run_dare(tmp_path, "prepare", "--events", tmp_path / "absent.csv", "--out", tmp_path / "x")
    assert code == 1
    assert told == ""
    assert errors.count("\n") == 1
    assert errors.startswith("dare: events: ")


def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    users, each = 20_000, 30
    times = list(range(each)) * users
    table = pa.table({"user_id": [user for user in range(users) for _ in range(each)], "item_id": times})
    pq.write_table(
        table.append_column("category_id", table["item_id"]).append_column("timestamp", [times]), tmp_path / "e.parquet"
    )
    # Its signals are the usual ones, whatever the tests were started with: in the background a shell ignores SIGINT.
    output = tmp_path_factory.mktemp("said")
    process = start_dare(output, "prepare", "--events", tmp_path / "e.parquet", "--out", tmp_path / "out", *LENIENT)
    while not (tmp_path / ".out.partial").exists():
        assert process.is_alive()
        time.sleep(0.01)
    assert process.pid
    os.kill(process.pid, signal.SIGINT)
    codes = wait([process])
    said = (output / "stderr").read_text()
    assert codes == [130], said
    assert said.endswith("dare: interrupted\n")
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["e.parquet"]


@pytest.mark.parametrize(
    "delimiter", ["|", ";", "\t", "\\t", " ", "#", "~", ":", "!", "&", "*", "'", "%", "@", "`", "-", ">"]
)
def test_a_delimiter_on_the_command_line_is_itself(dare: Dare, tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "${x}[1].csv"
    path.write_text(GOOD.replace(",", "\t" if delimiter == "\\t" else delimiter))
    code, output = dare(
        "prepare", "--events", path, "--out", tmp_path / "out", f"events.delimiter={delimiter}", "--overwrite", *LENIENT
    )
    assert code == 0
    assert "events: 23 read, 23 kept" in output


def test_tsv_means_tabs_and_no_format_is_guessed(dare: Dare, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(GOOD.replace(",", "\t"))
    assert dare("prepare", "--events", tmp_path / "a.tsv", "--out", tmp_path / "out", *LENIENT)[0] == 0
    (tmp_path / "a.csv").write_text(GOOD)
    message = refuse(dare, tmp_path, "--events", tmp_path / "a.tsv", "--events", tmp_path / "a.csv", "--overwrite")
    assert ".tsv files and others in one log" in message
    for setting, said in (
        ("events.delimiter=||", "events.delimiter=||': the value is not YAML; write text of signs in quotes"),
        ("events.delimiter=ab", "a delimiter of several characters needs quote=null"),
        ("events.delimiter=é", "events.delimiter: one character of ASCII"),
        ('events.delimiter="', "delimiter and quote are both"),
        ("events.timestamp_zone=Mars/Olympus", "events.timestamp_zone: an IANA name such as Asia/Shanghai"),
        ("events.since=yesterday", "events.since: a moment is seconds since 1970, or ISO 8601"),
        ("events.since=5 events.until=5", "events: since (5) must be earlier than until (5)"),
        ("split.kind=by_date", "split.validation_from: required, but not set"),
    ):
        assert said in refuse(dare, tmp_path, "--events", tmp_path / "a.csv", "--overwrite", *setting.split(" "))


def test_urls_are_not_made_into_folders(dare: Dare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "events.csv").write_text(GOOD)
    for command, said in (
        (["prepare", "--events", "nosuch://bucket/x.csv", "--out", "out"], "nosuch is no file system that is known"),
        (["prepare", "--events", "events.csv", "--out", "nosuch://bucket/out"], "no file system that is known"),
        (["prepare", "--events", "events.csv", "--out", "out", "--config", "s3://b/x.yaml"], "a path of this machine"),
        (["inspect", "nosuch://bucket/data"], "no file system that is known"),
        (["inspect", "s3://key:secret@bucket/data"], "a URL holds no credentials"),
        (["inspect", "s3://bucket/data?secret_key=abc"], "unknown option secret_key"),
        (["runs", "nosuch://bucket/runs"], "no file system that is known"),
        (["compare", "nosuch://host/run"], "no file system that is known"),
        (["synth", "--out", "s3://bucket/x.csv"], "a path of this machine is wanted here, not a URL"),
    ):
        code, message = dare(*command)
        assert code == 1, message
        assert "://" in message
        assert said in message
        assert "abc" not in message
        assert ":secret@" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["events.csv"]


def test_times_with_and_without_an_offset_do_not_meet_unasked(dare: Dare, tmp_path: Path) -> None:
    events, shown = tmp_path / "events.csv", tmp_path / "shown.csv"
    events.write_text(HEADER + "".join(f"1,{item},1,2017-11-25 0{item}:00:00\n" for item in range(9)))
    shown.write_text("user_id,item_id,category_id,timestamp,label\n1,3,1,2017-11-25T05:00:00Z,1\n")
    arguments = ["--events", events, "--impressions", shown, "split.test_fraction=0", "split.validation_fraction=0"]
    arguments += ["impressions.timestamp_unit=datetime", "events.timestamp_unit=datetime"]
    before = set(tmp_path.iterdir())
    code, message = dare("prepare", "--out", tmp_path / "out", *arguments)
    assert code == 1
    assert "events: times without an offset beside ones in impressions that say what moment they are" in message
    assert set(tmp_path.iterdir()) == before
    for zone, end in (("UTC", 5), ("-02:00", 3), ("+02:00", 7)):
        out = tmp_path / zone
        assert dare("prepare", "--out", out, *arguments, f"events.timestamp_zone={zone}")[0] == 0
        assert pq.read_table(out / "shard-00000.parquet").to_pylist()[0]["target_history_end"] == [end]


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "garbage"])
def test_compressed_files_are_read_to_their_end_or_not_at_all(
    dare: Dare, tmp_path: Path, ending: str, damage: str
) -> None:
    path = tmp_path / f"events.csv.{ending}"
    lines = "".join(f"{n % 50},{n * 7919 % 1009},1,{n}\n" for n in range(60_000))
    if ending == "gz":
        content = gzip.compress((HEADER + lines).encode())
    else:
        # Frames of zstd carry a checksum only where their writer asked for one: a cut is seen in any case.
        content = pa.compress((HEADER + lines).encode(), codec="zstd", asbytes=True)
    middle = len(content) // 2
    if damage == "cut":
        content = content[:-20] if ending == "gz" else content[:middle]
    elif damage == "flipped" and ending == "gz":
        content = content[:middle] + bytes([content[middle] ^ 8]) + content[middle + 1 :]
    else:
        content += b"what does not belong here"
    path.write_bytes(content)
    assert f"{path}" in refuse(dare, tmp_path, "--events", path)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("split.min_behaviors=1:0", "split.min_behaviors: input should be a valid integer"),
        ("split.min_behaviors=true", "split: min_behaviors: true and false are no value of this setting"),
        ("seed=yes", "seed: true and false are no value of this setting"),
        ("seed=0x10", "seed: input should be a valid integer"),
        ("seed=${x}", "Interpolation key 'x' not found; ${...} stands for the value of another setting"),
        ("events.since=12:30", "events.since: a moment is seconds since 1970"),
        ("events.timestamp_zone=right/UTC", "events.timestamp_zone: an IANA name"),
        ("events.timestamp_zone=localtime", "events.timestamp_zone: an IANA name"),
        ("events.timestamp_unit=mmdd events.since=2017-11-11", "timestamp_unit=mmdd has no year"),
    ],
)
def test_values_are_not_what_they_look_like(dare: Dare, tmp_path: Path, argument: str, message: str) -> None:
    (tmp_path / "events.csv").write_text(GOOD)
    assert message in refuse(dare, tmp_path, "--events", tmp_path / "events.csv", *argument.split(" "))


def test_numbers_are_decimal_and_offsets_are_text(dare: Dare, tmp_path: Path) -> None:
    events = tmp_path / "events.csv"
    events.write_text(GOOD)
    assert dare("prepare", "--events", events, "--out", tmp_path / "a", *LENIENT, "split.min_behaviors=010")[0] == 0
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["settings"]["split"]["min_behaviors"] == 10
    zone = "events.timestamp_zone=+10:00"
    assert dare("prepare", "--events", events, "--out", tmp_path / "b", *LENIENT, zone)[0] == 0
    for text, message in (
        ("split: {min_behaviors: 010}", "my.yaml: line 1: YAML takes 010 for a number of the base 2, 8, 16 or 60"),
        ("seed: 1\nevents: {timestamp_zone: +10:00}", "my.yaml: line 2: YAML takes +10:00 for a number"),
        ("[" * 3_000, "my.yaml: settings cannot be read: they are nested too deeply"),
        ("seed: \xff".encode("latin1"), "my.yaml: settings cannot be read: the file is not text of UTF-8"),
    ):
        (tmp_path / "my.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        message_of = dare("prepare", "--events", events, "--out", tmp_path / "c", "--config", tmp_path / "my.yaml")
        assert message in message_of[1]


def test_a_carriage_return_within_a_line_ends_no_record(dare: Dare, tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_bytes(GOOD.replace("\n", "\r\n").encode() + b"1,5,x\r9,9\r\n")
    message = refuse(dare, tmp_path, "--events", tmp_path / "e.csv", "events.text_category=true")
    assert "e.csv, line 25: a carriage return within the line" in message


def test_an_output_that_is_a_link_is_written_where_it_leads(dare: Dare, tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(GOOD)
    (tmp_path / "there").mkdir()
    for name, target in (("link", "there"), ("dangling", "new")):
        (tmp_path / name).symlink_to(target)
        assert dare("prepare", "--events", tmp_path / "events.csv", "--out", tmp_path / name, *LENIENT)[0] == 0
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / target / "manifest.json").is_file()
    code, message = dare("prepare", "--events", tmp_path / "events.csv", "--out", "/", *LENIENT)
    assert code == 1
    assert "no folder that can be written" in message

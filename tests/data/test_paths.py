"""What a person names, and which files that is."""

import logging
import os
from pathlib import Path

import pytest

from pipeline.paths import input_files, local_path
from schemas.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What Spark writes, and names that look like patterns."""
    for name in (
        "log/part-0.parquet",
        "log/part-1.parquet",
        "log/_SUCCESS",
        "log/.part-0.parquet.crc",
        "log/day=2/part-0.parquet",
        "log/_temporary/0/part-9.parquet",
        "a[1].csv",
        "a1.csv",
        "_mine.csv",
        ".hidden/b.csv",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["log"], ["log/day=2/part-0.parquet", "log/part-0.parquet", "log/part-1.parquet"]),
        (["log/"], ["log/day=2/part-0.parquet", "log/part-0.parquet", "log/part-1.parquet"]),
        (["log/*"], ["log/day=2/part-0.parquet", "log/part-0.parquet", "log/part-1.parquet"]),
        (["log/*.parquet"], ["log/part-0.parquet", "log/part-1.parquet"]),
        (["log/**/*.parquet"], ["log/day=2/part-0.parquet", "log/part-0.parquet", "log/part-1.parquet"]),
        (["a[1].csv"], ["a[1].csv"]),
        (["a[[]1].csv"], ["a[1].csv"]),
        (["a?.csv"], ["a1.csv"]),
        (["_mine.csv"], ["_mine.csv"]),
        ([".hidden"], [".hidden/b.csv"]),
        ([".hidden/*.csv"], [".hidden/b.csv"]),
        (["a1.csv", "./a1.csv", "a*.csv", "link.csv"], ["a1.csv", "a[1].csv"]),
    ],
)
def test_files_of_names(folder: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], expected: list[str]) -> None:
    monkeypatch.chdir(folder)
    (folder / "link.csv").symlink_to("a1.csv")
    assert [path.as_posix() for path in input_files("events", tuple(names))] == expected
    whole = tuple(f"{folder}/{name}" for name in names)
    assert [path.relative_to(folder).as_posix() for path in input_files("events", whole)] == expected
    assert input_files("events", tuple(f"file://{name}" for name in whole)) == input_files("events", whole)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.csv", "events: absent.csv: no such file"),
        ("absent*.csv", "events: absent*.csv: no such file"),
        ("empty", "events: empty: a folder without files"),
        ("marks", "events: marks: a folder without files but ones that begin with _ or ."),
        ("nosuch://bucket/log.parquet", "no file system that is known"),
        ("s3:///log.parquet", "names no bucket"),
        ("package:no_such_package/x.csv", "the Python package no_such_package is not installed"),
        ("package:yaml/nothing.csv", "the package has no such file"),
        ("a\0b", "zero byte"),
        ("", "a path is empty"),
        ("pipes", "pipes/x.csv is no file, but a pipe"),
        ("pipes/*", "pipes/x.csv is no file, but a pipe"),
        ("pipes/x.csv", "pipes/x.csv is no file, but a pipe"),
        ("links", "links/gone.csv is a link to nothing"),
        ("links/*.csv", "links/gone.csv is a link to nothing"),
        ("links/gone.csv", "links/gone.csv is a link to nothing"),
    ],
)
def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "marks").mkdir()
    (tmp_path / "marks" / "_SUCCESS").touch()
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes" / "x.csv")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "here.csv").touch()
    (tmp_path / "links" / "gone.csv").symlink_to("nowhere.csv")
    with pytest.raises(UserError) as refused:
        input_files("events", (name,))
    assert message in str(refused.value)


@pytest.mark.parametrize("name", ["log", "log/[dmp]*"])
def test_links_to_folders_are_followed_and_circles_are_not(folder: Path, name: str) -> None:
    (folder / "elsewhere" / "deep").mkdir(parents=True)
    (folder / "elsewhere" / "deep" / "part-7.parquet").write_text("x")
    (folder / "log" / "more").symlink_to(folder / "elsewhere")
    (folder / "log" / "circle").symlink_to(folder / "log")
    (folder / "elsewhere" / "circle").symlink_to(folder / "elsewhere")
    (folder / "elsewhere" / "back").symlink_to(folder / "log")
    names = [path.name for path in input_files("events", (f"{folder}/{name}",))]
    assert sorted(names) == ["part-0.parquet", "part-0.parquet", "part-1.parquet", "part-7.parquet"]


def test_what_is_passed_over_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("dare").propagate = True
    with caplog.at_level(logging.INFO, "dare.paths"):
        input_files("events", (str(folder / "log"), str(folder / "log" / "part-0.parquet")))
    assert "and 2 more: names begin with _ or .; not read" in caplog.text
    assert "part-0.parquet: named more than once; read once" in caplog.text


def test_a_url_is_no_local_folder() -> None:
    for url in ("s3://bucket/out", "gs://x", "hdfs://host/x", "S3://x"):
        with pytest.raises(UserError, match="a path of this machine is wanted"):
            local_path(url)
    assert local_path("C:x") == Path("C:x")
    assert local_path("file:///tmp/x") == Path("/tmp/x")

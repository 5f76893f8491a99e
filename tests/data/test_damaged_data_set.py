"""A bit of any file of a data set turns over: whoever reads it gets what was there before, or a line with its name."""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ingest.prepare import prepare
from pipeline.inspect.popularity import read_popularity
from pipeline.inspect.summary import summarize
from pipeline.stream.data_set import DataSet
from pipeline.stream.history_stream import HistoryStream
from schemas.documents import _notice
from schemas.errors import UserError
from schemas.manifest import MANIFEST, Manifest
from schemas.prepare import PrepareSettings
from schemas.stream import StreamSettings
from tests.datasets import manifest_of, write_manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that `dare prepare` has written, of several shards."""
    path = tmp_path_factory.mktemp("damaged")
    rng = np.random.default_rng(0)
    rows = [(user, item, item % 5, time) for user in range(24) for time, item in enumerate(rng.integers(0, 60, 30))]
    lines = ["user_id,item_id,category_id,timestamp", *(",".join(map(str, row)) for row in rows)]
    (path / "events.csv").write_text("\n".join(lines) + "\n")
    content = {
        "events": {"files": [str(path / "events.csv")]},
        "split": {"kind": "by_timestamp", "min_history": 5, "test_groups": 3, "validation_groups": 2},
        "shards": {"behaviors_per_shard": 250, "users_per_row_group": 3},
    }
    prepare(PrepareSettings.model_validate(content), path / "data")
    return path / "data"


def streamed(folder: Path) -> Any:
    """All batches of an epoch, as text."""
    chosen = StreamSettings(batch_size=64, history_length=5)
    with HistoryStream(folder, "train", chosen, seed=1, shuffle=True) as stream:
        return [
            (batch.user_id_U.tolist(), batch.item_T.tolist(), batch.histories["history"].item_M.tolist())
            for batch in stream
        ]


def counted(folder: Path) -> Any:
    return json.dumps(summarize(folder).to_json())


def dictionaries(folder: Path) -> Any:
    manifest = Manifest.read(folder)
    categories = manifest.verified(folder, "feature-category.parquet")
    popularity = read_popularity(categories, manifest.counts.categories, 4)
    return DataSet.open(folder).names("item").to_pylist(), popularity.load_W.tolist()


READERS: tuple[Callable[[Path], Any], ...] = (streamed, counted, dictionaries)


@contextmanager
def changed(file: Path, content: bytes) -> Iterator[None]:
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[Callable[[Path], Any], Any]:
    return {read: read(folder) for read in READERS}


@settings(deadline=None, max_examples=60)
@given(name=st.integers(0), place=st.integers(0), bit=st.integers(0, 7))
def test_any_bit(folder: Path, expected: dict[Callable[[Path], Any], Any], name: int, place: int, bit: int) -> None:
    files = sorted(folder.iterdir())
    assert len(files) > 5
    file = files[name % len(files)]
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 1 << bit
    with changed(file, bytes(content)):
        for read in READERS:
            try:
                found, said = read(folder), None
            except UserError as error:
                said = str(error)
            if said is None:
                assert found == expected[read], file
            else:
                assert str(folder) in said
                assert file.name in said
                assert "\n" not in said


def test_a_page_header_that_no_page_checksum_covers(folder: Path, expected: dict[Callable[[Path], Any], Any]) -> None:
    """Row groups have a checksum of their own: every byte of one counts."""
    file = folder / "shard-00000.parquet"
    for place in range(4, 64, 7):
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        with changed(file, bytes(content)), pytest.raises(UserError, match=r"row group 0 cannot be read \(it differs"):
            streamed(folder)


def test_a_data_set_of_an_earlier_version(folder: Path, expected: Any, caplog: pytest.LogCaptureFixture) -> None:
    content = manifest_of(folder)
    for shard in content["shards"]:
        del shard["footer_sha256"], shard["row_group_crc32"]
    with changed(folder / MANIFEST, json.dumps(content).encode()):
        _notice.cache_clear()
        for read in READERS:
            assert read(folder) == expected[read]
        (record,) = caplog.records
        assert "without being verified" in record.getMessage()


@pytest.mark.parametrize("name", ["/etc/passwd", "../data/shard-00000.parquet", "shard/../x"])
@pytest.mark.parametrize("kind", ["shards", "files"])
def test_a_manifest_that_leads_out_of_its_folder(folder: Path, kind: str, name: str) -> None:
    before = (folder / MANIFEST).read_bytes()
    content = manifest_of(folder)
    content[kind][0]["path"] = name
    try:
        write_manifest(folder, content)
        with pytest.raises(UserError, match=r"its list of files names .*, which is not a file of this folder"):
            DataSet.open(folder)
    finally:
        (folder / MANIFEST).write_bytes(before)


def test_a_link_that_leads_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    file = folder / "shard-00000.parquet"
    file.rename(tmp_path / "elsewhere.parquet")
    try:
        file.symlink_to(tmp_path / "elsewhere.parquet")
        with pytest.raises(UserError, match="leads outside of its folder"):
            streamed(folder)
    finally:
        file.unlink()
        (tmp_path / "elsewhere.parquet").rename(file)


def test_verify_reads_every_byte(folder: Path) -> None:
    with redirect_stdout(io.StringIO()):
        for file in sorted(folder.glob("*.parquet")):
            content = bytearray(file.read_bytes())
            content[1] ^= 1  # of the first four letters, which nobody reads
            with changed(file, bytes(content)), pytest.raises(UserError, match=f"{file.name} differs"):
                summarize(folder, verify=True)

"""Documents that carry their checksum: any bit of them that changes is found, or changes nothing."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runs.run_folder import RunFolder
from schemas.documents import (
    _notice,
    inside,
    json_document,
    json_line,
    log_lines,
    one_notice,
    parse_json,
    read_json,
    verify_yaml,
    yaml_document,
)
from schemas.errors import UserError
from schemas.settings import load_settings
from schemas.train import TrainSettings

CONTENT = {"step": 12, "score": 0.5, "files": [{"path": "ä", "bytes": 3}], "none": None}


@pytest.fixture(autouse=True)
def notices_again() -> None:
    _notice.cache_clear()


@given(content=st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=5) | st.none(), max_size=3))
@pytest.mark.parametrize("indent", [None, 1])
def test_a_document_comes_back(tmp_path_factory: pytest.TempPathFactory, indent: int | None, content: Any) -> None:
    content.pop("checksum", None)
    file = tmp_path_factory.getbasetemp() / "document.json"
    file.write_text(json_document(json.dumps(content, indent=indent) + "\n"))
    assert read_json(file) == content
    assert json.loads(file.read_text()).keys() == {"checksum", *content}


def every_bit(file: Path, read: Callable[[], Any]) -> int:
    """Turn over each third bit of a file: ``read`` refuses it by name, or returns what it did; how often it refuses."""
    content, expected, refused = file.read_bytes(), read(), 0
    for bit in range(0, 8 * len(content), 3):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            found, said = read(), None
        except UserError as error:
            said = str(error)
        assert found == expected if said is None else str(file) in said and "\n" not in said, (bit, said)
        refused += said is not None
    file.write_bytes(content)
    return refused


def test_every_bit_of_a_json_document(tmp_path: Path) -> None:
    file = tmp_path / "document.json"
    file.write_text(json_document(json.dumps(CONTENT, indent=1) + "\n"))

    def read() -> Any:
        found = read_json(file, {"step": int, "score": float | None})
        # A bit of the checksum's own name makes it a member like others: what the document says is what it said.
        return {name: found[name] for name in CONTENT}

    assert every_bit(file, read) > 2 * (len(file.read_bytes()) - len('"checksum": ') - 2)


def test_every_bit_of_a_log(tmp_path: Path) -> None:
    file = tmp_path / "losses.jsonl"
    file.write_text("".join(json_line({"step": step, "loss": step / 7}) for step in range(3)))

    def read() -> Any:
        return [(line["step"], line["loss"]) for _, line in log_lines(file)]

    assert len(read()) == 3
    assert every_bit(file, read) > 2 * len(file.read_bytes())


def test_every_bit_of_a_settings_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml_document("epochs: 3\nseed: 5\n"))
    assert verify_yaml(file, file.read_bytes())
    assert every_bit(file, RunFolder(tmp_path).settings) > 2 * len("epochs: 3\nseed: 5\n")


def test_who_edits_a_document_takes_its_checksum_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "settings.yaml"
    text = yaml_document("epochs: 3\n")
    file.write_text(text.replace("3", "4", 1))
    with pytest.raises(UserError, match=r"settings.yaml differs from its checksum; .* take its checksum out"):
        load_settings(TrainSettings, [file])
    file.write_text("epochs: 4\n")
    assert load_settings(TrainSettings, [file]).epochs == 4
    document = tmp_path / "plan.json"
    document.write_text(json.dumps({"b": 2} | json.loads(json_document('{"a": 1}'))))
    with pytest.raises(UserError, match=r"plan.json differs from its checksum"):
        read_json(document)
    document.write_text('{"a": 1}')
    assert parse_json(document, document.read_bytes()) == ({"a": 1}, False)
    assert not caplog.records


def test_a_document_of_an_earlier_version_is_used_with_one_notice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    (tmp_path / "b.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with caplog.at_level(logging.WARNING):
        assert read_json(tmp_path / "a.json") == {"a": 1}
        assert read_json(tmp_path / "a.json") == {"a": 1}
        assert [line for _, line in log_lines(tmp_path / "b.jsonl")] == [{"step": 1, "loss": 2.0}]
    (record,) = caplog.records
    assert str(tmp_path) in record.getMessage()
    assert "without being verified" in record.getMessage()


def test_many_folders_of_a_list_get_one_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with one_notice(tmp_path):
        for name in "abc":
            (tmp_path / name).mkdir()
            (tmp_path / name / "a.json").write_text("{}")
            read_json(tmp_path / name / "a.json")
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{tmp_path}: ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{}", "(no step)"),
        (b'{"step": "x"}', "(step is 'x')"),
        (b"[1]", "(not a JSON object)"),
        (b"\xff\xfe\x00", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (None, "is missing"),
    ],
)
def test_what_is_no_such_document_is_one_line(tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "document.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_json(file, {"step": int}, "do this")
    assert said in str(refused.value)
    assert str(file) in str(refused.value)
    assert content is None or str(refused.value).endswith("; do this")


def test_a_folder_in_the_place_of_a_document_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_json(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", ".", "", "a/b", "a\0b", "link"])
def test_names_of_a_list_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "x").touch()
    (folder / "link").symlink_to(tmp_path / "x")
    with pytest.raises(UserError, match="folder"):
        inside(folder, name)
    (folder / "y").touch()
    (folder / "there").symlink_to("y")
    assert inside(folder, "there") == folder / "there"


def test_a_pipe_in_the_place_of_a_document_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "job.json")
    with pytest.raises(UserError, match=r"job\.json is no regular file"):
        read_json(tmp_path / "job.json")

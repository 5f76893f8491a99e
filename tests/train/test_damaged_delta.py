"""Delta checkpoints that are damaged, of another run, or from a stranger: refused by name, and nothing is executed."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from embeddings.distributed.process_group import process_group
from pipeline.runs.checkpoint import RECORD, Checkpoint, checkpoints_in, damage_of, final_path
from pipeline.runs.checkpoint_files import METADATA, keys_in, load_values
from pipeline.runs.rows_file import RowsFile, TableRows, write_rows
from schemas.errors import UserError
from schemas.manifest import File
from tests.delta_checkpoints import SETTINGS, loaded, read_by_the_format, trained
from tests.runs import small_settings
from tests.trainers import CPU


@pytest.fixture(scope="module")
def data(few_users: Path) -> Path:
    return few_users


@pytest.fixture(scope="module")
def chain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of one rank."""
    folder = tmp_path_factory.mktemp("chain") / "checkpoints"
    with process_group(CPU):
        trained(small_settings(*SETTINGS), data, folder)
    return folder


def last_delta(folder: Path) -> Checkpoint:
    return [checkpoint for checkpoint in checkpoints_in(folder) if checkpoint.base is not None][-1]


@examples(deadline=None, max_examples=60)
@given(name=st.integers(0), place=st.integers(0), bit=st.integers(0, 7), how=st.sampled_from(["turn", "cut", "remove"]))
def test_any_damage_of_a_delta_or_what_it_stands_on(chain: Path, name: int, place: int, bit: int, how: str) -> None:
    delta = last_delta(chain)
    assert delta.base is not None
    files = [*sorted(delta.path.iterdir()), *sorted(final_path(chain, delta.base.step).iterdir())]
    file = files[name % len(files)]
    content = file.read_bytes()
    changed = bytearray(content)
    changed[place % len(content)] ^= 1 << bit
    try:
        if how == "remove":
            file.unlink()
        else:
            file.write_bytes(changed if how == "turn" else content[: place % len(content)])
        there = {each.step: each for each in checkpoints_in(chain)}
        if delta.step not in there:
            return  # without its record it is no checkpoint
        found = damage_of(there[delta.step])
    finally:
        file.write_bytes(content)
    assert found is not None
    assert file.name in found
    assert "\n" not in found
    if file.parent != delta.path:
        assert file.parent.name in found
    assert damage_of(delta) is None


@examples(deadline=None, max_examples=200)
@given(places=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=4), cut=st.integers(0))
def test_a_file_of_rows_from_a_stranger(
    chain: Path, tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, int]], cut: int
) -> None:
    """Whatever is in it, it is refused in a line or has rows of the table's range."""
    content = bytearray((last_delta(chain).path / "rows-0.safetensors").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for place, value in places:
        content[place % (header if place % 3 else len(content))] = value
    file = tmp_path_factory.getbasetemp() / "stranger.safetensors"
    file.write_bytes(content[: len(content) - cut % 99])
    key = "model.tables.inherent.attention.embedding_bags.item_attention.weight"
    try:
        opened = RowsFile(file)
        begin, end = opened.ranges.get("item_attention", (0, 0))
        for row_N, (values,) in opened.chunks("item_attention", [key], 0, 51) if end else ():
            assert len(row_N) == len(values)
            assert begin <= int(row_N.min()) <= int(row_N.max()) < end
    except UserError as error:
        said = str(error)
    else:
        return
    assert str(file) in said
    assert "\n" not in said


def rewritten(delta: Checkpoint, change: Callable[[dict[str, Any]], None] = lambda record: None) -> Checkpoint:
    """Let a delta's record have the checksums of its files as they are now, and no checksum of itself."""
    record = json.loads((delta.path / RECORD).read_bytes())
    del record["checksum"]
    record["files"] = [File.of(delta.path / file["path"]).model_dump() for file in record["files"]]
    change(record)
    (delta.path / RECORD).write_text(json.dumps(record))
    return next(each for each in checkpoints_in(delta.path.parent) if each.step == delta.step)


@pytest.fixture
def copied(chain: Path, tmp_path: Path) -> Checkpoint:
    shutil.copytree(chain, tmp_path / "checkpoints")
    return last_delta(tmp_path / "checkpoints")


def rows_of(file: Path, change: Callable[[TableRows], TableRows]) -> None:
    """Write a file of rows again, with all tables changed."""
    opened, tensors = RowsFile(file), read_by_the_format(file)
    tables = []
    for table, (first, last) in opened.ranges.items():
        keys = [key for key in tensors if f".embedding_bags.{table}.weight" in key]
        rows, *values = (torch.from_numpy(tensors[key].copy()) for key in (f"rows.{table}", *keys))
        tables.append(change(TableRows(table, first, last, rows, dict(zip(keys, values, strict=True)))))
    with file.open("wb") as stream:
        write_rows(stream, tables)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda of: TableRows(of.table, 0, of.last_row, of.row_N.flip(0), of.values), "are not in order between 0 and"),
        (lambda of: TableRows(of.table, 0, of.last_row, of.row_N + 60, of.values), "are not in order between 0 and"),
        (lambda of: TableRows(of.table, 0, of.last_row - 1, of.row_N[:0], {}), "no file has the changes of table"),
        (lambda of: TableRows(of.table, 0, of.last_row, of.row_N, {}), "it has not as many rows of"),
        (
            lambda of: TableRows(of.table, 0, of.last_row, of.row_N, {k: v.half() for k, v in of.values.items()}),
            "that are torch.float16 x",
        ),
        (
            lambda of: TableRows(of.table, 0, of.last_row, of.row_N[:2], {k: v[:1] for k, v in of.values.items()}),
            "it has not as many rows of",
        ),
    ],
)
def test_rows_that_do_not_fit_their_table(
    copied: Checkpoint, data: Path, change: Callable[[TableRows], TableRows], said: str
) -> None:
    """Checksums are right, as a stranger can make them."""
    rows_of(copied.path / "rows-0.safetensors", change)
    with process_group(CPU):
        delta = rewritten(copied)
        assert damage_of(delta) is None
        with pytest.raises(UserError, match=said) as error:
            loaded(small_settings(*SETTINGS), data, delta)
    assert str(copied.path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_delta_lacks_the_file_of_a_rank(copied: Checkpoint, data: Path) -> None:
    (copied.path / "rows-0.safetensors").rename(copied.path / "rows-0.other")

    def other_name(record: dict[str, Any]) -> None:
        record["files"] = [file for file in record["files"] if not file["path"].startswith("rows-")]

    with process_group(CPU):
        (copied.path / "rows-0.safetensors").touch()  # to have a checksum
        delta = rewritten(copied, other_name)
        assert damage_of(delta) is None
        with pytest.raises(UserError, match=f"{delta.path}: no file has the changes of table .* from row 0 on"):
            loaded(small_settings(*SETTINGS), data, delta)


def test_a_delta_of_another_full_checkpoint(copied: Checkpoint, data: Path, tmp_path: Path) -> None:
    settings = small_settings(*SETTINGS, "seed=2")
    with process_group(CPU):
        trained(settings, data, tmp_path / "foreign")
        foreign = final_path(tmp_path / "foreign", copied.step)
        shutil.rmtree(copied.path)
        shutil.copytree(foreign, copied.path)
        delta = last_delta(copied.path.parent)
        said = f"step-000000000003/{RECORD} is not that of the checkpoint which {delta.path.name} stands on"
        assert said in str(damage_of(delta))
        with pytest.raises(UserError, match=said):
            loaded(settings, data, delta)
        # Nor does a delta stand on a delta.
        rewritten(delta, lambda record: record["base"].update(step=4))
        assert damage_of(last_delta(copied.path.parent)) is not None


def test_a_full_checkpoint_that_is_gone(copied: Checkpoint, data: Path) -> None:
    assert copied.base is not None
    shutil.rmtree(final_path(copied.path.parent, copied.base.step))
    with process_group(CPU):
        assert f"step-000000000003/{RECORD} is missing" in str(damage_of(copied))
        with pytest.raises(UserError, match=r"step-000000000003/checkpoint.json is missing"):
            loaded(small_settings(*SETTINGS), data, copied)


class Trap:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return exec, (f"open({str(self._path)!r}, 'w').close()",)


@pytest.mark.parametrize("name", [METADATA, "rows-0.safetensors", "__0_0.distcp"])
def test_a_trap_is_not_sprung(copied: Checkpoint, data: Path, tmp_path: Path, name: str) -> None:
    (copied.path / name).write_bytes(pickle.dumps({"state_dict_metadata": Trap(tmp_path / "sprung")}))
    with process_group(CPU):
        delta = rewritten(copied)
        assert damage_of(delta) is None
        with pytest.raises(UserError, match=f"{name} (is damaged|names builtins.exec)"):
            loaded(small_settings(*SETTINGS), data, delta)
    assert not (tmp_path / "sprung").exists()


def test_a_delta_is_read_by_key(chain: Path) -> None:
    delta = last_delta(chain)
    with process_group(CPU):
        keys = keys_in(delta.path)
        assert keys == keys_in(final_path(chain, 3))
        key = "model.tables.inherent.attention.embedding_bags.item_attention.weight"
        values = {key: torch.zeros(keys[key] or ()), "progress.step": 0, "stream.epoch": 9}
        load_values(values, delta.path)
        dense = {"progress.step": 0}
        load_values(dense, delta.path)
    assert (dense["progress.step"], values["progress.step"], values["stream.epoch"]) == (5, 5, 0)
    rows = read_by_the_format(delta.path / "rows-0.safetensors")
    assert (values[key].numpy()[rows["rows.item_attention"]] == rows[key]).all()  # type: ignore[attr-defined]

"""Tables of checkpoints are read some rows at a time, as they were written, whatever ranks have written them."""

import os
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from pipeline.runs import stored_tables
from pipeline.runs.checkpoint import checkpoints_in
from pipeline.runs.checkpoint_files import Stored
from pipeline.runs.stored_tables import StoredTables
from schemas.errors import UserError
from tests.delta_checkpoints import SETTINGS, Values, trained
from tests.launcher import run_ranks
from tests.runs import small_settings

KEY = "model.tables.inherent.attention.embedding_bags.item_attention.weight"


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory, few_users: Path) -> tuple[Path, list[dict[int, Values]]]:
    """A full checkpoint, and deltas, of two ranks; and each rank's states by step."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = run_ranks(2, trained, small_settings(*SETTINGS), few_users, folder)
    return folder, [states for _, states in found]


def whole(states: list[dict[int, Values]], step: int) -> dict[str, bytes]:
    """The values of a step, by key; those of the first rank where they are the same on all of them."""
    keys = states[0][step]
    return {
        key: b"".join(content for _, content in sorted({*states[0][step][key], *states[1][step][key]})) for key in keys
    }


def test_tables_and_dense_values_of_full_ones_and_deltas(of_two_ranks: tuple[Path, list[dict[int, Values]]]) -> None:
    folder, states = of_two_ranks
    deltas = 0
    for checkpoint in checkpoints_in(folder):
        deltas += checkpoint.base is not None
        expected = whole(states, checkpoint.step)
        tables = StoredTables(checkpoint.path)
        for name, (rows, dim) in tables.shapes.items():
            (key,) = (key for key in expected if key.startswith("model.") and key.endswith(f".{name}.weight"))
            for count in (7, rows):
                windows = list(tables.rows(name, count))
                assert [len(window) for window in windows[:-1]] == [count] * (len(windows) - 1)
                assert all(window.shape[1] == dim for window in windows)
                assert torch.cat(windows).numpy().tobytes() == expected.pop(key) if count == rows else True
        dense = tables.dense()
        others = {key.removeprefix("model.") for key in expected if key.startswith("model.")}
        assert set(dense) == others
        for name, value in dense.items():
            assert value.numpy().tobytes() == states[0][checkpoint.step][f"model.{name}"][0][1]
    assert deltas == 3


def test_no_more_is_in_memory_than_is_asked_for(
    of_two_ranks: tuple[Path, list[dict[int, Values]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = of_two_ranks
    tables = StoredTables(checkpoints_in(folder)[-1].path)
    name, (rows, dim) = max(tables.shapes.items(), key=lambda of: of[1][0])
    taken, read_into = list[int](), stored_tables._read_into

    def counted(file: object, offset: int, view: memoryview) -> None:
        taken.append(len(view))
        read_into(file, offset, view)  # type: ignore[arg-type]

    monkeypatch.setattr(stored_tables, "_read_into", counted)
    windows = tables.rows(name, 5)
    for window in windows:
        assert window.shape[0] <= 5
    assert max(taken) <= 5 * dim * 4
    assert sum(taken) == rows * dim * 4 + 2 * 30  # each rank's piece has a header


def pieces(folder: Path) -> Stored:
    """A table of 7 x 8 in three pieces: two of columns beside each other, one of rows below."""
    whole_RD = torch.arange(56.0).view(7, 8)
    spans = [((0, 0), (4, 3)), ((0, 3), (4, 5)), ((4, 0), (3, 8))]
    chunks, storage = [], {}
    with (folder / "__0_0.distcp").open("wb") as file:
        file.write(b"something before")
        for (row, column), (rows, columns) in spans:
            begin = file.tell()
            torch.save(whole_RD[row : row + rows, column : column + columns].clone(), file)
            sizes = torch.Size([rows, columns])
            chunks.append(ChunkStorageMetadata(torch.Size([row, column]), sizes))
            where = _StorageInfo("__0_0.distcp", begin, file.tell() - begin)
            storage[MetadataIndex(KEY, torch.Size([row, column]))] = where
    kind = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([7, 8]), chunks)
    return Stored(folder, Metadata({KEY: kind}, storage_data=storage), {KEY: (7, 8)})


@pytest.fixture
def by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Stored, StoredTables]:
    stored = pieces(tmp_path)
    monkeypatch.setattr(stored_tables, "stored_in", lambda _: stored)
    return stored, StoredTables(tmp_path)


def test_pieces_of_columns(by_hand: tuple[Stored, StoredTables]) -> None:
    _, tables = by_hand
    for count in (1, 2, 3, 7, 100):
        assert torch.equal(torch.cat(list(tables.rows("item_attention", count))), torch.arange(56.0).view(7, 8))


def test_a_piece_that_is_missing_is_told(by_hand: tuple[Stored, StoredTables]) -> None:
    stored, tables = by_hand
    stored.metadata.storage_data.pop(MetadataIndex(KEY, torch.Size([0, 3])))
    with pytest.raises(UserError, match="no file has all of table item_attention"):
        list(tables.rows("item_attention", 3))


class Harm:
    def __reduce__(self) -> object:
        return os.system, ("touch harmed",)


def test_what_is_damaged_or_names_something_is_refused_and_nothing_is_called(
    by_hand: tuple[Stored, StoredTables], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, tables = by_hand
    file = tmp_path / "__0_0.distcp"
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], content.replace(b"PK", b"QK"), content.replace(b"little", b"bigger")):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"__0_0\.distcp is damaged"):
            list(tables.rows("item_attention", 3))
    file.unlink()
    with pytest.raises(UserError, match=r"__0_0\.distcp is missing"):
        list(tables.rows("item_attention", 3))
    with file.open("wb") as stream:
        torch.save(Harm(), stream)
    storage = by_hand[0].metadata.storage_data
    for index in storage:
        storage[index] = _StorageInfo("__0_0.distcp", 0, file.stat().st_size)
    with pytest.raises(UserError, match=r"__0_0\.distcp is damaged \(it names posix\.system\)"):
        list(tables.rows("item_attention", 3))
    assert not (tmp_path / "harmed").exists()

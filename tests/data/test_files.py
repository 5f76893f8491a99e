"""Files and folders that are there whole or not at all, and locks that end with their process."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from embeddings.distributed.process_group import process_group
from pipeline.files import is_locked, locked, output_folder, remove_folder, whole_file, write_whole
from pipeline.runs.checkpoint import final_path, partial_path
from pipeline.runs.checkpoint_writer import CheckpointWriter
from schemas.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from pipeline.files import locked
with locked(Path(sys.argv[1]), "refused"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_file_keeps_its_content_until_the_next_one_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    write_whole(file, "é\n")
    assert file.read_bytes() == "é\n".encode()
    with whole_file(file) as unfinished:
        unfinished.write_bytes(b"half")
        assert file.read_text() == "é\n"
    assert file.read_bytes() == b"half"
    with pytest.raises(ZeroDivisionError), whole_file(file) as unfinished:
        assert unfinished.write_bytes(b"quarter") / 0
    assert file.read_bytes() == b"half"
    write_whole(file, b"\x00")
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """What reaches the disk, in order: ``sync`` with a path, ``rename`` with the new name."""
    seen: list[tuple[str, Path]] = []
    sync, rename = os.fsync, Path.replace

    def noted_sync(handle: int) -> None:
        seen.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}"))))
        sync(handle)

    def noted_rename(path: Path, target: Path) -> Path:
        seen.append(("rename", target))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_rename)
    return seen


def test_content_is_on_the_disk_before_the_name_is(tmp_path: Path, disk: list[tuple[str, Path]]) -> None:
    write_whole(tmp_path / "file", "x")
    assert disk == [("sync", tmp_path / ".file.tmp"), ("rename", tmp_path / "file"), ("sync", tmp_path)]
    disk.clear()
    write_whole(tmp_path / "file", "y", sync=False)
    assert disk == [("rename", tmp_path / "file")]
    disk.clear()
    with output_folder(tmp_path / "out", [], overwrite=False) as folder:
        (folder / "a").mkdir()
        for name in ("a/x", "y"):
            (folder / name).write_text("1")
    *before, named, last = disk
    assert set(before) == {("sync", folder / name) for name in (".", "a", "a/x", "y")}
    assert (named, last) == (("rename", tmp_path / "out"), ("sync", tmp_path))


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, disk: list[tuple[str, Path]]) -> None:
    with process_group(torch.device("cpu")), CheckpointWriter(tmp_path, 1, {"plan.json": "{}"}) as writer:
        writer.save({"model": {"a": torch.ones(3)}}, 7, None)
        writer.wait()
    partial, final = partial_path(tmp_path, 7), final_path(tmp_path, 7)
    at = disk.index(("rename", final))
    files = {".", ".metadata", "checkpoint.json", "plan.json", "__0_0.distcp"}
    assert {path for _, path in disk[:at]} >= {partial / name for name in files}
    assert disk[at + 1] == ("sync", tmp_path)


def test_what_a_killed_process_left_of_a_file_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".file.json.tmp").write_text("a longer text than the next one")
    write_whole(tmp_path / "file.json", "new")
    assert (tmp_path / "file.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_a_folder_takes_its_place_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_folder(out, ["*.txt"], overwrite=False) as folder:
        (folder / "new.txt").write_text("1")
        (folder / ".work").mkdir()
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["new.txt"]
    with pytest.raises(FileNotFoundError), output_folder(out, ["*.txt"], overwrite=True) as folder:
        (folder / "absent/other.txt").write_text("2")
    assert [path.name for path in out.iterdir()] == ["new.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_another_process_has_finished_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def later(*arguments: object) -> object:
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.files.locked", locked)
            with output_folder(out, ["*.txt"], overwrite=False) as folder:
                (folder / "theirs.txt").write_text("1")
        return locked(*arguments)

    monkeypatch.setattr("pipeline.files.locked", later)
    with pytest.raises(UserError, match="out is not empty"), output_folder(out, ["*.txt"], overwrite=False):
        pass
    assert [path.name for path in out.iterdir()] == ["theirs.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"), output_folder(tmp_path / "file/a/out", [], overwrite=False):
        pass


def test_a_removed_folder_is_gone(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    remove_folder(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_lock_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert is_locked(file)
        with pytest.raises(UserError, match=r"^refused here$"), locked(file, "refused here", wait_s=0.2):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        process.kill()
        process.wait()
    assert not is_locked(file)
    with locked(file, "refused here"):
        assert is_locked(file)
    assert not is_locked(file)
    assert file.exists()


def test_looking_makes_no_file(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / "lock")
    assert not list(tmp_path.iterdir())


def test_a_forked_process_does_not_hold_the_lock(tmp_path: Path) -> None:
    """A worker that outlives the process which it was forked from must not keep a run locked."""
    file = tmp_path / "lock"
    context = multiprocessing.get_context("fork")
    end = context.Event()
    with locked(file, "refused"):
        child = context.Process(target=end.wait, args=(60,), daemon=True)
        child.start()
        assert is_locked(file)
    try:
        assert child.is_alive()
        assert not is_locked(file)
    finally:
        end.set()
        child.join()


def test_a_lock_file_that_cannot_be_made_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be locked: File exists"), locked(tmp_path / "file/lock", "refused"):
        pass


def test_a_lock_file_that_is_removed_while_it_is_held_locks_nobody_out(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with locked(file, "refused"):
        file.unlink()
    with locked(file, "refused"):
        assert is_locked(file)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    def fill() -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(OSError, match="No space left") as whole, whole_file(tmp_path / "a"):
        fill()
    assert whole.value.filename == str(tmp_path / "a")
    with pytest.raises(OSError, match="No space left") as folder, output_folder(tmp_path / "b", [], overwrite=False):
        fill()
    assert folder.value.filename == str(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []

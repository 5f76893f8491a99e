"""Checkpoints that ranks write together through their store: what they hold, what they cost, and ranks that die."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_saver import save

from embeddings.distributed.process_group import leave, process_group
from pipeline.errors import error_line
from pipeline.runs import checkpoint_writer
from pipeline.runs.checkpoint import checkpoints_in, final_path
from pipeline.runs.checkpoint_writer import CheckpointWriter, Copies
from tests.launcher import run_ranks, start_ranks, wait
from tests.runs import small_settings
from tests.trainers import CPU, Losses, Never, trainer_of

SOON = timedelta(seconds=5)


def content(checkpoint: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What the metadata says of all entries, and the bytes of all files of values."""
    metadata = FileSystemReader(checkpoint).read_metadata()
    places = {str(index): str(place) for index, place in metadata.storage_data.items()}
    told = {"entries": metadata.state_dict_metadata, "planner": metadata.planner_data, "places": places}
    return told, {file.name: file.read_bytes() for file in sorted(checkpoint.glob("*.distcp"))}


def saved_both_ways(data: Path, folder: Path) -> None:
    """A trained state, saved by us and by torch over gloo."""
    trainer = trainer_of(small_settings("epochs=1"), data)
    with CheckpointWriter(folder / "training", 1, {}) as writer:
        trainer.train(writer, Losses(), Never())  # type: ignore[arg-type]
        state = trainer.state_dict()
        dist.barrier()
        writer.save(state, 7, None)
        writer.wait()
    save(state, checkpoint_id=folder / "torch")


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_is_saved_is_what_torch_saves_over_a_group(ranks: int, few_users: Path, tmp_path: Path) -> None:
    run_ranks(ranks, saved_both_ways, few_users, tmp_path)
    ours, torchs = content(final_path(tmp_path / "training", 7)), content(tmp_path / "torch")
    assert ours[0] == torchs[0]
    assert len(ours[1]) == ranks
    assert ours[1] == torchs[1]


def cost(folder: Path) -> tuple[int, int, int]:
    """How many groups, connections of this process and keys of the store a writer adds, after it has saved."""
    store = dist.distributed_c10d._get_default_store()

    def now() -> tuple[int, int, int]:
        dist.barrier()
        established = [each for each in psutil.Process().net_connections("tcp") if each.status == "ESTABLISHED"]
        counted = len(dist.distributed_c10d._world.pg_map), len(established), store.num_keys()
        dist.barrier()
        return counted

    before = now()
    with CheckpointWriter(folder, 1, {}) as writer:
        for step in (1, 2):
            writer.save({"value": torch.ones(3), "random": {str(dist.get_rank()): "state"}}, step, None)
        writer.wait()
        added = [after - former for after, former in zip(now(), before, strict=True)]
    return added[0], added[1], added[2]


def test_ranks_meet_in_a_star_and_leave_nothing_in_the_store(tmp_path: Path) -> None:
    # Each rank has one connection more, to the store in the first one's process, which also has the other ends of all.
    assert run_ranks(4, cost, tmp_path) == [(0, 5, 0), (0, 1, 0), (0, 1, 0), (0, 1, 0)]


def die_while_writing(rank: int, folder: Path, of: int) -> None:
    """Rank ``of`` is killed when its part of the second checkpoint is on disk; the others tell their error."""
    checkpoint_writer.TIMEOUT = SOON
    write_data = checkpoint_writer.HashingWriter.write_data

    def die(writer: Any, *arguments: Any) -> Any:
        found = write_data(writer, *arguments)
        if rank == of and "000002" in str(writer.path):
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    checkpoint_writer.HashingWriter.write_data = die  # type: ignore[method-assign]
    with process_group(CPU), CheckpointWriter(folder / "checkpoints", 9, {}) as writer:
        state = {"value": torch.full((10,), rank), "random": {str(rank): rank}}
        try:
            for step in (1, 2, 3):
                writer.save(state, step, None)
        except BaseException as error:
            (folder / str(rank)).write_text(error_line(error) or repr(error))
            leave(1)
    leave(0)


@pytest.mark.parametrize("of", [0, 1, 2])
def test_a_rank_that_dies_ends_the_others_with_a_line(of: int, tmp_path: Path) -> None:
    began = time.monotonic()
    codes = wait(start_ranks(3, die_while_writing, tmp_path, of))
    assert codes == [-signal.SIGKILL if rank == of else 1 for rank in range(3)]
    assert time.monotonic() - began < 30 * SOON.total_seconds()
    for rank in {0, 1, 2} - {of}:
        line = (tmp_path / str(rank)).read_text()
        assert "the checkpoint of step 2 cannot be written: " in line
        assert line.endswith("; the last one is of step 1")
        assert "\n" not in line
    if of:
        assert f"nothing has come from rank {of} for 5 s; " in (tmp_path / "0").read_text()
    assert [checkpoint.step for checkpoint in checkpoints_in(tmp_path / "checkpoints")] == [1]


def fail_on_one(folder: Path, of: int) -> str:
    """The error of each rank where one of them cannot write."""
    write_data = checkpoint_writer.HashingWriter.write_data

    def fail(*arguments: Any) -> Any:
        if dist.get_rank() == of:
            raise OSError(28, "No space left on device")
        return write_data(*arguments)

    checkpoint_writer.HashingWriter.write_data = fail  # type: ignore[method-assign]
    with CheckpointWriter(folder, 9, {}) as writer:
        writer.save({"value": torch.ones(3)}, 1, None)
        try:
            writer.wait()
        except ValueError as error:
            return str(error)
    return "written"


@pytest.mark.parametrize("of", [0, 2])
def test_what_fails_on_one_rank_fails_on_all(of: int, tmp_path: Path) -> None:
    line = f"{tmp_path}: the checkpoint of step 1 cannot be written: no space left; there is none yet"
    assert run_ranks(3, fail_on_one, tmp_path, of) == [line] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_from_a_gpu_are_pinned_kept_and_complete() -> None:
    copies = Copies()
    whole = torch.zeros(1 << 26, device="cuda")
    first, part, on_cpu = copies.of([whole, whole[5:7], torch.ones(2)])
    whole += 1
    assert first.device == part.device == on_cpu.device == CPU
    assert first.is_pinned()
    assert not first.any()
    assert not part.any()
    place = first.data_ptr()
    del first, part
    (again,) = copies.of([whole])
    assert again.data_ptr() == place
    assert bool((again == 1).all())

"""What TensorBoard shows of a run that goes on, read as TensorBoard reads a folder of event files."""

import os
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.runs.run_folder import read_step_log
from pipeline.train.event_file import EventWriter, ahead_of_clock
from tests.runs import Run, slow_steps, small_settings

HOUR = 3600


def shown(folder: Path) -> list[tuple[int, float]]:
    """Steps and values of the training loss."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [(point.step, point.value) for point in accumulator.Scalars("loss/train")]


@pytest.mark.slow
def test_a_run_that_goes_on_after_the_clock_went_back(few_users: Path, tmp_path: Path) -> None:
    settings = small_settings("log_every=1")
    run = Run(1, settings, few_users, tmp_path / "run", slow_steps, (1,)).finish()
    (former,) = run.folder.glob("tensorboard/*")
    # Written by a clock that was an hour ahead of the one that the run goes on with.
    begun = int(former.name.split(".")[3])
    later = former.rename(former.with_name(former.name.replace(str(begun), str(begun + HOUR))))
    os.utime(later, (begun + HOUR + 60, begun + HOUR + 60))
    Run(1, settings, few_users, run.folder).finish()
    losses = [(line["step"], line["loss"]) for line in read_step_log(run.folder / "losses.jsonl")]
    points = shown(run.folder / "tensorboard")
    assert [step for step, _ in points] == [step for step, _ in losses]
    assert [value for _, value in points] == pytest.approx([loss for _, loss in losses])


@pytest.mark.parametrize("clock", [-HOUR, 0, HOUR])
def test_what_came_after_the_checkpoint_is_purged(clock: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, 10, 1.0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + clock)
    write(tmp_path, 6, 12, 2.0)
    monkeypatch.setattr(time, "time", lambda: now + 2 * clock)
    write(tmp_path, 9, 14, 3.0)
    assert shown(tmp_path) == [
        *((step, 1.0) for step in range(1, 6)),
        *((step, 2.0) for step in range(6, 9)),
        *((step, 3.0) for step in range(9, 15)),
    ]


def write(folder: Path, first: int, last: int, value: float) -> None:
    """Write steps as a start does that goes on after the step before ``first``."""
    writer = EventWriter(folder, first if first > 1 else 0, ahead_of_clock(folder))
    for step in range(first, last + 1):
        writer.add_scalar("loss/train", value, step)
    writer.close()


def test_a_full_disk_is_told_with_the_file(few_users: Path, tmp_path: Path) -> None:
    run = Run(1, small_settings("log_every=1", "epochs=200"), few_users, tmp_path / "run", small_event_files)
    assert run.wait() == [1]
    assert "/tensorboard/events.out.tfevents." in run.complaint()
    assert run.complaint().endswith(": no space left")


def small_event_files(rank: int) -> None:
    """Sabotage: the disk is full for the thread that writes events after some of them."""
    import errno

    from tensorboard.summary.writer import record_writer

    write, written = record_writer.RecordWriter.write, []

    def full(self: object, data: bytes) -> None:
        written.append(data)
        if len(written) > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    record_writer.RecordWriter.write = full

"""Training goes on with another number of ranks, at an epoch's start and within one."""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipeline.runs.checkpoint import last_checkpoint
from pipeline.runs.checkpoint_files import keys_in
from pipeline.runs.run_folder import read_step_log
from pipeline.stream.epoch_plan import Change, steps_per_epoch
from pipeline.stream.history_stream import HistoryStream
from tests.launcher import PATIENCE_S, free_port
from tests.runs import SMALL, Run, small_settings
from tests.torchx_jobs import last_step, wait_until

Key = tuple[int, int]
"""User and timestamp, which name a target."""


@pytest.fixture(scope="module")
def data(many_users: Path) -> Path:
    return many_users


def trains_on(rank: int, log: Path, stop_at: int | None = None, by: signal.Signals = signal.SIGKILL) -> None:
    """Sabotage: write down what each step is trained on, and let the last rank get a signal after a step."""
    from pipeline.train import trainer
    from pipeline.train.pipeline import ClickTask

    ranks, forward, agree = int(os.environ["WORLD_SIZE"]), ClickTask.forward, trainer.agree
    lines = (log / f"{rank}.jsonl").open("w", buffering=1)

    def noted(self: ClickTask, batch: Any, *arguments: Any) -> Any:
        keys = [batch.user_id_U[batch.user_T].tolist(), batch.timestamp_T.tolist()]
        place = [int(word.split()[1]) for word in batch.origin.split(", ")[1:3]]
        lines.write(json.dumps([place, list(zip(*keys, strict=True)), torch.initial_seed()]) + "\n")
        return forward(self, batch, *arguments)

    def stopped(step: int, *arguments: Any) -> Any:
        if step == stop_at and rank == ranks - 1:
            os.kill(os.getpid(), by)
        return agree(step, *arguments)

    ClickTask.forward, trainer.agree = noted, stopped  # type: ignore[method-assign]


def noted(log: Path, ranks: int) -> list[tuple[tuple[int, int], list[Key], int]]:
    """(epoch, step), targets and seed, of each step of each rank."""
    lines = [line for rank in range(ranks) for line in (log / f"{rank}.jsonl").read_text().splitlines()]
    return [(tuple(place), [tuple(key) for key in keys], seed) for place, keys, seed in map(json.loads, lines)]


def targets_of_an_epoch(data: Path) -> int:
    training = small_settings()
    return HistoryStream(data, "train", training.stream, seed=1, shuffle=True).targets


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_two_ranks_then_one_then_three(seed: int, data: Path, tmp_path: Path) -> None:
    """They are killed or stopped at any step of an epoch, and every target of it is trained on once."""
    draw = random.Random(seed)
    signals = draw.sample([signal.SIGKILL, signal.SIGTERM], 2)
    targets, sizes = targets_of_an_epoch(data), [draw.choice([8, 10]) for _ in range(3)]
    seen: dict[tuple[int, int], list[Key]] = {}
    changes: list[Change] = []
    for number, (ranks, size) in enumerate(zip((2, 1, 3), sizes, strict=True)):
        done = sum(change.steps for change in changes)
        stop_at, by = None, signals[number % 2]
        if number < 2:
            # Late enough for two checkpoints to be begun: then the first is whole.
            left = steps_per_epoch(targets, ranks, size, changes) - done
            stop_at = done + draw.randrange(8, (left // 2, left - 2)[number])
        (log := tmp_path / str(number)).mkdir()
        settings = small_settings(
            f"stream.batch_size={size}", "checkpoint.every=3", "checkpoint.delta_every=2", "validation.every=11"
        )
        run = Run(ranks, settings, data, tmp_path / "run", trains_on, (log, stop_at, by))
        codes = run.wait()
        if number == 2 or by == signal.SIGTERM:
            assert codes == [0] * ranks, run.said()
        else:
            assert codes[-1] == -signal.SIGKILL
        if number:
            former = changes[-1]
            left = targets - sum(change.world * change.batch_size * change.steps for change in changes)
            steps = steps_per_epoch(targets, ranks, size, changes)
            said = f"{ranks} rank{'s' if ranks > 1 else ''} instead of {former.world}"
            if size != former.batch_size:
                said += f" and batches of {size} targets instead of {former.batch_size}"
            assert (
                f"goes on after step {done} with {said} "
                f"({left:,} targets of the epoch left, {steps - done} step{'s' if steps - done > 1 else ''}), "
                f"{steps + steps_per_epoch(targets, ranks, size)} steps on {ranks} process"
            ) in run.said()
        # What was done after the last checkpoint is done again.
        last = last_checkpoint(tmp_path / "run" / "checkpoints")
        assert last is not None
        assert number == 2 or done < last.step <= stop_at + 1
        for place, keys, _ in noted(log, ranks):
            if number == 2 or place < (0, last.step):
                seen.setdefault(place, []).extend(keys)
        if number < 2:
            changes.append(Change(ranks, size, last.step - done))
    of_epoch = [Counter(key for (of, _), keys in seen.items() if of == epoch for key in keys) for epoch in (0, 1)]
    assert len(of_epoch[0]) == targets
    assert set(of_epoch[0].values()) == {1}
    assert of_epoch[0] == of_epoch[1]
    # Steps are counted on, and an epoch has as many as it was made in.
    ends = [steps_per_epoch(targets, 3, sizes[2], changes)]
    ends.append(ends[0] + steps_per_epoch(targets, 3, sizes[2]))
    assert sorted(seen) == [(0, step) for step in range(ends[0])] + [(1, step) for step in range(ends[1] - ends[0])]
    losses = [line["step"] for line in read_step_log(tmp_path / "run" / "losses.jsonl")]
    assert losses == list(range(1, ends[1] + 1))
    validated = [line["step"] for line in read_step_log(tmp_path / "run" / "validations.jsonl")]
    assert validated == sorted({*range(11, ends[1], 11), *ends})
    test = json.loads((tmp_path / "run" / "test.json").read_text())
    assert test["steps"] == ends[1]


def test_at_the_start_of_an_epoch_and_ranks_that_were_not_there(data: Path, tmp_path: Path) -> None:
    """Nothing is left of an epoch that is done; a new rank draws as if it had been there from the beginning."""
    Run(1, small_settings("epochs=1"), data, tmp_path / "run").finish()
    (log := tmp_path / "log").mkdir()
    last = Run(2, small_settings("epochs=2"), data, tmp_path / "run", trains_on, (log,)).finish()
    assert "with 2 ranks instead of 1, " in last.said()
    steps = [line["step"] for line in read_step_log(last.folder / "losses.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    # `torch.initial_seed` is part of a generator's state: that of the first rank is from the checkpoint.
    assert [noted(log, 2)[place][2] for place in (0, -1)] == [1, 2]
    saved = last_checkpoint(last.folder / "checkpoints")
    assert saved is not None
    assert not any(key.startswith("stream.changes") for key in keys_in(saved.path)), "of that epoch alone"


@pytest.mark.slow
def test_torchrun_goes_on_with_the_hosts_that_are_left(data: Path, tmp_path: Path) -> None:
    """Of two hosts, each a torchrun with a rank, one is lost, with all that runs on it."""
    run, port = tmp_path / "run", free_port()

    def host(name: str) -> subprocess.Popen[bytes]:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"),
            *("--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"),
            *("--local-addr", "127.0.0.1", "--rdzv-conf"),
            f"is_host={name == 'first'},last_call_timeout=10,keep_alive_interval=2,keep_alive_max_attempt=3",
            *("-m", "--", "jobs.cli", "train", "--data", str(data), "--run", str(run), *SMALL),
            *("epochs=1", "stream.batch_size=1", "validation.every=1000"),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with (tmp_path / name).open("w") as said:
            return subprocess.Popen(command, stdout=said, stderr=said, env=environment)

    hosts = [host("first"), host("second")]
    try:
        wait_until(lambda: last_step(run) >= 10 or any(each.poll() is not None for each in hosts), "some steps")
        lost = psutil.Process(hosts[1].pid)
        for process in [*lost.children(recursive=True), lost]:
            process.kill()
        said = tmp_path / "first"
        assert hosts[0].wait(PATIENCE_S) == 0, said.read_text()
        # Whichever of them had the first rank has told it; the one that is left goes on alone.
        assert "with 1 rank instead of 2 (" in said.read_text()
        targets = targets_of_an_epoch(data)
        changed = json.loads((run / "job.json").read_text())["starts"][-1]["step"]
        assert json.loads((run / "test.json").read_text())["steps"] == targets - changed
    finally:
        for each in hosts:
            each.kill()
            each.wait()

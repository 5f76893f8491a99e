"""Processes that train on gloo end in order, and with the right exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from embeddings.distributed.process_group import process_group, rank_environment
from tests.launcher import PATIENCE_S, free_port

ROOT = Path(__file__).parents[2]

TRAIN = """
import torch
from embeddings.distributed.process_group import leave, process_group
from embeddings.loss import click_loss
from tests.toy_model import batch_of, model_of, settings_of, sharded_like
torch.set_num_threads(1)
settings = settings_of("dare")
with process_group(torch.device("cpu")):
    model, losses = sharded_like(model_of(settings)), []
    for step in range(5):
        batch = batch_of(settings, seed=step)
        loss = click_loss(model(batch), batch.label_T)
        loss.backward()
        losses.append(loss.item())
print("losses", *losses)
leave(0)
"""


def test_one_process_needs_no_launcher() -> None:
    with process_group(torch.device("cpu")) as group:
        assert (group.size(), group.rank()) == (1, 0)
        assert dist.is_initialized()
    assert not dist.is_initialized()


def test_leaving_runs_exit_functions_flushes_and_keeps_the_code() -> None:
    program = (
        "import atexit; from embeddings.distributed.process_group import leave; "
        "atexit.register(print, 'at exit'); print('said'); leave(3)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stdout) == (3, "said\nat exit\n")


def start(ranks: int) -> list[tuple[int, str]]:
    """Exit code and output of each rank of a short training in fresh interpreters."""
    port = free_port()
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | rank_environment(rank, ranks, port),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=PATIENCE_S)[0] for process in running]
    return [(process.returncode, output) for process, output in zip(running, outputs, strict=True)]


def assert_all_left_in_order(ranks: int) -> None:
    ended = start(ranks)
    for code, output in ended:
        assert code == 0, output
        assert "terminate called" not in output
        assert output.splitlines()[-1].startswith("losses ")
    assert len({output.splitlines()[-1] for _, output in ended}) == 1


@pytest.mark.slow
def test_two_ranks_leave_in_order() -> None:
    assert_all_left_in_order(2)


@pytest.mark.slow
def test_two_ranks_leave_in_order_fifty_times() -> None:
    for _ in range(50):
        assert_all_left_in_order(2)

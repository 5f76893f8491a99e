"""The device of a process: what DEVICE says, what the machine has, and ranks that do not have the same."""

import os
import resource
import socket
import time
from pathlib import Path

import pytest
import torch

from embeddings.distributed.process_group import TIMEOUT, Meeting, process_group
from jobs import device
from jobs.device import gpus, own_device
from jobs.ranks import on_all_ranks
from pipeline.versions import fbgemm_has_cuda
from schemas.errors import UserError
from tests.launcher import start_ranks, wait
from tests.runs import Run, small_settings

CUDA_BUILD = torch.version.cuda is not None or fbgemm_has_cuda()
NO_SUCH_GPU = "77"
"""On no machine, with whatever build, can torch use it."""

cpu_build = pytest.mark.skipif(CUDA_BUILD, reason="says what a build without CUDA is told")


@pytest.fixture(scope="module")
def data(few_users: Path) -> Path:
    return few_users


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    """Device files of a machine with one GPU, whose driver may work or not."""
    for name in ("null", "nvidiactl", "nvidia-uvm", "nvidia0"):
        (tmp_path / name).touch()
    return tmp_path


# What decides.


@cpu_build
def test_a_cpu_build_on_a_machine_without_a_gpu_computes_on_the_cpu(dev: Path) -> None:
    (dev / "nvidia0").unlink()  # The driver's other files are there with no GPU too.
    assert gpus({}, dev) == 0
    assert gpus({"DEVICE": ""}, dev) == 0


@cpu_build
@pytest.mark.parametrize(
    ("environment", "sign"),
    [
        ({}, "there is a GPU ("),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES is 0,1, but"),
        ({"DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": ""}, "DEVICE=cuda is set, but"),
    ],
)
def test_a_gpu_that_the_build_cannot_use_is_one_clear_line(dev: Path, environment: dict[str, str], sign: str) -> None:
    with pytest.raises(UserError) as error:
        gpus(environment, dev)
    line = str(error.value)
    assert line.startswith(f"{socket.gethostname()}: {sign}")
    assert f"but torch {torch.__version__} is built without CUDA: install requirements/cuda.txt" in line
    assert line.endswith("; mend that, or set DEVICE=cpu to compute on the CPU")
    assert "\n" not in line


@pytest.mark.parametrize(
    "environment",
    [
        {"DEVICE": "cpu"},
        {"DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": "0"},
        {"CUDA_VISIBLE_DEVICES": ""},
        {"CUDA_VISIBLE_DEVICES": "-1"},
    ],
)
def test_a_gpu_can_be_left_alone(dev: Path, environment: dict[str, str]) -> None:
    assert gpus(environment, dev) == 0


def test_device_is_cpu_or_cuda(dev: Path) -> None:
    with pytest.raises(UserError, match=r"^DEVICE=gpu: must be cpu or cuda; "):
        gpus({"DEVICE": "gpu"}, dev)


def test_the_cpu_hides_the_gpus_from_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert own_device() == torch.device("cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "2 processes on a node with 1 GPU, and each needs one"),
        ({"LOCAL_RANK": "3"}, "4 processes on a node with 1 GPU, and"),
    ],
)
def test_more_ranks_than_gpus_are_refused_before_one_is_touched(
    environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "gpus", lambda _: 1)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=said):
        own_device()


# Several ranks.


def set_environment(rank: int, of: set[int], changes: dict[str, str]) -> None:
    """Sabotage: some ranks have another environment; a variable that is set to "" is not set."""
    if rank in of:
        os.environ.update(changes)


@pytest.mark.parametrize(("ranks", "broken"), [(1, 0), (3, 0), (3, 2)])
def test_a_rank_without_its_gpu_ends_all_with_its_line(ranks: int, broken: int, data: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    changes = {"DEVICE": "", "CUDA_VISIBLE_DEVICES": NO_SUCH_GPU}
    run = Run(ranks, small_settings(), data, tmp_path / "run", set_environment, ({broken}, changes))
    assert run.wait() == [1] * ranks
    assert f"CUDA_VISIBLE_DEVICES is {NO_SUCH_GPU}, but torch" in run.complaint()
    assert "DEVICE=cpu" in run.said(broken)
    assert not (tmp_path / "run").exists()
    # None has waited for another one in a collective.
    assert time.monotonic() - began < TIMEOUT.total_seconds() / 2


def test_a_wrong_device_is_told_once(data: Path, tmp_path: Path) -> None:
    run = Run(2, small_settings(), data, tmp_path / "run", set_environment, ({0, 1}, {"DEVICE": "tpu"}))
    assert run.wait() == [1, 1]
    assert "DEVICE=tpu: must be cpu or cuda" in run.complaint()


def meet(rank: int, folder: Path, kinds: tuple[str, ...]) -> None:
    meeting = Meeting.join()
    try:
        with process_group(torch.device(kinds[rank]), meeting):
            said = "met"
    except UserError as error:
        said = str(error)
    (folder / str(rank)).write_text(said)
    # The first one's ``meeting`` keeps the store, which the others may still be reading.
    until = time.monotonic() + 60
    while rank == 0 and len(list(folder.iterdir())) < len(kinds) and time.monotonic() < until:
        time.sleep(0.01)
    del meeting


@pytest.mark.parametrize(
    ("kinds", "first", "rank", "other"),
    [(("cpu", "cpu", "cuda"), "cpu", 2, "cuda"), (("cuda", "cpu", "cpu"), "cuda", 1, "cpu")],
)
def test_ranks_of_two_kinds_are_refused_by_all(
    kinds: tuple[str, ...], first: str, rank: int, other: str, tmp_path: Path
) -> None:
    assert wait(start_ranks(3, meet, tmp_path, kinds)) == [0, 0, 0]
    host = socket.gethostname()
    said = {(tmp_path / str(each)).read_text() for each in range(3)}
    assert said == {
        f"rank 0 computes with {first} on {host}, rank {rank} with {other} on {host}; all ranks need the same kind of "
        "device: mend the one that lacks CUDA, or set DEVICE=cpu for all"
    }


def note_limit(rank: int, folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    def work(_: torch.device) -> None:
        (folder / str(rank)).write_text(str(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))

    on_all_ranks(work)


def test_a_rank_may_open_as_many_files_as_the_system_grants(tmp_path: Path) -> None:
    assert wait(start_ranks(1, note_limit, tmp_path)) == [0]
    assert (tmp_path / "0").read_text() == str(resource.getrlimit(resource.RLIMIT_NOFILE)[1])

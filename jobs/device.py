"""The device that a process computes on: what ``DEVICE`` in the environment says, or else what the machine has.

A machine with a GPU that cannot be used is an error, not a slow machine: the other ranks would wait for it in NCCL, and
a rank alone would take days in place of hours.
"""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.versions import fbgemm_has_cuda, installed
from schemas.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and a machine without a GPU needs none of it here
    import torch

HIDDEN = ("", "-1", "NoDevFiles")
"""Values of ``CUDA_VISIBLE_DEVICES`` by which a user or a scheduler leaves a process no GPU."""


def own_device() -> "torch.device":
    """Return this rank's device: the GPU of its number on its node, or the CPU.

    On the CPU it also hides the GPUs that the machine may have from all that asks torch for them.

    Raises:
        UserError: see `gpus`; the node has more ranks than GPUs; a GPU does not work.
    """
    import torch

    count = gpus(os.environ)
    if not count:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return torch.device("cpu")
    # torchrun numbers the processes of a node; without a launcher the first GPU is taken.
    rank, ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Before NCCL is touched: it would find out too, with a trace, after others have begun to wait.
    if max(ranks, rank + 1) > count:
        have = f"{count} GPU{'s' if count > 1 else ''}"
        raise UserError(_line(f"{max(ranks, rank + 1)} processes on a node with {have}, and each needs one of its own"))
    device = torch.device("cuda", rank)
    try:
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except RuntimeError as error:
        raise UserError(_line(f"GPU {rank} does not work ({_first_line(error)})")) from None
    return device


def gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """Return how many GPUs a process may use; 0: it is to compute on the CPU.

    Args:
        environment: of the process; ``DEVICE`` and ``CUDA_VISIBLE_DEVICES`` matter.
        devices: folder of the machine's device files.

    Raises:
        UserError: ``DEVICE`` is neither ``cpu`` nor ``cuda``; the machine has a GPU, or is asked for one, and it cannot
            be used: no driver, or a build of torch or fbgemm-gpu without CUDA.
    """
    sign = _sign_of_a_gpu(environment, devices)
    if sign is None:
        return 0
    import torch

    if (obstacle := _obstacle()) is not None:
        raise UserError(_line(f"{sign}, but {obstacle}"))
    return torch.cuda.device_count()


def forced_kind(environment: Mapping[str, str]) -> str | None:
    """Return what ``DEVICE`` says, ``cpu`` or ``cuda``; None: nothing.

    Raises:
        UserError: it says something else.
    """
    kind = environment.get("DEVICE") or None
    if kind not in (None, "cpu", "cuda"):
        raise UserError(f"DEVICE={kind}: must be cpu or cuda; if it is not set, the machine decides")
    return kind


def _sign_of_a_gpu(environment: Mapping[str, str], devices: Path) -> str | None:
    """What says that a process is to compute on a GPU, in words; None: nothing does."""
    forced = forced_kind(environment)
    if forced is not None:
        return "DEVICE=cuda is set" if forced == "cuda" else None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return None if visible in HIDDEN else f"CUDA_VISIBLE_DEVICES is {visible}"
    # Device files, and not what the driver tells in /proc: that is seen in containers too that were given no GPU.
    if found := sorted(devices.glob("nvidia[0-9]*")):
        return f"there is a GPU ({found[0]})"
    # A driver that has not been loaded leaves no file. Whoever installs this build has a GPU in mind.
    return "fbgemm-gpu is installed in its build for CUDA" if fbgemm_has_cuda() else None


def _obstacle() -> str | None:
    """Why the programs that are installed cannot use a GPU here; None: they can."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install requirements/cuda.txt (make setup)"
    if not fbgemm_has_cuda():
        build = f"fbgemm-gpu-cpu {installed('fbgemm-gpu-cpu')}"
        return f"{build} is built without CUDA: install requirements/cuda.txt (make setup)"
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()  # Its error says why.
        except Exception as error:
            return f"torch cannot use it ({_first_line(error)}): nvidia-smi tells more"
        return "torch cannot use it: nvidia-smi tells more"
    return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _line(what: str) -> str:
    return f"{socket.gethostname()}: {what}; mend that, or set DEVICE=cpu to compute on the CPU"

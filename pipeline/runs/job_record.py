"""``job.json`` of a run: when it was started, where, with what program, and how each start ended."""

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import LAST_WORDS, description
from pipeline.files import write_whole
from pipeline.runs.run_folder import RunFolder
from pipeline.versions import versions
from schemas.documents import json_document

PROGRAM = Path(__file__).parents[2]
"""Folder of the checkout, if the program is run from one."""


@contextmanager
def recorded(run: RunFolder, former: list[dict[str, Any]], step: int, device: torch.device) -> Iterator[None]:
    """Record this start and, after the block, its end. All ranks must call it; the first one writes.

    A process that is killed leaves a start without an end.

    Args:
        run: a run whose folder this process has locked.
        former: starts of the run before this one, what `RunFolder.starts` returns.
        step: step that the run goes on after, or 0.
        device: device of this rank.
    """
    topology = _topology(device)  # a collective: before the other ranks go on
    if dist.get_rank() > 0:
        yield
        return
    start = {
        "time": _now(),
        "step": step,
        "app": os.environ.get("TORCHX_JOB_ID"),
        "topology": topology,
        "versions": versions(),
        "git": git_state(PROGRAM),
    }
    _write(run, [*former, start])

    def failed(why: str) -> None:
        _write(run, [*former, start | {"ended": _now(), "how": "failed", "error": why}])

    LAST_WORDS.append(failed)
    try:
        yield
    except BaseException as error:
        # Also for Ctrl-C. Only a kill leaves no trace, and then the start without an end tells of it.
        failed(description(error))
        raise
    finally:
        LAST_WORDS.remove(failed)
    _write(run, [*former, start | {"ended": _now(), "how": "finished" if run.test_file.is_file() else "stopped"}])


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the revision that is checked out in ``folder`` and whether files differ from it; None: no checkout."""
    if not (folder / ".git").exists():
        return None
    try:
        revision, changes = (
            subprocess.run(
                # Without the locks a run never hinders a person who works in the checkout.
                ["git", "--no-optional-locks", "-C", str(folder), *command],
                capture_output=True,
                text=True,
                check=True,
                timeout=20,
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": revision, "modified": bool(changes)}


def _topology(device: torch.device) -> dict[str, Any]:
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, platform.node())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "ranks": len(hosts),
        # torchrun's number of agents, one on each node; without it, as many as there are names of hosts.
        "nodes": int(os.environ.get("GROUP_WORLD_SIZE", len(set(hosts)))),
        "hosts": sorted(set(hosts)),
        "device": device.type,
        "device_name": name,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _write(run: RunFolder, starts: list[dict[str, Any]]) -> None:
    write_whole(run.job_file, json_document(json.dumps({"starts": starts}, indent=1) + "\n"))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""torchx's own commands, with one line where torchx shows a trace for what is not there.

That is an image, a scheduler's client, its commands or its server. Mistakes in a job of ours and faults of the program
are reported as by `dare`, see `pipeline.errors`.
"""

import argparse
import subprocess
import sys
import warnings
from typing import NoReturn

from torchx.cli.cmd_base import SubCommand
from torchx.cli.cmd_cancel import CmdCancel
from torchx.cli.cmd_list import CmdList
from torchx.cli.cmd_log import CmdLog
from torchx.cli.cmd_run import CmdRun
from torchx.cli.cmd_status import CmdStatus
from torchx.runner.config import load_sections
from torchx.schedulers.local_scheduler import SignalException

from pipeline.errors import show_trace, tell

PACKAGES = {"botocore": "boto3", "google": "google-cloud-batch"}
"""Package of a module that is not called as its package is."""
CONTAINERS = ("local_docker", "kubernetes", "kubernetes_mcad", "aws_batch", "aws_sagemaker", "gcp_batch", "lsf")
"""Schedulers that start images."""
CLIENTS = {"docker": "Docker", "kubernetes": "Kubernetes", "urllib3": "the server", "botocore": "AWS"}
"""What cannot be reached or refuses, by the module whose errors say so."""


class Command(SubCommand):
    """A command of torchx that tells in one line what of the world outside has failed."""

    def run(self, args: argparse.Namespace) -> None:
        """Do what the command does; exit with 1, 70 or a signal's code where it fails."""
        # torchx warns and goes on without; the error that follows is told below, in one line.
        warnings.filterwarnings("ignore", message="failed to load kube config")
        scheduler = getattr(args, "scheduler", None) or _scheduler_of(args)
        try:
            super().run(args)
        except SignalException as signal:
            print(f"torchx: {scheduler}: interrupted, and so is the job", file=sys.stderr)
            sys.exit(128 + signal.sigval)
        except Exception as error:
            reason = _outside_failure(error)
            if reason is None:
                sys.exit(tell(error))
            show_trace(error, fault=False)
            _fail(scheduler, reason)


class Run(Command, CmdRun):
    """Submits a job, and waits for it if it is local."""

    def run(self, args: argparse.Namespace) -> None:
        """Refuse a job of ours that has no image where one is needed; submit it."""
        words = args.component_name_and_args
        # What stands behind `--` are arguments of the job, which may have an --image of its own.
        words = words[: words.index("--")] if "--" in words else words
        component = next(
            (word for word in words if word.startswith("dare.") or "jobs/torchx/components.py:" in word), None
        )
        given = any(word.partition("=")[0] == "--image" for word in words)
        if component and args.scheduler in CONTAINERS and not given:
            defaults = load_sections(prefix="component").get(component, {})
            if not defaults.get("image"):
                _fail(
                    args.scheduler,
                    f"starts containers; say with --image which one, after {component} (jobs/docker builds them)",
                )
        super().run(args)


class Status(Command, CmdStatus):
    """Shows the state of a job."""


class Log(Command, CmdLog):
    """Shows what a job prints."""


class List(Command, CmdList):
    """Lists the jobs of a scheduler."""


class Cancel(Command, CmdCancel):
    """Ends a job."""


def _scheduler_of(args: argparse.Namespace) -> str:
    handle = getattr(args, "app_handle", None) or getattr(args, "identifier", "")
    return str(handle).partition(":")[0]


def _outside_failure(error: Exception) -> str | None:
    """What of the world outside has failed, or None if nothing of it has."""
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        return f"needs a package that is not installed: pip install {PACKAGES.get(module, module)}"
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} is not on this machine"
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error.cmd[0]} ended with {error.returncode}; is the cluster up, and this machine part of it?"
    client = CLIENTS.get(type(error).__module__.partition(".")[0])
    if client is None:
        return None
    reason = " ".join(f"{getattr(error, 'status', '')} {getattr(error, 'reason', '') or error}".split())
    return f"{client} is not reachable, or refuses: {reason}"


def _fail(scheduler: str, reason: str) -> NoReturn:
    print(f"torchx: {scheduler}: {reason}", file=sys.stderr)
    sys.exit(1)

"""torchx's commands, with one line for what is not there: an image, a scheduler's client, its commands, its server."""

import argparse
import subprocess
import sys
import warnings

from torchx.cli.cmd_base import SubCommand
from torchx.cli.cmd_cancel import CmdCancel
from torchx.cli.cmd_list import CmdList
from torchx.cli.cmd_log import CmdLog
from torchx.cli.cmd_run import CmdRun
from torchx.cli.cmd_status import CmdStatus
from torchx.runner.config import load_sections
from torchx.schedulers.local_scheduler import SignalException

PACKAGES = {"botocore": "boto3", "google": "google-cloud-batch"}
"""What has a module of another name."""
CONTAINERS = ("local_docker", "kubernetes", "kubernetes_mcad", "aws_batch", "aws_sagemaker", "gcp_batch", "lsf")
"""Schedulers that start images."""
CLIENTS = {"docker": "Docker", "kubernetes": "Kubernetes", "urllib3": "the server", "botocore": "AWS"}
"""Whose errors are about what they cannot reach or may not do, by module."""


class OneLine(SubCommand):
    """A command of torchx whose failures of the world outside are told without a trace."""

    def run(self, args: argparse.Namespace) -> None:
        """Do what the command does."""
        warnings.filterwarnings("ignore", message="failed to load kube config")
        scheduler = getattr(args, "scheduler", None) or _scheduler_of(args)
        try:
            super().run(args)
        except SignalException as signal:
            print(f"torchx: {scheduler}: interrupted, and so is the job", file=sys.stderr)
            sys.exit(128 + signal.sigval)
        except Exception as error:
            reason = _reason(error)
            if reason is None:
                raise
            print(f"torchx: {scheduler}: {reason}", file=sys.stderr)
            sys.exit(1)


class Run(OneLine, CmdRun):
    """Submits a job, and waits for it if it is local."""

    def run(self, args: argparse.Namespace) -> None:
        """Refuse a job of ours that has no image where one is needed; submit it."""
        words = args.component_name_and_args
        words = words[: words.index("--")] if "--" in words else words
        component = next(
            (word for word in words if word.startswith("dare.") or "jobs/torchx/components.py:" in word), None
        )
        given = any(word.partition("=")[0] == "--image" for word in words)
        if component and args.scheduler in CONTAINERS and not given:
            defaults = load_sections(prefix="component").get(component, {})
            if not defaults.get("image"):
                print(
                    f"torchx: {args.scheduler}: starts containers; say with --image which one, after {component} "
                    "(jobs/docker builds them)",
                    file=sys.stderr,
                )
                sys.exit(1)
        super().run(args)


class Status(OneLine, CmdStatus):
    """State of a job."""


class Log(OneLine, CmdLog):
    """What a job prints."""


class List(OneLine, CmdList):
    """Jobs of a scheduler."""


class Cancel(OneLine, CmdCancel):
    """Ends a job."""


def _scheduler_of(args: argparse.Namespace) -> str:
    handle = getattr(args, "app_handle", None) or getattr(args, "identifier", "")
    return str(handle).partition(":")[0]


def _reason(error: Exception) -> str | None:
    """None: an error of the program."""
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
    told = " ".join(f"{getattr(error, 'status', '')} {getattr(error, 'reason', '') or error}".split())
    return f"{client} is not reachable, or refuses: {told}"

"""`torchx run`, with one line for what is not there: a scheduler's client, its commands, its server."""

import argparse
import subprocess
import sys

from docker.errors import DockerException
from torchx.cli.cmd_run import CmdRun

PACKAGES = {"botocore": "boto3", "google": "google-cloud-batch"}
"""What has a module of another name."""


class Run(CmdRun):
    """Takes the place of torchx's own, by an entry point."""

    def run(self, args: argparse.Namespace) -> None:
        """Submit a job, and wait for it if it is local."""
        try:
            super().run(args)
        except (ModuleNotFoundError, FileNotFoundError, subprocess.CalledProcessError, DockerException) as error:
            print(f"torchx: {args.scheduler}: {_reason(error)}", file=sys.stderr)
            sys.exit(1)


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        return f"needs a package that is not installed: pip install {PACKAGES.get(module, module)}"
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} is not on this machine"
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error.cmd[0]} ended with {error.returncode}; is the cluster up, and this machine part of it?"
    return f"Docker is not reachable: {' '.join(str(error).split())}"

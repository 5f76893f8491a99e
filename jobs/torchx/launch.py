"""A command of `dare` as a torchx job: processes on nodes, the shell line that starts them, environment and role."""

import logging
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torchx import specs

from jobs.device import forced_kind, gpus
from schemas.errors import UserError

NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
"""Names of jobs that all schedulers take, with what they add to it."""


@dataclass(frozen=True)
class Processes:
    """How many nodes a job has, and how many processes each node."""

    nodes: int
    per_node: int

    @classmethod
    def parse(cls, text: str, gpus: int) -> "Processes":
        """Read nodes, or nodes x processes of each.

        Args:
            text: such as ``2`` or ``2x8``; without the second number, one process for each GPU, or two on a CPU.
            gpus: GPUs of a node.

        Raises:
            UserError: another text, no node or no process, or more processes than GPUs.
        """
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
        if match is None:
            raise UserError(f"-j {text}: nodes, or nodes x processes of each, are wanted, such as 2 or 2x8")
        nodes, per_node = int(match[1]), int(match[2] or gpus or 2)
        if not nodes or not per_node:
            raise UserError(f"-j {text}: at least one node and one process are needed")
        if gpus and per_node > gpus:
            have = f"{gpus} GPU{'s' if gpus > 1 else ''}"
            raise UserError(
                f"-j {text}: {per_node} processes on nodes of {have}, and each needs one of its own; "
                "say --gpu or -h for other nodes, or set DEVICE=cpu"
            )
        return cls(nodes, per_node)


def check_training(arguments: Sequence[str], command: str = "train") -> None:
    """Find a mistake in the settings of a run before processes are started, and started again, to find it.

    Nothing is checked if a file of settings is not on this machine: it may be where the job will run.

    Args:
        arguments: arguments of the command.
        command: ``train`` or ``online``.

    Raises:
        UserError: no run can have these settings.
    """
    import typer.main

    from jobs.app import app
    from schemas.online import load_online
    from schemas.settings import load_settings
    from schemas.train import TrainSettings

    # The command's own parser, so that options here mean what they will mean in the job. ``resilient_parsing`` calls
    # nothing and asks for nothing.
    parser = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    given = parser.make_context(command, list(arguments), resilient_parsing=True).params
    files = [given["file"]] if command == "online" else given["config"] or []
    if not all(file is not None and file.is_file() for file in files):
        return
    overrides = given["overrides"] or ()
    try:
        settings = (
            load_online(given["file"], overrides).train
            if command == "online"
            else load_settings(TrainSettings, files, overrides)
        )
    except UserError as error:
        raise UserError(f"dare {command}: {error}") from None
    # FBGEMM tells of each library that it loads, on the root logger, whose lines torchx shows.
    logging.disable(logging.INFO)
    from embeddings.models import MODELS  # Takes a while to import.

    logging.disable(logging.NOTSET)

    name = settings.model.name
    if name not in MODELS:
        raise UserError(f"dare {command}: model.name: must be one of {', '.join(sorted(MODELS))} (not {name!r})")


def node(
    name: str | None, cores: int, gpus: int, mebibytes: int, devices: Mapping[str, str] | None = None
) -> specs.Resource:
    """Return what a job asks for on each node.

    Args:
        name: name of a node that torchx knows, in place of cores, gpus and mebibytes; or None.
        cores: cores of a node.
        gpus: GPUs of a node.
        mebibytes: memory of a node in MiB.
        devices: how many of other devices, such as RDMA adapters, by the scheduler's name for them; None: none.

    Raises:
        UserError: no such name, or a node without cores or memory, or devices that are no number.
    """
    if wrong := [f"{key}={count}" for key, count in (devices or {}).items() if not count.isdecimal() or not int(count)]:
        raise UserError(f"--devices {wrong[0]}: a name and how many of it are wanted, such as vpc.amazonaws.com/efa=4")
    counts = {key: int(count) for key, count in (devices or {}).items()}
    if name is not None:
        if name not in specs.named_resources:
            raise UserError(f"-h {name}: no such node; the shipped ones are named as the topologies of `dare plan`")
        named = specs.named_resources[name]
        return replace(named, devices=named.devices | counts)
    if cores < 1 or gpus < 0 or mebibytes < 1:
        raise UserError(
            f"--cpu {cores} --gpu {gpus} --memMB {mebibytes}: a node has cores and memory, and no less than 0 GPUs"
        )
    return specs.Resource(cores, gpus, mebibytes, devices=counts)


def gpus_of_node(name: str | None, said: int | None, image: str, env: Mapping[str, str]) -> tuple[int, str | None]:
    """Return how many GPUs each node has, and on which kind of device the ranks are to compute.

    Where nobody says how many, they are those of this machine: the job runs on it, or on others like it.

    Args:
        name: name of a node that torchx knows, or None.
        said: GPUs of a node as the user has said, or None.
        image: of a container, which has only what it is given; empty: none.
        env: environment of the job, besides this process's.

    Returns:
        GPUs of a node; ``cpu``, ``cuda``, or None: each rank decides by its machine.

    Raises:
        UserError: see `jobs.device.gpus`.
    """
    environment = {**os.environ, **env}
    if name in specs.named_resources:
        said = specs.named_resources[name].gpu
    found = said if said is not None else 0 if image else gpus(environment)
    # A node that was asked for with GPUs and has none that works is then an error, whatever else tells of them; and one
    # that was asked for without must not take those that belong to another job.
    asked = "cuda" if found else None if said is None else "cpu"
    return found, forced_kind(environment) or asked


@dataclass(frozen=True)
class Job:
    """A torchx job, but for the command of `dare` that it runs.

    Args:
        name: name of the job.
        image: image of the container; empty: the environment that torchx runs in.
        node: what the job asks for on each node.
        env: environment, besides what `dare` needs, or in place of it.
        mounts: mounts of the container, as torchx writes them.
        max_retries: how often the scheduler starts the job again.
        device: kind of device on which ranks compute, see `gpus_of_node`.
    """

    name: str
    image: str
    node: specs.Resource
    env: Mapping[str, str]
    mounts: Sequence[str]
    max_retries: int = 0
    device: str | None = None

    def ranks(
        self,
        command: str,
        arguments: Sequence[str],
        processes: str,
        *,
        rdzv_port: int,
        log_dir: str | None,
        max_restarts: int = 0,
    ) -> specs.AppDef:
        """Describe a command on several processes, which torchrun starts on each node.

        Args:
            command: name of a command of `dare`.
            arguments: arguments of the command.
            processes: nodes, or nodes x processes of each; see `Processes.parse`.
            rdzv_port: port on the first node where nodes meet; a single node takes a free port of its loopback.
            log_dir: folder for each process's output, or None.
            max_restarts: how often all processes are started again when one dies.

        Raises:
            UserError: no scheduler would take such a job.
        """
        if not 0 < rdzv_port < 65536:
            raise UserError(f"--rdzv_port {rdzv_port}: not a port")
        if max_restarts < 0:
            raise UserError(f"--max_restarts {max_restarts}: less than none")
        count = Processes.parse(processes, 0 if self.device == "cpu" else self.node.gpu)
        if count.nodes == 1:
            # Port 0: a free one, so that jobs side by side do not meet each other. Only nodes that must find one
            # another need to agree on a number.
            meeting = ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
        else:
            # The shell on each node knows the first one by a variable of the scheduler; on the first it may be unset.
            meeting = [f"--rdzv-endpoint=$${{{specs.macros.rank0_env}:=localhost}}:{rdzv_port}"]
        options = [
            f"--rdzv-id={specs.macros.app_id}",
            f"--nnodes={count.nodes}",
            f"--nproc-per-node={count.per_node}",
            f"--max-restarts={max_restarts}",
            # Standard output and error, to the scheduler's log and, with a folder, to a file for each process.
            "--tee=3",
            # Empty: it would stand before the number of the process in each line of the log.
            "--role=",
            *([f"--log-dir={log_dir}"] if log_dir else []),
            # `--`: else torchrun takes --run, and all else that begins like an option of its own, for itself.
            *("-m", "--", "jobs.cli", command, *arguments),
        ]
        line = " ".join(["-m torch.distributed.run --rdzv-backend=c10d", *meeting, shlex.join(options)])
        return self._app(command, line, self.node.cpu // count.per_node, count.nodes, {"c10d": rdzv_port})

    def single(self, command: str, arguments: Sequence[str], ports: Mapping[str, int] | None = None) -> specs.AppDef:
        """Describe a command that is one process, which listens on some ports, by their names.

        Other arguments, and errors, are those of `ranks`.
        """
        line = f"-m jobs.cli {shlex.join([command, *arguments])}"
        return self._app(command, line, self.node.cpu, 1, dict(ports or {}))

    def _app(self, command: str, line: str, cores: int, nodes: int, ports: dict[str, int]) -> specs.AppDef:
        if not NAME.fullmatch(self.name):
            raise UserError(
                f"--name {self.name}: not a name for a job: a letter, then up to 39 letters, digits and dashes, "
                "all lower case, no dash at the end"
            )
        if self.max_retries < 0:
            raise UserError(f"--max_retries {self.max_retries}: less than none")
        try:
            mounts = specs.parse_mounts(list(self.mounts))
        except (KeyError, ValueError) as error:
            raise UserError(f"--mounts {','.join(self.mounts)}: {error.args[0]}") from None
        env = _environment(cores, self.device) | dict(self.env)
        # Slurm's list of variables ends a value at its first comma: such values travel in the command line.
        with_comma = [f"{key}={value}" for key, value in env.items() if "," in value]
        # A container has its own Python; elsewhere it is the one that torchx runs in, even if its environment is not
        # active.
        # ``exec``: the scheduler's signals reach torchrun, which passes them on, and not a shell in between.
        start = ["exec", *(["env", *with_comma] if with_comma else []), "python" if self.image else sys.executable]
        # RDMA locks the memory that it sends from; with the usual soft limit NCCL's first message would fail.
        limits = "ulimit -S -l hard; " if self.device == "cuda" and nodes > 1 else ""
        role = specs.Role(
            name=command,
            image=self.image,
            entrypoint="bash",
            args=["-c", f"{limits}{shlex.join(start)} {line}"],
            env={key: value for key, value in env.items() if "," not in value},
            num_replicas=nodes,
            max_retries=self.max_retries,
            resource=self.node,
            port_map=ports,
            mounts=mounts,
        )
        return specs.AppDef(self.name, [role])


def _environment(cores: int, device: str | None) -> dict[str, str]:
    """Return the environment that processes of ``cores`` cores each need, which compute on a kind of device."""
    return {
        # On every rank, also where the scheduler does not pass this environment on.
        **({"DEVICE": device} if device else {}),
        # Each process would take all cores of its node, and results would depend on how many those are.
        "OMP_NUM_THREADS": str(max(1, cores)),
        # Threads that wait for each other sleep instead of spinning.
        "OMP_WAIT_POLICY": "PASSIVE",
        # Without it processes that torchrun starts again meet in the store of those that died, and wait for them.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "LOGLEVEL": "WARNING",  # what torchrun says of each start is not for the users of `dare`
    }

"""torchx components: `dare`'s commands as jobs (`torchx run dare.train ...`); see docs/jobs.md.

torchx reads this file's source: it knows `Optional`, `Dict` and `List` only, and looks for no postponed annotations.
"""

from typing import Dict, List, Optional

from torchx import specs

from jobs.torchx import launch


def train(
    *args: str,
    j: str = "1",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: Optional[int] = None,
    memMB: int = 4096,
    image: str = "",
    name: str = "dare-train",
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    devices: Optional[Dict[str, str]] = None,
    max_restarts: int = 3,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    log_dir: Optional[str] = None,
) -> specs.AppDef:
    """Train a model: `dare train`, one process a device.

    Args:
        args: arguments of `dare train`, after `--`
        j: nodes, or nodes x processes of each, e.g. 2x8; if not said, one process a GPU, or two on a CPU
        h: a node by name, e.g. h200-128x8, in place of cpu, gpu and memMB
        cpu: cores of a node
        gpu: GPUs of a node; if not said, those of this machine, and none in a container
        memMB: memory of a node in MiB
        image: container image; none: the environment that torchx runs in
        name: name of the job
        env: environment, K=V,K2=V2; values may have commas
        mounts: for containers, type=bind,src=/host,dst=/job[,readonly]
        devices: other devices of a node by the scheduler's name, e.g. vpc.amazonaws.com/efa=4 or rdma/hca=8
        max_restarts: how often the processes are started again, from the last checkpoint, when one dies
        max_retries: how often the scheduler starts the job again, from the last checkpoint, when it fails
        rdzv_port: port on the first node where several nodes meet; jobs that share nodes need different ones
        log_dir: folder for each process's standard output and error, beside the scheduler's own
    """
    if args and not image:  # an image may hold another version of the program
        launch.check_training(args)
    gpus, device = launch.gpus_of_node(h, gpu, image, env or {})
    node = launch.node(h, cpu, gpus, memMB, devices)
    job = launch.Job(name, image, node, env or {}, mounts or [], max_retries, device)
    return job.ranks("train", args, j, max_restarts=max_restarts, rdzv_port=rdzv_port, log_dir=log_dir)


def online(
    *args: str,
    j: str = "1",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: Optional[int] = None,
    memMB: int = 4096,
    image: str = "",
    name: str = "dare-online",
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    devices: Optional[Dict[str, str]] = None,
    max_restarts: int = 3,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    log_dir: Optional[str] = None,
) -> specs.AppDef:
    """Let a model learn day by day: `dare online`, one process a device.

    Args:
        args: arguments of `dare online`, after `--`
        j: nodes, or nodes x processes of each, e.g. 2x8; if not said, one process a GPU, or two on a CPU
        h: a node by name, e.g. h200-128x8, in place of cpu, gpu and memMB
        cpu: cores of a node
        gpu: GPUs of a node; if not said, those of this machine, and none in a container
        memMB: memory of a node in MiB
        image: container image; none: the environment that torchx runs in
        name: name of the job
        env: environment, K=V,K2=V2; values may have commas
        mounts: for containers, type=bind,src=/host,dst=/job[,readonly]
        devices: other devices of a node by the scheduler's name, e.g. vpc.amazonaws.com/efa=4 or rdma/hca=8
        max_restarts: how often the processes are started again, from the last checkpoint, when one dies
        max_retries: how often the scheduler starts the job again, from the last checkpoint, when it fails
        rdzv_port: port on the first node where several nodes meet; jobs that share nodes need different ones
        log_dir: folder for each process's standard output and error, beside the scheduler's own
    """
    if args and not image:  # an image may hold another version of the program
        launch.check_training(args, "online")
    gpus, device = launch.gpus_of_node(h, gpu, image, env or {})
    node = launch.node(h, cpu, gpus, memMB, devices)
    job = launch.Job(name, image, node, env or {}, mounts or [], max_retries, device)
    return job.ranks("online", args, j, max_restarts=max_restarts, rdzv_port=rdzv_port, log_dir=log_dir)


def evaluate(
    *args: str,
    j: str = "1",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: Optional[int] = None,
    memMB: int = 4096,
    image: str = "",
    name: str = "dare-evaluate",
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    devices: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    log_dir: Optional[str] = None,
) -> specs.AppDef:
    """Evaluate a checkpoint: `dare evaluate`, one process a device.

    Args:
        args: arguments of `dare evaluate`, after `--`
        j: nodes, or nodes x processes of each, e.g. 2x8; if not said, one process a GPU, or two on a CPU
        h: a node by name, e.g. h200-128x8, in place of cpu, gpu and memMB
        cpu: cores of a node
        gpu: GPUs of a node; if not said, those of this machine, and none in a container
        memMB: memory of a node in MiB
        image: container image; none: the environment that torchx runs in
        name: name of the job
        env: environment, K=V,K2=V2; values may have commas
        mounts: for containers, type=bind,src=/host,dst=/job[,readonly]
        devices: other devices of a node by the scheduler's name, e.g. vpc.amazonaws.com/efa=4 or rdma/hca=8
        max_retries: how often the scheduler starts the job again when it fails
        rdzv_port: port on the first node where several nodes meet; jobs that share nodes need different ones
        log_dir: folder for each process's standard output and error, beside the scheduler's own
    """
    gpus, device = launch.gpus_of_node(h, gpu, image, env or {})
    node = launch.node(h, cpu, gpus, memMB, devices)
    job = launch.Job(name, image, node, env or {}, mounts or [], max_retries, device)
    return job.ranks("evaluate", args, j, rdzv_port=rdzv_port, log_dir=log_dir)


def prepare(
    *args: str,
    cpu: int = 2,
    memMB: int = 4096,
    image: str = "",
    name: str = "dare-prepare",
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Turn logs of events into user-history shards: `dare prepare`.

    Args:
        args: arguments of `dare prepare`, after `--`
        cpu: cores
        memMB: memory in MiB
        image: container image; none: the environment that torchx runs in
        name: name of the job
        env: environment, K=V,K2=V2; values may have commas
        mounts: for containers, type=bind,src=/host,dst=/job[,readonly]
        max_retries: how often the scheduler starts the job again when it fails
    """
    job = launch.Job(name, image, launch.node(None, cpu, 0, memMB), env or {}, mounts or [], max_retries)
    return job.single("prepare", args)


def plan(
    *args: str,
    cpu: int = 2,
    memMB: int = 4096,
    image: str = "",
    name: str = "dare-plan",
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Plan a model's tables on a cluster, without its GPUs: `dare plan`.

    Args:
        args: arguments of `dare plan`, after `--`
        cpu: cores
        memMB: memory in MiB
        image: container image; none: the environment that torchx runs in
        name: name of the job
        env: environment, K=V,K2=V2; values may have commas
        mounts: for containers, type=bind,src=/host,dst=/job[,readonly]
    """
    job = launch.Job(name, image, launch.node(None, cpu, 0, memMB), env or {}, mounts or [])
    return job.single("plan", args)


def serve(
    *args: str,
    port: int = 8080,
    cpu: int = 2,
    memMB: int = 4096,
    image: str = "",
    name: str = "dare-serve",
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 3,
) -> specs.AppDef:
    """Answer requests over HTTP: `dare serve`, one process that listens on a port.

    Args:
        args: arguments of `dare serve` but for --port, after `--`; a container listens to all without --host
        port: port that it listens on
        cpu: cores
        memMB: memory in MiB
        image: container image; none: the environment that torchx runs in
        name: name of the job
        env: environment, K=V,K2=V2; values may have commas
        mounts: for containers, type=bind,src=/host,dst=/job[,readonly]
        max_retries: how often the scheduler starts the job again when it fails
    """
    job = launch.Job(name, image, launch.node(None, cpu, 0, memMB), env or {}, mounts or [], max_retries)
    # Nobody reaches the loopback of a container.
    said = any(each.partition("=")[0] == "--host" for each in args)
    host = ["--host", "0.0.0.0"] if image and not said else []
    return job.single("serve", [*args, *host, "--port", str(port)], {"http": port})

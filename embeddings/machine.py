"""What this machine can hold: settings that need far more are refused before they stall it.

`dare plan` does not ask: it is about another machine.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import psutil

from schemas.errors import UserError
from schemas.manifest import Manifest
from schemas.stream import StreamSettings

GIB = 2**30
THREADS_PER_CORE, FEW_THREADS = 16, 64
"""How many threads may wait for disks, for each core, and how many on any machine."""
TARGET_BYTES, BEHAVIOR_BYTES = 64, 32
"""Bytes of a target and of a behaviour of a batch on the host."""
IN_HAND = 2
"""Batches beside those that are prefetched: the one that is made, the one that is consumed."""
DENSE_COPIES = 5
"""Copies of the dense parameters: weights, gradients, DDP's buckets, Adam's two averages."""


def container_limit() -> int:
    """Bytes that the container of this process may use; without a limit, more than any machine has."""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            return int(Path(file).read_text())  # the text "max" where there is no limit
    return sys.maxsize


def host_memory() -> int:
    """Bytes of memory that this process could have if nothing else ran."""
    return min(psutil.virtual_memory().total, container_limit())


def check_threads(key: str, threads: int) -> None:
    """Refuse threads that this machine's cores cannot run.

    Raises:
        UserError: names the setting, by ``key``, and what is allowed.
    """
    cores = len(os.sched_getaffinity(0))
    most = max(FEW_THREADS, THREADS_PER_CORE * cores)
    if threads > most:
        raise UserError(f"{key}: at most {most} on this machine of {cores} cores (not {threads:,})")


def check_stream(settings: StreamSettings, manifest: Manifest) -> None:
    """Refuse threads that this machine's cores cannot run, and batches that its memory cannot hold.

    Raises:
        UserError: names the setting, what it needs and what there is.
    """
    check_threads("stream.threads", settings.threads)
    memory = host_memory()
    if settings.shuffle_memory > memory:
        raise UserError(
            f"stream.shuffle_memory: {_gib(settings.shuffle_memory)} is more than this machine has, {_gib(memory)}"
        )
    # With it comes torch, whose two seconds a command that prepares data need not wait for.
    from embeddings.workload import mean_load

    # No batch has more targets than its split.
    counts = manifest.counts
    targets = min(settings.batch_size, max(counts.train.targets, counts.validation.targets, counts.test.targets))
    targets_per_user, filled = mean_load(manifest, settings)
    lengths = [part.length for part in (settings.sequences or {}).values()] or [settings.history_length]
    behaviors = targets / targets_per_user * sum(lengths) * filled
    batch = targets * TARGET_BYTES + behaviors * BEHAVIOR_BYTES
    # No more batches are made ahead than an epoch has.
    epoch = -(-max(counts.train.targets, 1) // settings.batch_size)
    needed = int(batch * (min(settings.prefetch_batches, epoch) + IN_HAND))
    if needed > memory:
        raise UserError(
            f"stream.batch_size={settings.batch_size} and stream.prefetch_batches={settings.prefetch_batches}: batches "
            f"made ahead need about {_gib(needed)}, {_gib(int(batch))} each, and this machine has {_gib(memory)}; take "
            "smaller ones, or see `dare plan --data DIR`"
        )


def check_dense(hidden: Sequence[int], copies: int = 1, key: str = "model.hidden") -> None:
    """Refuse hidden layers whose weights this machine cannot hold.

    Args:
        hidden: their widths.
        copies: how many times there are such layers: for each task, or each expert.
        key: the setting that says the widths.

    Raises:
        UserError: names the setting, what it needs and what there is.
    """
    values = copies * sum(before * after for before, after in pairwise(hidden))
    needed, memory = values * 4 * DENSE_COPIES, host_memory()
    if needed > memory:
        raise UserError(
            f"{key}={list(hidden)}: the layers, their gradients and optimizer need about {_gib(needed)}, this "
            f"machine has {_gib(memory)}; take narrower ones, or see `dare plan`"
        )


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB"

"""Writes checkpoints while training goes on."""

import errno
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from pipeline.runs.checkpoint import RECORD, final_path, last_checkpoint, partial_path, prune, remove_leftovers


class CheckpointWriter:
    """Saves states of all ranks into ``folder``, one at a time, in a thread of its own.

    `save` copies the state, which is all that training waits for. The thread's collectives have a process group of
    their own, so that they never mix with training's. A checkpoint is written into a hidden folder, which the first
    rank renames when all ranks are done: it is whole or not there.

    All ranks must call the same methods in the same order.

    Args:
        folder: of the run's checkpoints.
        keep: the last so many stay, and the best.
        documents: text files to put beside each state, by name.
    """

    def __init__(self, folder: Path, keep: int, documents: Mapping[str, str]) -> None:
        self._folder, self._keep, self._documents = folder, keep, dict(documents)
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        dist.barrier()

    def save(self, state: Mapping[str, Any], step: int, score: float | None) -> None:
        """Begin to save ``state``; waits for the previous one first.

        Args:
            state: nested dictionaries, lists and tuples of tensors, sharded tensors and plain values.
            step: names the checkpoint.
            score: see `Checkpoint.score`.

        Raises:
            OSError: the previous one could not be written.
        """
        self.wait()
        self._writing = self._thread.submit(self._write, self._copy(state), step, score)

    def check(self) -> None:
        """Raise what `wait` would, if it is known by now."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until what was begun is whole, on the rank that asks.

        Raises:
            OSError: it could not be written; names the step and the last checkpoint that is whole.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=False)

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._copy(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(part) for part in value)
        if isinstance(value, ShardedTensor):
            on_cpu = all(shard.tensor.device.type == "cpu" for shard in value.local_shards())
            return value.clone() if on_cpu else value.cpu(process_group=self._group)
        return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value

    def _write(self, state: dict[str, Any], step: int, score: float | None) -> None:
        partial, final = partial_path(self._folder, step), final_path(self._folder, step)
        try:
            save(state, checkpoint_id=partial, process_group=self._group)
            if dist.get_rank() == 0:
                record = {"step": step, "score": score, "ranks": dist.get_world_size()}
                for name, content in (self._documents | {RECORD: json.dumps(record) + "\n"}).items():
                    (partial / name).write_text(content)
                partial.rename(final)
                prune(self._folder, self._keep)
        except (OSError, RuntimeError, CheckpointException) as error:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError(self._explain(error, step)) from error

    def _explain(self, error: BaseException, step: int) -> str:
        last = last_checkpoint(self._folder)
        whole = f"the last one is of step {last.step}" if last else "there is none yet"
        first = _first_cause(error)
        reason = "no space left" if getattr(first, "errno", None) == errno.ENOSPC else f"{first}".splitlines()[0]
        return f"{self._folder}: the checkpoint of step {step} cannot be written: {reason}; {whole}"


def _first_cause(error: BaseException) -> BaseException:
    """The error of the file system that is behind an error of torch.distributed.checkpoint, if one is."""
    if isinstance(error, CheckpointException):
        for wrapped, _ in error.failures.values():
            return _first_cause(wrapped)
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error

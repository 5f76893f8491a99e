"""Writes checkpoints while training goes on."""

import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from pipeline.errors import is_lost_contact, is_refusal, refusal_reason
from pipeline.runs.checkpoint import RECORD, final_path, last_checkpoint, partial_path, prune, remove_leftovers
from schemas.errors import UserError


class CheckpointWriter:
    """Saves states of all ranks into ``folder``, one at a time, in a thread of its own.

    `save` copies the state, which is all that training waits for. The thread's collectives have a process group of
    their own, so that they never mix with training's. A checkpoint is written into a hidden folder, which the first
    rank renames when all ranks are done: it is whole or not there.

    All ranks must call the same methods in the same order.

    Args:
        folder: folder of the run's checkpoints.
        keep: how many of the last checkpoints stay, beside the best one.
        documents: text files to put beside each state, by name.
    """

    def __init__(self, folder: Path, keep: int, documents: Mapping[str, str]) -> None:
        self._folder, self._keep, self._documents = folder, keep, dict(documents)
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            # Before the barrier below: no rank may write into a folder that is about to be removed.
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
            score: metric of the validation at this step if the model was better than ever before, else None.

        Raises:
            UserError: the previous one could not be written: the disk is full, another rank is gone.
        """
        self.wait()
        # The copy is made here, in the caller's thread: the next step changes the weights in place.
        self._writing = self._thread.submit(self._write, self._copy(state), step, score)

    def check(self) -> None:
        """Raise the error that `wait` would raise, if there is one by now; never waits."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until this rank's part of the checkpoint that was begun is written.

        Raises:
            UserError: it could not be written; names the step and the last checkpoint that is whole.
        """
        if self._writing is not None:
            # Forgotten before its error is raised: a second `wait` does not raise it again.
            writing, self._writing = self._writing, None
            writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Not waited for: training has done so where all went well. After an error another rank may be gone, and the
        # thread would wait for it in a collective.
        self._thread.shutdown(wait=False)

    def _copy(self, value: Any) -> Any:
        """Copy a state to the CPU: training goes on to change the original while the copy is written."""
        if isinstance(value, Mapping):
            return {key: self._copy(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(part) for part in value)
        if isinstance(value, ShardedTensor):
            # ``cpu()`` returns the tensor itself where it is on the CPU already. From a GPU it needs a group that can
            # carry CPU tensors: the writer's own, on gloo.
            on_cpu = all(shard.tensor.device.type == "cpu" for shard in value.local_shards())
            return value.clone() if on_cpu else value.cpu(process_group=self._group)
        return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value

    def _write(self, state: dict[str, Any], step: int, score: float | None) -> None:
        partial, final = partial_path(self._folder, step), final_path(self._folder, step)
        try:
            # A collective: it returns when the parts of all ranks are written and synced to disk.
            save(state, checkpoint_id=partial, process_group=self._group)
            if dist.get_rank() == 0:
                record = {"step": step, "score": score, "ranks": dist.get_world_size()}
                for name, content in (self._documents | {RECORD: json.dumps(record) + "\n"}).items():
                    (partial / name).write_text(content)
                # The record is in the folder before the folder has its name: whoever sees a checkpoint can tell its
                # step and score.
                partial.rename(final)
                # Only now may an older one go: there is a newer one that is whole.
                prune(self._folder, self._keep)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            # A disk that is full or another rank that is gone; anything else is a fault of the program.
            if (reason := _reason(error)) is not None:
                raise UserError(self._explain(reason, step)) from error
            raise

    def _explain(self, reason: str, step: int) -> str:
        last = last_checkpoint(self._folder)
        whole = f"the last one is of step {last.step}" if last else "there is none yet"
        return f"{self._folder}: the checkpoint of step {step} cannot be written: {reason}; {whole}"


def _reason(error: BaseException) -> str | None:
    """Why the machine or another rank kept a checkpoint from being written; None: it is a fault of the program."""
    # A refusal explains best, whichever rank met it: lost contact may only be its consequence.
    errors = list(_with_causes(error))
    for each in errors:
        if is_refusal(each):
            return refusal_reason(each)
    for each in errors:
        # torch's writer finds out by itself that a file has not become as long as what it wrote.
        if is_lost_contact(each) or "PytorchStreamWriter" in str(each) or "unexpected pos" in str(each):
            return str(each).splitlines()[0]
    return None


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those behind it, also those of other ranks, which torch.distributed.checkpoint has gathered."""
    while error is not None:
        yield error
        if isinstance(error, CheckpointException):
            for of_rank, _ in error.failures.values():
                yield from _with_causes(of_rank)
        error = error.__cause__ or error.__context__

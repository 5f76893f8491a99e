"""Writes checkpoints while training goes on."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from pipeline.errors import is_lost_contact, is_refusal, refusal_reason
from pipeline.files import give_name, remove_tree
from pipeline.runs.checkpoint import RECORD, Base, final_path, last_checkpoint, partial_path, prune, remove_leftovers
from pipeline.runs.checkpoint_files import HashingWriter
from pipeline.runs.store_collectives import StoreCollectives
from schemas.documents import json_document
from schemas.errors import StoreError, UserError
from schemas.manifest import File
from schemas.storage import RemotePath

if TYPE_CHECKING:
    # Runs without deltas need not load it.
    from pipeline.runs.delta import DeltaState
    from pipeline.runs.rows_file import TableRows

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the slowest one to write its part."""


class CheckpointWriter:
    """Saves states of all ranks into ``folder``, one at a time, in a thread of its own.

    `save` copies the state, which is all that training waits for. The threads of the ranks talk through the store of
    the default group, so that they never mix with training's collectives. A checkpoint is written into a hidden folder,
    which the first rank renames when all ranks are done: it is whole or not there. At a URL it is the record, written
    last, that makes it whole.

    All ranks must call the same methods in the same order.

    Args:
        folder: folder of the run's checkpoints.
        keep: how many of the last checkpoints stay, beside the best one.
        documents: text files to put beside each state, by name.
        deltas: knows which rows of tables have changed; None: all checkpoints are full ones.
    """

    def __init__(
        self, folder: Path, keep: int, documents: Mapping[str, str], deltas: "DeltaState | None" = None
    ) -> None:
        self._folder, self._keep, self._documents, self._deltas = folder, keep, dict(documents), deltas
        # The thread's own, on the first rank: what the next delta will say that it stands on.
        self._base = deltas.base if deltas else None
        self._has_base = self._base is not None
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            # Before the barrier below: no rank may write into a folder that is about to be removed.
            remove_leftovers(folder)
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        # A connection of its own: on training's, waiting for a slow rank would keep all others of this process waiting.
        self._store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._copies = Copies()
        # A thread begins on GPU 0, whichever is its rank's.
        on_gpu = dist.get_backend() == "nccl"
        device = partial(torch.cuda.set_device, torch.cuda.current_device()) if on_gpu else None
        self._thread = ThreadPoolExecutor(1, "checkpoint", device)
        self._writing: Future[None] | None = None
        dist.barrier()

    def save(self, state: Mapping[str, Any], step: int, score: float | None, *, full: bool = True) -> None:
        """Begin to save ``state``; waits for the previous one first.

        Args:
            state: nested dictionaries, lists and tuples of tensors, sharded tensors and plain values.
            step: names the checkpoint.
            score: metric of the validation at this step if the model was better than ever before, else None.
            full: save all of it; else, of the tables, what has changed since the last full one, if there is one.

        Raises:
            UserError: the previous one could not be written: the disk is full, another rank is gone.
        """
        self.wait()
        # The copy is made here, in the caller's thread: the next step changes the weights in place.
        rows = None
        if self._deltas is not None and self._has_base and not full:
            state, rows = self._deltas.split(state)
        planner = CopyingPlanner(self._copies)
        planner.set_up_planner(dict(state), is_coordinator=self._rank == 0)
        plan = planner.create_local_plan()
        if self._deltas is not None and rows is None:
            # If it cannot be written the run ends, so that no delta will miss it.
            self._deltas.begin()
            self._has_base = True
        self._writing = self._thread.submit(self._write, planner, plan, rows, step, score)

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

    def _write(
        self,
        planner: "CopyingPlanner",
        plan: SavePlan,
        rows: "Sequence[TableRows] | None",
        step: int,
        score: float | None,
    ) -> None:
        partial, final = partial_path(self._folder, step), final_path(self._folder, step)
        ranks = StoreCollectives(self._store, f"checkpoint/{step}", self._rank, self._ranks, TIMEOUT)
        try:
            # It returns when the parts of all ranks are written.
            files = write_planned(planner, plan, HashingWriter(partial), ranks, rows)
            # By the first rank, and all learn whether it could: they end for the same reason, and one of them tells it.
            base = None if rows is None else self._base
            ranks.broadcast("publish", lambda: self._publish(partial, final, files, step, score, base))
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            if self._rank == 0:
                with suppress(UserError):  # a store that has failed may fail again; the next start removes it
                    remove_tree(partial)
            # A disk that is full or another rank that is gone; anything else is a fault of the program.
            if (reason := _reason(error)) is not None:
                raise UserError(self._explain(reason, step)) from error
            raise

    def _publish(
        self, partial: Path, final: Path, files: list[File], step: int, score: float | None, base: Base | None
    ) -> None:
        """Put documents and record beside the files of all ranks, and give the folder its name."""
        listed = [file.model_dump() for file in files]
        for name, content in self._documents.items():
            (partial / name).write_text(content)
            digest = hashlib.sha256(content.encode()).hexdigest()
            listed.append(File(path=name, bytes=len(content.encode()), sha256=digest).model_dump())
        record: dict[str, Any] = {"step": step, "score": score, "ranks": self._ranks, "files": listed}
        if base is not None:
            record["base"] = asdict(base)
        text = json_document(json.dumps(record, indent=1) + "\n")
        (partial / RECORD).write_text(text)
        # The record is in the folder before the folder has its name: whoever sees a checkpoint can tell its step and
        # score, and whether its files are whole.
        if partial != final:
            give_name(partial, final)
        if base is None:
            self._base = Base(step, hashlib.sha256(text.encode()).hexdigest())
        # Only now may an older one go: there is a newer one that is whole.
        prune(self._folder, self._keep)

    def _explain(self, reason: str, step: int) -> str:
        last = last_checkpoint(self._folder)
        whole = f"the last one is of step {last.step}" if last else "there is none yet"
        return f"{self._folder}: the checkpoint of step {step} cannot be written: {reason}; {whole}"


class Copies:
    """Copies of tensors on the CPU, complete when they are returned.

    From a GPU they are made through pinned memory, all at once, into buffers that are kept: those of the same tensors
    are written over the next time. On the CPU they are new each time.
    """

    def __init__(self) -> None:
        self._stager: StateDictStager | None = None

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copy tensors; those of one storage on a GPU are views of one copy of it."""
        on_gpu = [tensor.detach() for tensor in tensors if tensor.is_cuda]
        if not on_gpu:
            return [tensor.clone() for tensor in tensors]
        self._stager = self._stager or StateDictStager(pin_memory=True)
        staged = iter(self._stager.stage(on_gpu, non_blocking=True))
        copies = [next(staged) if tensor.is_cuda else tensor.clone() for tensor in tensors]
        torch.cuda.current_stream().synchronize()
        return copies


class CopyingPlanner(DefaultSavePlanner):
    """Plans a checkpoint of a state as it is now; what is written later are copies.

    Args:
        copies: makes the copies of tensors.
    """

    def __init__(self, copies: Copies) -> None:
        super().__init__()
        self._copies = copies
        self._copied: dict[MetadataIndex, Any] = {}

    def create_local_plan(self) -> SavePlan:
        """Plan what this rank can write, and copy it; other values than tensors are serialised at once."""
        plan = super().create_local_plan()
        items: tuple[list[WriteItem], list[WriteItem]] = ([], [])
        for item in plan.items:
            items[item.type == WriteItemType.BYTE_IO].append(item)
        copies = self._copies.of([self.lookup_object(item.index).detach() for item in items[False]])
        self._copied = {item.index: copy for item, copy in zip(items[False], copies, strict=True)}
        self._copied |= {item.index: super(CopyingPlanner, self).resolve_data(item) for item in items[True]}
        # Nothing of the state itself is kept: training goes on to change it.
        self.state_dict = {}
        return plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        """Return the copy that is to be written."""
        return self._copied[write_item.index]


def write_planned(
    planner: CopyingPlanner,
    plan: SavePlan,
    writer: HashingWriter,
    ranks: StoreCollectives,
    rows: "Sequence[TableRows] | None" = None,
) -> list[File]:
    """Write a checkpoint together with the other ranks, as torch.distributed.checkpoint's ``save`` does.

    Args:
        planner: has made ``plan``.
        plan: what this rank can write. What several ranks have is written by one of them.
        writer: of files.
        ranks: the other ranks.
        rows: of a delta, this rank's changed rows.

    Returns:
        On the first rank the files of all ranks with their checksums, else none.

    Raises:
        CheckpointException: on all ranks, where one of them has failed.
        DistError: another rank is gone.
    """
    metadata: Metadata | None = None

    def prepare() -> SavePlan:
        if ranks.is_coordinator and isinstance(writer.path, RemotePath):
            # What a damaged checkpoint of this step has left; no rank writes before all have come here.
            writer.path.remove_tree()
        writer.set_up_storage_writer(ranks.is_coordinator, rank=ranks.rank)
        return writer.prepare_local_plan(plan)

    def plan_all(plans: list[SavePlan]) -> list[SavePlan]:
        nonlocal metadata
        plans, metadata = planner.create_global_plan(plans)
        return writer.prepare_global_plan(plans)

    def write() -> tuple[list[WriteResult], list[File]]:
        if rows is not None:
            from pipeline.runs.delta import rows_file_name

            writer.write_rows(rows_file_name(ranks.rank), rows)
        # The future's own ``wait`` raises what went wrong.
        return writer.write_data(planner.finish_plan(final_plan), planner).wait(), writer.files

    def finish(written: list[tuple[list[WriteResult], list[File]]]) -> None:
        assert metadata is not None
        writer.finish(metadata, [results for results, _ in written])
        # This rank's own are those of its writer, which has written the metadata just now.
        files.extend([*writer.files, *(file for _, of_rank in written[1:] for file in of_rank)])

    files = list[File]()
    final_plan = ranks.reduce_scatter("plan", prepare, plan_all)
    ranks.all_reduce("write", write, finish)
    return files


def _reason(error: BaseException) -> str | None:
    """Why the machine or another rank kept a checkpoint from being written; None: it is a fault of the program."""
    # A refusal explains best, whichever rank met it: lost contact may only be its consequence.
    errors = list(_with_causes(error))
    for each in errors:
        if isinstance(each, StoreError):
            return str(each)
        if is_refusal(each):
            return refusal_reason(each)
    for each in errors:
        if is_lost_contact(each):
            return str(each).splitlines()[0]
        # torch's writer finds out by itself that a file has not become as long as what it wrote, and names its sources.
        if "PytorchStreamWriter" in str(each) or "unexpected pos" in str(each):
            return "a file has not become as long as what was written; is the disk full?"
    return None


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those behind it, also those of other ranks, which torch.distributed.checkpoint has gathered."""
    while error is not None:
        yield error
        if isinstance(error, CheckpointException):
            for of_rank, _ in error.failures.values():
                yield from _with_causes(of_rank)
        error = error.__cause__ or error.__context__

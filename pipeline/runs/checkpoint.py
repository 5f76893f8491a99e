"""The checkpoints of a run: which there are, which may go, and which are whole.

A checkpoint is a folder that torch.distributed.checkpoint has written, ``step-000000000123``, with `RECORD` in it.
Names that begin with a dot are of checkpoints that are being written or removed. At a URL, where no folder can get
another name, `RECORD` is the last file that is written and the first that goes: a folder without it is no checkpoint.
Whether one is whole, all ranks find out together: each looks at its part of the files, and they agree.

A delta checkpoint (`pipeline.runs.delta`) is one as well; its record names the full one that it stands on, which stays
as long as it does, and without which it is damaged.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import Field, NonNegativeInt, TypeAdapter, ValidationError

from pipeline.files import remove_folder
from schemas.documents import inside, notice_unverified, read_bytes, read_json
from schemas.errors import StoreError, UserError
from schemas.manifest import File
from schemas.storage import RemotePath, sha256

T = TypeVar("T")

RECORD = "checkpoint.json"
"""File that says of which step a checkpoint is, how good, and what files it has."""

_FILES = TypeAdapter(tuple[File, ...])


@dataclass(frozen=True)
class Base:
    """The full checkpoint that a delta stands on."""

    step: NonNegativeInt
    record_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """SHA-256 of its `RECORD`, which has the checksums of all its files."""

    @classmethod
    def of(cls, full: "Checkpoint") -> Self:
        """Return what a delta says of the full checkpoint that it stands on."""
        return cls(full.step, hashlib.sha256(read_bytes(full.path / RECORD)).hexdigest())


_BASE = TypeAdapter(Base)


def steps_in(folder: Path) -> list[Path]:
    """Return the folders of checkpoints by step; at a URL, those that have a record."""
    paths = sorted(folder.glob("step-*"))
    return [path for path in paths if not isinstance(path, RemotePath) or (path / RECORD).is_file()]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: its folder, its step, its score and its files."""

    path: Path
    step: int
    score: float | None = None
    """The metric of the validation at this step if the model was better than ever before, else None."""
    files: tuple[File, ...] | None = None
    """All files beside `RECORD`; None: an earlier version of this program wrote it, without a list."""
    damage: str | None = None
    """Why its record cannot be read; then nothing else is known but the step. None: the record is whole."""
    base: Base | None = None
    """The full checkpoint that it stands on, if it is a delta."""


def checkpoints_in(folder: Path) -> list[Checkpoint]:
    """Return all checkpoints by step, also those whose record is damaged, but none that is removed meanwhile."""
    checkpoints = []
    # Steps are written with leading zeros, so that the order of names is that of steps.
    for path in steps_in(folder):
        name = re.fullmatch(r"step-([0-9]+)", path.name)
        if name is None:
            continue
        try:
            checkpoints.append(_read(path))
        except UserError as error:
            if path.is_dir():
                checkpoints.append(Checkpoint(path, int(name[1]), damage=str(error)))
    return checkpoints


def _read(path: Path) -> Checkpoint:
    keys = {"step": int, "score": float | int | None}
    record = read_json(path / RECORD, keys, "remove the folder of this checkpoint", part_of=path.parent.parent)
    try:
        files = None if "files" not in record else _FILES.validate_python(record["files"])
        base = None if "base" not in record else _BASE.validate_python(record["base"])
    except ValidationError as error:
        raise UserError(f"{path / RECORD}: {error.errors()[0]['msg']}; remove the folder of this checkpoint") from None
    return Checkpoint(path, record["step"], record["score"], files, base=base)


def delta_in(folder: Path) -> Checkpoint | None:
    """Return the checkpoint that is in a folder if it is a delta, else None.

    Raises:
        UserError: its record is damaged.
    """
    # Of what has no record, nobody has said that it is a delta.
    checkpoint = _read(folder) if (folder / RECORD).is_file() else None
    return None if checkpoint is None or checkpoint.base is None else checkpoint


def base_of(delta: Checkpoint) -> Checkpoint:
    """Return the full checkpoint that a delta stands on, by its record; its other files are not looked at.

    Raises:
        UserError: it is missing, its record is damaged, or another one has taken its place.
    """
    assert delta.base is not None
    path = final_path(delta.path.parent, delta.base.step)
    if hashlib.sha256(read_bytes(path / RECORD)).hexdigest() != delta.base.record_sha256:
        raise UserError(f"{path / RECORD} is not that of the checkpoint which {delta.path.name} stands on")
    base = _read(path)
    if base.base is not None or base.step != delta.base.step:
        raise UserError(f"{path} is not the full checkpoint of step {delta.base.step}")
    return base


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the checkpoint of the latest step, or None if there is none."""
    return next((each for each in reversed(checkpoints_in(folder)) if each.damage is None), None)


def best_of(checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """Return the checkpoint of the best validation, or None if none of them has one."""
    scored = [checkpoint for checkpoint in checkpoints if checkpoint.score is not None]
    return max(scored, key=lambda checkpoint: checkpoint.score or 0.0, default=None)


def best_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the checkpoint of the best validation in a folder, or None if no checkpoint has one."""
    return best_of(checkpoints_in(folder))


def final_path(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step, once it is whole."""
    return folder / f"step-{step:012}"


def partial_path(folder: Path, step: int) -> Path:
    """Return the folder in which the checkpoint of a step is written until it is whole."""
    if isinstance(folder, RemotePath):
        return final_path(folder, step)
    return folder / f".step-{step:012}.partial"


def prune(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the last ``keep`` full ones, as many deltas that stand on these, and the best one.

    A full one stays as long as a delta that stays needs it; damaged ones stay, and count for nothing.
    """
    checkpoints = [checkpoint for checkpoint in checkpoints_in(folder) if checkpoint.damage is None]
    full = [checkpoint for checkpoint in checkpoints if checkpoint.base is None][-keep:]
    steps = {checkpoint.step for checkpoint in full}
    deltas = [checkpoint for checkpoint in checkpoints if checkpoint.base is not None and checkpoint.base.step in steps]
    # The best one stays whatever its age: the test, evaluation and scoring take it.
    best = best_of(checkpoints)
    remove_all_but(checkpoints, [*full, *deltas[-keep:], *([best] if best else [])])


def remove_all_but(checkpoints: Sequence[Checkpoint], kept: Sequence[Checkpoint]) -> None:
    """Remove those of a folder's checkpoints that are not to be kept, and that no kept delta stands on."""
    steps = {checkpoint.step for checkpoint in kept} | {each.base.step for each in kept if each.base is not None}
    # A delta goes before what it stands on: whoever finds it finds that too.
    for checkpoint in sorted(checkpoints, key=lambda each: -each.step):
        if checkpoint.step not in steps:
            # Out of sight first: a folder that is removed by half must not be taken for a checkpoint.
            if isinstance(checkpoint.path, RemotePath):
                (checkpoint.path / RECORD).unlink(missing_ok=True)
                checkpoint.path.remove_tree()
            else:
                remove_folder(checkpoint.path)


def aside(checkpoint: Path) -> Path:
    """Return the folder that a damaged checkpoint is moved to when training goes on from an earlier one.

    At a URL the folder stays, until the step is made anew, and its record is moved.
    """
    if isinstance(checkpoint, RemotePath):
        return checkpoint / f"damaged-{RECORD}"
    return checkpoint.with_name(f"damaged-{checkpoint.name}")


def set_aside(checkpoint: Path) -> None:
    """Move a damaged checkpoint to where it counts for nothing; one that was moved there before goes."""
    if isinstance(checkpoint, RemotePath):
        (checkpoint / RECORD).rename(aside(checkpoint))
        return
    shutil.rmtree(aside(checkpoint), ignore_errors=True)
    checkpoint.rename(aside(checkpoint))


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run was writing or removing."""
    if isinstance(folder, RemotePath):
        for step in folder.glob("step-*"):
            if not any((step / name).is_file() for name in (RECORD, aside(step).name)):
                step.remove_tree()
        return
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)


def from_first_rank(read: Callable[[], T]) -> T:
    """Return what a function returns on the first rank, on all ranks, so that they do the same whatever each sees.

    All ranks must call it.

    Raises:
        UserError: on all ranks what the function raises on the first one.
    """
    import torch.distributed as dist  # Not at the top: runs are listed without waiting for torch.

    if not dist.is_initialized():
        return read()
    message: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            message = [read(), None]
        except UserError as error:
            message = [None, str(error)]
    dist.broadcast_object_list(message)
    value, refusal = message
    if refusal is not None:
        raise UserError(refusal)
    return value  # type: ignore[no-any-return]


def on_every_rank(work: Callable[[], None]) -> None:
    """Do work that may fail on one rank alone; all ranks must call it.

    Raises:
        UserError: on all ranks what the work has raised on one of them.
    """
    import torch.distributed as dist  # Not at the top: runs are listed without waiting for torch.

    refusal = None
    try:
        work()
    except UserError as error:
        refusal = str(error)
    refusals = [refusal]
    if dist.is_initialized():
        refusals = [None] * dist.get_world_size()
        dist.all_gather_object(refusals, refusal)
    if told := next(filter(None, refusals), None):
        raise UserError(told)


def damage_of(checkpoint: Checkpoint) -> str | None:
    """Compare all files of a checkpoint with their checksums, of a delta those of its full one too.

    All ranks must call it. A checkpoint of an earlier version of this program has no checksums; a notice says so.

    Returns:
        What is damaged, the same on all ranks; None: nothing.

    Raises:
        StoreError: on all ranks, where one could not read its part of the files from a URL.
    """
    damage = _damage_of_files(checkpoint)
    if damage is not None or checkpoint.base is None:
        return damage
    base, damage = from_first_rank(lambda: _base_or_damage(checkpoint))
    return damage if base is None else _damage_of_files(base, f"{base.path.name}/")


def _base_or_damage(delta: Checkpoint) -> tuple[Checkpoint | None, str | None]:
    try:
        return base_of(delta), None
    except StoreError:
        raise
    except UserError as error:
        return None, f"the full checkpoint that it stands on: {error}"


def _damage_of_files(checkpoint: Checkpoint, prefix: str = "") -> str | None:
    """What is damaged of a checkpoint's own files, whose names are told behind ``prefix``; all ranks must call it."""
    import torch.distributed as dist  # Not at the top: runs are listed without waiting for torch.

    if checkpoint.damage is not None:
        return checkpoint.damage
    if checkpoint.files is None:
        notice_unverified(checkpoint.path.parent.parent)  # the run: once for all of its checkpoints
        return None
    # The largest files first, dealt out in turns: about as much to read for each rank.
    files = sorted(checkpoint.files, key=lambda file: (-file.bytes, file.path))
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    damage, refusal = None, None
    try:
        damage = next(filter(None, (_damage_of_file(checkpoint.path, file) for file in files[rank::ranks])), None)
    except StoreError as error:
        refusal = str(error)
    found: list[tuple[str | None, str | None]] = [(damage, refusal)]
    if ranks > 1:
        found = [(None, None)] * ranks
        dist.all_gather_object(found, (damage, refusal))
    # What could not be read is not damaged: nothing is to be moved aside for it.
    if any(refusals := [refused for _, refused in found if refused]):
        raise StoreError(refusals[0])
    return next((f"{prefix}{told}" for told, _ in found if told), None)


def is_there(checkpoint: Checkpoint) -> bool:
    """Whether the folder of a checkpoint is there, as the first rank sees it; all ranks must call it."""
    path = checkpoint.path
    return from_first_rank((path / RECORD).is_file if isinstance(path, RemotePath) else path.is_dir)


def _damage_of_file(folder: Path, file: File) -> str | None:
    # Never an error but of a store: the other ranks wait for what this one has found.
    try:
        path = inside(folder, file.path)
        size = path.stat().st_size
        if size != file.bytes:
            return f"{file.path} is {size} bytes, not {file.bytes}"
        return None if sha256(path) == file.sha256 else f"{file.path} differs from its SHA-256"
    except FileNotFoundError:
        return f"{file.path} is missing"
    except OSError as error:
        return f"{file.path} cannot be read: {error.strerror}"
    except StoreError:
        raise
    except UserError as error:
        return str(error)

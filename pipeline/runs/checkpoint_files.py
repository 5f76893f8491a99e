"""The files of a checkpoint: written with a checksum each, and loaded without executing anything that is in them.

They are those of torch.distributed.checkpoint, which pickles what it knows of a checkpoint, ``.metadata``, and all
values that are not tensors. Its own reader calls whatever such a file names; the ones here know a few classes and
refuse the rest.
"""

import hashlib
import io
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum, EnumMeta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_load_plan
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as load_in_place
from torch.futures import Future

from pipeline.runs.checkpoint import Checkpoint, base_of, delta_in, from_first_rank
from schemas.documents import inside, read_bytes
from schemas.errors import UserError
from schemas.manifest import File
from schemas.storage import RemotePath

if TYPE_CHECKING:
    # Runs without deltas need not load it.
    from pipeline.runs.rows_file import TableRows

METADATA = ".metadata"
"""File of a checkpoint that says which values there are, and where."""

_CLASSES = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
            *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
}
"""All that `METADATA` may name, beside the dtypes of torch. None of them does more than hold values."""

_RANDOM_STATES: list[Any] = [
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
    # It makes an empty array; numpy has moved it from one module to another.
    *((np.zeros(0).__reduce__()[0], f"numpy.{module}.multiarray._reconstruct") for module in ("_core", "core")),
]
"""What a value beside numbers, texts and containers of them may hold: the state of numpy's random numbers."""


class HashingWriter(FileSystemWriter):
    """Writes files of a checkpoint as torch's writer does, and knows the checksum of each without reading it again.

    Args:
        folder: of the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fs = self._hashing = _HashingFileSystem()
        # A store has its own way to keep what it has taken.
        self.sync_files = not isinstance(folder, RemotePath)

    def storage_meta(self) -> StorageMeta | None:
        """Return where the checkpoint is, as what a reader is allowed to unpickle."""
        if isinstance(self.path, RemotePath):
            return StorageMeta(checkpoint_id=self.path.url, save_id=self.save_id)
        return super().storage_meta()

    def write_rows(self, name: str, tables: "Sequence[TableRows]") -> None:
        """Write a file of rows beside torch's."""
        from pipeline.runs.rows_file import write_rows

        with self.fs.create_stream(self.fs.concat_path(self.path, name), "wb") as stream:
            write_rows(stream, tables)  # type: ignore[arg-type]

    @property
    def files(self) -> list[File]:
        """The files that this process has written, complete ones alone."""
        return list(self._hashing.files.values())


class _HashingFileSystem(FileSystem):
    def __init__(self) -> None:
        self.files: dict[str, File] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        assert isinstance(path, Path)
        with _HashingStream(path.open("wb", buffering=0)) as stream:
            yield stream
        self._add(path.name, stream.bytes, stream.sha256)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        assert isinstance(path, Path)
        assert isinstance(new_path, Path)
        file = self.files.pop(path.name)
        self._add(new_path.name, file.bytes, file.sha256)

    def _add(self, name: str, size: int, sha256: str) -> None:
        self.files[name] = File(path=name, bytes=size, sha256=sha256)


class _HashingStream(io.BufferedWriter):
    """A file that is written from its beginning to its end."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(raw)
        self._digest, self.bytes = hashlib.sha256(), 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def seekable(self) -> bool:
        return False

    def write(self, content: Any) -> int:
        self._digest.update(content)
        written = super().write(content)
        self.bytes += written
        return written


def parse_metadata(folder: Path, content: bytes) -> Metadata:
    """Parse the content of a checkpoint's `METADATA`.

    Raises:
        UserError: it is damaged, names something to be called, or files outside of the folder.
    """
    file = folder / METADATA
    try:
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    except _ForeignNameError as error:
        raise UserError(
            f"{file} names {error}, which no checkpoint of this program holds; nothing of it was executed; "
            "do not use this checkpoint"
        ) from None
    except Exception:  # whatever unpickling a damaged file raises
        raise UserError(f"{file} is damaged; use another checkpoint") from None
    if not (isinstance(metadata, Metadata) and isinstance(metadata.storage_data, dict)):
        raise UserError(f"{file} is damaged; use another checkpoint")
    for name in sorted({str(getattr(part, "relative_path", "")) for part in metadata.storage_data.values()}):
        inside(folder, name)
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    return metadata


class _ForeignNameError(Exception):
    """A name that is not to be called."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            # Up to 3.11.3 Python writes a member of an enumeration as ``getattr(class, name)``.
            return _enum_member
        raise _ForeignNameError(f"{module}.{name}")


def _enum_member(enumeration: object, name: object) -> Enum:
    """Return what `getattr` would, of a class of `_CLASSES` that is an enumeration, and nothing else."""
    if isinstance(enumeration, EnumMeta) and name in enumeration.__members__:
        member: Enum = enumeration.__members__[str(name)]
        return member
    raise _ForeignNameError("builtins.getattr")


class CheckpointReader(FileSystemReader):
    """Reads files of a checkpoint whose metadata is known already.

    Args:
        folder: of the checkpoint.
        metadata: what `parse_metadata` has returned.
    """

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._folder, self._metadata = folder, metadata

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return the metadata; nothing is read."""
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what a plan says, file by file.

        Raises:
            UserError: a file is missing or damaged; names it.
        """
        of_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            of_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in of_file.items():
            try:
                super().read_data(replace(plan, items=items), planner)
            except FileNotFoundError:
                raise UserError(f"{self._folder / name} is missing") from None
            except OSError as error:
                raise UserError(f"{self._folder / name} cannot be read: {error.strerror}") from error
            except Exception as error:  # whatever torch raises of a damaged file; its own words name its sources
                raise UserError(f"{self._folder / name} is damaged") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done


class SafeLoadPlanner(DefaultLoadPlanner):
    """Loads values that are not tensors as torch does, but for those that would execute something."""

    def create_local_plan(self) -> LoadPlan:
        """Plan what this rank reads, by keys as they are written now.

        torch takes what other ranks have alone, such as the optimizer's state of a table that is whole on one of them,
        for a sign of keys as it wrote them up to 2.3, which this program never did.
        """
        assert self.metadata is not None
        return create_default_local_load_plan(self.state_dict, self.metadata, strict=True)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value into its place in the state."""
        with torch.serialization.safe_globals(_RANDOM_STATES):
            loaded = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], loaded)


@dataclass(frozen=True)
class Stored:
    """What a checkpoint has, and which files it is in."""

    folder: Path
    metadata: Metadata
    shapes: dict[str, tuple[int, ...] | None]
    """By key; None for what is not a tensor."""
    delta: Checkpoint | None = None
    full: "Stored | None" = None
    """The full checkpoint that a delta stands on, where the tables are."""


def stored_in(checkpoint: Path) -> Stored:
    """Return what there is to load; all ranks must call it.

    Raises:
        UserError: the checkpoint is damaged.
    """
    # Read once, for all ranks: one that could not read it would leave the others in the collectives of a load.
    delta = from_first_rank(lambda: delta_in(checkpoint))
    full = None
    if delta is not None:
        full = _of_folder(from_first_rank(lambda: base_of(delta)).path)
    of_delta = _of_folder(checkpoint)
    if delta is None or full is None:
        return of_delta
    from pipeline.runs.delta import table_of

    tables = {key: shape for key, shape in full.shapes.items() if table_of(key)}
    return replace(of_delta, shapes=tables | of_delta.shapes, delta=delta, full=full)


def _of_folder(folder: Path) -> Stored:
    metadata = parse_metadata(folder, from_first_rank(lambda: read_bytes(folder / METADATA)))
    shapes = {
        key: tuple(kind.size) if isinstance(kind, TensorStorageMetadata) else None
        for key, kind in metadata.state_dict_metadata.items()
    }
    return Stored(folder, metadata, shapes)


def keys_in(checkpoint: Path) -> dict[str, tuple[int, ...] | None]:
    """Return the shapes of a checkpoint's entries by key; None for an entry that is not a tensor.

    All ranks must call it.

    Raises:
        UserError: the checkpoint is damaged.
    """
    return stored_in(checkpoint).shapes


def load(state: dict[str, Any], checkpoint: Path) -> None:
    """Load the values of ``state`` from ``checkpoint``: tensors in place, others replaced. All ranks must call it.

    Args:
        state: nested dictionaries, some or all of the top-level keys that were saved.
        checkpoint: folder of a checkpoint, full or a delta, that any number of ranks have saved.

    Raises:
        UserError: the checkpoint has other keys or shapes, all of which are named; it is damaged.
    """
    stored = stored_in(checkpoint)
    # Top-level parts that the caller did not ask for do not count as differences.
    saved = {key: shape for key, shape in stored.shapes.items() if key.split(".")[0] in state}
    refuse_differences(checkpoint, saved, shapes_of(state))
    _load(state, stored)


def shapes_of(state: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """Return the shapes of what a state holds, by torch.distributed.checkpoint's own flattened keys.

    All ranks must call it, and get what any of them has: only the rank of a table that is whole has its optimizer's
    state.
    """
    shapes = {key: _shape(value) for key, value in flatten_state_dict(dict(state))[0].items()}
    if not dist.is_initialized():
        return shapes
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, shapes)
    return {key: shape for of_rank in found for key, shape in of_rank.items()}


def refuse_differences(
    checkpoint: Path,
    saved: Mapping[str, tuple[int, ...] | None],
    wanted: Mapping[str, tuple[int, ...] | None],
) -> None:
    """Compare shapes by key.

    Args:
        checkpoint: what to call it.
        saved: what is in it.
        wanted: what is to be loaded.

    Raises:
        UserError: they differ; names up to five keys.
    """
    # Of the random states, a rank has its own alone.
    missing = [f"{key} is not in it" for key in wanted if key not in saved]
    extra = [f"{key} is not in the model" for key in saved if key not in wanted and not key.startswith("random.")]
    other = [
        f"{key} is {_times(saved[key])}, in the model {_times(shape)}"
        for key, shape in wanted.items()
        if key in saved and saved[key] != shape
    ]
    if differences := other + missing + extra:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise UserError(f"{checkpoint} is of another model: {'; '.join(differences[:5])}{more}")


def load_values(values: dict[str, Any], checkpoint: Path) -> None:
    """Load some values of a checkpoint, full or a delta: tensors in place, others replaced. All ranks must call it.

    Args:
        values: by key, those of `keys_in`. A table, or its optimizer's state, is a tensor of its full size or a
            `ShardedTensor`, whatever ranks have saved; ranks may have different ones.
        checkpoint: its folder.

    Raises:
        UserError: the checkpoint is damaged.
    """
    _load(values, stored_in(checkpoint))


def _load(state: dict[str, Any], stored: Stored) -> None:
    if stored.delta is None or stored.full is None:
        _load_from(state, stored)
        return
    from pipeline.runs.delta import part_of_state, put_rows, table_of

    tables = part_of_state(state, lambda key: table_of(key) is not None)
    # Also where this rank wants no tables: all ranks must call both.
    _load_from(tables, stored.full)
    put_rows(tables, stored.delta)
    rest = part_of_state(state, lambda key: table_of(key) is None)
    _load_from(rest, stored)
    # Tensors were loaded in place; what is none is in the part alone.
    paths = flatten_state_dict(state)[1]
    for key, value in flatten_state_dict(rest)[0].items():
        set_element(state, paths[key], value)


def _load_from(state: dict[str, Any], stored: Stored) -> None:
    """Load from torch's files of a folder."""
    reader = CheckpointReader(stored.folder, stored.metadata)
    try:
        load_in_place(state, storage_reader=reader, planner=SafeLoadPlanner())
    except CheckpointException as error:
        # What a rank says of a file, told on all of them. Anything else is a fault of the program, or a rank is gone.
        for failure, _ in error.failures.values():
            if isinstance(failure, UserError):
                raise UserError(f"{failure}; use another checkpoint") from error
        raise


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.size()) if isinstance(value, torch.Tensor | ShardedTensor) else None


def _times(shape: tuple[int, ...] | None) -> str:
    return "no tensor" if shape is None else " x ".join(map(str, shape)) or "a number"

"""petastorm's Reader over a given list of row groups: each is read whole, in this order, by any number of threads."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar

import pyarrow as pa

from pipeline.stream.petastorm_compat import (
    ConcurrentVentilator,
    EmptyResultError,
    Reader,
    StrictThreadPool,
    WorkerBase,
)
from pipeline.stream.shard_file import ShardFile
from schemas.errors import UserError
from schemas.manifest import Shard

R = TypeVar("R")

_OPEN_FILES = 16
"""Files that a thread keeps open: a shuffled order comes back to a file before long, and a footer is not read again."""


class RowGroupAddress(NamedTuple):
    """Where a row group is, and what the manifest says of its shard; None: nothing."""

    path: Path
    row_group: int
    shard: Shard | None = None

    def __str__(self) -> str:
        return f"{self.path}: row group {self.row_group}"


@dataclass(frozen=True)
class _Source(Generic[R]):
    """What reaches the worker threads through petastorm, as its ``dataset_path``."""

    addresses: Sequence[RowGroupAddress]
    schema: pa.Schema
    convert: Callable[[pa.Table, int], R]


class RowGroupReader(Reader, Generic[R]):
    """Iterates over row groups in the given order; each is read and converted in one of the reader's threads.

    Use it as a context manager: its threads end with it.

    Args:
        addresses: the row groups, in order.
        schema: columns to read, with the types that they must have.
        convert: makes a result of (row group as a table, its index in ``addresses``); runs in the reader's threads.
        threads: number of threads.
        ahead: results that may wait for the consumer; at least 2 a thread.

    Raises:
        UserError: while iterating: a file or row group that cannot be read, a column that is missing or of another
            type, or what ``convert`` raises.
    """

    def __init__(
        self,
        addresses: Sequence[RowGroupAddress],
        schema: pa.Schema,
        convert: Callable[[pa.Table, int], R],
        *,
        threads: int,
        ahead: int,
    ) -> None:
        self._count = len(addresses)
        super().__init__(
            # petastorm's Reader passes its first two arguments, a file system and a path, on to the worker without a
            # look at them; only our `SchemaOnlyDataset` and our worker ever read the second.
            None,
            _Source(addresses, schema, convert),
            schema_fields=schema.names,
            # Two messages a row group: the result, and that it was processed.
            reader_pool=StrictThreadPool(threads, 2 * ahead),
            worker_class=_Worker,
            shuffle_row_groups=False,
            is_batched_reader=True,
        )

    def __enter__(self) -> Self:
        return self

    def __next__(self) -> R:
        result: R = super().__next__()
        return result

    def cleanup_cache(self) -> None:
        """Do nothing: there is no cache to clean, and petastorm's own method prints a line."""

    def _filter_row_groups(self, *_: object) -> tuple[list[int], None]:
        """Number our row groups as given. petastorm calls this to choose among those that it knows: none."""
        return list(range(self._count)), None

    def _create_ventilator(self, row_groups: list[int], *_: object) -> ConcurrentVentilator:
        """Hand out all items at once: they are numbers, and memory is bounded where results wait.

        petastorm's own method, which it would call in this one's place, hands out a few and then looks for room every
        10 ms.
        """
        return ConcurrentVentilator(
            self._workers_pool.ventilate,
            [{"index": index} for index in row_groups],
        )


class _Results:
    """Returns a pool's results unchanged; petastorm's Reader asks such an object for each result that it returns."""

    batched_output = True

    def read_next(self, pool: StrictThreadPool, schema: object, ngram: object) -> Any:
        try:
            return pool.get_results()
        except EmptyResultError:
            raise StopIteration from None


class _Worker(WorkerBase):
    """Reads row groups, one worker a thread. It publishes a failure in place of a result, to be raised in its turn."""

    def __init__(self, worker_id: int, publish_func: Callable[[Any], None], args: tuple[Any, ...]) -> None:
        super().__init__(worker_id, publish_func, args)
        # petastorm's tuple of arguments: the file system, then the path of the data set.
        self._source: _Source[object] = args[1]
        self._files: OrderedDict[Path, ShardFile] = OrderedDict()

    @staticmethod
    def new_results_queue_reader() -> _Results:
        return _Results()

    def process(self, index: int) -> None:
        result: object
        try:
            result = self._source.convert(self._read(self._source.addresses[index]), index)
        except Exception as error:
            # Raised out of here, petastorm would print its trace to standard error and end this thread.
            result = error
        self.publish_func(result)

    def _read(self, address: RowGroupAddress) -> pa.Table:
        # A row group a thread: Arrow's own threads would take more cores than the setting ``threads`` allows.
        return self._open(address).read(address.row_group, self._source.schema.names)

    def _open(self, address: RowGroupAddress) -> ShardFile:
        # Taken out and put in again below: the order of the dictionary is that of the last use.
        path = address.path
        file = self._files.pop(path, None)
        if file is None:
            file = ShardFile(path, address.shard)
            _check_columns(path, file.schema, self._source.schema)
            if len(self._files) == _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files[path] = file
        return file


def _check_columns(path: Path, schema: pa.Schema, wanted: pa.Schema) -> None:
    for field in wanted:
        index = schema.get_field_index(field.name)
        if index < 0:
            raise UserError(f"{path}: column {field.name} is missing; prepare the data set again")
        kind = schema.field(index).type
        # A list's elements may have another name or be nullable: other writers than ours call them so.
        same = kind == field.type
        if pa.types.is_list(kind) and pa.types.is_list(field.type):
            same = kind.value_type == field.type.value_type
        if not same:
            raise UserError(f"{path}: column {field.name} is {kind}, not {field.type}; prepare the data set again")

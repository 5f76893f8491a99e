"""Makes petastorm work beside today's pyarrow. The rest of this program imports petastorm's names from here alone.

petastorm 0.13.1 does not import with pyarrow >= 16: it asks for ``pyarrow.filesystem`` and ``pyarrow.hdfs``, and its
Reader opens data sets with the legacy ``ParquetDataset``. The two modules are stood in for while petastorm imports, and
the Reader is given a data set that knows its schema and nothing else: row groups come from our own index. So petastorm
never looks for ``_common_metadata``, which it would unpickle.

It also loses data: ``ThreadPool.get_results`` asks whether the workers are done before it asks whether the ventilator
is; what is ventilated in between is dropped in silence. ``StrictThreadPool`` asks in the right order.
"""

import importlib
import queue
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow as pa

_REMOVED_FROM_PYARROW = {
    "pyarrow.filesystem": {"LocalFileSystem": object},
    "pyarrow.hdfs": {"HadoopFileSystem": object},
}


def _import_petastorm() -> ModuleType:
    """Import ``petastorm.reader`` with stand-ins for what pyarrow no longer has; they are gone again afterwards."""
    # An older pyarrow has them; what is there is not replaced.
    absent = {name: names for name, names in _REMOVED_FROM_PYARROW.items() if name not in sys.modules}
    for name, names in absent.items():
        stand_in = ModuleType(name)
        stand_in.__dict__.update(names)
        sys.modules[name] = stand_in
    try:
        return importlib.import_module("petastorm.reader")
    finally:
        for name in absent:
            del sys.modules[name]


class SchemaOnlyDataset:
    """What petastorm's Reader asks of a data set; it learns ``source.schema`` and sees no row groups."""

    # Without common metadata petastorm takes the Arrow schema of the first piece. The ``metadata`` of a piece says that
    # it has no row groups, so petastorm plans none.
    metadata = common_metadata = partitions = None

    def __init__(self, source: Any, **_: object) -> None:
        # petastorm has a numpy type for each column, which nothing here looks at; that of text is one that numpy 2 has
        # removed. So text is said to be numbers.
        kinds = {field.name: pa.int64() if field.type == pa.string() else field.type for field in source.schema}
        schema = pa.schema(list(kinds.items()))
        metadata = SimpleNamespace(num_row_groups=0, schema=SimpleNamespace(to_arrow_schema=lambda: schema))
        self.fs = SimpleNamespace(open=None)
        self.pieces = [SimpleNamespace(get_metadata=lambda: metadata, partition_keys=[])]


_reader: Any = _import_petastorm()
# The name ``pq`` in petastorm's module alone: pyarrow itself stays as it is.
_reader.pq = SimpleNamespace(ParquetDataset=SchemaOnlyDataset)

from petastorm.reader import Reader  # noqa: E402
from petastorm.workers_pool import EmptyResultError, VentilatedItemProcessedMessage  # noqa: E402
from petastorm.workers_pool.thread_pool import ThreadPool  # noqa: E402
from petastorm.workers_pool.ventilator import ConcurrentVentilator  # noqa: E402
from petastorm.workers_pool.worker_base import WorkerBase  # noqa: E402

__all__ = ["ConcurrentVentilator", "EmptyResultError", "Reader", "StrictThreadPool", "ThreadPool", "WorkerBase"]


class StrictThreadPool(ThreadPool):
    """A ThreadPool that loses nothing and gives results in the order in which their items were ventilated."""

    def __init__(self, workers_count: int, results_queue_size: int) -> None:
        super().__init__(workers_count, results_queue_size)
        self._finished_items = 0

    def get_results(self) -> Any:
        """The next result.

        Raises:
            EmptyResultError: all results were given, or the pool was stopped.
            Exception: what a worker published in place of a result.
        """
        while True:
            # Before the counters: once this is true, they do not grow any more.
            ventilated_all = self._ventilator.completed()
            # Counted over all workers, where petastorm counts by worker: results come in the order of the items, so one
            # number says how many are done.
            if self._stop_event.is_set() or (ventilated_all and self._finished_items == self._ventilated_items):
                raise EmptyResultError
            # Item i goes to worker i mod W, and each worker keeps the order of its own items.
            turn = self._results_queues[self._finished_items % self.workers_count]
            try:
                # Not for ever: neither the end of the ventilation nor a stop from elsewhere wakes a queue.
                result = turn.get(timeout=0.05)
            except queue.Empty:
                continue
            if isinstance(result, VentilatedItemProcessedMessage):
                self._finished_items += 1
                self._ventilator.processed_item()
            elif isinstance(result, Exception):
                # Threads are gone before the error goes on: the reader cannot be used any more, and nobody else would
                # end them.
                self.stop()
                self.join()
                raise result
            else:
                return result

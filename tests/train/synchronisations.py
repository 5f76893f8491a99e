"""Counts what would make the host wait for a GPU in a training step, on a CPU.

Counted are calls that read a tensor's values (`tolist`, `item`, `int()`, `bool()`, ...), uploads of lists, and
operators whose output's size depends on values: on a GPU each of them waits. What runs in compiled code of the CPU, and
numpy, is not counted: it has another path on a GPU.
"""

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = str(Path(__file__).parents[2])
READS = ("tolist", "item", "__int__", "__float__", "__bool__", "__index__")
SIZED_BY_VALUES = {
    *("nonzero", "_unique2", "unique_dim", "unique_consecutive", "equal", "masked_select", "bincount"),
    "_local_scalar_dense",
}

ON_THE_HOST = ("fbgemm_gpu/split_table_batched_embeddings_ops_training.py", "torch/optim/optimizer.py")
"""Files that read nothing but counts of steps and rates, which they keep in the host's memory on a GPU too."""

NO_WORK = {
    *("detach", "slice", "view", "_unsafe_view", "_reshape_alias", "t", "transpose", "as_strided", "split", "select"),
    *("split_with_sizes", "expand", "unsqueeze", "squeeze", "alias", "permute", "chunk", "unbind", "lift_fresh"),
    *("empty", "new_empty", "empty_like", "empty_strided", "_local_scalar_dense"),
    *("_record_function_enter_new", "_record_function_exit"),
}
"""Operators that launch nothing on a GPU: views of a tensor, fresh memory, notes of a profiler."""


class StepCounter(TorchDispatchMode):
    """What happened while it was active."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        """By kind, and the line of this repository that it came from."""
        self.launched: Counter[str] = Counter()
        """Operators that compute something, by name."""
        self._reading = False

    def wait(self, kind: str) -> None:
        """Note that the host would wait."""
        stack = [frame for frame in traceback.extract_stack() if frame.filename not in (__file__, contextlib.__file__)]
        if stack[-1].filename.endswith(ON_THE_HOST):
            return
        own = [frame for frame in stack if frame.filename.startswith(ROOT + "/") and "/.venv/" not in frame.filename]
        where = f"{own[-1].filename.removeprefix(ROOT + '/')}:{own[-1].lineno}" if own else "a library"
        self.waits[kind, where] += 1

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        name = function.__name__.split(".")[0]
        self.launched[name] += name not in NO_WORK
        # A read is counted where it is called; the operator below it is the same wait.
        if name in SIZED_BY_VALUES and not (name == "_local_scalar_dense" and self._reading):
            self.wait(name)
        if name == "repeat_interleave" and "Tensor" in function.__name__ and keywords.get("output_size") is None:
            self.wait(name)
        if name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in arguments[1]
        ):
            self.wait("index by bool")
        return function(*arguments, **keywords)

    @contextmanager
    def reading(self, kind: str) -> Iterator[None]:
        """Within the block, a value is read."""
        if self._reading:
            yield
            return
        self.wait(kind)
        self._reading = True
        try:
            yield
        finally:
            self._reading = False


@contextmanager
def counting() -> Iterator[StepCounter]:
    """Count within the block."""
    counter = StepCounter()

    def wrap(owner: Any, name: str, counts: Callable[[tuple[Any, ...], dict[str, Any]], bool]) -> Callable[[], None]:
        plain = getattr(owner, name)

        def counted(*arguments: Any, **keywords: Any) -> Any:
            if not counts(arguments, keywords):
                return plain(*arguments, **keywords)
            with counter.reading(name):
                return plain(*arguments, **keywords)

        setattr(owner, name, counted)
        return lambda: setattr(owner, name, plain)

    undo = [wrap(torch.Tensor, name, lambda arguments, _: True) for name in READS]
    # An upload of numbers: pageable memory, so the host waits for the copy.
    undo.append(wrap(torch, "tensor", lambda _, keywords: "device" in keywords))
    try:
        with counter:
            yield counter
    finally:
        for restore in undo:
            restore()

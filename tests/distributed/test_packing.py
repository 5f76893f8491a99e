"""Sending columns costs the host as much for a thousand ranks as for four: no operator and no loop for each of them."""

import json
import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cli import bench_packing
from benchmarks.packing import columns_of, group_of_none
from embeddings.distributed import collectives
from embeddings.distributed.collectives import Column, ColumnsAllToAll, all_to_all_with_gradient, exchange_counts

COLUMNS, VALUES = 6, 500


class OperatorCount(TorchDispatchMode):
    """How many operators there were, collectives included."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.count += 1
        return function(*arguments, **keywords or {})


class StepsOfPython:
    """How many instructions of `embeddings.distributed.collectives` the interpreter carries out."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "StepsOfPython":
        sys.settrace(self._trace)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename != collectives.__file__:
            return None
        frame.f_trace_opcodes = True
        self.count += event == "opcode"
        return self._trace


def exchange(ranks: int) -> tuple[int, int]:
    """Operators of all that a lookup sends and its gradient brings back, and the interpreter's steps for it."""
    with group_of_none(ranks) as group:
        columns = columns_of(ranks, COLUMNS, VALUES)
        floats = [
            Column(column.values.requires_grad_(), column.sent, column.received)
            for column in columns
            if column.values.dtype == torch.float32
        ]
        count_SX = torch.ones(ranks, 3, dtype=torch.int64)
        with OperatorCount() as operators, StepsOfPython() as steps:
            exchange_counts(count_SX, group)
            ColumnsAllToAll(group, columns).wait()
            arrived = all_to_all_with_gradient(floats, 0.5, group)
            torch.autograd.backward(arrived, list(map(torch.ones_like, arrived)))
    return operators.count, steps.count


def test_the_work_does_not_grow_with_the_ranks() -> None:
    few = exchange(4)
    assert min(few) > 10
    assert exchange(1024) == few


def test_last_line_is_json(capfd: pytest.CaptureFixture[str]) -> None:
    bench_packing(ranks=16, columns=3, values=50, rounds=2, json=True)
    figures = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (figures["ranks"], figures["columns"], figures["values"]) == (16, 3, 50)
    assert figures["ms"] > 0

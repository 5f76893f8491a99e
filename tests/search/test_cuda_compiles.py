"""The GPU's search kernel compiles for each architecture in every variant that a run can ask for, without a GPU."""

import importlib.util
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from multiprocessing import get_context

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.search.topk.inputs import TopKInputs
from tests.top_k_inputs import DTYPES
from tests.top_k_parts import searches_with_parts

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from tests.kernel_variants import Compiled, Variant, asked_for, compiled, warmed

ARCHITECTURES = {80: "A100", 90: "H100 and H200", 100: "B200"}
MOST_REGISTERS = 128
"""So that four programs of four warps are on a multiprocessor at a time, while some of them wait for memory."""


def test_every_variant_compiles_without_spilling() -> None:
    variants = sorted(set().union(*(warmed(k, dtype) for k in (1, 32, 33, 128, 129) for dtype in DTYPES)), key=str)
    # Three modes for each of four types of rows: K up to 32 has two of them, and any other K has two.
    assert len(variants) == 12
    wanted = list(product(variants, ARCHITECTURES))
    # Fresh processes, because a forked one may have taken locks of its parent's threads with it.
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), get_context("spawn")) as pool:
        results = list(pool.map(compiled, *zip(*wanted, strict=True)))
    table = "\n".join(_line(*of) for of in zip(wanted, results, strict=True))
    print(table)
    assert all(result.spilled_bytes == 0 and result.registers <= MOST_REGISTERS for result in results), table
    # Rows, and those of small tables, are read 16 bytes at a time.
    assert all(result.vector_loads >= 4 for result in results), table


def _line(wanted: tuple[Variant, int], result: Compiled) -> str:
    variant, architecture = wanted
    return f"sm_{architecture}, {variant}: " + ", ".join(f"{value} {name}" for name, value in result._asdict().items())


@given(search=searches_with_parts(longest=300, dims=70), k=st.sampled_from([1, 20, 32, 33, 100, 128, 129, 1000]))
@settings(max_examples=100, deadline=None)
def test_no_search_needs_what_warming_has_not_compiled(search: TopKInputs, k: int) -> None:
    assert asked_for(replace(search, k=k)) <= warmed(k, search.rows_RD.dtype)


def test_slices_and_lengths_make_no_variant() -> None:
    rows_RD = torch.zeros(50, 40)
    for first, dim, targets, length in product((0, 1, 4), (1, 16, 17, 32), (1, 16, 17), (1, 16, 33, 2000)):
        search = TopKInputs(
            rows_RD=rows_RD[first:, first : first + dim],
            ids_M=torch.zeros(length + first, dtype=torch.int64)[first:],
            start_T=torch.zeros(targets + first, dtype=torch.int64)[first:],
            end_T=torch.full((targets,), length),
            query_TD=torch.zeros(targets, dim),
            k=20,
            additive_W=torch.zeros(targets * length + first)[first:],
        )
        assert asked_for(search) <= warmed(20, torch.float32)

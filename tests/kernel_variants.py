"""What Triton would compile for a search, found and compiled on a machine without a GPU."""

import re
import subprocess
from functools import cache
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from embeddings.search.topk import cuda, cuda_kernel
from embeddings.search.topk.inputs import TopKInputs

KERNEL = cuda_kernel.search


class Variant(NamedTuple):
    """All that the compiled code depends on, but for the architecture."""

    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], str], ...]
    """What the compiler was told of an argument's value."""
    warps: int

    def __str__(self) -> str:
        types, constants = dict(self.signature), dict(self.constants)
        kept, block = (constants[KERNEL.arg_names.index(name),] for name in ("kept", "block_n"))
        return f"{types['rows_RD']}, kept {kept}, block {block}"


class Compiled(NamedTuple):
    """What the assembler says of a variant."""

    registers: int
    """Of a thread."""
    spilled_bytes: int
    """Of a thread, in memory for want of registers."""
    vector_loads: int
    """Loads of 16 bytes a thread."""


class _Recorder:
    """Stands for the kernel, and starts nothing: asks Triton what it would compile for the arguments."""

    def __init__(self) -> None:
        self.variants: set[Variant] = set()
        # Which NVIDIA architecture does not matter for the key.
        self._backend = make_backend(GPUTarget("cuda", 90, 32))
        self._binder = create_function_from_signature(KERNEL.signature, KERNEL.params, self._backend)

    def __getitem__(self, grid: tuple[int, ...]) -> "_Recorder":
        assert 1 <= grid[0] < 2**31
        assert 1 <= grid[1] < 2**16
        return self

    def __call__(self, *args: object, **kwargs: object) -> None:
        bound, specialization, options = self._binder(*args, **kwargs)
        parsed, signature, constants, attributes = KERNEL._pack_args(
            self._backend, kwargs, bound, specialization, options
        )
        self.variants.add(
            Variant(
                tuple(signature.items()),
                tuple(constants.items()),
                tuple((place, str(attribute)) for place, attribute in attributes.items() if attribute),
                parsed.num_warps,
            )
        )


def asked_for(*searches: TopKInputs) -> set[Variant]:
    """The variants that searches on a GPU would ask for."""
    recorder = _Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_kernel, "search", recorder)
        for search in searches:
            cuda.top_k_cuda(search, int(search.length_T.max()) if len(search.length_T) else 0)
    return recorder.variants


@cache
def warmed(k: int, dtype: torch.dtype) -> set[Variant]:
    """The variants that `cuda.warm` compiles."""
    recorder = _Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_kernel, "search", recorder)
        cuda.warm(k, dtype, torch.device("cpu"))
    return recorder.variants


def compiled(variant: Variant, architecture: int) -> Compiled:
    """Compile a variant for an architecture, 90 for sm_90, or take it from Triton's cache on disk."""
    assert not variant.attributes
    kernel = triton.compile(
        ASTSource(KERNEL, dict(variant.signature), dict(variant.constants), {}),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": variant.warps},
    )
    with NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        usage = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    vectors = re.findall(r"ld\.global\.v(?:4\.b32|2\.b64)", kernel.asm["ptx"])
    return Compiled(int(found[1]), int(found[2]), len(vectors))

"""How far apart two computations of the same numbers may be, whatever the processor and the number of threads.

Processors add in different orders: 4, 8 or 16 numbers at once, with or without fused multiplication, and each thread
its own part. Where the product can compute in float64, tests let it (`in_float64`), and the allowance is far below
anything that a mistake would change. Elsewhere the allowance follows from what is added (`rounding`).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from embeddings.batch import Batch
from embeddings.model import CtrModel
from embeddings.models import twin
from embeddings.search import local
from embeddings.search.topk.inputs import ScorePart, TopKInputs

LAMBDA = 8.0
"""A bound that holds for n roundings but for a chance of ``2 n exp(-LAMBDA**2 / 2)``: 3e-14 for each."""


def rounding(summands: int, magnitude: float | Tensor, dtype: torch.dtype = torch.float32) -> float:
    """The most by which two computations of the same sum differ.

    A sum of n numbers in any order rounds n - 1 times, and its terms, being products, once more each; every rounding
    is off by at most ``u = eps / 2`` of what has been added up so far, which is at most the sum of absolute values.
    Roundings go up as often as down, so n of them amount to ``sqrt(n)``, not ``n`` (Higham and Mary, "A new approach
    to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41, 2019, theorem 2.4): each computation is off by
    at most ``LAMBDA * sqrt(n) * u`` times the sum of absolute values, and two of them differ by twice that.

    Args:
        summands: n. Where sums are made of sums, those on the longest way from the inputs to the result together, as
            the errors of stages add up.
        magnitude: the sum of the terms' absolute values, or the largest entry of a tensor of them. Where terms cancel
            it is larger than the result, and then so is the allowance.
        dtype: what is computed in.
    """
    return LAMBDA * math.sqrt(summands) * torch.finfo(dtype).eps * float(magnitude)


def largest(*tensors: Tensor) -> float:
    """The largest absolute value of all tensors; 0 if there is none."""
    return max((float(values.detach().abs().max()) for values in tensors if values.numel()), default=0.0)


def summands(model: CtrModel, batch: Batch) -> int:
    """All that is added on the way from the rows to the loss and back to the gradients.

    Forwards each layer adds its inputs, backwards its outputs; the loss and the gradients of dense weights add up the
    targets, those of rows all pairs of a target and a behaviour.
    """
    layers = sum(sum(weight.shape) for name, weight in model.named_parameters() if "embedding_bags" not in name)
    rows = sum(model.represented_dims().values())
    pairs = sum(int((history.end_T - history.start_T).sum()) for history in batch.histories.values())
    return layers + rows + len(batch) + pairs


@contextmanager
def in_float64() -> Iterator[None]:
    """Within the block an unsharded model whose weights are float64 computes in float64 throughout.

    Tables may hold 16 bits, so the product makes float32 of what it looks up (``Tensor.float``); here that is float64.
    Only what is compiled for float32, the choice of the top K and of clusters, gets rows and scores rounded to it.
    """

    def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
        def rounded(*arguments: Any, **named: Any) -> Any:
            with _precision(torch.float32, to_float32):
                return function(*(to_float32(value) for value in arguments), **named)

        return rounded

    def to_float32(value: Any) -> Any:
        if isinstance(value, TopKInputs | ScorePart):
            return type(value)(**{field.name: to_float32(getattr(value, field.name)) for field in fields(value)})
        if isinstance(value, list | tuple):
            return [to_float32(one) for one in value]
        return value.to(torch.float32) if isinstance(value, Tensor) and value.is_floating_point() else value

    log_counts = in_float32(twin.log_counts)
    with pytest.MonkeyPatch.context() as patch, _precision(torch.float64, Tensor.double):
        patch.setattr(local, "top_k", in_float32(local.top_k))
        patch.setattr(twin, "log_counts", lambda *given: log_counts(*given).double().exp().round().log())
        yield


@contextmanager
def _precision(dtype: torch.dtype, to_float: Callable[[Tensor], Tensor]) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "float", to_float)
            yield
    finally:
        torch.set_default_dtype(before)

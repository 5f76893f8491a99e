"""Rows of a table in the memory of a CPU: looked up, and updated in the backward pass.

They are FBGEMM's rows and its optimizer's state, which checkpoints take from it; and each step is the one that FBGEMM
makes. But on a CPU its backward pass takes about 400 ns a row in one thread, ten times as long as reading and writing
the row, and would be half of a training step.

R = rows of a table, d = their dim, I = rows looked up.
"""

from typing import Any, NamedTuple

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor
from torch.autograd.function import once_differentiable

from embeddings.compiled import in_even_parts

WORTH_THREADS = 1 << 13
"""Rows that are worth a second thread."""

_KINDS = {
    EmbOptimType.EXACT_SGD: "SGD",
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: "ROWWISE_ADAGRAD",
    EmbOptimType.EXACT_ADAGRAD: "ADAGRAD",
}


class HostTable(NamedTuple):
    """A table of an FBGEMM kernel, and how its rows learn."""

    weights_Rd: Tensor
    """float32."""
    state_X: Tensor
    """float32: the optimizer's, (R,) or (R * d,); empty if it has none."""
    kind: str
    """Which optimizer, as `host_rows_kernel` calls it."""
    rate: float
    epsilon: float

    @classmethod
    def of(cls, kernel: SplitTableBatchedEmbeddingBagsCodegen, number: int) -> "HostTable | None":
        """The table of that number; None where FBGEMM itself must look it up: on a GPU, or with another optimizer."""
        weights_Rd = kernel.split_embedding_weights()[number].detach()
        kind = _KINDS.get(kernel.optimizer)
        if weights_Rd.is_cuda or weights_Rd.dtype != torch.float32 or kind is None:
            return None
        states = kernel.split_optimizer_states()[number] if kind != "SGD" else ()
        state_X = states[0].detach().view(-1) if states else weights_Rd.new_empty(0)
        return cls(weights_Rd, state_X, kind, kernel.get_learning_rate(), kernel.optimizer_args.eps)


def rows_of(table: HostTable, row_I: Tensor) -> Tensor:
    """Look rows up, float32 (I, d); in the backward pass each one makes its optimizer's step.

    Args:
        table: where they are.
        row_I: int64, 0 .. R - 1; they may repeat, and then make one step with the sum of their gradients.
    """
    # A function without an input that has a gradient would have no backward pass.
    anchor = torch.empty(0, requires_grad=True)
    rows_Id: Tensor = _Rows.apply(anchor, row_I.contiguous(), table)
    return rows_Id


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, anchor: Tensor, row_I: Tensor, table: HostTable) -> Tensor:
        from embeddings.distributed import host_rows_kernel

        context.row_I, context.table = row_I, table
        rows_Id = table.weights_Rd.new_empty(len(row_I), table.weights_Rd.shape[1])
        weights, rows, index = table.weights_Rd.numpy(), rows_Id.numpy(), row_I.numpy()
        # The kernel would read foreign memory; what users give is checked long before.
        assert not len(index) or 0 <= index.min() <= index.max() < len(weights), "rows outside of the table"
        threads = torch.get_num_threads() if len(index) >= WORTH_THREADS else 1
        in_even_parts(lambda first, end: host_rows_kernel.gather(weights, index, first, end, rows), len(index), threads)
        return rows_Id

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_Id: Tensor) -> tuple[None, None, None]:
        from embeddings.distributed import host_rows_kernel

        table: HostTable = context.table
        weights, state, index = table.weights_Rd.numpy(), table.state_X.numpy(), context.row_I.numpy()
        gradient = gradient_Id.contiguous().numpy()
        kind = getattr(host_rows_kernel, table.kind)
        rate, epsilon = gradient.dtype.type(table.rate), gradient.dtype.type(table.epsilon)
        parts = torch.get_num_threads() if len(gradient) >= WORTH_THREADS else 1

        def update(first: int, end: int) -> None:
            for part in range(first, end):
                host_rows_kernel.update(weights, state, index, gradient, kind, rate, epsilon, part, parts)

        in_even_parts(update, parts, parts)
        return None, None, None

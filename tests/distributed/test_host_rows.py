"""Rows of a CPU's tables learn as FBGEMM's kernels let them: weights, the optimizer's state, any number of threads."""

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.distributed import host_rows
from embeddings.distributed.host_rows import HostTable, rows_of

OPTIMIZERS = (EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD)


def kernel_of(optimizer: EmbOptimType, rows: int, dim: int) -> SplitTableBatchedEmbeddingBagsCodegen:
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=optimizer,
        learning_rate=0.1,
        eps=1e-8,
        pooling_mode=PoolingMode.SUM,
    )
    kernel.split_embedding_weights()[0].copy_(torch.randn(rows, dim, generator=torch.Generator().manual_seed(rows)))
    return kernel


def learnt(kernel: SplitTableBatchedEmbeddingBagsCodegen) -> list[torch.Tensor]:
    states = kernel.split_optimizer_states()[0] if kernel.optimizer != EmbOptimType.EXACT_SGD else []
    return [values.detach().clone() for values in (kernel.split_embedding_weights()[0], *states)]


def steps(kernel: SplitTableBatchedEmbeddingBagsCodegen, ids: list[list[int]], own: bool) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(len(ids))
    dim = kernel.split_embedding_weights()[0].shape[1]
    for of_step in ids:
        row_I = torch.tensor(of_step, dtype=torch.int64)
        factor_Id = torch.randn(len(row_I), dim, generator=draw)
        table = HostTable.of(kernel, 0)
        assert table is not None
        rows_Id = rows_of(table, row_I) if own else kernel(row_I, torch.arange(len(row_I) + 1))
        assert torch.equal(rows_Id, kernel.split_embedding_weights()[0][row_I])
        (rows_Id * factor_Id).square().sum().backward()
    return learnt(kernel)


@given(
    optimizer=st.sampled_from(OPTIMIZERS),
    dim=st.sampled_from([4, 16, 20]),
    ids=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=40), min_size=1, max_size=4),
    threads=st.sampled_from([1, 3]),
)
@settings(max_examples=60, deadline=None)
def test_rows_learn_as_fbgemm_lets_them(optimizer: EmbOptimType, dim: int, ids: list[list[int]], threads: int) -> None:
    before, worth = torch.get_num_threads(), host_rows.WORTH_THREADS
    try:
        torch.set_num_threads(threads)
        host_rows.WORTH_THREADS = 1
        found = steps(kernel_of(optimizer, 10, dim), ids, own=True)
    finally:
        torch.set_num_threads(before)
        host_rows.WORTH_THREADS = worth
    expected = steps(kernel_of(optimizer, 10, dim), ids, own=False)
    # Sums of up to 40 gradients, in another order.
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_threads_change_no_bit(optimizer: EmbOptimType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_rows, "WORTH_THREADS", 1)
    ids = [torch.randint(0, 300, (1000,), generator=torch.Generator().manual_seed(step)).tolist() for step in range(3)]
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            found.append(steps(kernel_of(optimizer, 300, 16), ids, own=True))
        finally:
            torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_no_rows_make_no_step_and_pass_a_gradient_on() -> None:
    kernel = kernel_of(EmbOptimType.EXACT_ROWWISE_ADAGRAD, 10, 4)
    before = learnt(kernel)
    table = HostTable.of(kernel, 0)
    assert table is not None
    rows_Id = rows_of(table, torch.empty(0, dtype=torch.int64))
    assert rows_Id.requires_grad
    rows_Id.sum().backward()
    assert all(torch.equal(one, other) for one, other in zip(before, learnt(kernel), strict=True))

"""Ids by shard, as a CPU and as a GPU sort them: against FBGEMM's operator, and against a loop over ids."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from embeddings.distributed.row_wise import Bucketed, bucketed, bucketed_by_sort

SHARDS = (1, 2, 8, 100)
DTYPES = (torch.int32, torch.int64)


@st.composite
def tables_and_ids(draw: st.DrawFn) -> tuple[int, list[int]]:
    """Rows of a table, and ids in it: few different ones, so that many are equal; the last shards may have no rows."""
    rows = draw(st.sampled_from([1, 3, 97, 100, 101, 70_001, 2_000_000_000]))
    few = draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=12))
    return rows, draw(st.lists(st.sampled_from(few), max_size=200))


def one_by_one(ids: list[int], block: int, shards: int) -> tuple[list[int], list[int], list[int]]:
    """Counts, rows and indices as the definition says: shard by shard, and in each in the order of the ids."""
    of_shard = [[index for index, row in enumerate(ids) if row // block == shard] for shard in range(shards)]
    indices = [index for part in of_shard for index in part]
    return list(map(len, of_shard)), [ids[index] % block for index in indices], indices


def by_fbgemm(id_B: torch.Tensor, block: int, shards: int) -> tuple[list[int], list[int], list[int]]:
    """Counts, rows and indices by FBGEMM's operator on a CPU, which keeps the order of ids there."""
    length, blocks = (torch.tensor([number], dtype=id_B.dtype) for number in (len(id_B), block))
    count_S, row_B, _, index_B, _ = torch.ops.fbgemm.block_bucketize_sparse_features(
        length, id_B, True, False, blocks, shards
    )
    return count_S.tolist(), row_B.tolist(), index_B.tolist()


def plain(ids: Bucketed) -> tuple[list[int], list[int], list[int]]:
    return ids.count_S.tolist(), ids.row_B.tolist(), ids.index_B.tolist()


@settings(deadline=None, max_examples=60)
@given(tables_and_ids())
@example((100, []))
@example((3, [2, 0, 2, 1, 0]))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", SHARDS)
def test_a_sort_buckets_as_fbgemm_does_on_a_cpu(shards: int, dtype: torch.dtype, case: tuple[int, list[int]]) -> None:
    rows, ids = case
    block, id_B = -(-rows // shards), torch.tensor(ids, dtype=dtype)
    expected = one_by_one(ids, block, shards)
    assert by_fbgemm(id_B, block, shards) == expected
    for found in (bucketed_by_sort(id_B, block, shards), bucketed(id_B, block, shards)):
        assert plain(found) == expected
        assert found.row_B.dtype == dtype  # as narrow as the ids, since rows travel
        assert found.count_S.dtype in DTYPES
        assert found.index_B.dtype in DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", SHARDS)
def test_ids_may_lie_apart_in_memory(shards: int, dtype: torch.dtype) -> None:
    id_B = torch.randint(0, 100, (3, 40), dtype=dtype, generator=torch.Generator().manual_seed(1))[1].repeat(2)[::2]
    assert not id_B.is_contiguous()
    block = -(-100 // shards)
    for found in (bucketed_by_sort(id_B, block, shards), bucketed(id_B, block, shards)):
        assert plain(found) == one_by_one(id_B.tolist(), block, shards)


def test_the_order_of_many_equal_ids_is_kept() -> None:
    """A sort that is not stable keeps the order of a few ids by chance."""
    id_B = torch.randint(0, 8, (100_000,), generator=torch.Generator().manual_seed(2))
    found = bucketed_by_sort(id_B, 2, 4)
    shard_B = id_B[found.index_B] // 2
    assert (shard_B.diff() >= 0).all()
    assert (found.index_B.diff()[shard_B.diff() == 0] > 0).all()

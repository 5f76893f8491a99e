"""Run with TRITON_INTERPRET=1, before triton is loaded: the GPU's search on this machine's CPU against plain torch."""

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from embeddings.search.topk import cuda
from embeddings.search.topk.api import TopKImplementation, top_k
from embeddings.search.topk.inputs import TopKInputs
from tests.top_k_inputs import assert_same
from tests.top_k_parts import searches_with_parts


@given(
    search=searches_with_parts(longest=40, dims=40, k=20),
    programs=st.sampled_from([1, 100]),
    key_bytes=st.sampled_from([1, cuda.KEY_BYTES]),
)
@settings(max_examples=40, deadline=None, derandomize=True, phases=(Phase.generate,))
def agree(search: TopKInputs, programs: int, key_bytes: int) -> None:
    cuda.PROGRAMS, cuda.KEY_BYTES = programs, key_bytes
    assert_same(top_k(search, TopKImplementation.CUDA), top_k(search, TopKImplementation.REFERENCE))


def agree_on_long_windows(k: int, programs: int) -> None:
    cuda.PROGRAMS = programs
    values = torch.Generator().manual_seed(k)
    search = TopKInputs(
        rows_RD=torch.randint(-2, 3, (30, 20), generator=values).half(),
        ids_M=torch.randint(0, 30, (150,), generator=values),
        start_T=torch.tensor([0, 30]),
        end_T=torch.tensor([100, 150]),
        query_TD=torch.randint(-2, 3, (2, 20), generator=values).float(),
        additive_W=torch.randint(-2, 3, (220,), generator=values).float(),
        k=k,
    )
    assert_same(top_k(search, TopKImplementation.CUDA), top_k(search, TopKImplementation.REFERENCE))


if __name__ == "__main__":
    # Small, so that windows of a few dozen behaviours meet every mode, several blocks and several shares.
    cuda.SHORT, cuda.FEW, cuda.MANY = cuda.Mode(4, 4), cuda.Mode(4, 16), cuda.Mode(16, 16)
    agree()
    for k in (3, 16, 17):
        for programs in (1, 6):
            agree_on_long_windows(k, programs)

"""Tables in host memory are read through their lookups alone: no step writes the device's cache back."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel

from embeddings.distributed.process_group import process_group
from embeddings.distributed.row_wise import row_wise_tables
from embeddings.loss import click_loss
from embeddings.model import CtrModel
from embeddings.models import build_model
from embeddings.sharding import make_plan, shard
from tests.toy_model import batch_of, settings_of, sizes_of

CPU, META = torch.device("cpu"), torch.device("meta")


def sharded(search: str) -> tuple[CtrModel, nn.Module]:
    settings = settings_of("dare", search=search)
    model = build_model(settings, sizes_of(settings), META)
    return model, shard(model, CPU, make_plan(model, CPU, batch_size=64))


def pretend_cached(collections: Sequence[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Declare tables to be in host memory, where none is on a CPU, and let nobody write a cache back."""

    def flush() -> None:
        raise AssertionError("the cache was written back")

    for collection in collections:
        for kernel in collection._lookups[0]._emb_modules:
            monkeypatch.setattr(kernel, "flush", flush)
            for table in kernel.config.embedding_tables:
                table.compute_kernel = EmbeddingComputeKernel.FUSED_UVM_CACHING


@pytest.mark.parametrize(
    ("search", "sets"), [("shard", ["representation"]), ("local", ["attention", "representation"])]
)
def test_a_step_leaves_the_cache_alone(search: str, sets: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tables that may be in host memory, small ones included, which are gathered whole."""
    with process_group(CPU):
        model, whole = sharded(search)
        pretend_cached([*(model.tables.inherent[name] for name in sets), model.tables.cross], monkeypatch)
        batch = batch_of(model.settings, 1)
        click_loss(whole(batch), batch.label_T).backward()


def test_rows_in_host_memory_are_not_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    with process_group(CPU):
        model, _ = sharded("shard")
        pretend_cached([model.tables.inherent["attention"]], monkeypatch)
        item = row_wise_tables(model.tables.inherent["attention"])["item"]
        assert (item.local_rows, item.device) == (51, CPU)
        with pytest.raises(AssertionError, match="rows in host memory"):
            _ = item.local_Rd

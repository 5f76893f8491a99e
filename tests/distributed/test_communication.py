"""Floats in 16 bits on their way: close to 32 bits within what the type holds, and half the bytes."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from embeddings.distributed.lookups import WeightedBags, sharded_rows
from embeddings.initialization import initialize
from embeddings.loss import click_loss
from embeddings.models import build_model
from embeddings.sharding import make_plan, shard
from embeddings.sizes import DataSizes
from pipeline.planning.measuring import TrafficCounter
from schemas.model import Communication, ModelSettings, TableSet
from tests.launcher import run_ranks
from tests.toy_batch import part, toy_batch

CPU = torch.device("cpu")
SIZES = DataSizes.counted(items=50, categories=7, lengths={"history": 12})
DIM, IDS = 16, 40
PRECISION: dict[Communication, float] = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8}
"""The largest relative error of rounding a float to each type."""


def model_of(communication: Communication) -> tuple[torch.nn.Module, torch.nn.Module]:
    tables = TableSet(dim=DIM, optimizer="sgd", learning_rate=1.0)
    settings = ModelSettings(
        attention=tables, representation=tables, communication=communication, retrieved={"history": 4}
    )
    model = build_model(settings, SIZES, torch.device("meta"))
    sharded = shard(model, CPU, make_plan(model, CPU, batch_size=64))
    initialize(sharded, seed=3)
    with torch.no_grad():
        for name, value in sharded.state_dict().items():
            if "embedding_bags" in name:
                for piece in value.local_shards():
                    piece.tensor.mul_(20)
    return model, sharded


def counted(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    with TrafficCounter() as traffic:
        found = work()
    return found, traffic.bytes


def rows_of(model: torch.nn.Module, ids: dict[str, torch.Tensor]) -> torch.Tensor:
    """Item and category rows of ids, side by side."""
    rows = sharded_rows(model.tables.inherent["attention"], ids, None, model.tables.codecs)
    return torch.cat([rows[name].rows_Ld[rows[name].index_B] for name in ids], dim=1)


def lookups(communication: Communication) -> dict[str, tuple[torch.Tensor, float]]:
    """What a rank finds, and the bytes that it sends."""
    model, sharded = model_of(communication)
    draw = torch.Generator().manual_seed(dist.get_rank())
    ids = {
        name: torch.randint(0, rows, (IDS,), generator=draw, dtype=torch.int32)
        for name, rows in (("item", 51), ("category", 8))
    }
    weight, bag = torch.rand(IDS, generator=draw), torch.arange(IDS) // 4
    bags = WeightedBags(ids, weight, torch.ones(IDS, dtype=torch.bool), bag, IDS // 4)
    found = {
        "rows": counted(lambda: rows_of(model, ids)),
        "sums": counted(lambda: torch.cat(list(model.tables.pooled_rows("representation", bags).values()), dim=1)),
    }
    batch = part(toy_batch(1, targets=24, lengths={"history": 12}), dist.get_rank(), dist.get_world_size())
    sharded.eval()
    cross = model.tables.small_rows(CPU)
    chosen, sent = counted(lambda: model.search(batch, cross, model.start_search(batch))["history"].index_TK)
    found["best"] = chosen, sent
    sharded.train()
    prediction = sharded(batch)
    click_loss(prediction, batch.label_T).backward()
    found["logits"] = prediction.logit_T.detach(), 0.0
    state = sharded.state_dict()["tables.inherent.representation.embedding_bags.item_representation.weight"]
    found["learnt"] = state.local_shards()[0].tensor.clone(), 0.0
    return {name: (values.detach(), size) for name, (values, size) in found.items()}


def all_lookups() -> dict[str, dict[str, tuple[torch.Tensor, float]]]:
    return {communication: lookups(communication) for communication in PRECISION}


def test_16_bits_are_close_and_half_as_many_bytes() -> None:
    for by_kind in run_ranks(2, all_lookups):
        exact = by_kind["fp32"]
        for communication in ("fp16", "bf16"):
            found, precision = by_kind[communication], PRECISION[communication]
            scale = exact["rows"][0].abs().max().item()
            torch.testing.assert_close(found["rows"][0], exact["rows"][0], rtol=precision, atol=1e-6)
            # A sum of 4 has two parts, each of which is rounded.
            torch.testing.assert_close(found["sums"][0], exact["sums"][0], rtol=precision, atol=8 * scale * precision)
            assert (found["rows"][0] != exact["rows"][0]).any()
            assert (found["sums"][0] != exact["sums"][0]).any()
            # At most an equal score's place differs: the toy's scores are far apart.
            assert (found["best"][0] != exact["best"][0]).float().mean() < 0.1
            torch.testing.assert_close(found["logits"][0], exact["logits"][0], rtol=0.05, atol=20 * precision)
            torch.testing.assert_close(found["learnt"][0], exact["learnt"][0], rtol=0.05, atol=0.05)
            assert (found["learnt"][0] != exact["learnt"][0]).any()
            for name in ("rows", "sums", "best"):
                assert found[name][1] < exact[name][1]


def bytes_of_rows(communication: Communication) -> tuple[float, float]:
    """Bytes that a lookup of all rows sends, and its backward pass."""
    model, _ = model_of(communication)
    ids = {"item": torch.arange(51, dtype=torch.int32), "category": torch.arange(51, dtype=torch.int32) % 8}
    rows, there = counted(lambda: rows_of(model, ids))
    _, back = counted(lambda: rows.sum().backward())
    return there, back


def both_bytes() -> list[tuple[float, float]]:
    return [bytes_of_rows(communication) for communication in ("fp32", "fp16", "bf16")]


def test_half_of_the_floats_bytes_are_saved() -> None:
    for (there, back), *halved in run_ranks(2, both_bytes):
        floats = back  # nothing else comes back
        for there_16, back_16 in halved:
            assert back_16 == pytest.approx(floats / 2)
            assert there - there_16 > 0.45 * floats

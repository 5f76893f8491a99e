"""What more features of items cost a search on the shards: in each behaviour's record, or beside the item's row.

A behaviour's features travel with its item to the item's shard. They could lie there, a column a feature, beside the
item's row: then no bit of them travels, and the shard takes them by the row. Both find the same behaviours.

M = behaviours, R = item rows of a shard.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from embeddings.batch import Batch, Selection
from embeddings.initialization import initialize
from embeddings.layers.scoring import DotProduct
from embeddings.loss import click_loss
from embeddings.model import CtrModel
from embeddings.models import build_model
from embeddings.search.messages import Record, SearchMessages, SearchSizes, ShardInput
from embeddings.search.score_parts import PairRows
from embeddings.search.sharded import ShardedTopK
from embeddings.search.topk.inputs import PartKind
from embeddings.sharding import make_plan, shard
from embeddings.sizes import DataSizes, FeatureSize
from pipeline.planning.measuring import StepTask, TrafficCounter, made_up_batch, on_gloo_ranks
from schemas.model import Feature
from schemas.settings import load_settings
from schemas.train import TrainSettings

MORE = {
    "brand": FeatureSize("item", rows=10_000),
    "seller": FeatureSize("item", rows=50_000),
    "color": FeatureSize("item", rows=60),
    "price": FeatureSize("item", rows=20),
    "tags": FeatureSize("item", "ids", rows=2_000, bags=30_000),
}
"""Features of items beside the category: 14, 16, 6, 5 and 15 bits."""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class FeatureFigures:
    """What a search with some features took; times are medians over the rounds, of the slowest rank."""

    targets: int
    more: int
    """Features of items beside the category."""
    where: str
    """``record``: they travel with the behaviour; ``item``: they lie beside its row."""
    words: int
    """32-bit words of a behaviour's record."""
    search_bytes: int
    """Bytes that a rank sends in a search, the mean over ranks."""
    search_ms: float
    step_ms: float
    """A training step."""
    step_cpu_ms: float
    """What a rank computes in it, whoever else uses the machine."""
    same: bool
    """Whether the search finds what it finds where features travel."""


class _BesideItems(SearchMessages):
    """Messages without some features of the behaviours, which the shard takes from columns of its items."""

    def __init__(self, whole: SearchMessages, held: Mapping[Feature, Tensor]) -> None:
        self.__dict__ |= vars(whole)
        self._held, self._all = held, whole.features
        self.features = tuple(feature for feature in whole.features if feature not in held)

    def unpack(self, targets: Mapping[str, Tensor], behaviors: Mapping[str, Tensor], sizes: SearchSizes) -> ShardInput:
        """The shard's input, of records and of its own columns."""
        found = super().unpack(targets, behaviors, sizes)
        histories = {}
        for sequence, history in found.histories.items():
            columns = {name: held_R.index_select(0, history.item_M) for name, held_R in self._held.items()}
            pairs = {name: PairRows(PartKind.VALUE, column_M) for name, column_M in columns.items()}
            histories[sequence] = history._replace(pairs={**history.pairs, **pairs})
        return ShardInput(found.targets, histories)


def measure(ranks: int, targets: int, length: int, items: int, rounds: int) -> list[dict[str, Any]]:
    """Measure all numbers of features, on a group of processes with a thread each.

    Args:
        ranks: processes.
        targets: of a rank.
        length: N.
        items: in all.
        rounds: steps that are timed, with features in records and beside items in turns.
    """
    found: list[dict[str, Any]] = []
    arguments = (targets, length, items, rounds)
    by_rank = on_gloo_ranks(ranks, _all_measured, *arguments, timeout_s=3600)
    for of_case in zip(*by_rank, strict=True):
        slowest = max(of_case, key=lambda figures: figures.step_ms)
        # Bytes of all ranks: which one was the slowest is chance, and each has a batch of its own.
        sent = sum(figures.search_bytes for figures in of_case) // ranks
        same = all(figures.same for figures in of_case)
        found.append(vars(replace(slowest, search_bytes=sent, same=same)))
    return found


def _all_measured(targets: int, length: int, items: int, rounds: int) -> list[FeatureFigures]:
    counts = range(len(MORE) + 1)
    return [figures for more in counts for figures in _measured(targets, length, items, more, rounds)]


def _measured(targets: int, length: int, items: int, more: int, rounds: int) -> list[FeatureFigures]:
    added = dict(list(MORE.items())[:more])
    overrides = [
        f"model.features=[{','.join(['item', 'category', 'position', *added])}]",
        f"stream={{history_length: {length}, batch_size: {targets}}}",
    ]
    settings = load_settings(TrainSettings, overrides=overrides)
    sizes = DataSizes.counted(items, 10_000, {"history": length})
    sizes = replace(sizes, features={**sizes.features, **added})
    model = build_model(settings.model, sizes, torch.device("meta"))
    sharded = shard(model, CPU, make_plan(model, CPU, targets))
    initialize(sharded, seed=1)
    # Larger than first weights, so that features decide what is found.
    with torch.no_grad():
        for value in model.state_dict().values():
            for piece in value.local_shards() if hasattr(value, "local_shards") else []:
                piece.tensor.mul_(100)
    of_items = _columns(sizes)
    batch = _of_items(made_up_batch(StepTask(settings, sizes), seed=dist.get_rank()), of_items)
    block = -(-(items + 1) // dist.get_world_size())
    own = slice(dist.get_rank() * block, (dist.get_rank() + 1) * block)
    held = {name: column_I[own].contiguous() for name, column_I in of_items.items() if name in added}
    ways: dict[str, Callable[[DotProduct, Batch], ShardedTopK]] = {"record": partial(CtrModel._top_k, model)}
    if more:
        ways["item"] = partial(_beside, model, held)

    def search() -> Selection:
        with torch.no_grad():
            small = model.tables.small_rows(CPU)
            return model.search(batch, small, model.start_search(batch))["history"]

    def step() -> None:
        click_loss(sharded(batch), batch.label_T).backward()

    selected, sent, words = dict[str, Selection](), dict[str, int](), dict[str, int]()
    for where, way in ways.items():
        vars(model)["_top_k"] = way
        with TrafficCounter() as traffic:
            selected[where] = search()
        sent[where] = round(traffic.bytes)
        words[where] = _words(way(model.scoring, batch)._messages)  # type: ignore[arg-type]
    times: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):
        for where, way in ways.items():
            vars(model)["_top_k"] = way
            for what, work in (("search", search), ("step", step)):
                dist.barrier()
                began, cpu = time.perf_counter(), time.process_time()
                work()
                ended, cpu = time.perf_counter(), time.process_time() - cpu
                # The first round compiles.
                if number:
                    times.setdefault((where, what), []).append(ended - began)
                    times.setdefault((where, f"{what} cpu"), []).append(cpu)
    ms = {key: round(1e3 * statistics.median(seconds), 1) for key, seconds in times.items()}
    return [
        FeatureFigures(
            targets,
            more,
            where,
            words[where],
            sent[where],
            ms[where, "search"],
            ms[where, "step"],
            ms[where, "step cpu"],
            torch.equal(selected[where].index_TK, selected["record"].index_TK),
        )
        for where in ways
    ]


def _words(messages: SearchMessages) -> int:
    record: Record = messages.behavior_record("history", 0)
    return record.words


def _beside(model: CtrModel, held: Mapping[Feature, Tensor], scoring: DotProduct, batch: Batch) -> ShardedTopK:
    made = CtrModel._top_k(model, scoring, batch)
    made._messages = _BesideItems(made._messages, held)
    return made


def _columns(sizes: DataSizes) -> dict[Feature, Tensor]:
    """What each item has, the same on all ranks, int32 (items + 1)."""
    draw = torch.Generator().manual_seed(7)
    return {
        name: torch.randint(1, sizes.values(name), (sizes.items + 1,), generator=draw, dtype=torch.int32)
        for name in sizes.features
    }


def _of_items(batch: Batch, of_items: Mapping[Feature, Tensor]) -> Batch:
    """The batch with the features that its items have."""

    def columns(item_X: Tensor) -> dict[Feature, Tensor]:
        return {name: column_I.index_select(0, item_X) for name, column_I in of_items.items()}

    histories = {
        name: replace(history, features_M=columns(history.item_M)) for name, history in batch.histories.items()
    }
    return replace(batch, histories=histories, features_T=columns(batch.item_T))

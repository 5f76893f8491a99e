"""Search on the shards against TorchRec's way, on several gloo ranks.

TorchRec's way: the sample's rank fetches the rows of all behaviours, and searches with `torch.bmm` and `torch.topk`.

B = samples of a rank, N = behaviours of each, K = kept, D = dim, R = rows.
"""

import logging
import multiprocessing
import os
import socket
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.types import ShardingEnv, ShardingType

from embeddings.batch import Batch, History, Selection
from embeddings.distributed.process_group import leave, process_group, rank_environment
from embeddings.distributed.row_wise import row_wise_tables
from embeddings.model import CtrModel
from embeddings.models import build_model
from embeddings.planning import topology_of
from embeddings.sharding import machines_here, make_plan, shard
from embeddings.sizes import DataSizes
from pipeline.planning.measuring import TrafficCounter
from schemas.model import ModelSettings, TableSet

CPU = torch.device("cpu")
META = torch.device("meta")


class Case(NamedTuple):
    """A size of the search."""

    dim: int
    length: int
    k: int
    samples: int
    """Targets of each rank."""


CASES = (
    Case(16, 200, 20, 512),
    Case(32, 2000, 100, 64),
    Case(32, 10_000, 100, 64),
    Case(128, 2000, 100, 64),
    Case(128, 10_000, 100, 64),
)


@dataclass(frozen=True)
class ShardSearchFigures:
    """What a size took; times are medians over the rounds."""

    dim: int
    length: int
    k: int
    samples: int
    ranks: int
    vs_stock: float
    """Stock's time over ours."""
    bytes_vs_stock: float
    """Bytes that a rank sends in stock's way, counted, over those that it sends in ours."""
    exact: bool
    """Whether both find the same behaviours, but for scores that differ by rounding alone."""
    ms: float
    stock_ms: float
    bytes_per_sample: float
    stock_bytes_per_sample: float


def measure(ranks: int, rows: int, rounds: int, cases: tuple[Case, ...] = CASES) -> list[dict[str, Any]]:
    """Measure all cases; progress goes to standard error.

    Args:
        ranks: processes, a thread each.
        rows: R.
        rounds: repetitions of each timing; both sides take turns.
        cases: sizes.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    receiver, sender = context.Pipe(duplex=False)
    arguments = (ranks, port, rows, rounds, cases, sender)
    processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    # The ranks have the other end: when they have all ended, `recv` raises EOFError instead of waiting.
    sender.close()
    figures_of_cases = []
    try:
        for case in cases:
            figures = receiver.recv()
            print(f"{case}: {figures.stock_ms:.0f} ms -> {figures.ms:.0f} ms", file=sys.stderr)
            figures_of_cases.append(asdict(figures))
    except EOFError:
        raise RuntimeError("a rank has failed; see above") from None
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return figures_of_cases


def _rank(
    rank: int,
    ranks: int,
    port: int,
    rows: int,
    rounds: int,
    cases: tuple[Case, ...],
    sender: Connection,
) -> None:
    os.environ |= rank_environment(rank, ranks, port)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("torchrec", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with process_group(CPU):
        for case in cases:
            figures = _compared(case, rows, rounds)
            if rank == 0:
                sender.send(figures)
    leave(0)


def _compared(case: Case, rows: int, rounds: int) -> ShardSearchFigures:
    ours, stock = _OnShard(case, rows), _Stock(case, rows)
    stock.copy_rows(ours)
    batch = _batch(case, rows)
    chosen, (score_BN, best) = ours.search(batch), stock.search(batch)
    start_B1 = batch.histories["history"].start_T[:, None]
    # Scores are compared, not indices: sums in another order may exchange two that are nearly equal.
    score_BK = score_BN.gather(1, chosen.index_TK - start_B1)
    exact = bool(chosen.valid_TK.all()) and torch.allclose(score_BK, best.values, atol=1e-5, rtol=1e-5)
    times: dict[str, list[float]] = {"ours": [], "stock": []}
    for _ in range(rounds):
        times["ours"].append(_seconds(lambda: ours.search(batch)))
        times["stock"].append(_seconds(lambda: stock.search(batch)))
    ms, stock_ms = (1000 * statistics.median(of_side) for of_side in times.values())
    sent, stock_sent = _bytes(lambda: ours.search(batch)), _bytes(lambda: stock.search(batch))
    # One rank reports for all: exact means on every rank.
    everywhere = torch.tensor([float(exact)])
    dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    return ShardSearchFigures(
        *case,
        ranks=dist.get_world_size(),
        vs_stock=round(stock_ms / ms, 2),
        bytes_vs_stock=round(stock_sent / sent, 1),
        exact=bool(everywhere),
        ms=round(ms, 1),
        stock_ms=round(stock_ms, 1),
        bytes_per_sample=round(sent / case.samples),
        stock_bytes_per_sample=round(stock_sent / case.samples),
    )


def _seconds(work: Callable[[], object]) -> float:
    dist.barrier()
    begin = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - begin


def _bytes(work: Callable[[], object]) -> float:
    with TrafficCounter() as traffic:
        work()
    return float(traffic.bytes)


def _batch(case: Case, rows: int) -> Batch:
    """A user a sample, each with N behaviours of evenly spread items."""
    draw = torch.Generator().manual_seed(dist.get_rank())
    samples, behaviors = case.samples, case.samples * case.length
    offset_U = torch.arange(samples + 1) * case.length
    nothing_M = torch.zeros(behaviors, dtype=torch.int32)
    history = History(
        item_M=torch.randint(1, rows, (behaviors,), generator=draw, dtype=torch.int32),
        timestamp_M=nothing_M.long(),
        features_M={"category": nothing_M},
        offset_U=offset_U,
        start_T=offset_U[:-1],
        end_T=offset_U[1:],
    )
    return Batch(
        histories={"history": history},
        user_T=torch.arange(samples),
        user_id_U=torch.arange(samples),
        item_T=torch.randint(1, rows, (samples,), generator=draw, dtype=torch.int32),
        timestamp_T=nothing_M[:samples].long(),
        features_T={"category": nothing_M[:samples]},
        labels_T={"label": torch.zeros(samples)},
        origin="benchmark",
    )


class _OnShard:
    """What a model does: ids travel, and the position's part of the score is added on the shard."""

    def __init__(self, case: Case, rows: int) -> None:
        settings = ModelSettings(
            features=("item", "position"),
            attention=TableSet(dim=case.dim),
            representation=TableSet(dim=4),
            retrieved={"history": case.k},
        )
        sizes = DataSizes.counted(rows - 1, 1, {"history": case.length})
        self.model: CtrModel = build_model(settings, sizes, META)
        shard(self.model, CPU, make_plan(self.model, CPU, batch_size=1))
        with torch.no_grad():
            for value in self.model.state_dict().values():
                for piece in value.local_shards() if hasattr(value, "local_shards") else []:
                    piece.tensor.normal_(generator=torch.Generator().manual_seed(dist.get_rank()))
            self.small = self.model.tables.small_rows(CPU)

    @torch.no_grad()
    def search(self, batch: Batch) -> Selection:
        """The K best of each sample."""
        return self.model.search(batch, self.small, self.model.start_search(batch))["history"]


class _RowWise(EmbeddingCollectionSharder):
    """TorchRec's own offers no row-wise sharding on a CPU."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Sharding types on offer."""
        return [ShardingType.ROW_WISE.value]


class _Stock:
    """A row-wise sharded `EmbeddingCollection`: behaviours and target of a sample are one sequence of its lookup."""

    def __init__(self, case: Case, rows: int) -> None:
        self.case = case
        config = EmbeddingConfig(name="item", num_embeddings=rows, embedding_dim=case.dim, feature_names=["item"])
        module = torch.nn.Sequential(EmbeddingCollection(tables=[config], device=META))
        group, sharders = dist.group.WORLD, [_RowWise()]
        assert group is not None
        planner = EmbeddingShardingPlanner(topology=topology_of(machines_here(CPU)), batch_size=1)
        plan = planner.collective_plan(module, sharders, group)
        env = ShardingEnv.from_process_group(group)
        model = DistributedModelParallel(module, env=env, device=CPU, plan=plan, sharders=sharders)
        self.collection = model.module[0]

    @torch.no_grad()
    def copy_rows(self, ours: _OnShard) -> None:
        """Search the same rows."""
        attention = ours.model.tables.inherent["attention"]
        rows = row_wise_tables(attention)["item"].local_Rd
        self.collection._lookups[0]._emb_modules[0].split_embedding_weights()[0].copy_(rows)
        position_Rd = ours.small.cross["attention"]["history"]["position"]
        score_R = position_Rd @ position_Rd[0] * position_Rd.shape[1] ** -0.5
        self.additive_N = score_R[1:].flip(0)

    @torch.no_grad()
    def search(self, batch: Batch) -> tuple[Tensor, torch.return_types.topk]:
        """All scores, and the K best of each sample."""
        samples = len(batch)
        ids_BN = batch.histories["history"].item_M.view(samples, -1)
        ids = torch.cat([ids_BN, batch.item_T[:, None]], dim=1).flatten()
        lengths = torch.full((samples,), ids_BN.shape[1] + 1, dtype=torch.int32)
        lookup = self.collection(KeyedJaggedTensor(keys=["item"], values=ids, lengths=lengths))
        rows_BND = lookup.wait()["item"].values().view(samples, -1, self.case.dim)
        query_BD = rows_BND[:, -1] * self.case.dim**-0.5
        score_BN = torch.bmm(rows_BND[:, :-1], query_BD.unsqueeze(2)).squeeze(2) + self.additive_N
        return score_BN, torch.topk(score_BN, self.case.k)

"""Training steps of DARE against the same model in plain torch, trained the way the paper's authors train it.

Plain torch: `nn.Embedding` tables with dense gradients, one dense Adam over all rows of all tables, all N behaviours of
every target gathered from both sets of tables. Here: what `dare train` does in a step, on one process.

B = targets of a batch, N = behaviours of each, K = kept, d = dim of a feature, D = dim of item and category together,
E = dim of all features together.
"""

import ctypes
import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.model_parallel import get_unwrapped_module

from embeddings.batch import Batch
from embeddings.initialization import initialize
from embeddings.layers.mlp import SLOPE
from embeddings.loss import click_loss
from embeddings.models import build_model
from embeddings.sharding import make_plan, shard
from embeddings.sizes import DataSizes
from jobs.ranks import M_MMAP_MAX, M_TRIM_THRESHOLD, keep_large_blocks
from pipeline.planning.measuring import StepTask, made_up_batch, on_gloo_ranks
from pipeline.train.optimizer import DenseOptimizer
from pipeline.train.pipeline import SearchPrefetchPipeline
from schemas.settings import load_settings
from schemas.train import DenseSettings, TrainSettings

CPU = torch.device("cpu")

TARGETS_PER_USER = (1, 24)
"""How many targets of a batch share a user's history: none of them, and about as many as batches by user have."""
BATCHES = 24
"""Batches of each case. A turn here is a step of each, which takes about as long as plain torch's one step: the first
of them finds caches that the other side has left, as no step of a run does."""
ALLOWED = 1e-5
"""Greatest relative difference of the losses of both sides on the same batch and the same weights."""


class Size(NamedTuple):
    """What is trained."""

    items: int
    categories: int
    length: int
    """N."""
    k: int
    dim: int
    """d."""
    batch: int
    """B."""


@dataclass(frozen=True)
class TrainingFigures:
    """What steps took; medians over the rounds."""

    targets_per_user: int
    items: int
    samples_per_s: float
    vs_dense_torch: float
    """Samples/s here over those of plain torch."""
    step_ms: float
    dense_samples_per_s: float
    dense_step_ms: float
    loss_difference: float
    """Greatest relative difference of the two losses of a batch, before the first step."""
    batch: int
    threads: int
    tuned: bool
    """Whether plain torch had a fused Adam and memory that is kept."""


def measure(
    items: int = 4_000_000,
    batch: int = 2048,
    threads: int = 2,
    rounds: int = 5,
    categories: int = 9_000,
    length: int = 200,
    k: int = 20,
    dim: int = 16,
    *,
    tuned: bool = False,
) -> list[dict[str, Any]]:
    """Measure steps with one target of a user in a batch, and with many; progress goes to standard error.

    Args:
        items: rows of each of the two item tables.
        batch: targets of a batch.
        threads: of both sides.
        rounds: repetitions; both sides take turns.
        categories: rows of each category table.
        length: behaviours of every history.
        k: behaviours kept.
        dim: floats of an item's, a category's and a position's row.
        tuned: give plain torch what it does not have by itself: one fused pass of Adam over each table, and the memory
            of large tensors kept for the next ones, as `dare train` keeps it.

    Raises:
        RuntimeError: the process failed; the losses of both sides differ, for one.
    """
    size = Size(items, categories, length, k, dim, batch)
    # A process of its own, because a process that has had a process group must end by `leave`.
    (figures,) = on_gloo_ranks(1, _measured, size, threads, rounds, tuned, timeout_s=3600)
    return [asdict(of_case) for of_case in figures]


def _measured(size: Size, threads: int, rounds: int, tuned: bool) -> list[TrainingFigures]:
    torch.set_num_threads(threads)
    settings = load_settings(
        TrainSettings,
        overrides=[
            f"stream.batch_size={size.batch}",
            f"stream.history_length={size.length}",
            f"model.attention.dim={size.dim}",
            f"model.representation.dim={size.dim}",
            f"model.retrieved.history={size.k}",
        ],
    )
    sizes = DataSizes.counted(items=size.items, categories=size.categories, lengths={"history": size.length})
    task = StepTask(settings, sizes)
    ours = _sharded(settings, sizes)
    plain = PlainDare(size, settings.model.hidden)
    plain.copy_weights(ours)
    batches = {
        sharing: [made_up_batch(task, seed=step, targets_per_user=sharing) for step in range(BATCHES)]
        for sharing in TARGETS_PER_USER
    }
    # All losses before the first step: from then on the two optimizers go different ways.
    differences = {sharing: _loss_difference(ours, plain, of_case[:2]) for sharing, of_case in batches.items()}
    sides = _Ours(ours, settings.dense), _Plain(plain, settings.dense, tuned)
    return [
        _timed(size, sharing, batches[sharing], sides, rounds, differences[sharing], threads, tuned)
        for sharing in TARGETS_PER_USER
    ]


def _sharded(settings: TrainSettings, sizes: DataSizes) -> DistributedModelParallel:
    """The model as `dare train` makes it, but with weights so large that losses depend on who is selected."""
    model = build_model(settings.model, sizes, torch.device("meta"))
    sharded = shard(model, CPU, make_plan(model, CPU, settings.stream.batch_size))
    initialize(sharded, seed=1)
    # First weights of about 0.01 make scores of 0 and logits of 0: all models would have the same loss, log 2.
    with torch.no_grad():
        for name, weight in _weights(sharded).items():
            if "tables." in name:
                weight.mul_(100)
            elif weight.dim() == 2:
                weight.mul_(10)
    return sharded


def _weights(sharded: DistributedModelParallel) -> dict[str, Tensor]:
    """All values of the state by name, those of the tables too: one rank has all their rows."""
    state = get_unwrapped_module(sharded).state_dict()
    return {
        name: value.local_shards()[0].tensor if hasattr(value, "local_shards") else value
        for name, value in state.items()
    }


class PaddedBatch(NamedTuple):
    """A batch as the authors store it: a history for each target, int32."""

    item_B: Tensor
    category_B: Tensor
    item_BN: Tensor
    category_BN: Tensor
    position_BN: Tensor
    """Counted back from the target, from 1."""
    label_B: Tensor
    """float32."""

    @classmethod
    def of(cls, batch: Batch) -> "PaddedBatch":
        """Lay the windows side by side; all of them have N behaviours, so there is no padding to be masked."""
        history = batch.histories["history"]
        (length,) = set((history.end_T - history.start_T).tolist())
        index_BN = history.start_T[:, None] + torch.arange(length)
        position_BN = (history.end_T[:, None] - index_BN).int()
        item_BN, category_BN = history.item_M[index_BN], history.features_M["category"][index_BN]
        return cls(batch.item_T, batch.features_T["category"], item_BN, category_BN, position_BN, batch.label_T)


class PlainDare(nn.Module):
    """DARE with one history, in plain torch (arXiv 2410.02604, section 3; docs/models.md)."""

    def __init__(self, size: Size, hidden: Sequence[int]) -> None:
        super().__init__()
        self.k = size.k

        def tables() -> nn.ModuleDict:
            rows = {"item": size.items + 1, "category": size.categories + 1, "position": size.length + 1}
            return nn.ModuleDict({name: nn.Embedding(count, size.dim) for name, count in rows.items()})

        self.attention, self.representation = tables(), tables()
        inputs = 3 * 3 * size.dim  # the target, the pooled history, and their product
        layers: list[nn.Module] = [nn.BatchNorm1d(inputs)]
        for before, after in pairwise([inputs, *hidden]):
            layers += [nn.Linear(before, after), nn.PReLU(init=SLOPE)]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden[-1], 1))

    @torch.no_grad()
    def copy_weights(self, sharded: DistributedModelParallel) -> None:
        """Begin with the weights of the model that this one is compared with."""
        weights = _weights(sharded)
        for name in ("attention", "representation"):
            tables = getattr(self, name)
            for feature in ("item", "category"):
                tables[feature].weight.copy_(weights[f"tables.inherent.{name}.embedding_bags.{feature}_{name}.weight"])
            tables["position"].weight.copy_(weights[f"tables.cross.embedding_bags.history_position_{name}.weight"])
        for name, parameter in self.layers.named_parameters():
            parameter.copy_(weights[f"prediction.layers.{name}"])

    def forward(self, batch: PaddedBatch) -> Tensor:
        """Predict logits, float32 (B,)."""
        own_B = torch.zeros_like(batch.item_B)  # the target's own position is 0
        q_BD, q_Bd = self._rows(self.attention, batch.item_B, batch.category_B, own_B)
        k_BND, k_BNd = self._rows(self.attention, batch.item_BN, batch.category_BN, batch.position_BN)
        v_BE = torch.cat(self._rows(self.representation, batch.item_B, batch.category_B, own_B), -1)
        e_BNE = torch.cat(self._rows(self.representation, batch.item_BN, batch.category_BN, batch.position_BN), -1)
        score_BN = _scaled_product(k_BND, q_BD) + _scaled_product(k_BNd, q_Bd)
        score_BK, index_BK = score_BN.topk(self.k)
        chosen_BKE = e_BNE.gather(1, index_BK.unsqueeze(2).expand(-1, -1, e_BNE.shape[2]))
        pooled_BE = (score_BK.softmax(1).unsqueeze(2) * chosen_BKE).sum(1)
        # The order of the columns that the weights are copied in: target, history, product.
        logit_B1: Tensor = self.layers(torch.cat([v_BE, pooled_BE, pooled_BE * v_BE], 1))
        return logit_B1.squeeze(1)

    @staticmethod
    def _rows(tables: nn.ModuleDict, item: Tensor, category: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([tables["item"](item), tables["category"](category)], -1), tables["position"](position)


def _scaled_product(k_BND: Tensor, q_BD: Tensor) -> Tensor:
    return torch.matmul(k_BND, q_BD.unsqueeze(2)).squeeze(2) / math.sqrt(q_BD.shape[1])


@torch.no_grad()
def _loss_difference(ours: DistributedModelParallel, plain: PlainDare, batches: Sequence[Batch]) -> float:
    """Greatest relative difference of the losses of both sides, in training mode, on the same batches.

    Raises:
        RuntimeError: it is above `ALLOWED`, so that the two sides do not compute the same.
    """
    # In float64, for which the weights are copied once. The target's own position is a constant column: the rounding of
    # its mean in float32, times 1 / sqrt(epsilon), is what the authors' batch normalisation makes of it, and ours not.
    exact = deepcopy(plain).double()
    greatest = 0.0
    for batch in batches:
        loss = float(click_loss(ours(batch), batch.label_T))
        theirs = float(binary_cross_entropy_with_logits(exact(PaddedBatch.of(batch)), batch.label_T.double()))
        greatest = max(greatest, abs(loss - theirs) / theirs)
        if greatest > ALLOWED:
            raise RuntimeError(f"the losses of a batch differ: {loss} here, {theirs} in plain torch")
    return greatest


class _Ours:
    """The step of `dare train`: search started a batch ahead, tables' optimizers in the backward pass."""

    def __init__(self, model: DistributedModelParallel, settings: DenseSettings) -> None:
        self.pipeline = SearchPrefetchPipeline(model, DenseOptimizer(model, settings), CPU)

    def seconds(self, batches: Sequence[Batch]) -> float:
        """Seconds of a step: of all of them, from the first batch's fetch to the last one's end, by their number."""
        todo, began = iter(batches), time.perf_counter()
        for _ in batches:
            self.pipeline.progress(todo)
        seconds = (time.perf_counter() - began) / len(batches)
        self.pipeline.reset()
        return seconds


class _Plain:
    """The authors' step: Adam over all parameters, every row of every table among them."""

    def __init__(self, model: PlainDare, settings: DenseSettings, fused: bool) -> None:
        self.model = model
        # None, not False: what torch chooses by itself is the authors' way.
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=fused or None
        )

    def seconds(self, batch: PaddedBatch) -> float:
        """Seconds of a step."""
        began = time.perf_counter()
        self.optimizer.zero_grad()
        binary_cross_entropy_with_logits(self.model(batch), batch.label_B).backward()
        self.optimizer.step()
        return time.perf_counter() - began


M_MMAP_THRESHOLD = -3
"""The number of a parameter in glibc's <malloc.h>."""


def _leave_blocks_to_glibc() -> None:
    """Undo `keep_large_blocks`: what glibc comes to by itself in a process that frees large tensors."""
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        # The threshold adapts itself up to 32 MiB, and that of giving memory back is twice as much.
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 64 << 20)
        mallopt(M_MMAP_MAX, 1 << 16)


def _timed(
    size: Size,
    sharing: int,
    batches: Sequence[Batch],
    sides: tuple[_Ours, _Plain],
    rounds: int,
    difference: float,
    threads: int,
    tuned: bool,
) -> TrainingFigures:
    ours, plain = sides
    padded = [PaddedBatch.of(batch) for batch in batches]
    seconds, dense_seconds = [], []
    # The first round is not counted: kernels are compiled in it, and Adam's state is made.
    for step in range(1 + rounds):
        keep_large_blocks()  # as `dare train` does
        seconds.append(ours.seconds(batches))
        if not tuned:
            _leave_blocks_to_glibc()
        dense_seconds.append(plain.seconds(padded[step % len(padded)]))
    step_s, dense_step_s = median(seconds[1:]), median(dense_seconds[1:])
    print(
        f"{sharing} targets of a user: {dense_step_s * 1e3:.0f} ms -> {step_s * 1e3:.0f} ms",
        file=sys.stderr,
        flush=True,
    )
    return TrainingFigures(
        targets_per_user=sharing,
        items=size.items,
        samples_per_s=round(size.batch / step_s, 1),
        vs_dense_torch=round(dense_step_s / step_s, 2),
        step_ms=round(step_s * 1e3, 2),
        dense_samples_per_s=round(size.batch / dense_step_s, 1),
        dense_step_ms=round(dense_step_s * 1e3, 2),
        loss_difference=difference,
        batch=size.batch,
        threads=threads,
        tuned=tuned,
    )

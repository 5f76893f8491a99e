"""Training on a GPU: a step a call, `python -m benchmarks.gpu.training STEP`; needs fbgemm_gpu and torchrec.

Batches are made up, ids travel through a process group of one rank. Without a GPU the steps run on the CPU, which shows
that they work and no more.
"""

import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineBase

from benchmarks.gpu.figures import run_step, tell
from embeddings.batch import Batch
from embeddings.distributed.process_group import leave, process_group
from embeddings.distributed.row_wise import bucketed
from embeddings.initialization import initialize
from embeddings.models import build_model
from embeddings.sharding import make_plan, shard
from embeddings.sizes import DataSizes
from pipeline.planning.measuring import StepTask, made_up_batch
from pipeline.runs.checkpoint import last_checkpoint
from pipeline.runs.checkpoint_writer import CheckpointWriter
from pipeline.train.optimizer import DenseOptimizer
from pipeline.train.pipeline import ClickTask, SearchPrefetchPipeline, StepOutput, agree
from pipeline.train.trainer import Trainer
from schemas.errors import UserError
from schemas.settings import load_settings
from schemas.train import TrainSettings

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = DataSizes.counted(items=20_000, categories=300, lengths={"history": 60}, behaviors=4, scenes=3)
FEATURES = "model.features=[item,category,position,interval,behavior,scene]"
STEPS_COMPARED = 20


def bucketing() -> None:
    """Ids by shard, in their old order within each, as the CPU has them."""
    draw = torch.Generator().manual_seed(1)
    for ids, shards in product((0, 1, 1000, 400_000), (1, 2, 8, 100)):
        id_B = torch.randint(0, 100_000, (ids,), generator=draw, dtype=torch.int32)
        block = -(-100_000 // shards)
        expected, found = bucketed(id_B, block, shards), bucketed(id_B.to(DEVICE), block, shards)
        for name in expected._fields:
            one, other = getattr(expected, name).long(), getattr(found, name).long().cpu()
            assert torch.equal(one, other), f"{ids} ids, {shards} shards: {name} differs"
    tell("bucketing differs from the CPU's", 0, at_most=0)
    id_B = torch.randint(0, 100_000, (20_000_000,), generator=draw, dtype=torch.int32).to(DEVICE)
    bucketed(id_B, 12_500, 8)
    tell("20 M ids to 8 shards", _seconds(partial(bucketed, id_B, 12_500, 8)) * 1e3, "ms")


def losses(model: str) -> None:
    """The losses of some steps against the CPU's: search on the shard and locally, prefetched and plain."""
    expected: dict[str, list[float]] = {}
    for search, device, prefetched in product(("shard", "local"), dict.fromkeys((CPU, DEVICE)), (False, True)):
        settings = _settings(f"model.name={model}", f"model.search={search}", FEATURES)
        found = _losses(settings, SIZES, device, prefetched)
        if device == CPU and not prefetched:
            expected[search] = found
        name = f"{model}, {search}, {'prefetched' if prefetched else 'plain'}, {device.type}"
        worst = max(abs(one - other) / abs(other) for one, other in zip(found, expected[search], strict=True))
        tell(f"{name}: relative difference of {STEPS_COMPARED} losses", worst, at_most=1e-4)


def half_precision() -> None:
    """Tables of fp16 against those of fp32."""
    whole, half = (
        _losses(_settings(f"model.attention.precision={kind}", f"model.representation.precision={kind}"), SIZES, DEVICE)
        for kind in ("fp32", "fp16")
    )
    worst = max(abs(one - other) / abs(other) for one, other in zip(half, whole, strict=True))
    tell("fp16 tables: relative difference of losses", worst, at_most=0.02)


def host_memory() -> None:
    """Tables in host memory, cached on the device, against those on the device."""
    on_device = _losses(_settings(), SIZES, DEVICE)
    for role, search in product(("representation", "attention"), ("shard", "local")):
        name = f"{role} in host memory, search {search}"
        try:
            found = _losses(_settings(f"model.{role}.memory=host", f"model.search={search}"), SIZES, DEVICE)
        except UserError as refused:
            tell(name, f"refused: {refused}"[:100])
            continue
        worst = max(abs(one - other) / abs(other) for one, other in zip(found, on_device, strict=True))
        tell(f"{name}: relative difference of losses", worst, at_most=1e-4)


def synchronisations() -> None:
    """How often the host waits for the GPU in a step, as torch warns of it."""
    for model, search in product(("dare", "twin"), ("shard", "local")):
        settings = _settings(f"model.name={model}", f"model.search={search}")
        batches = [made_up_batch(StepTask(settings, SIZES), seed) for seed in range(8)]
        pipeline, optimizer = _pipeline(settings, SIZES, DEVICE, prefetched=True)
        source = iter(batches)
        for _ in range(5):
            pipeline.progress(source)
        with warnings.catch_warnings(record=True) as caught:
            # Each of them, also where a line is met again.
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            agree(6, pipeline.progress(source), optimizer.gradient_norm, stop=False)
            torch.cuda.set_sync_debug_mode("default")
        places = [
            f"{Path(warning.filename).name}:{warning.lineno}"
            for warning in caught
            if "called a synchronizing" in str(warning.message)
        ]
        goal = 8 if (model, search) == ("dare", "shard") else None
        tell(f"synchronisations of a step, {model}, {search}", len(places), at_most=goal)
        tell("at", ", ".join(sorted(set(places)))[:200] or "none")


def throughput() -> None:
    """Samples a second at a batch of 2,048, and what a step's time goes into."""
    goals = {200: 200_000, 10_000: 50_000}
    for length, dim in product(goals, (32, 128)):
        settings = _settings("stream.batch_size=2048", f"model.attention.dim={dim}", "model.representation.dim=32")
        sizes = DataSizes.counted(items=4_000_000, categories=10_000, lengths={"history": length})
        # Few batches over and over: on a GPU no cache holds their rows, and to make many takes the time of the check.
        batches = [made_up_batch(StepTask(settings, sizes), seed) for seed in range(3)]
        pipeline, _ = _pipeline(settings, sizes, DEVICE, prefetched=True)
        source = _over_and_over(batches)
        for _ in range(5):
            pipeline.progress(source)
        name = f"N {length}, K_A {dim}"
        seconds = _seconds(partial(pipeline.progress, source), steps=20)
        tell(f"step, {name}", seconds * 1e3, "ms")
        tell(f"training, {name}", 2048 / seconds, "samples/s", at_least=goals[length])
        if DEVICE.type == "cuda":
            tell(f"peak memory, {name}", torch.cuda.max_memory_allocated() / 1e9, "GB")
            torch.cuda.reset_peak_memory_stats()
        _profile(pipeline, source, name)


def resume() -> None:
    """A run that is saved and resumed has the losses that it would have had."""
    settings = _settings()
    with tempfile.TemporaryDirectory() as folder:
        whole = _trained(settings, Path(folder) / "whole", (12,))
        again = _trained(settings, Path(folder) / "again", (6, 12))
    worst = max(abs(one - other) / abs(other) for one, other in zip(again, whole, strict=True))
    tell("relative difference of losses after a resume", worst, at_most=1e-4)


def _settings(*overrides: str) -> TrainSettings:
    small = ["stream.batch_size=256", "model.retrieved.history=20"]
    return load_settings(TrainSettings, overrides=[*small, *overrides])


def _sharded(settings: TrainSettings, sizes: DataSizes, device: torch.device) -> DistributedModelParallel:
    model = build_model(settings.model, sizes, torch.device("meta"))
    sharded = shard(model, device, make_plan(model, device, settings.stream.batch_size))
    initialize(sharded, settings.seed)
    return sharded


def _pipeline(
    settings: TrainSettings, sizes: DataSizes, device: torch.device, prefetched: bool
) -> tuple[TrainPipelineBase[Batch, StepOutput], DenseOptimizer]:
    sharded = _sharded(settings, sizes, device)
    optimizer = DenseOptimizer(sharded, settings.dense)
    if prefetched:
        return SearchPrefetchPipeline(sharded, optimizer, device), optimizer
    return TrainPipelineBase(ClickTask(sharded), optimizer, device), optimizer


def _losses(settings: TrainSettings, sizes: DataSizes, device: torch.device, prefetched: bool = True) -> list[float]:
    # The CPU's ranks and the GPU's need different groups; each is left before the next one is made.
    batches = [made_up_batch(StepTask(settings, sizes), seed) for seed in range(STEPS_COMPARED)]
    with process_group(device):
        pipeline, _ = _pipeline(settings, sizes, device, prefetched)
        source = iter(batches)
        found = [float(pipeline.progress(source).loss) for _ in batches]
        del pipeline
    return found


class _Batches:
    """Stands for a stream."""

    steps_per_epoch, waited_s = 12, 0.0

    def __init__(self, settings: TrainSettings) -> None:
        self._task, self.epoch, self.step = StepTask(settings, SIZES), 0, 0

    def __iter__(self) -> Iterator[Batch]:
        return (made_up_batch(self._task, step) for step in range(self.step, self.steps_per_epoch))

    def steps_of(self, epoch: int) -> int:
        return self.steps_per_epoch

    def state_at(self, epoch: int, step: int) -> dict[str, Any]:
        return {"epoch": epoch, "step": step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]


class _Report:
    """Stands for a run's report, and asks the run to stop after a step."""

    def __init__(self, stop_at: int) -> None:
        self.losses: list[float] = []
        self.received, self._stop_at = False, stop_at

    def step(self, step: int, agreed: Any) -> None:
        self.losses.append(agreed.loss)
        # Known to the loop from the next step on.
        self.received = step >= self._stop_at - 1

    def point(self, *_: Any) -> None:
        pass

    def flush(self) -> None:
        pass


def _trained(settings: TrainSettings, folder: Path, stops: tuple[int, ...]) -> list[float]:
    """The losses of a run that is stopped and resumed after some of its steps."""
    found: list[float] = []
    for stop in stops:
        with process_group(DEVICE):
            trainer = Trainer(settings, _sharded(settings, SIZES, DEVICE), _Batches(settings), None, DEVICE)  # type: ignore[arg-type]
            trainer._validate = lambda report: False  # type: ignore[method-assign]
            last = last_checkpoint(folder) if folder.exists() else None
            if last is not None:
                trainer.resume(last.path)
            report = _Report(stop)
            with CheckpointWriter(folder, 9, {}) as writer:
                trainer.train(writer, report, report)  # type: ignore[arg-type]
            found += report.losses
            del trainer
    return found


def _over_and_over(batches: list[Batch]) -> Iterator[Batch]:
    while True:
        yield from batches


def _seconds(work: Callable[[], object], steps: int = 5) -> float:
    """Seconds of a call, on average, with what it has left for the device to do."""
    _wait()
    began = time.perf_counter()
    for _ in range(steps):
        work()
    _wait()
    return (time.perf_counter() - began) / steps


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _profile(pipeline: TrainPipelineBase[Batch, StepOutput], source: Iterator[Batch], name: str) -> None:
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])]
    with profile(activities=kinds) as found:
        for _ in range(3):
            pipeline.progress(source)
        _wait()
    attribute = "self_device_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, attribute))
    total = sum(getattr(event, attribute) for event in events)
    tell(f"busy in a step, {name}", total / 3e3, "ms")
    for event in events[:8]:
        tell(f"  of it {event.key[:50]}", 100 * getattr(event, attribute) / max(total, 1), "%")


def _in_group(step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with process_group(DEVICE):
            step()

    return run


# Steps that compare devices, or resume, make the groups that they need.
STEPS: dict[str, Callable[[], None]] = {
    "bucketing": bucketing,
    "losses-dare": lambda: losses("dare"),
    "losses-twin": lambda: losses("twin"),
    "throughput": _in_group(throughput),
    "synchronisations": _in_group(synchronisations),
    "resume": resume,
    "half-precision": half_precision,
    "host-memory": host_memory,
}

if __name__ == "__main__":
    for logger in ("torchrec", "torch.fx"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    run_step(STEPS)
    leave(0)

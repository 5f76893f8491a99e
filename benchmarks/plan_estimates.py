"""Estimated training steps beside measured ones, on two gloo ranks of this machine."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.planning.calibration import RANKS, plan_settings
from pipeline.planning.dry_run import dry_run
from pipeline.planning.measuring import StepTask, step_seconds
from schemas.cluster import ClusterSettings
from schemas.errors import UserError


@dataclass(frozen=True)
class Size:
    """The size of a training step."""

    targets: int
    length: int
    dim: int
    retrieved: int = 20


@dataclass(frozen=True)
class StepFigures:
    """An estimate and its truth."""

    search: str
    targets: int
    length: int
    dim: int
    retrieved: int
    estimated_ms: float
    measured_ms: float
    ratio: float
    """Estimated over measured."""


SIZES = (
    Size(256, 200, 16),
    Size(256, 1000, 16),
    Size(512, 200, 64),
    Size(128, 2000, 32),
    Size(1024, 200, 16),
)


def measure(cluster: ClusterSettings, searches: tuple[str, ...] = ("local", "shard")) -> Iterator[StepFigures]:
    """Estimate and measure a step of each size.

    Raises:
        UserError: a cluster that is not this machine's.
        RuntimeError: a process failed.
    """
    # An estimate for other machines says nothing about a step on this one.
    if cluster.device != "cpu" or cluster.ranks != RANKS:
        raise UserError(
            f"{cluster.name}: steps are measured on {RANKS} ranks of a CPU; `dare plan --calibrate` makes its file"
        )
    for search in searches:
        for size in SIZES:
            settings, sizes = plan_settings(
                cluster,
                (
                    f"stream.batch_size={size.targets}",
                    f"stream.history_length={size.length}",
                    f"model.attention.dim={size.dim}",
                    f"model.representation.dim={size.dim}",
                    f"model.retrieved.history={size.retrieved}",
                    f"model.search={search}",
                ),
            )
            estimated = dry_run(settings, sizes).step.ms
            measured = step_seconds(StepTask(settings, sizes), RANKS) * 1e3
            yield StepFigures(
                search,
                **vars(size),
                estimated_ms=round(estimated, 1),
                measured_ms=round(measured, 1),
                ratio=round(estimated / measured, 2),
            )

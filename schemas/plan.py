"""Settings of a dry run: those of a training run, the sizes of its data, and the cluster."""

from typing import Self

from pydantic import Field, PositiveInt, model_validator

from schemas.cluster import ClusterSettings
from schemas.settings import Settings
from schemas.train import TrainSettings


class SizeSettings(Settings):
    """Numbers of distinct ids, where no data set says them."""

    items: PositiveInt
    categories: PositiveInt = 10_000
    behaviors: PositiveInt | None = None
    """None: no behaviour types."""
    scenes: PositiveInt | None = None
    """None: no scenes."""


class WorkloadSettings(Settings):
    """What a batch of real data looks like, and how much there is of it."""

    targets_per_user: float = Field(1.0, ge=1)
    """Targets of a batch that share a user's history."""
    filled: float = Field(1.0, gt=0, le=1)
    """How much of a sequence's length N histories fill, on the mean."""
    samples: PositiveInt = 1_000_000_000
    """To be trained on."""


class PlanSettings(TrainSettings):
    """Everything that a dry run depends on; a file for ``dare train --config`` is a part of it."""

    cluster: ClusterSettings
    sizes: SizeSettings | None = None
    """None: those of a data set."""
    workload: WorkloadSettings = WorkloadSettings()

    @model_validator(mode="after")
    def _device_has_memory(self) -> Self:
        if self.cluster.device == "cuda" and not self.cluster.device_memory:
            raise ValueError("cluster.device_memory: must be above 0 where cluster.device is cuda")
        return self

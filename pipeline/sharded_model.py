"""The model of a run, sharded over the ranks, as training, evaluation and scoring build it."""

import torch
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan

from embeddings.models import build_model
from embeddings.sharding import make_plan, shard
from embeddings.sizes import DataSizes
from schemas.manifest import Manifest
from schemas.train import TrainSettings


def sharded_model(
    settings: TrainSettings, manifest: Manifest, device: torch.device, plan: ShardingPlan | None = None
) -> DistributedModelParallel:
    """Plan and shard over the default process group; its weights are arbitrary until they are drawn or loaded.

    Args:
        settings: of the run.
        manifest: of the data set, whose sizes decide those of the tables.
        device: of this rank.
        plan: to follow, for the same number of ranks; None: one is made.

    Raises:
        ValueError: settings that do not fit the data, the device or each other; a plan that does not fit them.
    """
    model = build_model(settings.model, DataSizes.of(manifest, settings.stream), torch.device("meta"))
    if plan is None:
        bags = settings.stream.batch_size * (1 + sum(settings.model.retrieved.values()))
        plan = make_plan(model, device, bags)
    return shard(model, device, plan)

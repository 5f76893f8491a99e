"""The model of a run, sharded over the ranks, as training, evaluation and scoring build it."""

import torch
from torchrec.distributed import DistributedModelParallel

from embeddings.models import build_model
from embeddings.sharding import make_plan, shard
from embeddings.sizes import DataSizes
from schemas.manifest import Manifest
from schemas.train import TrainSettings


def sharded_model(settings: TrainSettings, manifest: Manifest, device: torch.device) -> DistributedModelParallel:
    """Plan and shard over the default process group; its weights are arbitrary until they are drawn or loaded.

    Args:
        settings: of the run.
        manifest: of the data set, whose sizes decide those of the tables.
        device: of this rank.

    Raises:
        ValueError: settings that do not fit the data, the device or each other.
    """
    model = build_model(settings.model, DataSizes.of(manifest, settings.stream), torch.device("meta"))
    bags = settings.stream.batch_size * (1 + sum(settings.model.retrieved.values()))
    return shard(model, device, make_plan(model, device, bags))

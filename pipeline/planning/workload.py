"""The workload that a dry run plans for: that of a data set, as far as its settings say nothing of their own."""

from embeddings.workload import mean_load
from schemas.manifest import Manifest
from schemas.plan import PlanSettings


def with_load_of(settings: PlanSettings, manifest: Manifest) -> PlanSettings:
    """Settings with the workload of a data set's training split; what the settings say themselves stays.

    Args:
        settings: of the dry run.
        manifest: of the data set.
    """
    # The figures that training plans with (`embeddings.sharding.sharded_model`).
    measured = dict(zip(("targets_per_user", "filled"), mean_load(manifest, settings.stream), strict=True))
    load = settings.workload
    own = {name: value for name, value in measured.items() if name not in load.model_fields_set}
    return settings.model_copy(update={"workload": load.model_copy(update=own)})

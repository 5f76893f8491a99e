"""A small cluster and settings of dry runs on it."""

from schemas.cluster import ClusterSettings, CollectiveShares, Link
from schemas.plan import PlanSettings
from schemas.settings import load_settings

CLUSTER = ClusterSettings(
    name="toy",
    device="cuda",
    device_name="toy",
    nodes=1,
    devices_per_node=4,
    device_memory=1 << 30,  # type: ignore[arg-type]
    host_memory=64 << 30,  # type: ignore[arg-type]
    memory_bandwidth=100,
    within_node=Link(bandwidth=10, latency=5),
    between_nodes=Link(bandwidth=2, latency=20),
    collectives=CollectiveShares(reduce_scatter=0.5, all_gather=0.8),
    dense_rate=1,
)


def plan_settings(*overrides: str) -> PlanSettings:
    small = (
        "stream.batch_size=64",
        "stream.history_length=100",
        "model.attention.dim=16",
        "model.representation.dim=32",
    )
    return load_settings(PlanSettings, [], [*small, *overrides], {"cluster": CLUSTER.model_dump()})

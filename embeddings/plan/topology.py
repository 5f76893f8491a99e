"""A cluster's settings as the planner's topology."""

from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import HardwareConfig, KernelConfig, TopologyFactory, TrainerConfig

from schemas.cluster import ClusterSettings

_PER_MS = 1e6
"""GB/s -> bytes/ms, the planner's unit."""


def usable_memory(cluster: ClusterSettings) -> tuple[int, int]:
    """Bytes of device and of host memory that a rank may plan with."""
    share = 1 - cluster.reserved
    return int(cluster.device_memory * share), int(cluster.host_memory / cluster.devices_per_node * share)


def cluster_topology(cluster: ClusterSettings, taken: int = 0) -> Topology:
    """The planner's view of the cluster, made by its factory.

    Args:
        cluster: the machines.
        taken: bytes of a rank's memory (device, or host on a CPU) that are not for tables.
    """
    device_bytes, host_bytes = usable_memory(cluster)
    on_cpu = cluster.device == "cpu"
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=cluster.ranks, local_world_size=cluster.devices_per_node),
        HardwareConfig(
            hbm_cap_bytes=0 if on_cpu else max(0, device_bytes - taken),
            ddr_cap_bytes=max(1, host_bytes - taken * on_cpu),
            intra_host_bw=cluster.within_node.bandwidth * _PER_MS,
            inter_host_bw=min(cluster.between_nodes.bandwidth, cluster.within_node.bandwidth) * _PER_MS,
            hbm_mem_bw=cluster.memory_bandwidth * _PER_MS,
            ddr_mem_bw=cluster.memory_bandwidth * _PER_MS,
            hbm_to_ddr_mem_bw=cluster.host_link * _PER_MS,
        ),
        KernelConfig(compute_device=cluster.device, use_hardware_based_bandwidth=True),
    )

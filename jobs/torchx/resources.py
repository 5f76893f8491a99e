"""The node of each shipped topology as a named resource of torchx (`-h h200-128x8`)."""

from functools import cache, partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torchx.specs import Resource

from schemas.cluster import ClusterSettings, known_clusters
from schemas.settings import load_settings

MEMORY_SHARE = 0.96
"""Share of a node's memory that a job can have; the rest is the system's. torchx takes the same for its own nodes."""
CORES_PER_SYSTEM_CORE = 16
"""One core of so many is the system's; where the scheduler has reserved some, a job that asks for all never starts."""


@cache
def _clusters() -> dict[str, Path]:
    return known_clusters(Path(__file__).parents[1].joinpath("clusters"))


def node(topology: str) -> Resource:
    """Return the node of a shipped topology."""
    settings: Any = OmegaConf.to_container(OmegaConf.load(_clusters()[topology]))
    cluster = load_settings(ClusterSettings, [], [], settings)
    assert cluster.cores is not None
    return Resource(
        cpu=cluster.cores - cluster.cores // CORES_PER_SYSTEM_CORE,
        gpu=cluster.devices_per_node if cluster.device == "cuda" else 0,
        memMB=int(cluster.host_memory / 2**20 * MEMORY_SHARE),
    )


# Entry points of torchx name functions without arguments; see pyproject.toml.
laptop_cpu = partial(node, "laptop-cpu")
a100_8 = partial(node, "a100-8")
h100_16x8 = partial(node, "h100-16x8")
h200_16x8 = partial(node, "h200-16x8")
h200_128x8 = partial(node, "h200-128x8")

"""Settings of a cluster: what a plan needs to know of the machines that it is for."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import ByteSize, Field, NonNegativeFloat, PositiveFloat, model_validator

from schemas.settings import Settings, without_former


class Link(Settings):
    """How a rank reaches others."""

    bandwidth: PositiveFloat
    """GB/s (10^9 bytes) that a rank sends in an all-to-all."""
    latency: NonNegativeFloat
    """Microseconds of a collective that carries next to nothing."""


class CollectiveShares(Settings):
    """What share of an all-to-all's bandwidth other collectives reach, by bytes sent."""

    reduce_scatter: PositiveFloat = 1.0
    all_gather: PositiveFloat = 1.0
    all_reduce: PositiveFloat = 1.0


class Costs(Settings):
    """Time of a device for one of many, beside the time of the bytes that it moves; nanoseconds."""

    row: NonNegativeFloat = 0.1
    """Reading a row at random."""
    update: NonNegativeFloat = 0.3
    """Adding a row's gradient and writing the row back."""
    bag: NonNegativeFloat = 0.1
    """A bag of a lookup, empty ones too."""
    id: NonNegativeFloat = 0.2
    """Finding the shard of an id, whether it is asked for already, and its row's place locally."""
    behavior: NonNegativeFloat = 0.3
    """A behaviour's way to its shard: finding it, making its columns, taking them apart there."""
    pair: NonNegativeFloat = 0.1
    """Scoring and ranking a (target, behaviour) pair locally, the products aside."""
    scan: NonNegativeFloat = 0.05
    """Scoring and ranking a pair in the fused search on a shard, the products aside."""
    cross: NonNegativeFloat = 0.05
    """The score of a cross feature of a pair."""
    input: NonNegativeFloat = 0.05
    """An input of the prediction, forwards and backwards, the products aside."""
    step: NonNegativeFloat = 5_000_000
    """A step, whatever its size: launching kernels, Python, waiting for the slowest rank."""


class ClusterSettings(Settings):
    """Nodes of equal devices; a rank a device. On ``cpu`` a device is a process with its share of the node."""

    name: str
    device: Literal["cpu", "cuda"]
    device_name: str
    nodes: Annotated[int, Field(gt=0, le=100_000)]
    devices_per_node: Annotated[int, Field(gt=0, le=1024)]
    device_memory: ByteSize = Field(ByteSize(0), ge=0, lt=2**63)
    """Memory of a device; 0 on ``cpu``."""
    host_memory: ByteSize = Field(gt=0, lt=2**63)
    """Memory of a node's host."""
    cores: Annotated[int, Field(gt=0, le=65_536)] | None = None
    """CPU cores of a node, which its jobs ask for; a plan needs none."""
    memory_bandwidth: PositiveFloat
    """GB/s of a device's memory, or of a process's share of the host's, read and written from end to end."""
    host_link: PositiveFloat = 32.0
    """GB/s between a device and its host, for rows that are in the host's memory."""
    within_node: Link
    between_nodes: Link
    collectives: CollectiveShares = CollectiveShares()
    dense_rate: PositiveFloat
    """TFLOP/s of a device in matrix products of the sizes here, not its peak."""
    costs: Costs = Costs()
    price: PositiveFloat | None = None
    """Price of a device-hour, in any currency."""
    measured: str | None = None
    """When and where the figures were measured; None: from data sheets."""

    @model_validator(mode="before")
    @classmethod
    def _reserve_is_fixed(cls, values: object) -> object:
        why = "`dare plan` leaves as much of the memory free as `dare train` does"
        return without_former("cluster", values, "reserved", why)

    @property
    def ranks(self) -> int:
        """Number of devices."""
        return self.nodes * self.devices_per_node


def known_clusters(folder: Path) -> dict[str, Path]:
    """Find the settings files of clusters in a folder.

    Returns:
        Files by the name of the cluster, which is that of the file.
    """
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}

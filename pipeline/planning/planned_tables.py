"""The tables of a model as a plan places them, and whether a plan holds every row of them once."""

from dataclasses import dataclass
from math import prod

from torchrec.distributed.types import ParameterSharding, ShardingPlan

from embeddings.model import CtrModel
from embeddings.planning import STATE_BYTES
from embeddings.tables.specs import TableKind, TableSpec
from schemas.errors import UserError
from schemas.model import Feature

VALUE_BYTES = {"fp32": 4, "fp16": 2}
"""Bytes of a value of a row."""


@dataclass(frozen=True)
class PlannedTable:
    """A table that the model declares and the planner has placed."""

    name: str
    kind: TableKind
    set: str
    """The set of tables that it belongs to: ``attention``, ``representation``, ``context``, or one of a model's own."""
    feature: Feature
    rows: int
    dim: int
    value_bytes: int
    state_bytes: int
    """Bytes of the optimizer state of all rows."""
    sharding_type: str
    compute_kernel: str
    ranks: tuple[int, ...]
    """The rank of each shard."""
    shard_rows: tuple[int, ...]
    """The number of rows of each shard."""
    gathered: bool
    """Whether each step gathers all its rows on every rank (`embeddings.tables.specs.TableSpec.gathered`)."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all rows."""
        return self.rows * self.dim * self.value_bytes

    @property
    def bytes(self) -> int:
        """Bytes of all rows and of their optimizer state."""
        return self.weight_bytes + self.state_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.dim * self.value_bytes

    @property
    def on_host(self) -> bool:
        """Whether its rows are in the host's memory of a machine with GPUs."""
        return "uvm" in self.compute_kernel

    @property
    def inherent(self) -> bool:
        """Whether it is of items, so that rows are looked up by id, of targets and of behaviours."""
        return self.kind == "inherent"


def planned_tables(model: CtrModel, plan: ShardingPlan) -> tuple[PlannedTable, ...]:
    """All tables of a model, as a plan places them.

    Args:
        model: before sharding.
        plan: of its tables.

    Raises:
        UserError: the plan lacks a table, has one that the model has not, or does not hold exactly its rows.
    """
    # What remains in here at the end are tables that nobody has declared.
    placed = {name: sharding for tables in plan.plan.values() for name, sharding in tables.items()}
    planned = []
    for name, spec in model.tables.specs.items():
        rows, dim = spec.rows, spec.dim
        if name not in placed:
            raise UserError(f"the plan has no table {name}, whose {rows:,} rows the model declares")
        sharding = placed.pop(name)
        _check_cover(name, rows, dim, sharding)
        planned.append(_planned(spec, sharding))
    if placed:
        raise UserError(f"the plan has tables that the model does not declare: {', '.join(sorted(placed))}")
    return tuple(planned)


def _planned(spec: TableSpec, sharding: ParameterSharding) -> PlannedTable:
    bytes_a_row, bytes_a_value = STATE_BYTES[spec.settings.optimizer]
    assert sharding.ranks is not None
    return PlannedTable(
        name=spec.name,
        kind=spec.kind,
        set=spec.set,
        feature=spec.feature,
        rows=spec.rows,
        dim=spec.dim,
        value_bytes=VALUE_BYTES[spec.settings.precision],
        state_bytes=spec.rows * (bytes_a_row + bytes_a_value * spec.dim),
        sharding_type=sharding.sharding_type,
        compute_kernel=sharding.compute_kernel,
        ranks=tuple(sharding.ranks),
        shard_rows=tuple(shard.shard_sizes[0] for shard in sharding.sharding_spec.shards),
        gathered=spec.gathered,
    )


def _check_cover(name: str, rows: int, dim: int, sharding: ParameterSharding) -> None:
    """Shards must hold every value of the table once."""
    shards = sharding.sharding_spec.shards if sharding.sharding_spec else []
    # The right number of values, and no gap between the rows of one shard and the next: then each row is there once.
    held = sum(prod(shard.shard_sizes) for shard in shards)
    if held != rows * dim:
        raise UserError(f"the plan holds {held:,} values of table {name}, the model declares {rows:,} x {dim}")
    parts = sorted((*shard.shard_offsets, *shard.shard_sizes) for shard in shards if prod(shard.shard_sizes))
    row = 0
    for first, column, size, width in parts:
        # Only for shards that hold whole rows; parts of rows are told by the number of values alone.
        if (column, width) == (0, dim) and first != row:
            raise UserError(f"the plan does not hold the rows of table {name} from {row:,} to {first:,} once")
        row = first + size

"""A sharding plan as a file that people review and `dare train --plan` follows."""

import json
from pathlib import Path
from typing import Any

from torch.distributed._shard.metadata import ShardMetadata
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
)

from schemas.documents import json_document, parse_json, read_bytes
from schemas.errors import UserError


def plan_text(plan: ShardingPlan) -> str:
    """Write a plan as JSON: its checksum, then each table's sharding type, kernel, ranks and shards.

    A shard has offsets, sizes and a placement.
    """
    by_table = {}
    for module, tables in plan.plan.items():
        for name, sharding in tables.items():
            # Ranks are given for each table; shards say which rows each rank has, and on which device.
            specification = sharding.sharding_spec
            by_table[name] = {
                "module": module,
                "sharding_type": sharding.sharding_type,
                "compute_kernel": sharding.compute_kernel,
                "ranks": sharding.ranks,
                "shards": [
                    {"offsets": part.shard_offsets, "sizes": part.shard_sizes, "placement": str(part.placement)}
                    for part in (specification.shards if specification else [])
                ],
            }
    # A line a table and a shard: short enough to read, and a diff shows what changed.
    tables = [
        f" {json.dumps(name)}: {{"
        + ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in table.items() if key != "shards")
        + ', "shards": [\n'
        + ",\n".join(f"  {json.dumps(part)}" for part in table["shards"])
        + "\n ]}"
        for name, table in by_table.items()
    ]
    return json_document("{\n" + ",\n".join(tables) + "\n}\n")


def read_plan(path: Path) -> ShardingPlan:
    """Read a plan from a file that holds what `plan_text` returns, or that a person has written.

    Whoever changes a plan takes its checksum out, the first member of the file.

    Raises:
        UserError: no such file, not a plan, or one that differs from its checksum.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such plan; `dare plan --save {path}` writes one")
    try:
        content, _ = parse_json(path, read_bytes(path))
        # The file is by table, for people; TorchRec's plan is by module and then by table.
        modules: dict[str, EmbeddingModuleShardingPlan] = {}
        for name, table in content.items():
            modules.setdefault(table["module"], EmbeddingModuleShardingPlan())[name] = _sharding(table)
    except UserError as error:
        raise UserError(f"{error}, if it is a sharding plan at all") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: not a sharding plan ({type(error).__name__}: {error})") from None
    return ShardingPlan(dict(modules))


def _sharding(table: dict[str, Any]) -> ParameterSharding:
    shards = [
        ShardMetadata(shard_offsets=part["offsets"], shard_sizes=part["sizes"], placement=part["placement"])
        for part in table["shards"]
    ]
    return ParameterSharding(
        sharding_type=table["sharding_type"],
        compute_kernel=table["compute_kernel"],
        ranks=[int(rank) for rank in table["ranks"]],
        sharding_spec=EnumerableShardingSpec(shards),
    )


def differences(before: ShardingPlan, after: ShardingPlan) -> list[str]:
    """Return what differs between two plans, a line for each table and property; empty: nothing does."""
    old, new = _summaries(before), _summaries(after)
    lines = []
    for name in dict.fromkeys([*old, *new]):
        if name not in new:
            lines.append(f"{name}: only in the plan before")
        elif name not in old:
            lines.append(f"{name}: new")
        else:
            lines += [
                f"{name}: {key} {old[name][key]} -> {value}"
                for key, value in new[name].items()
                if old[name][key] != value
            ]
    return lines


def _summaries(plan: ShardingPlan) -> dict[str, dict[str, Any]]:
    """Return what people compare of each table's sharding, by table and property."""
    summaries = {}
    for tables in plan.plan.values():
        for name, sharding in tables.items():
            shards = sharding.sharding_spec.shards
            ranks = sorted(sharding.ranks)
            summaries[name] = {
                "rows": f"{sum(part.shard_sizes[0] for part in shards):,}",
                "dim": max(part.shard_sizes[1] for part in shards),
                "sharding type": sharding.sharding_type,
                "compute kernel": sharding.compute_kernel,
                "ranks": _shown(ranks),
                "rows of a shard": f"{max(part.shard_sizes[0] for part in shards):,}",
                "device": str(shards[0].placement).partition("/")[2].partition(":")[0],
            }
    return summaries


def _shown(ranks: list[int]) -> str:
    if ranks == list(range(ranks[0], ranks[-1] + 1)) and len(ranks) > 2:
        return f"{ranks[0]}..{ranks[-1]}"
    return ",".join(map(str, ranks))

"""A sharding plan for people and programs to read."""

import json

from torchrec.distributed.types import ShardingPlan


def plan_text(plan: ShardingPlan) -> str:
    """JSON: for each table of each module its sharding type, kernel, ranks, and shards (offsets, sizes, placement)."""
    found = {}
    for module, tables in plan.plan.items():
        for name, sharding in tables.items():
            specification = sharding.sharding_spec
            found[name] = {
                "module": module,
                "sharding_type": sharding.sharding_type,
                "compute_kernel": sharding.compute_kernel,
                "ranks": sharding.ranks,
                "shards": [
                    {"offsets": part.shard_offsets, "sizes": part.shard_sizes, "placement": str(part.placement)}
                    for part in (specification.shards if specification else [])
                ],
            }
    return json.dumps(found, indent=1) + "\n"

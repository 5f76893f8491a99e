"""Small days of a chain, made by hand: they follow each other by their manifests alone, and have equal dictionaries."""

import hashlib
from pathlib import Path

from schemas.manifest import MANIFEST, Chain, Day
from schemas.shards import Split
from tests.datasets import manifest_of, random_users, write_dataset, write_manifest


def write_day(folder: Path, seed: int, former: Path | None = None, *, users: int = 40, targets: int = 9) -> Path:
    """Write a day that continues ``former``; None: day 0. Items are hashed, so that all of them are old."""
    splits = tuple(Split) if targets else (Split.VALIDATION, Split.TEST)
    write_dataset(folder, random_users(users, seed, splits=(Split.TRAIN, *splits) if targets else splits))
    chain = Chain(first_timestamp=20_000 + seed, last_timestamp=20_000 + seed, rows=None, layers=())
    if former is not None:
        before = Chain.model_validate(manifest_of(former)["chain"])
        last = Day(
            fingerprint=hashlib.sha256((former / MANIFEST).read_bytes()).hexdigest(),
            first_timestamp=before.first_timestamp,
            last_timestamp=before.last_timestamp,
            sources=(),
        )
        chain = chain.model_copy(update={"days": (*before.days, last)})
    write_manifest(folder, manifest_of(folder) | {"chain": chain.model_dump(mode="json")})
    return folder

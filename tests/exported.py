"""A run whose checkpoints are exported in tests."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.runs.checkpoint import Checkpoint

FEATURES = "[item,category,brand,tags,price,mass,position,action,topics,dwell,city,langs,age,slot,bid]"


@dataclass(frozen=True)
class Deltas:
    """A run of two ranks with text ids: a full checkpoint, and a delta that stands on it."""

    run: Path
    data: Path
    full: Checkpoint
    delta: Checkpoint

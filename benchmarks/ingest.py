"""`dare prepare` over logs of its own making: integer ids without features, and text ids with four features.

N = events.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from pipeline.hashing import mix

BLOCK = 1_000_000
"""Events that are made at a time."""
BEHAVIORS_OF_A_USER = 200
EVENTS_OF_AN_ITEM = 5
CATEGORIES = 9_400
SEGMENTS = 50
TYPES = ("view", "cart", "favourite", "buy")
LETTERS = np.frombuffer(b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_", np.uint8)
ID_LENGTH = 22
"""Characters of a text id: 128 bits in base 64."""

OPTIONS = pyarrow.csv.WriteOptions(quoting_style="none")

FEATURES = [
    {"name": "category", "of": "item", "column": "category"},
    {"name": "type", "of": "behavior", "column": "type"},
    {"name": "dwell", "of": "behavior", "kind": "number", "column": "dwell", "buckets": 20},
    {"name": "segment", "of": "user", "column": "segment"},
]


@dataclass(frozen=True)
class IngestFigures:
    """One run of ``dare prepare``."""

    case: str
    events: int
    input_mib: float
    seconds: float
    """Of ``dare prepare``, without the start of its process."""
    events_per_s: int
    peak_mib: int
    """Most resident memory of its process."""


def measure(events: int) -> Iterator[IngestFigures]:
    """Prepare a log with integer ids and no features, then one with text ids and `FEATURES`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case, settings in (("integer ids", {}), ("text ids, 4 features", _settings())):
            log = folder / "log.csv"
            write_log(log, events, text=bool(settings))
            (folder / "settings.yaml").write_text(json.dumps(settings))
            command = [sys.executable, "-m", "jobs.cli", "prepare", "--events", str(log), "--out", str(folder / "out")]
            command += ["--config", str(folder / "settings.yaml"), "--overwrite", "--json", "split.min_behaviors=1"]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            told = json.loads(output.splitlines()[-1])
            yield IngestFigures(
                case,
                events,
                round(log.stat().st_size / 2**20, 1),
                told["seconds"],
                round(events / told["seconds"]),
                told["peak_mib"],
            )


def _settings() -> dict[str, Any]:
    log = {"user_type": "text", "item_type": "text", "category_id": None}
    return {"events": log, "features": FEATURES}


def write_log(path: Path, events: int, *, text: bool) -> None:
    """Write a log of events whose users and items are drawn, items in proportion to a power of their rank."""
    users, items = max(events // BEHAVIORS_OF_A_USER, 10), max(events // EVENTS_OF_AN_ITEM, 100)
    writer = None
    with pa.OSFile(str(path), "wb") as file:
        for first in range(0, events, BLOCK):
            block = _block(np.arange(first, min(first + BLOCK, events)), users, items, text=text)
            writer = writer or pyarrow.csv.CSVWriter(file, block.schema, write_options=OPTIONS)
            writer.write(block)
        if writer is not None:
            writer.close()


def _block(number_N: NDArray[np.int64], users: int, items: int, *, text: bool) -> pa.Table:
    def uniform(salt: int) -> NDArray[np.float64]:
        return mix(number_N, salt) / np.float64(2**64)

    user_N = (uniform(1) * users).astype(np.int64)
    item_N = (items * uniform(2) ** 3).astype(np.int64)
    columns: dict[str, Any] = {
        "user_id": _texts(user_N, 3) if text else user_N,
        "item_id": _texts(item_N, 4) if text else item_N,
        "timestamp": (1_500_000_000 + uniform(5) * 10_000_000).astype(np.int64),
    }
    category_N = (mix(item_N, 6) % np.uint64(CATEGORIES)).astype(np.int64)
    if not text:
        return pa.table(columns | {"category_id": category_N})
    names = pa.array([f"category {number}" for number in range(CATEGORIES)])
    columns["category"] = names.take(pa.array(category_N))
    columns["type"] = pa.array(TYPES).take(pa.array((uniform(7) ** 2 * len(TYPES)).astype(np.int64)))
    columns["dwell"] = np.round(-np.log1p(-uniform(8)) * 30, 2)
    segments = pa.array([f"segment {number}" for number in range(SEGMENTS)])
    columns["segment"] = segments.take(pa.array((mix(user_N, 9) % np.uint64(SEGMENTS)).astype(np.int64)))
    return pa.table(columns)


def _texts(id_N: NDArray[np.int64], salt: int) -> pa.Array:
    """Ids as `ID_LENGTH` characters that look drawn."""
    bits = [mix(id_N, salt), mix(id_N, salt + 100), mix(id_N, salt + 200)]
    places = [(bits[place // 10] >> np.uint64(6 * (place % 10))) & np.uint64(63) for place in range(ID_LENGTH)]
    letters = LETTERS[np.stack(places, axis=1)].reshape(-1)
    offsets = np.arange(len(id_N) + 1, dtype=np.int32) * ID_LENGTH
    return pa.StringArray.from_buffers(len(id_N), pa.py_buffer(offsets), pa.py_buffer(letters))

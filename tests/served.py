"""An exported model for tests of answers, made of a raw log: prepared, trained for a moment, exported."""

import csv
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.export.export import export_run
from pipeline.ingest.prepare import prepare
from schemas.prepare import PrepareSettings
from tests.runs import Run, small_settings

ITEMS, USERS, ACTIONS = 60, 40, ("view", "cart", "buy")
FEATURES: list[dict[str, Any]] = [
    {"name": "category", "of": "item", "column": "department"},
    {"name": "action", "of": "behavior", "column": "action"},
    {"name": "city", "of": "user", "column": "city"},
    {"name": "slot", "of": "impression", "column": "slot", "type": "integer"},
    {"name": "price", "of": "item", "kind": "number", "column": "price", "scale": "log"},
    {"name": "tags", "of": "item", "kind": "ids", "column": "tags", "separator": " "},
]
READ = "model.features=[item,category,position,interval,action,city,slot,price,tags]"


@dataclass(frozen=True)
class RawLog:
    """Events and impressions as files, and as requests have them."""

    folder: Path
    events: list[dict[str, Any]]
    shown: list[dict[str, Any]]

    @property
    def shown_file(self) -> Path:
        return self.folder / "shown.csv"

    def history(self, user: int) -> dict[str, Any]:
        """A user's history, in the words of the log."""
        lines = [line for line in self.events if line["customer"] == user]
        columns = {name: [line[name] for line in lines] for name in ("product", "when", "action")}
        return columns | {"city": f"city {user % 3}"}

    def candidate(self, line: dict[str, Any]) -> dict[str, Any]:
        """What an impression is as a candidate."""
        return {name: line[name] for name in ("product", "when", "slot")}


def write_log(folder: Path) -> RawLog:
    """Write a log of users who like some departments."""
    draw = random.Random(5)
    liked = {user: draw.sample(range(6), 2) for user in range(USERS)}

    def line(user: int, product: int, when: int) -> dict[str, Any]:
        tags = " ".join(f"t{product % number}" for number in (2, 3, 7))
        of_item = {"department": f"d{product % 6}", "price": 1.5 * product, "tags": tags}
        return {"customer": user, "product": product, "when": when, "city": f"city {user % 3}"} | of_item

    events, shown = [], []
    for user in range(USERS):
        for _ in range(draw.randint(5, 60)):
            product = draw.choice([each for each in range(ITEMS) if each % 6 in liked[user] or draw.random() < 0.2])
            # Several behaviours have one time.
            when = 1_600_000_000 + 50 * draw.randint(0, 400)
            events.append(line(user, product, when) | {"action": draw.choice(ACTIONS)})
        for _ in range(30):
            product = draw.randrange(ITEMS)
            taken = (product % 6 in liked[user]) != (draw.random() < 0.1)
            when = 1_600_000_000 + draw.randint(2_000, 22_000)
            shown.append(line(user, product, when) | {"slot": draw.randint(1, 4), "label": int(taken)})
    for name, lines in (("events", events), ("shown", shown)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)
    return RawLog(folder, events, shown)


def prepare_log(log: RawLog) -> Path:
    """Prepare the log; returns the folder of the data set."""
    names = {"user_id": "customer", "item_id": "product", "timestamp": "when", "category_id": None}
    content = {
        "events": {"files": [str(log.folder / "events.csv")]} | names,
        "impressions": {"files": [str(log.shown_file)]} | names,
        "split": {"kind": "impressions", "min_history": 0, "test_fraction": 0.3},
        "features": FEATURES,
    }
    prepare(PrepareSettings.model_validate(content), log.folder / "data")
    return log.folder / "data"


@dataclass(frozen=True)
class Exported:
    """An exported model, and a request to it."""

    folder: Path
    """A small DARE in fp32."""
    other: Path
    """The model at another step of its run."""
    run: Path
    data: Path
    log: RawLog
    user: int
    history: dict[str, Any]
    """Of the user."""
    candidates: list[dict[str, Any]]

    @property
    def body(self) -> dict[str, Any]:
        """What a server is asked."""
        return {"history": self.history, "candidates": self.candidates}


@pytest.fixture(scope="session")
def raw_log(tmp_path_factory: pytest.TempPathFactory) -> RawLog:
    """A log of 40 users; its data set is in the folder ``data`` beside it."""
    log = write_log(tmp_path_factory.mktemp("raw-log"))
    prepare_log(log)
    return log


def train(log: RawLog, name: str, *overrides: str) -> Path:
    """Train on the log's data set for a moment; returns the folder of the run."""
    settings = small_settings("epochs=1", READ, *overrides)
    return Run(1, settings, log.folder / "data", log.folder / name).finish().folder


@pytest.fixture(scope="session")
def exported(raw_log: RawLog) -> Exported:
    """A small DARE of two checkpoints, exported in fp32, without compiled programs."""
    run = train(raw_log, "run", "checkpoint.every=100")
    export_run(run, raw_log.folder / "model", "last", compile=False)
    export_run(run, raw_log.folder / "other", "best", compile=False)
    user = max(range(USERS), key=lambda user: len(raw_log.history(user)["product"]))
    candidates = [raw_log.candidate(line) for line in raw_log.shown if line["customer"] == user][:8]
    return Exported(
        raw_log.folder / "model",
        raw_log.folder / "other",
        run,
        raw_log.folder / "data",
        raw_log,
        user,
        raw_log.history(user),
        candidates,
    )

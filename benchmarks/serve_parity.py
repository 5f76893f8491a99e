"""Compare an exported model's answers to raw lines with `dare score` of its run, target by target.

    python -m benchmarks.serve_parity --run runs/cj --model models/cj --preset completejourney

Each user's history is what the log says, and each target a candidate, so that raw values take the way of a request.
Settings are those that the data set was prepared with: ``--preset``, ``--config``, ``events.files=[log.csv]``.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from embeddings.distributed.process_group import process_group
from pipeline.evaluate.auc import Ranks, auc
from pipeline.evaluate.score import PARTS, score_run
from pipeline.ingest.columns import event_columns, impression_columns, key_of
from pipeline.ingest.conversion import converted
from pipeline.ingest.reading import raw_batches
from pipeline.ingest.sources import LogFiles, feature_files, log_files
from pipeline.serve.columns import RequestColumn
from pipeline.serve.predictor import Predictor
from schemas.prepare import PRESETS, PrepareSettings
from schemas.settings import load_settings


@dataclass(frozen=True)
class Parity:
    """How far answers are from `dare score`."""

    targets: int
    """That were compared."""
    ambiguous: int
    """Targets cut from events at whose moment a column has several values: the log does not say which is theirs."""
    largest_difference: float
    """Of the main task's probabilities."""
    auc_of_run: float
    auc_of_model: float
    p50_ms: float
    """Of a request with all targets of a user, raw values and all."""


class RawLog:
    """All lines of a log with their columns as they stand, by user.

    Args:
        files: of the log.
        columns: how user and time are read.
    """

    def __init__(self, files: LogFiles) -> None:
        batches = [(index, batch) for index in range(len(files.paths)) for batch in raw_batches(files, index)]
        self.table = pa.Table.from_batches([batch for _, batch in batches])
        self._values: dict[str, list[Any]] = {}
        index_N = np.concatenate([np.full(len(batch), index) for index, batch in batches])
        record_N = np.concatenate([np.arange(1, 1 + int((index_N == each).sum())) for each in range(len(files.paths))])
        user, second = (self._column(files, name) for name in ("user_id", "timestamp"))
        names = np.array(files.names, object)
        self.lines = pd.DataFrame({"user": user, "second": second, "file": names[index_N], "line": record_N})
        self.by_user = self.lines.groupby("user").indices
        self.by_moment = self.lines.groupby(["user", "second"]).indices
        self.by_line = {place: index for index, place in enumerate(zip(names[index_N], record_N, strict=True))}

    def _column(self, files: LogFiles, name: str) -> list[Any]:
        column = next(column for column in files.columns if column.name == name)
        raw = self.table[column.source].combine_chunks()
        values: list[Any] = converted(column, raw, files.unit, files.zone)[0].to_pylist()
        return values

    def values(self, column: str, index: Any) -> list[Any]:
        """Raw values of some lines."""
        if column not in self._values:
            self._values[column] = self.table[column].to_pylist()
        values = self._values[column]
        return [values[each] for each in index]


def users_of_files(settings: PrepareSettings, columns: Sequence[RequestColumn]) -> dict[Any, dict[str, Any]]:
    """What files say of users, by raw id: column of a request -> raw value."""
    names = {column.feature: column.name for column in columns if column.of == "user"}
    found: dict[Any, dict[str, Any]] = {}
    for part in feature_files(settings):
        if part.features[0].of != "user":
            continue
        key, kind = key_of(settings, part.features[0])
        for index in range(len(part.files.paths)):
            for batch in raw_batches(part.files, index):
                column = next(each for each in part.files.columns if each.source == key and each.kind == kind)
                ids = converted(column, batch.column(key), "s", None)[0].to_pylist()
                for feature in part.features:
                    for user, value in zip(ids, batch.column(str(feature.column)).to_pylist(), strict=True):
                        if feature.name in names:
                            found.setdefault(user, {})[names[feature.name]] = value
    return found


def requests(
    predictor: Predictor, settings: PrepareSettings, scores: pd.DataFrame
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]], list[int]]]:
    """Yield, for each user, the raw history, unambiguous candidates, and the row of each of these in ``scores``."""
    history = [column for column in predictor.columns if column.of != "candidate" and column.role != "user"]
    candidate = [column for column in predictor.columns if column.of == "candidate"]
    events = RawLog(log_files("events", settings.events, event_columns(settings), skip_corrupt=False))
    shown = None
    if settings.impressions is not None:
        shown = RawLog(log_files("impressions", settings.impressions, impression_columns(settings), skip_corrupt=False))
    of_files = users_of_files(settings, history)
    lists = [each.name for each in history if each.name in events.table.column_names]
    log = shown or events
    names = [each.name for each in candidate if each.required and each.name in log.table.column_names]
    item = next(each.name for each in candidate if each.role == "item")
    of_target = {name: scores[name].tolist() for name in scores.columns}
    for user, index in scores.groupby("user_id").indices.items():
        raw: dict[str, Any] = {name: events.values(name, events.by_user.get(user, [])) for name in lists}
        candidates, rows = [], []
        for row in map(int, index):
            if shown is None:
                lines = log.by_moment[user, of_target["timestamp"][row]]
                # Negatives have what is their positive's, but for the item.
                values = {name: log.values(name, lines) for name in names} | {item: [of_target["item_id"][row]]}
            else:
                place = shown.by_line[of_target["file"][row], of_target["line"][row]]
                values = {name: log.values(name, [place]) for name in names}
            if all(len(set(map(repr, each))) == 1 for each in values.values()):
                candidates.append({name: each[0] for name, each in values.items()})
                rows.append(row)
        yield raw | of_files.get(user, {}), candidates, rows


def compare(run: Path, model: Path, which: str, split: str, settings: PrepareSettings, data: Path | None) -> Parity:
    """Compare the answers of ``model`` with those of ``run`` on all targets of a split."""
    with TemporaryDirectory() as folder, process_group(torch.device("cpu")):
        out = Path(folder) / "scores"
        score_run(run, split, which, data, out, torch.device("cpu"), overwrite=False)
        scores = pd.concat([pd.read_parquet(part) for part in sorted(out.glob(PARTS))], ignore_index=True)
    predictor = Predictor.load(model)
    found = np.full(len(scores), np.nan)
    milliseconds = []
    for history, candidates, rows in requests(predictor, settings, scores):
        start = time.perf_counter()
        answer = predictor.score(history, candidates)
        milliseconds.append(1000 * (time.perf_counter() - start))
        found[rows] = answer if answer.ndim == 1 else answer[:, 0]
    known = np.isfinite(found)
    label, expected = scores["label"].to_numpy(), scores["score"].to_numpy()
    return Parity(
        int(known.sum()),
        int((~known).sum()),
        float(np.abs(found - expected)[known].max()),
        auc_of(label[known], expected[known]),
        auc_of(label[known], found[known]),
        round(float(np.median(milliseconds)), 3),
    )


def auc_of(label: Any, score: Any) -> float:
    """The AUC of labels that are 0, 1, or missing."""
    return auc(torch.from_numpy(score[label == 1]), torch.from_numpy(score[label == 0]), Ranks(None))


def main() -> None:
    """Print the comparison as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="the data set, if it has moved")
    parser.add_argument("--checkpoint", default="best")
    parser.add_argument("--split", default="test")
    parser.add_argument("--preset", default="generic", choices=sorted(PRESETS))
    parser.add_argument("--config", type=Path, action="append", default=[])
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    files: list[Path | Mapping[str, Any]] = [PRESETS[given.preset], *given.config]
    settings = load_settings(PrepareSettings, files, given.overrides)
    parity = compare(given.run, given.model, given.checkpoint, given.split, settings, given.data)
    print(json.dumps(asdict(parity)))


if __name__ == "__main__":
    main()

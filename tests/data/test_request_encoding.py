"""Requests are encoded as ``dare prepare`` and the stream encode the same raw lines."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from embeddings.batch import Bags, Batch, History
from pipeline.ingest.prepare import prepare
from pipeline.stream.data_set import DataSet
from pipeline.stream.history_stream import HistoryStream
from schemas.shards import RECORDS_OF_A_FILE, SPLITS
from schemas.stream import HistorySequence, StreamSettings
from tests.raw_logs import Logs, Row, encoder_of, random_lines


def plain(column: torch.Tensor, bags: Bags | None) -> list[Any]:
    """Values of a column: ids, floats, or ids of sets."""
    if bags is None:
        return column.tolist()
    ends = bags.offset_B1.tolist()
    return [bags.id_E[ends[number] : ends[number + 1]].tolist() for number in column.tolist()]


def target(batch: Batch, t: int) -> Row:
    """All that a batch says of a target and its window, with sets in the place of their numbers."""
    user = int(batch.user_T[t])

    def window(history: History) -> Row:
        cut = slice(int(history.start_T[t]), int(history.end_T[t]))
        features = {name: plain(column[cut], batch.bags.get(name)) for name, column in history.features_M.items()}
        return {"item": history.item_M[cut].tolist(), "timestamp": history.timestamp_M[cut].tolist()} | features

    return {
        "item": int(batch.item_T[t]),
        "timestamp": int(batch.timestamp_T[t]),
        "features": {name: plain(column[t : t + 1], batch.bags.get(name)) for name, column in batch.features_T.items()},
        "user": {
            name: plain(column[user : user + 1], batch.bags.get(name)) for name, column in batch.features_U.items()
        },
        "windows": {name: window(history) for name, history in batch.histories.items()},
        "types": {
            **{name: column.dtype for name, column in batch.features_T.items()},
            **{
                name: column.dtype
                for history in batch.histories.values()
                for name, column in history.features_M.items()
            },
            "item": batch.item_T.dtype,
            "timestamp": batch.timestamp_T.dtype,
        },
    }


def streams(folder: Path, settings: StreamSettings) -> list[Batch]:
    """All batches of a data set."""
    counts = DataSet.open(folder).targets_G
    batches = []
    for split in SPLITS:
        if counts[split].sum():
            with HistoryStream(folder, split, settings, seed=1, shuffle=False, lines=True) as stream:
                batches += list(stream)
    return batches


def compare(logs: Logs, folder: Path, stream: StreamSettings, seed: int) -> int:
    """Compare every target of a data set with the request made of the raw lines; returns how many there are."""
    encoder = encoder_of(folder, stream)
    names = None if logs.items == "hashed" else DataSet.open(folder).names("item")
    order, count = random.Random(seed), 0
    for batch in streams(folder, stream):
        texts = batch.user_text_U
        assert texts is not None
        for user in range(batch.users):
            targets = torch.nonzero(batch.user_T == user).flatten().tolist()
            name = texts[user].as_py()
            candidates = []
            for t in targets:
                if logs.shown is not None:
                    assert batch.line_T is not None
                    row = logs.shown[int(batch.line_T[t]) % RECORDS_OF_A_FILE - 1]
                    candidates.append(logs.candidate(row, logs.word(row["item"])))
                    continue
                own = batch.item_T if batch.own_item_T is None else batch.own_item_T
                assert names is not None
                raw = names[int(own[t])].as_py()
                at = [row for row in logs.events if row["user"] == name and row["time"] == int(batch.timestamp_T[t])]
                # Of equal lines with other places only one is the target: those are left out.
                rows = [row for row in at if str(logs.item(row["item"])) == str(raw)]
                candidates.append(logs.candidate(rows[0], raw) if len({row["place"] for row in rows}) == 1 else None)
            given = [t for t, candidate in zip(targets, candidates, strict=True) if candidate is not None]
            request = encoder.encode(logs.history(name, order), [each for each in candidates if each is not None])
            for place, t in enumerate(given):
                assert target(request.batch, place) == target(batch, t)
            count += len(given)
    return count


SEQUENCES = {
    "short": HistorySequence(length=2),
    "long": HistorySequence(length=100),
    "clicks": HistorySequence(length=5, where={"kind": ("click", "buy")}),
    "searched": HistorySequence(length=5, where={"words": ("a",), "numbers": (1, 3)}),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("items", "unit", "shown"),
    [("text", "s", True), ("integer", "datetime", True), ("hashed", "ms", True), ("uuid", "s", False)],
)
def test_requests_become_what_prepare_and_the_stream_make(
    tmp_path: Path, items: str, unit: str, shown: bool, seed: int
) -> None:
    logs = Logs(tmp_path, random_lines(seed), items, unit, shown=shown)
    prepare(logs.settings(), tmp_path / "data")
    compared = compare(logs, tmp_path / "data", StreamSettings(batch_size=7, sequences=SEQUENCES), seed)
    assert compared > 20

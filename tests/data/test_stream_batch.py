"""Windows of a batch, and the rows of cross features that their behaviours have."""

import math
from pathlib import Path

import pytest
import torch

from embeddings.batch import Selection
from embeddings.features import behavior_row
from pipeline.stream.history_stream import HistoryStream
from schemas.stream import StreamSettings
from tests.datasets import random_users, write_dataset


@pytest.mark.parametrize("named", [True, False])
def test_windows_equal_a_slow_reference(tmp_path: Path, named: bool) -> None:
    names = {"behaviors": ("click", "cart"), "scenes": ("feed",)} if named else {}
    write_dataset(tmp_path / "data", random_users(30, behaviors=2, scenes=1), **names)
    settings = StreamSettings(batch_size=16, history_length=7)
    with HistoryStream(tmp_path / "data", "train", settings, seed=0, shuffle=True) as stream:
        batches = list(stream)
    assert len(batches) > 2
    for batch in batches:
        history = batch.histories["history"]
        columns = {"item": history.item_M, **history.features_M}
        targets = {"item": batch.item_T, **batch.features_T}
        assert set(history.features_M) == {"category"} | ({"behavior", "scene"} if named else set())
        assert set(batch.features_T) == {"category"} | ({"scene"} if named else set())
        offsets = history.offset_U.tolist()
        assert (offsets[0], offsets[-1]) == (0, len(history.item_M))
        everything = Selection.everything(history)
        for t in range(len(batch)):
            start, end = int(history.start_T[t]), int(history.end_T[t])
            user = int(batch.user_T[t])
            assert offsets[user] <= start <= end <= offsets[user + 1], "a window lies within its user's history"
            index_N = everything.index_TK[t][everything.valid_TK[t]]
            assert index_N.tolist() == list(range(start, end))
            spans_N = batch.timestamp_T[t] - history.timestamp_M[start:end]
            assert bool((spans_N > 0).all()), "history is strictly earlier"
            target = torch.full_like(index_N, t)
            position_N = behavior_row("position", batch, history, index_N, target)
            assert position_N.tolist() == list(range(end - start, 0, -1))
            interval_N = behavior_row("interval", batch, history, index_N, target)
            assert interval_N.tolist() == [1 + math.floor(math.log2(1 + span)) for span in spans_N.tolist()]
            for name, column_M in columns.items():
                if name in ("behavior", "scene"):
                    assert torch.equal(behavior_row(name, batch, history, index_N, target), column_M[start:end])
        assert all(len(column_T) == len(batch) for column_T in targets.values())

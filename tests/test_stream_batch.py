"""Views of a batch: KeyedJaggedTensors and the padded one."""

import itertools
from pathlib import Path

import pytest

from embeddings.interval import interval_bucket
from pipeline.stream.history_stream import HistoryStream
from schemas.stream import StreamSettings
from tests.datasets import random_users, write_dataset


@pytest.mark.parametrize("named", [True, False])
def test_views_equal_a_slow_reference(tmp_path: Path, named: bool) -> None:
    names = {"behaviors": ("click", "cart"), "scenes": ("feed",)} if named else {}
    write_dataset(tmp_path / "data", random_users(30, behaviors=2, scenes=1), **names)
    settings = StreamSettings(batch_size=16, history_length=7)
    with HistoryStream(tmp_path / "data", "train", settings, seed=0, shuffle=True) as stream:
        batches = list(stream)
    assert len(batches) > 2
    for batch in batches:
        history = batch.histories["history"]
        columns = {"item": history.item_M, "category": history.category_M}
        targets = {"item": batch.item_T, "category": batch.category_T}
        if named:
            columns |= {"behavior": history.behavior_M, "scene": history.scene_M}
            targets |= {"scene": batch.scene_T}
        assert (history.behavior_M is None, history.scene_M is None, batch.scene_T is None) == (not named,) * 3

        kjt = history.kjt()
        assert kjt.keys() == list(columns)
        assert kjt.stride() == batch.users
        bounds = history.offset_U.tolist()
        for name, jagged in kjt.to_dict().items():
            expected = [columns[name][a:b].tolist() for a, b in itertools.pairwise(bounds)]
            assert [part.tolist() for part in jagged.to_dense()] == expected
        kjt = batch.target_kjt()
        assert kjt.keys() == list(targets)
        for name, jagged in kjt.to_dict().items():
            assert [part.tolist() for part in jagged.to_dense()] == [[value] for value in targets[name].tolist()]

        padded = history.padded(batch.timestamp_T)
        longest = int((history.end_T - history.start_T).max())
        views = {
            "item": padded.item_TN,
            "category": padded.category_TN,
            "behavior": padded.behavior_TN,
            "scene": padded.scene_TN,
        }
        for t in range(len(batch)):
            start, end = int(history.start_T[t]), int(history.end_T[t])
            padding = longest - (end - start)
            for name, column in columns.items():
                assert views[name][t].tolist() == column[start:end].tolist() + [0] * padding
            assert padded.position_TN[t].tolist() == list(range(end - start, 0, -1)) + [0] * padding
            spans = batch.timestamp_T[t] - history.timestamp_M[start:end]
            assert bool((spans > 0).all()), "history is strictly earlier"
            assert padded.interval_TN[t].tolist() == interval_bucket(spans).tolist() + [0] * padding
            assert padded.valid_TN[t].tolist() == [True] * (end - start) + [False] * padding

"""Batches of data sets whose items lie elsewhere in the table than at their ids, as those of a chain of days do."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stream.data_set import DataSet
from pipeline.stream.negatives import Negatives
from pipeline.stream.translation import Translation
from schemas.errors import UserError
from schemas.manifest import Day, data_set_fingerprint
from schemas.row_layout import LEAST_ROWS, RowLayout
from schemas.shards import ITEM_FEATURES, Split
from schemas.stream import NegativeSettings
from tests.data.test_stream_features import change_arrow, check, read, with_column
from tests.examples import examples
from tests.featured import Encoder, Log, write_featured


def rows_of(log: Log, seed: int, largest: int) -> dict[Any, int]:
    """Rows for about two thirds of the items, no two of them alike."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(largest)[: len(log.items)] + 1
    return {name: int(row) for name, row in zip(log.items, rows, strict=True) if rng.random() < 0.7}


def day_of(folder: Path) -> Day:
    fingerprint = data_set_fingerprint(folder)
    return Day(fingerprint=fingerprint, first_timestamp=0, last_timestamp=0, sources=())


@pytest.mark.parametrize("largest", [30, LEAST_ROWS + 7])
@pytest.mark.parametrize("split", [Split.TRAIN, Split.TEST])
def test_items_lie_at_their_places(tmp_path: Path, largest: int, split: Split) -> None:
    log = Log.random(30, seed=5)
    encoder = Encoder(log, 1).with_rows(rows_of(log, 1, largest), {}, largest)
    manifest = write_featured(tmp_path / "data", log, 1, encoder=encoder)
    assert manifest.largest_item == RowLayout.of(largest).places - 1
    batches = read(tmp_path / "data", split=split.name.lower())
    # Features are those of ids, of items without a place too.
    check(batches, log, encoder, split)
    raw = DataSet.open(tmp_path / "data").names("item")
    items = {(user["id"], each["timestamp"]): each["item"] for user in log.users for each in user["targets"]}
    for batch in batches:
        assert batch.own_item_T is not None
        names = raw.take(pa.array(batch.own_item_T.numpy())).to_pylist()
        users = batch.user_text_U.take(pa.array(batch.user_T.numpy())).to_pylist()
        assert names == [items[key] for key in zip(users, batch.timestamp_T.tolist(), strict=True)]


@settings(deadline=None, max_examples=examples(5, 40))
@given(seed=st.integers(0, 1000), placed=st.sampled_from([(True, True), (False, True), (True, False)]))
def test_ids_become_the_places_of_the_other_data_set(
    tmp_path_factory: pytest.TempPathFactory, seed: int, placed: tuple[bool, bool]
) -> None:
    folder, encoders = tmp_path_factory.mktemp("translated"), []
    logs = [Log.random(10, seed, items=12), Log.random(5, seed + 1, items=16)]
    for name, log, has_places in zip(("data", "trained"), logs, placed, strict=True):
        encoder = Encoder(log, seed + len(encoders))
        encoders.append(encoder.with_rows(rows_of(log, seed, 40), {}, 40) if has_places else encoder)
        write_featured(folder / name, log, 0, encoder=encoders[-1])
    data, trained = DataSet.open(folder / "data"), DataSet.open(folder / "trained")
    translation = Translation.between(data, trained)
    for name, id in encoders[0].item.items():
        assert translation.ids["item"][id] == (encoders[1].place(name) if name in encoders[1].item else 0)
    if data.targets_G["train"].any():
        batches = read(folder / "data", translation=translation)
        known = encoders[1].item
        check(batches, logs[0], encoders[1], Split.TRAIN, known=lambda name, raw: name != "item" or raw in known)


@pytest.mark.parametrize("backwards", [False, True])
def test_days_of_a_chain_are_translated_without_their_raw_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backwards: bool
) -> None:
    logs = [Log.random(12, 1, items=12), Log.random(12, 2, items=20)]
    first = Encoder(logs[0], 1).with_rows(rows_of(logs[0], 1, 20), {}, 20)
    write_featured(tmp_path / "first", logs[0], 1, encoder=first)
    second = Encoder(logs[1], 2, former=first).with_rows(rows_of(logs[1], 2, 33), {}, 33)
    write_featured(tmp_path / "second", logs[1], 2, encoder=second, days=(day_of(tmp_path / "first"),))
    data, trained = DataSet.open(tmp_path / "second"), DataSet.open(tmp_path / "first")
    encoders, log = (second, first), logs[1]
    if backwards:
        data, trained, encoders, log = trained, data, (first, second), logs[0]
    matched = Translation.between(data, trained)
    assert {name: matched.ids["item"][id] for name, id in encoders[0].item.items()} == {
        name: encoders[1].place(name) if name in encoders[1].item else 0 for name in encoders[0].item
    }
    check(
        read(data.folder, translation=matched),
        log,
        encoders[1],
        Split.TRAIN,
        known=lambda name, raw: name != "item" or raw in encoders[1].item,
    )
    # The same as by raw ids, of which none was read.
    monkeypatch.setattr("pipeline.stream.translation._same_ids", lambda *_: None)
    by_raw_id = Translation.between(data, trained)
    assert {name: ids.tolist() for name, ids in matched.ids.items()} == {
        name: ids.tolist() for name, ids in by_raw_id.ids.items()
    }
    monkeypatch.undo()
    monkeypatch.setattr(DataSet, "names", None)
    Translation.between(data, trained)


def test_dictionaries_tell_places_apart(tmp_path: Path) -> None:
    log = Log.random(10, 3)
    rows = rows_of(log, 1, 40)
    for name in ("one", "same", "other"):
        write_featured(tmp_path / name, log, 1, encoder=Encoder(log, 1).with_rows(rows, {}, 40))

    def moved(table: pa.Table) -> pa.Table:
        place_I = table["item"].to_numpy().copy()
        one, other = np.flatnonzero(place_I)[:2]
        place_I[[one, other]] = place_I[[other, one]]
        return with_column(table, "item", place_I)

    change_arrow(tmp_path / "other", ITEM_FEATURES, moved)
    said = {name: DataSet.open(tmp_path / name).dictionaries() for name in ("one", "same", "other")}
    assert said["one"] == said["same"] != said["other"]


@pytest.mark.parametrize("draw", ["frequency", "uniform"])
def test_negatives_have_a_place(tmp_path: Path, draw: Any) -> None:
    log = Log.random(10, 3)
    encoder = Encoder(log, 1).with_rows(rows_of(log, 1, 40), {}, 40)
    manifest = write_featured(tmp_path / "data", log, 1, encoder=encoder)
    cut = manifest.model_copy(update={"impression_files": ()})
    data_set = DataSet.open(tmp_path / "data")
    positives = int(manifest.counts.train.targets)
    object.__setattr__(cut.counts, "train", manifest.counts.train.model_copy(update={"positives": positives}))
    object.__setattr__(data_set, "manifest", cut)
    negatives = Negatives.of(NegativeSettings(draw=draw), data_set, seed=1)
    weight_I = np.diff(negatives.cumulative_I, prepend=0)
    assert {id for id in encoder.item.values() if weight_I[id]} == {
        id for name, id in encoder.item.items() if encoder.place(name)
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop_columns(["item"]), "column item is missing or of another type"),
        (lambda table: with_column(table, "item", [0, *[99] * 30]), "column item has ids from 0 to 99"),
        (lambda table: with_column(table, "item", [1] * 31), "column item gives the unknown a place"),
    ],
)
def test_places_that_cannot_be_right(tmp_path: Path, change: Any, message: str) -> None:
    log = Log.random(10, 3)
    write_featured(tmp_path / "data", log, 1, encoder=Encoder(log, 1).with_rows(rows_of(log, 1, 40), {}, 40))
    change_arrow(tmp_path / "data", ITEM_FEATURES, change)
    with pytest.raises(UserError) as raised:
        read(tmp_path / "data")
    assert message in str(raised.value)

"""Batches of data sets with features of every kind: against the raw values that these were made from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.batch import Bags, Batch
from pipeline.stream.data_set import DataSet
from pipeline.stream.history_stream import HistoryStream
from pipeline.stream.translation import Translation
from schemas.errors import UserError
from schemas.manifest import Manifest
from schemas.shards import ITEM_FEATURES, SPLITS, Split
from schemas.stream import StreamSettings
from tests.data.test_stream import assert_equal
from tests.datasets import random_users, reseal, rewrite_shard, write_dataset
from tests.examples import examples
from tests.featured import KINDS, LABELS, WORDS, Encoder, Log, write_featured

SETTINGS = StreamSettings(batch_size=8, history_length=6, shuffle_memory=5000)
LOG = Log.random(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("featured") / "data"
    write_featured(folder, LOG, seed=1)
    return folder


def stream(folder: Path, **arguments: Any) -> HistoryStream:
    given = {"split": "train", "settings": SETTINGS, "seed": 5, "shuffle": True, "lines": True} | arguments
    return HistoryStream(folder, **given)


def read(folder: Path, **arguments: Any) -> list[Batch]:
    with stream(folder, **arguments) as opened:
        return list(opened)


def plain(column: torch.Tensor, place: int, bags: Bags | None) -> Any:
    """A value of a batch: an id, a float, or the ids of a set."""
    value = column[place].item()
    if bags is None:
        return value
    return bags.id_E[bags.offset_B1[int(value)] : bags.offset_B1[int(value) + 1]].tolist()


def expected_value(encoder: Encoder, name: str, raw: Any, known: Callable[[str, Any], bool]) -> Any:
    if KINDS[name][1] == "ids":
        return sorted(encoder.ids[name][each] for each in raw if known(name, each))
    if raw is not None and KINDS[name][2] == "dictionary" and not known(name, raw):
        return 0
    return encoder.id(name, raw)


def check(
    batches: list[Batch],
    log: Log,
    encoder: Encoder,
    split: Split,
    *,
    belongs: Callable[[dict[str, Any]], bool] = lambda row: True,
    length: int = 6,
    known: Callable[[str, Any], bool] = lambda name, raw: True,
    names: frozenset[str] = frozenset(KINDS),
) -> None:
    """Compare an epoch with the log; ``known`` are raw values that the ids' data set has."""
    users = {user["id"]: user for user in log.users}
    number = {user["id"]: place for place, user in enumerate(log.users)}
    expected = {
        (user["id"], each["timestamp"]) for user in log.users for each in user["targets"] if each["split"] == split
    }

    def item(raw: Any) -> int:
        return encoder.place(raw) if known("item", raw) else 0

    def check_features(columns: dict[str, torch.Tensor], place: int, row: dict[str, Any], batch: Batch) -> None:
        of_item = log.items[row["item"]] if "item" in row else {}
        for name, column in columns.items():
            raw = of_item[name] if name in of_item else row[name]
            found = plain(column, place, batch.bags.get(name))
            assert found == expected_value(encoder, name, raw, known), name
            assert column.dtype == (torch.float32 if KINDS[name][2] == "scale" else torch.int32)

    seen = set()
    for batch in batches:
        (history,) = batch.histories.values()
        sides = {
            side: {name for name in names if KINDS[name][0] == side}
            for side in ("item", "behavior", "user", "impression")
        }
        assert set(history.features_M) == sides["item"] | sides["behavior"]
        assert set(batch.features_T) == sides["item"] | sides["impression"] | (names & {"scene"})
        assert set(batch.features_U) == sides["user"]
        assert set(batch.bags) == {name for name in names if KINDS[name][1] == "ids"}
        assert tuple(batch.labels_T) == LABELS
        for t in range(len(batch)):
            u = int(batch.user_T[t])
            text = batch.user_text_U
            name = int(batch.user_id_U[u]) if text is None else text[u].as_py()
            if text is not None:
                assert number[name] == int(batch.user_id_U[u])
            user = users[name]
            (target,) = (each for each in user["targets"] if each["timestamp"] == int(batch.timestamp_T[t]))
            seen.add((name, target["timestamp"]))
            assert batch.item_T[t] == item(target["item"])
            check_features(batch.features_T, t, target, batch)
            check_features(batch.features_U, u, user, batch)
            assert [batch.labels_T[label][t].item() for label in LABELS] == [target["label"], target["label_buy"]]
            assert batch.weight_T is not None
            assert batch.weight_T[t] == target["weight"]
            assert batch.line_T is not None
            assert batch.line_T[t] == target["line"]
            kept = [row for row in user["history"][: target["history_end"]] if belongs(row)][-length:]
            start, end = int(history.start_T[t]), int(history.end_T[t])
            assert history.timestamp_M[start:end].tolist() == [row["timestamp"] for row in kept]
            for place, row in zip(range(start, end), kept, strict=True):
                assert history.item_M[place] == item(row["item"])
                check_features(history.features_M, place, row, batch)
    assert seen == expected
    assert sum(map(len, batches)) == len(expected)


@pytest.mark.parametrize("split", Split)
@pytest.mark.parametrize("text", [True, False])
def test_batches_equal_the_raw_values(tmp_path: Path, split: Split, text: bool) -> None:
    log = Log.random(40, seed=2, text=text)
    manifest = write_featured(tmp_path / "data", log, seed=3)
    batches = read(tmp_path / "data", split=split.name.lower())
    check(batches, log, Encoder(log, 3), split)
    assert manifest.largest_item < manifest.counts.items
    raw = DataSet.open(tmp_path / "data").names("item")
    for batch in batches:
        assert batch.own_item_T is not None, "rare items have no row, and their raw ids are asked for all the same"
        assert (batch.user_text_U is not None) == text
        of_user = {user["id"]: user for user in log.users}
        for t in range(len(batch)):
            u = int(batch.user_T[t])
            user = batch.user_id_U[u].item() if batch.user_text_U is None else batch.user_text_U[u].as_py()
            (target,) = (each for each in of_user[user]["targets"] if each["timestamp"] == batch.timestamp_T[t])
            assert raw[int(batch.own_item_T[t])].as_py() == target["item"]


def test_features_that_are_not_wanted_are_not_read(folder: Path) -> None:
    wanted = frozenset({"tags", "scene", "city", "bid"})
    batches = read(folder, features=wanted | {"item", "position"})
    check(batches, LOG, Encoder(LOG, 1), Split.TRAIN, names=wanted)
    with pytest.raises(UserError, match="no feature colour; it has category, brand, tags"):
        read(folder, features={"colour"})


def test_sets_are_one_object_for_all_batches_and_streams(folder: Path) -> None:
    with stream(folder) as one, stream(folder, split="test") as other:
        of_all = [batch.bags["tags"] for opened in (one, other) for batch in opened]
        # Verified and mapped once.
        items = [opened._reading.items.features.columns_I["mass"] for opened in (one, other)]
        assert np.shares_memory(*items)
    assert len(of_all) > 2
    assert all(bags is of_all[0] for bags in of_all)


@pytest.mark.parametrize(
    ("where", "belongs"),
    [
        ({"action": ["buy", "view"]}, lambda row: row["action"] in ("buy", "view")),
        ({"topics": [50]}, lambda row: 50 in row["topics"]),
        ({"topics": ["1", "3"], "action": ["cart"]}, lambda row: {1, 3} & {*row["topics"]} and row["action"] == "cart"),
    ],
)
def test_sequences_are_cut_by_any_feature_of_behaviours(
    folder: Path, where: dict[str, Any], belongs: Callable[[dict[str, Any]], bool]
) -> None:
    settings = StreamSettings(batch_size=8, sequences={"some": {"length": 4, "where": where}}, shuffle_memory=5000)
    batches = read(folder, settings=settings, features={"category", *where})
    names = frozenset({"category", *where})
    check(batches, LOG, Encoder(LOG, 1), Split.TRAIN, belongs=belongs, length=4, names=names)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ({"where": {"action": ["sell"]}}, "sequences.some.where.action: sell is not in the data set; it has "),
        ({"where": {"city": ["Rom"]}}, "sequences.some.where.city: the data set has no such column (it has action, "),
        ({"where": {"dwell": [1]}}, "sequences.some.where.dwell: dwell is a number that stays one"),
        ({"behavior": ["buy"]}, "sequences.some.behavior: the data set has no such column (it has action, scene"),
    ],
)
def test_conditions_that_cannot_be_met(folder: Path, sequence: dict[str, Any], message: str) -> None:
    settings = StreamSettings(sequences={"some": {"length": 4, **sequence}})
    with pytest.raises(UserError) as raised:
        read(folder, settings=settings)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_condition_stands_in_one_place() -> None:
    with pytest.raises(ValueError, match="scene stands in where as well"):
        StreamSettings(sequences={"some": {"length": 4, "scene": ["ads"], "where": {"scene": ["ads"]}}})


@pytest.mark.parametrize("world", [1, 2, 5])
def test_ranks_and_resuming(folder: Path, world: int) -> None:
    ranks = [read(folder, rank=rank, world=world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    check([batch for batches in ranks for batch in batches], LOG, Encoder(LOG, 1), Split.TRAIN)
    rank = world - 1
    with stream(folder, rank=rank, world=world) as opened:
        states = [opened.state_dict() for _ in opened]
    for done, state in enumerate(states[:-1], 1):
        with stream(folder, rank=rank, world=world) as opened:
            opened.load_state_dict(state)
            for batch, expected in zip(opened, ranks[rank][done:], strict=True):
                assert_equal(batch, expected)


def test_users_named_by_text_are_sampled_whole_and_whatever_their_order(tmp_path: Path) -> None:
    log = Log.random(120, seed=4)
    write_featured(tmp_path / "one", log, seed=1)
    write_featured(tmp_path / "other", Log(log.users[::-1], log.items, log.rare), seed=2, users_per_row_group=7)
    found = []
    for folder in ("one", "other"):
        batches = read(tmp_path / folder, user_fraction=0.3)
        found.append({text for batch in batches for text in batch.user_text_U.to_pylist()})
        assert sum(map(len, batches)) == sum(
            target["split"] == 0 for user in log.users if user["id"] in found[-1] for target in user["targets"]
        )
    assert found[0] == found[1]
    assert 20 < len(found[0]) < 60


@settings(deadline=None, max_examples=examples(8, 60))
@given(seed=st.integers(0, 1000), other=st.integers(0, 1000), split=st.sampled_from(Split))
def test_another_data_sets_ids(tmp_path_factory: pytest.TempPathFactory, seed: int, other: int, split: Split) -> None:
    folder = tmp_path_factory.mktemp("translated")
    log = Log.random(12, seed, items=12)
    # The other log lacks some values of each dictionary, and has other items.
    trained = Log.random(5, seed + 1, items=16)
    write_featured(folder / "data", log, seed)
    write_featured(folder / "trained", trained, other)
    data, with_ids = DataSet.open(folder / "data"), DataSet.open(folder / "trained")
    encoder = Encoder(trained, other)
    translation = Translation.between(data, with_ids)
    assert translation.unknown["item"] == sum(
        encoder.item.get(name, encoder.rows + 1) > encoder.rows for name in log.items
    )
    if not data.targets_G[split.name.lower()].any():
        return
    batches = read(folder / "data", split=split.name.lower(), translation=translation)
    check(batches, log, encoder, split, known=lambda name, raw: name != "item" or raw in encoder.item)


def test_values_that_the_other_data_set_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_featured(tmp_path / "data", LOG, 1)
    # Without Oslo, new and 50.
    kept = {"city": ["Rom", "Ürümqi"], "tags": ["red", "big", "old"], "topics": [1, 2, 3]}
    lacking = Log.random(20, 9)
    for row in [*lacking.users, *lacking.items.values(), *(row for user in lacking.users for row in user["history"])]:
        for name, words in kept.items():
            if name in row:
                value = row[name]
                row[name] = [each for each in value if each in words] if isinstance(value, list) else None
    for name, words in kept.items():
        monkeypatch.setitem(WORDS, name, words)
    write_featured(tmp_path / "trained", lacking, 2)
    encoder = Encoder(lacking, 2)
    translation = Translation.between(*(DataSet.open(tmp_path / name) for name in ("data", "trained")))
    assert {name: translation.unknown[name] for name in kept} == {"city": 1, "tags": 1, "topics": 1}
    batches = read(tmp_path / "data", translation=translation)
    check(batches, LOG, encoder, Split.TRAIN, known=lambda name, raw: name not in kept or raw in kept[name])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("EDGES", (1.0, 2.0, 3.0), "feature price has edges=[2.5, 5.0, 7.5], and edges=[1.0, 2.0, 3.0] in"),
        ("MEAN", 4.0, "feature mass has mean=3.0, and mean=4.0 in"),
        ("HASHED", 6, "feature brand has rows=5, and rows=6 in"),
    ],
)
def test_other_encodings_are_not_translated(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, message: str
) -> None:
    monkeypatch.setattr(f"tests.featured.{name}", value)
    write_featured(tmp_path / "other", LOG, 1)
    data, other = DataSet.open(folder), DataSet.open(tmp_path / "other")
    with pytest.raises(UserError) as raised:
        Translation.between(data, other)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    # Whoever does not read the feature is not hindered.
    Translation.between(data, other, {"category", "tags", "city"})


def change_arrow(folder: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    table = change(pa.ipc.open_file(pa.OSFile(str(folder / name))).read_all())
    with pa.ipc.new_file(folder / name, table.schema) as writer:
        writer.write_table(table)
    reseal(folder, name)


def with_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    place = table.column_names.index(name)
    return table.set_column(place, name, pa.array(values, table.schema.field(name).type))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (ITEM_FEATURES, lambda table: table.drop_columns(["brand"]), "column brand is missing"),
        (ITEM_FEATURES, lambda table: table.slice(0, 5), "has 5 rows, the manifest says 30 items"),
        (ITEM_FEATURES, lambda table: with_column(table, "tags", [99] * 31), "column tags has ids from 99 to 99"),
        (
            ITEM_FEATURES,
            lambda table: with_column(table, "mass", [np.nan] * 31),
            "column mass has numbers that are not",
        ),
        ("bags-tags.arrow", lambda table: table.slice(1), "sets; the empty one and"),
        ("bags-tags.arrow", lambda table: with_column(table, "ids", [[], *[[2, 1]] * (len(table) - 1)]), "not ascend"),
        (
            "bags-tags.arrow",
            lambda table: with_column(table, "ids", [[], *[[9]] * (len(table) - 1)]),
            "ids from 9 to 9",
        ),
    ],
)
def test_wrong_files_beside_the_shards(
    tmp_path: Path, file: str, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    write_featured(tmp_path / "data", LOG, 1)
    change_arrow(tmp_path / "data", file, change)
    with pytest.raises(UserError) as raised:
        read(tmp_path / "data")
    assert message in str(raised.value)
    assert str(tmp_path / "data" / file) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("file", [ITEM_FEATURES, "bags-tags.arrow", "feature-action.parquet"])
def test_damaged_files_beside_the_shards(tmp_path: Path, file: str) -> None:
    write_featured(tmp_path / "data", LOG, 1)
    path = tmp_path / "data" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    settings = StreamSettings(sequences={"some": {"length": 4, "where": {"action": ["buy"]}}})
    with pytest.raises(UserError, match=f"{file} differs from the checksum in the manifest"):
        read(tmp_path / "data", settings=settings)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("target_weight", -0.5, "column target_weight has weights below 0"),
        ("target_weight", float("nan"), "column target_weight has numbers that are not finite"),
        ("history_dwell", float("inf"), "column history_dwell has numbers that are not finite"),
        ("history_topics", 99, "column history_topics has ids from 99 to 99"),
        ("user_city", 4, "column user_city has ids from 4 to 4, the manifest allows 0 to 3"),
        ("target_slot", -1, "column target_slot has ids from -1 to -1"),
    ],
)
def test_wrong_values(tmp_path: Path, column: str, value: float, message: str) -> None:
    write_featured(tmp_path / "data", LOG, 1)

    def change(table: pa.Table) -> pa.Table:
        rows = table[column].to_pylist()
        return with_column(table, column, [[value] * len(row) if isinstance(row, list) else value for row in rows])

    rewrite_shard(tmp_path / "data", "shard-00000.parquet", change)
    with pytest.raises(UserError) as raised:
        read(tmp_path / "data")
    assert message in str(raised.value)
    assert "shard-00000.parquet" in str(raised.value)


def test_memory_of_the_shuffle_buffer_counts_what_is_gathered(folder: Path) -> None:
    few, many = (len(stream(folder, features=names)._plan(0).blocks) for names in ({"category"}, None))
    assert few < many


def test_what_a_run_must_have_in_common_with_a_data_set(folder: Path, tmp_path: Path) -> None:
    said = DataSet.open(folder).dictionaries()
    write_featured(tmp_path / "other", LOG, 2)
    other = DataSet.open(tmp_path / "other").dictionaries()
    assert said["items"] != other["items"]
    assert said["features"]["brand"] == other["features"]["brand"], "hashed: no dictionary"
    assert said["features"]["city"] != other["features"]["city"]
    assert set(said["features"]) == set(KINDS)
    assert set(SPLITS) == {split.name.lower() for split in Split}
    assert Manifest.read(folder).item_rows == said["item_rows"]


def test_data_sets_of_an_earlier_version_are_translated_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WORDS, "category", [2, 3, 4])
    log = Log.random(30, 5, text=False)
    write_featured(tmp_path / "three", log, 1)
    write_dataset(tmp_path / "two", random_users(30))
    two, three = DataSet.open(tmp_path / "two"), DataSet.open(tmp_path / "three")
    encoder, features = Encoder(log, 1), frozenset({"category"})
    # In the earlier one ids equal raw values: items 1 .. 50, categories 1 .. 7; the later one has items 0 .. 29.
    category = [0, 0, *(encoder.ids["category"][raw] for raw in (2, 3, 4)), 0, 0, 0]
    item = [0, *(encoder.item.get(raw, 99) for raw in range(1, 51))]
    plain = read(tmp_path / "two", shuffle=False)
    translated = read(tmp_path / "two", shuffle=False, translation=Translation.between(two, three, features))
    for batch, before in zip(translated, plain, strict=True):
        assert batch.item_T.tolist() == [item[i] if item[i] <= encoder.rows else 0 for i in before.item_T]
        assert batch.features_T["category"].tolist() == [category[i] for i in before.features_T["category"]]
        (here,), (there,) = batch.histories.values(), before.histories.values()
        assert here.features_M["category"].tolist() == [category[i] for i in there.features_M["category"]]
    back = Translation.between(three, two, features)
    for batch in read(tmp_path / "three", features=features, translation=back):
        (history,) = batch.histories.values()
        raw = {id: name for name, id in encoder.item.items()}
        own = batch.own_item_T
        assert own is not None
        assert batch.item_T.tolist() == [raw[int(id)] for id in own]
        assert batch.features_T["category"].tolist() == [log.items[raw[int(id)]]["category"] or 0 for id in own]
        assert {*history.features_M["category"].tolist()} <= {0, 2, 3, 4}

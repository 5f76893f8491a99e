"""`init`: rows of a file in the tables of real ranks, what is counted, and what is refused."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embeddings.distributed.process_group import process_group
from pipeline.train import pretrained
from schemas.errors import UserError
from tests.datasets import CATEGORIES, ITEMS
from tests.featured import Encoder, Log, write_featured
from tests.launcher import run_ranks
from tests.object_store import object_store
from tests.runs import Run, small_settings
from tests.trainers import CPU, trainer_of

KEY = "tables.inherent.{set}.embedding_bags.{name}.weight"
UNKNOWN = (10_001, -3)
"""Raw ids that the data set does not have; its own are 1 .. ITEMS, and each is its own row."""


def write(path: Path, ids: list[Any], vectors: Any, kind: pa.DataType | None = None) -> str:
    vectors = pa.array([None if vector is None else list(vector) for vector in vectors], kind or pa.list_(pa.float32()))
    pq.write_table(pa.table({"raw_id": ids, "vector": vectors}), path, row_group_size=7)
    return str(path)


def drawn(count: int, dim: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(count).normal(size=(count, dim)).astype(np.float32)


def rows_of(data: Path, files: dict[str, str], *overrides: str) -> dict[str, torch.Tensor]:
    """All tables, gathered on every rank, after `load_vectors` with batches of a few records."""
    pretrained.BATCH_BYTES = 160
    trainer = trainer_of(small_settings(*overrides), data)
    pretrained.load_vectors(trainer.model, files, trainer_data(data))
    gathered = {}
    for key, value in trainer.model.state_dict().items():
        if "embedding_bags" in key:
            whole = torch.zeros(value.size()) if torch.distributed.get_rank() == 0 else None
            value.gather(0, whole)
            gathered[key] = whole
    return gathered


def trainer_data(data: Path) -> Any:
    from pipeline.stream.data_set import DataSet

    return DataSet.open(data)


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float64()),
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in (pa.list_(pa.float32(), 4), pa.large_list(pa.float16()))
        ),
    ],
)
def test_rows_are_the_file_s_on_any_number_of_ranks(few_users: Path, tmp_path: Path, kind: pa.DataType) -> None:
    ids = [*np.random.default_rng(1).permutation(ITEMS)[:40] + 1, *UNKNOWN]
    vectors = drawn(len(ids), 4).astype(np.float16).astype(np.float32)
    stored = vectors.astype(np.float16) if kind.value_type == pa.float16() else vectors
    categories = drawn(CATEGORIES, 8)
    files = {
        "item_attention": write(tmp_path / "items.parquet", ids, stored, kind),
        "category_representation": write(tmp_path / "categories.parquet", [*range(1, CATEGORIES + 1)], categories),
    }
    plain = run_ranks(1, rows_of, few_users, {})[0]
    one, (two, _) = run_ranks(1, rows_of, few_users, files)[0], run_ranks(2, rows_of, few_users, files)
    wanted = {key: rows.clone() for key, rows in plain.items()}
    key = KEY.format(set="attention", name="item_attention")
    for raw, vector in zip(ids[:40], vectors, strict=False):
        wanted[key][raw] = torch.from_numpy(vector)
    key = KEY.format(set="representation", name="category_representation")
    wanted[key][1:] = torch.from_numpy(categories)
    for rows in (one, two):
        assert rows.keys() == wanted.keys()
        assert all(torch.equal(rows[key], wanted[key]) for key in wanted)


def test_a_run_begins_with_them_says_how_many_and_goes_on_without_the_file(few_users: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "items.parquet", [3, 1, *UNKNOWN], drawn(4, 4))
    settings = small_settings("epochs=1", f"init.item_attention={file}")
    run = Run(2, settings, few_users, tmp_path / "run").finish()
    said = [line for line in run.said().splitlines() if "init.item_attention" in line]
    assert len(said) == 1
    assert f"2 rows begin with a vector of {file}, {ITEMS - 2} keep their drawn values; 2 of its ids" in said[0]
    plain = Run(2, small_settings("epochs=1"), few_users, tmp_path / "plain").finish()
    assert plain.logs()[0] != run.logs()[0]
    Path(file).unlink()
    longer = Run(2, settings.model_copy(update={"epochs": 2}), few_users, tmp_path / "run").finish()
    assert "init.item_attention" not in longer.said()


@pytest.mark.parametrize(
    ("table", "ids", "vectors", "complaint"),
    [
        ("item", [1], [[0.0] * 4], "init.item: the model has no such table; its tables: category_attention"),
        ("history_position_attention", [1], [[0.0] * 4], "rows of position have no raw ids in this data set"),
        ("item_attention", [1, 2], [[0.0] * 4, [0.0] * 3], "record 2 has 3 values, the table's dim is 4"),
        ("item_attention", [1, 2], [[0.0] * 4, None], "record 2 has no vector, the table's dim is 4"),
        ("item_attention", [1, 2, 5, 2], [[0.0] * 4] * 4, "1 ids are there more than once, 2 among them"),
        ("item_attention", [1, 77_777, 77_777], [[0.0] * 4] * 3, "1 ids are there more than once, 77777 among them"),
        ("item_attention", [1, 2], [[0.0] * 4, [0, 0, np.nan, 0]], "record 2: its vector has a value that is not fin"),
        ("item_attention", [1, 99], [[0.0] * 4, [0, 0, np.inf, 0]], "record 2: its vector has a value that is not fin"),
        ("item_attention", [1, 2], [[0.0] * 4, [0, None, 0, 0]], "record 2: its vector has a value that is not fin"),
        ("item_attention", [1, None], [[0.0] * 4] * 2, "record 2: raw_id is missing"),
        ("item_attention", UNKNOWN, [[0.0] * 4] * len(UNKNOWN), "is in the data set, where they are such as"),
        ("item_attention", ["1", "x"], [[0.0] * 4] * 2, "record 2: raw_id 'x' is not an integer"),
    ],
)
def test_what_does_not_fit_is_refused(
    few_users: Path, tmp_path: Path, table: str, ids: list[Any], vectors: Any, complaint: str
) -> None:
    file = write(tmp_path / "file.parquet", ids, vectors)
    with pytest.raises(AssertionError) as error:
        run_ranks(1, rows_of, few_users, {table: file})
    assert "schemas.errors.UserError: init." in str(error.value)
    assert complaint in str(error.value)


def test_a_file_that_is_none_is_one_line_and_exit_code_1(few_users: Path, tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("1,0.5")
    pq.write_table(pa.table({"raw_id": [1], "vector": ["0.5 0.5"]}), tmp_path / "texts.parquet")
    pq.write_table(pa.table({"id": [1]}), tmp_path / "other.parquet")
    for name, complaint in (
        ("missing.parquet", "cannot be read"),
        ("text.parquet", "cannot be read"),
        ("texts.parquet", "column vector is string; a list of floats is wanted"),
        ("other.parquet", "wants one column raw_id; there are id"),
    ):
        settings = small_settings(f"init.item_attention={tmp_path / name}")
        run = Run(2, settings, few_users, tmp_path / f"run-{name}")
        assert set(run.wait()) == {1}
        assert complaint in run.complaint()


def test_a_file_may_be_at_a_url(few_users: Path, tmp_path: Path) -> None:
    vectors = drawn(2, 4)
    with object_store("moto", tmp_path / "store") as store, process_group(CPU):
        store.path("items.parquet").write_bytes(Path(write(tmp_path / "file.parquet", [3, 1], vectors)).read_bytes())
        rows = rows_of(few_users, {"item_attention": "s3://bucket/items.parquet"})
    item = rows[KEY.format(set="attention", name="item_attention")]
    assert torch.equal(item[[3, 1]], torch.from_numpy(vectors))


def test_raw_ids_may_be_text_and_rare_items_have_no_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = Log.random(40, seed=3)
    write_featured(tmp_path / "data", log, seed=5)
    names, tags = list(log.items), ["red", "old", "unheard of"]
    files = {
        "item_attention": write(tmp_path / "items.parquet", names, drawn(len(names), 4)),
        "tags_representation": write(tmp_path / "tags.parquet", tags, drawn(3, 8)),
    }
    features = "model.features=item,category,tags,brand"
    with caplog.at_level(logging.INFO, "dare"), process_group(CPU):
        plain, rows = (rows_of(tmp_path / "data", each, features) for each in ({}, files))
    encoder = Encoder(log, 5)
    for table, dim, raw, ids in (
        ("item_attention", 4, names, {name: encoder.item[name] for name in names if name not in log.rare}),
        ("tags_representation", 8, tags, encoder.ids["tags"]),
    ):
        key = KEY.format(set=table.partition("_")[2], name=table)
        wanted = plain[key].clone()
        for name, vector in zip(raw, drawn(len(raw), dim), strict=True):
            if name in ids:
                wanted[ids[name]] = torch.from_numpy(vector)
        assert torch.equal(rows[key], wanted)
    assert f"{len(names) - len(log.rare)} rows begin with a vector of {files['item_attention']}, 0 keep" in caplog.text
    assert f"{len(log.rare)} of its ids have no row" in caplog.text
    with process_group(CPU), pytest.raises(UserError, match="rows of brand have no raw ids in this data set"):
        rows_of(tmp_path / "data", {"brand_attention": files["item_attention"]}, features)

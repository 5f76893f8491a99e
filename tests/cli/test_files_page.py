"""docs/files.md names every column and key of the files of real commands."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embeddings.sizes import DataSizes
from pipeline.experiment.results import SCHEMA
from pipeline.export.export import export_run
from pipeline.ingest.prepare import prepare
from pipeline.planning.dry_run import dry_run
from pipeline.planning.text import as_dict
from schemas.prepare import PRESETS, PrepareSettings
from schemas.settings import load_settings
from schemas.shards import history_schema, shard_schema
from tests.plans import plan_settings
from tests.runs import Run, run_dare, small_settings

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs/files.md").read_text()
NAMED = set(re.findall(r"`([^`]+)`", PAGE))
FREE = {"settings", "versions", "starts", "events_left_out", "impressions_left_out", "users_left_out_by_reason"}
"""Objects whose keys are settings, packages or reasons, or that the text names in another way."""


def keys(value: object) -> Iterator[str]:
    if isinstance(value, list):
        for entry in value:
            yield from keys(entry)
    elif isinstance(value, dict):
        for key, below in value.items():
            yield key
            if key not in FREE - {"starts"}:
                yield from keys(below)


def missing(names: Iterator[str] | list[str]) -> set[str]:
    return set(names) - NAMED


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, many_users: Path) -> Path:
    settings = small_settings("epochs=1", "checkpoint.delta_every=3")
    return Run(1, settings, many_users, tmp_path_factory.mktemp("run") / "run").finish().folder


def test_a_data_set(tmp_path: Path) -> None:
    lines = [f"{user},{step % 7 + user % 3},{step % 3},{step * 10}" for user in range(9) for step in range(40)]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,category_id,timestamp", *lines]) + "\n")
    overrides = ["split.min_behaviors=10", "split.train_targets=2", "split.negatives=0", "history.keep=40"]
    values = {"events": {"files": [str(tmp_path / "log.csv")]}}
    prepare(load_settings(PrepareSettings, [PRESETS["generic"]], overrides, values), tmp_path / "data")
    for file in (tmp_path / "data").glob("*.parquet"):
        # Features have names of their own.
        assert not missing([re.sub("^f_.*", "f_NAME", name) for name in pq.read_schema(file).names]), file
    (layer,) = (tmp_path / "data").glob("history-*.arrow")
    with pa.ipc.open_file(str(layer)) as file:
        assert not missing(file.schema.names)
        _, metadata = file.get_batch_with_custom_metadata(0)
        assert not missing([name.decode() for name in metadata])
    assert not missing(history_schema(behavior=True, scene=True, line=True).names)
    assert not missing(shard_schema((), user_type="text", labels=("click",), weighted=True, line=True).names)
    assert not missing(keys(json.loads((tmp_path / "data/manifest.json").read_text())))


def test_a_run(run: Path) -> None:
    for name in ("test.json", "progress.json", "data_set.json", "job.json"):
        assert not missing(keys(json.loads((run / name).read_text()))), name
    for name in ("losses.jsonl", "validations.jsonl"):
        assert not missing(keys([json.loads(line) for line in (run / name).read_text().splitlines()])), name
    for table in json.loads((run / "plan.json").read_text()).values():
        assert not missing(keys(table))
    for record in run.glob("checkpoints/*/checkpoint.json"):
        assert not missing(keys(json.loads(record.read_text())))
    assert any("base" in json.loads(record.read_text()) for record in run.glob("checkpoints/*/checkpoint.json"))
    written = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert not {name for name in written if f"`{name}" not in PAGE}


def test_tags_of_tensorboard(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert tags["scalars"]
    tensors = [tag.removesuffix("/text_summary") for tag in tags["tensors"]]
    assert not missing([*tags["scalars"], *tags["histograms"], *tensors])


def test_scores_results_and_plans(run: Path, tmp_path: Path) -> None:
    code, _, errors = run_dare(tmp_path, "score", "--run", run, "--out", tmp_path / "scores")
    assert code == 0, errors
    for file in (tmp_path / "scores").glob("*.parquet"):
        assert not missing(pq.read_schema(file).names)
    assert not missing(SCHEMA.names)
    sizes = DataSizes.counted(items=2000, categories=100, lengths={"history": 50})
    document = as_dict(dry_run(plan_settings(), sizes))
    assert not missing(list(document))
    assert not missing(list(document["tables"][0]))


def test_an_exported_model(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "model", compile=False)
    document = json.loads((tmp_path / "model/model.json").read_text())
    # Settings of a model have a page of their own.
    document.pop("model")
    assert not missing(keys(document))
    columns = pa.ipc.open_file(tmp_path / "model/dictionaries/item.arrow").schema.names
    assert not missing(columns)


def test_messages_of_the_first_log_are_those_of_the_program() -> None:
    page = (REPOSITORY / "docs/first_log.md").read_text()
    folders = ("schemas", "pipeline", "embeddings")
    source = "".join(path.read_text() for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py")))
    # A text that is written as several strings is one.
    source = re.sub(r'"\s*\n\s*f?"', "", source).replace("{MANIFEST}", "manifest.json")
    rows = re.findall(r"^\| (`.+?) \| ", page, re.MULTILINE)
    assert len(rows) > 40
    fragments = [part for row in rows for text in re.findall(r"`([^`]+)`", row) for part in text.split(" ... ")]
    assert not [part for part in fragments if part not in source]

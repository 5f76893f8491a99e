"""Targets of users without any behaviour (``split.min_history: 0``): from the log to scores, with every model."""

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from embeddings.batch import Batch
from embeddings.distributed.process_group import process_group
from embeddings.initialization import initialize
from embeddings.loss import click_loss
from embeddings.models import build_model
from embeddings.sizes import DataSizes
from pipeline.evaluate.open_run import evaluate_run
from pipeline.evaluate.score import score_run
from pipeline.ingest.prepare import prepare
from pipeline.stream.history_stream import HistoryStream
from schemas.manifest import Manifest
from schemas.model import ModelSettings
from schemas.prepare import PrepareSettings
from schemas.stream import StreamSettings
from tests.launcher import run_ranks
from tests.model.definitions import definition_of
from tests.runs import Run, small_settings
from tests.tolerance import largest, rounding, summands
from tests.toy_model import CPU, named, settings_of, sharded_like

LENGTH = 12
KNOWN, NEW = 12, 18
"""Users with behaviours, and without."""
KINDS = ("dare", "twin-projection", "twin-v2", "din", "din-short", "eta", "sdim", "sim-hard", "sim-soft")
"""Models that stand for each kind of search and of pooling."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new_users")
    rng = np.random.default_rng(5)
    with (folder / "events.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("user_id", "item_id", "category_id", "timestamp"))
        for user in range(KNOWN):
            for _ in range(int(rng.integers(1, 20))):
                item = int(rng.integers(1, 30))
                writer.writerow((user, item, item % 4, int(rng.integers(50, 400))))
    with (folder / "shown.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("user_id", "item_id", "category_id", "timestamp", "label"))
        for number in range(160):
            item = int(rng.integers(1, 30))
            writer.writerow((number % (KNOWN + NEW), item, item % 4, int(rng.integers(0, 500)), number % 3 % 2))
    content = {
        "events": {"files": [str(folder / "events.csv")]},
        "impressions": {"files": [str(folder / "shown.csv")]},
        "split": {"kind": "impressions", "min_history": 0, "test_fraction": 0.3},
        "shards": {"behaviors_per_shard": 40, "users_per_row_group": 4},
    }
    manifest = prepare(PrepareSettings.model_validate(content), folder / "data")
    counts = manifest.counts
    assert counts.users == KNOWN + NEW
    assert counts.users_left_out == 0
    assert counts.impressions_left_out == {}
    assert counts.train.targets + counts.validation.targets + counts.test.targets == 160
    return folder


def compare(data: Path) -> dict[str, int]:
    """On this rank, models' logits beside their definitions'; returns the targets, and those without a history."""
    stream = StreamSettings(batch_size=12, history_length=LENGTH)
    sizes = DataSizes.of(Manifest.read(data), stream)
    with HistoryStream(
        data, "train", stream, seed=0, shuffle=True, rank=dist.get_rank(), world=dist.get_world_size()
    ) as batches:
        # As many targets with a history as without.
        batch = min(batches, key=lambda batch: abs(2 * without_history(batch) - len(batch)))
    for name in KINDS:
        plain = model_with_weights(
            settings_of(name, retrieved={"history": 4}, features=["item", "category", "position"]), sizes
        )
        sharded = sharded_like(plain)
        definition = definition_of(plain)
        # In training, statistics of all ranks' batches normalise.
        definition.training = False
        logit_T, expected_T = sharded.eval()(batch).logit_T, definition.logits(batch)[0].float()
        assert torch.isfinite(logit_T).all(), name
        allowed = rounding(summands(plain, batch), 1 + largest(expected_T.detach()))
        torch.testing.assert_close(logit_T, expected_T, atol=allowed, rtol=0, msg=named(name))
        loss = click_loss(sharded.train()(batch), batch.label_T)
        assert torch.isfinite(loss), name
        loss.backward()
        assert all(torch.isfinite(each.grad).all() for each in sharded.parameters() if each.grad is not None)
    return {"targets": len(batch), "without": without_history(batch)}


def without_history(batch: Batch) -> int:
    history = batch.histories["history"]
    return int((history.start_T == history.end_T).sum())


def model_with_weights(settings: ModelSettings, sizes: DataSizes) -> torch.nn.Module:
    model = build_model(settings, sizes)
    initialize(model, 1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(30 if "embedding_bags" in name else 20 if weight.dim() > 1 else 1)
    return model


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_model_predicts_for_users_without_events(folder: Path, ranks: int) -> None:
    if ranks == 1:
        with process_group(CPU):
            found = [compare(folder / "data")]
    else:
        found = run_ranks(ranks, compare, folder / "data")
    targets, without = (sum(each[name] for each in found) for name in ("targets", "without"))
    assert 0 < without < targets


def test_they_are_learnt_measured_and_scored(folder: Path, tmp_path: Path) -> None:
    run = Run(2, small_settings("epochs=1"), folder / "data", tmp_path / "run").finish().folder
    with process_group(CPU):
        score_run(
            run, "test", "best", None, tmp_path / "out", CPU, overwrite=False, impressions=(str(folder / "shown.csv"),)
        )
        evaluation = evaluate_run(run, "test", "best", None, CPU)["label"]
    table = pq.read_table(tmp_path / "out" / "impressions-00000.parquet").to_pandas()
    scored = table[table["score"].notna()]
    assert evaluation.samples == len(scored) == Manifest.read(folder / "data").counts.test.targets
    assert (scored["user_id"].astype(int) >= KNOWN).any()
    assert scored["score"].between(0, 1, inclusive="neither").all()

"""Absurd settings are refused with a line that names key and value; large ones that someone needs are not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embeddings.machine import check_dense, check_stream, host_memory
from pipeline.errors import error_line
from schemas.cluster import ClusterSettings
from schemas.errors import UserError
from schemas.experiment import ExperimentSettings
from schemas.manifest import Manifest
from schemas.settings import load_settings
from schemas.stream import StreamSettings
from schemas.synth import SynthSettings
from schemas.train import TrainSettings

HUGE = 10**24


@pytest.mark.parametrize(
    "key",
    [
        *("seed", "epochs", "log_every", "dense.warmup_steps", "validation.every", "validation.patience"),
        *(
            "checkpoint.every",
            "checkpoint.delta_every",
            "checkpoint.keep",
            "stream.batch_size",
            "stream.history_length",
            "stream.threads",
        ),
        *("stream.prefetch_batches", "stream.shuffle_memory", "model.attention.dim", "model.representation.dim"),
        *("model.retrieved.history", "model.hash_bits", "model.hash_width", "model.cluster_size"),
    ],
)
def test_no_run_can_have_these(key: str) -> None:
    with pytest.raises(UserError, match=f"^{key}: .*{HUGE}"):
        load_settings(TrainSettings, overrides=[f"{key}={HUGE}"])


def test_widths_and_rates_that_are_none() -> None:
    with pytest.raises(UserError, match=r"^model.hidden.0: .*1000000000"):
        load_settings(TrainSettings, overrides=["model.hidden=[1000000000]"])
    for key in ("dense.learning_rate", "model.attention.learning_rate", "dense.clip_norm"):
        with pytest.raises(UserError, match=f"^{key}: "):
            load_settings(TrainSettings, overrides=[f"{key}=.inf"])


@pytest.mark.parametrize("key", ["events", "items", "categories", "days", "impressions_per_user", "max_length"])
def test_no_log_can_have_these(key: str) -> None:
    with pytest.raises(UserError, match=f"^{key}: "):
        load_settings(SynthSettings, overrides=[f"{key}={HUGE}"])


def test_other_settings_have_bounds_too() -> None:
    laptop = Path(__file__).parents[2] / "jobs" / "clusters" / "laptop-cpu.yaml"
    with pytest.raises(UserError, match=r"^nodes: .*; devices_per_node: .*; host_memory: "):
        load_settings(
            ClusterSettings, [laptop], [f"{key}={HUGE}" for key in ("nodes", "devices_per_node", "host_memory")]
        )
    with pytest.raises(UserError, match=r"seeds.0: "):
        load_settings(ExperimentSettings, [laptop.parents[1] / "experiments" / "smoke.yaml"], [f"seeds=[{HUGE}]"])


def test_large_settings_are_legal() -> None:
    load_settings(
        TrainSettings,
        overrides=[
            *("stream.batch_size=65536", "stream.history_length=10000", "model.retrieved.history=1000"),
            *("seed=9223372036854775807", "stream.threads=256", "model.hidden=[4096,4096,4096]", "epochs=1000"),
        ],
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ["threads=1024"],
        ["shuffle_memory=1000TB"],
    ],
)
def test_what_this_machine_cannot_do_is_refused(overrides: list[str], few_users: Path) -> None:
    settings = load_settings(StreamSettings, overrides=overrides)
    with pytest.raises(UserError, match=f"^stream.{overrides[0].partition('=')[0]}"):
        check_stream(settings, Manifest.read(few_users))


def test_a_batch_is_no_larger_than_the_data(few_users: Path, many_targets: Manifest) -> None:
    settings = load_settings(StreamSettings, overrides=["batch_size=16777216", "history_length=10000000"])
    check_stream(settings, Manifest.read(few_users))
    with pytest.raises(UserError, match=r"^stream.batch_size=16777216 and stream.prefetch_batches=4: .*GiB"):
        check_stream(settings, many_targets)


@pytest.fixture
def many_targets(few_users: Path) -> Manifest:
    """A data set of users with a million behaviours and one target each."""
    manifest = Manifest.read(few_users)
    counts = manifest.counts
    train = counts.train.model_copy(update={"targets": 10**9})
    return manifest.model_copy(
        update={"counts": counts.model_copy(update={"train": train, "users": 10**9, "behaviors": 10**15})}
    )


def test_layers_that_do_not_fit() -> None:
    check_dense([200, 80])
    width = int((host_memory() / 4) ** 0.5)
    with pytest.raises(UserError, match=r"^model.hidden=.* GiB"):
        check_dense([width, width])
    narrower = width // 8
    check_dense([narrower, narrower])
    with pytest.raises(UserError, match=r"^model.mixture.hidden=.* GiB"):
        check_dense([narrower, narrower], 256, "model.mixture.hidden")


def allocate_by_torch() -> Any:
    return torch.empty(2**46, dtype=torch.uint8)


def allocate_by_numpy() -> Any:
    return np.empty(2**60, np.uint8)


def allocate_by_python() -> Any:
    return bytearray(2**60)


@pytest.mark.parametrize("allocate", [allocate_by_torch, allocate_by_numpy, allocate_by_python])
def test_memory_that_there_is_not_is_a_line(allocate: Any) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as failed:
        allocate()
    line = error_line(failed.value)
    assert line is not None
    assert line.startswith("does not fit in memory: ")
    assert "dare plan" in line
    assert "\n" not in line

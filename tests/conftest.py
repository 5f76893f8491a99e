"""Data sets that tests share, which nobody changes; the device of all tests; and what every test leaves as it was."""

import gc
import logging
import os
import random
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy
import pytest

from schemas.shards import Split
from tests.datasets import random_users, write_dataset
from tests.disks import mounted_disk

# Before the first test starts a process: two ranks on a machine with one GPU would fail. What needs a GPU says so by
# itself, and asks torch for it.
os.environ["DEVICE"] = "cpu"

# Two runs of the same tests try the same examples, so that what fails once can be looked at. Others are tried with
# `HYPOTHESIS_PROFILE=explore`.
hypothesis.settings.register_profile("repeated", derandomize=True)
hypothesis.settings.register_profile("explore", print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeated"))


# All that is loaded while tests are collected stays: to look for garbage in it again and again takes seconds.
gc.disable()


def pytest_collection_finish() -> None:
    """Take what is loaded out of what garbage collections look at: each end of a process group collects all of it."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def few_users(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 60 users whose targets are in the three splits alike; it takes a moment to train on."""
    folder = tmp_path_factory.mktemp("few-users") / "data"
    write_dataset(folder, random_users(60))
    return folder


@pytest.fixture(scope="session")
def many_users(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 150 users most of whose targets are for training: some dozen global batches an epoch."""
    folder = tmp_path_factory.mktemp("many-users") / "data"
    write_dataset(folder, random_users(150, splits=(*[Split.TRAIN] * 5, Split.VALIDATION, Split.TEST)))
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a MiB, empty."""
    with mounted_disk(tmp_path / "disk", 1024) as disk:
        yield disk


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Random numbers of a test are its own, whichever tests ran before it in the process."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    numpy.random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def unconfigured_logging() -> Iterator[None]:
    """Take back what a command that ran in this process has set up: its handler would show and catch lines twice."""
    yield
    logger = logging.getLogger("dare")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)

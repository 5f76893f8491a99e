"""Tables on a terminal: whatever its width and the names, no line is longer and no cell loses a letter."""

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from pipeline.reporting.text_table import prose_lines, table_lines
from pipeline.runs.comparison import data_names
from pipeline.runs.listing import run_state
from pipeline.runs.run_folder import read_step_log
from schemas.documents import read_json
from schemas.shards import Split
from tests.datasets import random_users, write_dataset
from tests.runs import Run, small_settings

REPOSITORY = Path(__file__).parents[2]
LETTERS = st.text(st.sampled_from("abcXYZ019 /-_.=模\n\x1b"), max_size=40)


def letters(texts: list[str]) -> Counter[str]:
    return Counter("".join("".join(texts).split()))


@given(
    rows=st.integers(1, 5).flatmap(
        lambda columns: st.lists(st.lists(LETTERS, min_size=columns, max_size=columns), min_size=1, max_size=5)
    ),
    width=st.none() | st.integers(24, 120),
)
def test_no_line_is_longer_and_no_letter_is_lost(rows: list[list[str]], width: int | None) -> None:
    header, *below = rows
    lines = list(table_lines(header, below, width=width))
    assert width is None or all(cell_len(line) <= width for line in lines)
    assert all(line.isprintable() for line in lines)
    written = letters(lines)
    cells = [cell.replace("\n", "\\n").replace("\x1b", "\\x1b") for row in rows for cell in row]
    assert not letters(cells) - written


def test_a_table_that_fits_has_a_line_a_row() -> None:
    lines = list(table_lines(["run", "test AUC"], [["模型", "0.7"], ["b", "0.75"]], width=20))
    assert lines == ["run   test AUC", "模型       0.7", "b         0.75"]


def test_a_wide_table_has_parts_that_repeat_the_labels() -> None:
    header = ["dim", "nodes", "best validation AUC", "samples/s"]
    lines = list(table_lines(header, [["16", "1", "0.75", "12,345"]], labels=2, width=26))
    assert lines == [
        "                  best",
        "            validation",
        "dim  nodes         AUC",
        "16       1        0.75",
        "",
        "dim  nodes  samples/s",
        "16       1     12,345",
    ]


def test_sentences_are_broken_between_words() -> None:
    assert prose_lines("one two three", 8) == ["one two", "  three"]
    assert prose_lines("one two three", None) == ["one two three"]


def on_terminal(columns: int, *arguments: object) -> list[str]:
    """Lines that `dare` prints on a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += part
    os.close(ours)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    return said.decode().replace("\r\n", "\n").splitlines()


@pytest.fixture(scope="module")
def run(many_users: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Run(1, small_settings("epochs=1"), many_users, tmp_path_factory.mktemp("run") / "run").finish().folder


@pytest.fixture(scope="module")
def thirty(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty runs with names of all lengths, each with a setting of its own; the first one is damaged."""
    folder = tmp_path_factory.mktemp("runs")
    for index in range(30):
        copy = folder / f"{'experiment-of-a-long-name/' * (index % 3)}dim-{index}"
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
        text = (copy / "settings.yaml").read_text()
        text = re.sub("^# checksum: .*\n", "", text, flags=re.M)
        (copy / "settings.yaml").write_text(re.sub("^seed: .*$", f"seed: {index}", text, flags=re.M))
        (copy / "checkpoints").mkdir()
    (folder / "dim-0/test.json").write_text("{")
    return folder


@pytest.mark.parametrize("columns", [80, 200])
def test_thirty_runs(columns: int, thirty: Path) -> None:
    lines = on_terminal(columns, "runs", thirty)
    table = lines[: next(index for index, line in enumerate(lines) if line.startswith(str(thirty)))]
    assert all(cell_len(line) <= columns for line in table)
    test = json.loads((thirty / "dim-3/test.json").read_text())
    names: list[str] = []
    for line in table:
        # A line that is indented goes on with the name of the line above.
        name = re.split(" {2,}", line.strip())[0]
        names[-1:] = [names[-1] + name] if line.startswith("  ") and names else [*names[-1:], name]
    for index in range(30):
        assert f"{'experiment-of-a-long-name/' * (index % 3)}dim-{index}" in names
    assert "\n".join(table).count(f"{test['auc']:.4f}") == 29
    assert sum("damaged" in line for line in table) == 1


def test_thirty_runs_side_by_side(thirty: Path) -> None:
    runs = [thirty / f"dim-{3 * index}" for index in range(1, 10)]
    lines = on_terminal(80, "compare", *runs)
    assert all(cell_len(line) <= 80 for line in lines)
    assert "AUC" in lines[0]
    assert lines[0].split() == ["run", "model", "AUC", "GAUC", "log", "loss"]
    # The setting that differs is a row of its own or a column; each run's value is there.
    assert [line.split() for line in lines if line.startswith("seed")] == [
        ["seed", *(str(3 * index) for index in range(1, 10))]
    ]


def test_runs_of_different_data_sets_say_so(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    assert "data set" not in on_terminal(80, "compare", run, other)[0]
    document = read_json(other / "data_set.json")
    (other / "data_set.json").write_text(json.dumps(document | {"folder": "/data/others", "fingerprint": "f" * 64}))
    lines = on_terminal(80, "compare", run, other, "--json")
    assert "data set" in lines[0]
    assert "others" in lines[2]
    assert "the runs were tested on different data sets" in "\n".join(lines)
    documents = json.loads(lines[-1])["runs"]
    assert [row["data"]["fingerprint"] for row in documents] == [document["fingerprint"], "f" * 64]
    again = [{"data": {"folder": "/data/shop", "fingerprint": each * 64}} for each in "abb"]
    assert data_names(again) == ["shop (aaaaaaaaaaaa)", "shop (bbbbbbbbbbbb)", "shop (bbbbbbbbbbbb)"]


@pytest.mark.slow
def test_a_run_whose_validations_are_not_defined(tmp_path: Path) -> None:
    splits = (*[Split.TRAIN] * 5, Split.VALIDATION, Split.TEST)
    users = [
        replace(
            user,
            targets=[
                replace(target, label=1) if target.split == Split.VALIDATION else target for target in user.targets
            ],
        )
        for user in random_users(150, splits=splits)
    ]
    write_dataset(tmp_path / "data", users)
    run = Run(1, small_settings("epochs=1"), tmp_path / "data", tmp_path / "runs/run").finish()
    assert "validation AUC not defined" in run.said()
    assert "nan" not in run.said()
    assert "the best so far" not in run.said()
    test = json.loads((run.folder / "test.json").read_text())
    assert (test["checkpoint"], test["checkpoint_step"]) == ("last", test["steps"])
    assert {line["auc"] for line in read_step_log(run.folder / "validations.jsonl")} == {None}
    settings = ["epochs=1", *small_settings_texts()]
    (line,) = on_terminal(200, "train", "--data", tmp_path / "data", "--run", run.folder, *settings)
    assert f"test of the last checkpoint, of step {test['steps']} (none was the best: " in line
    assert run_state(run.folder).validations
    assert "undefined" in on_terminal(120, "runs", tmp_path / "runs")[1]
    assert {tag for tag in scalars(run.folder / "tensorboard") if tag.startswith("validation/")} == {
        "validation/log_loss",
        "validation/calibration",
    }


def small_settings_texts() -> list[str]:
    from tests.runs import SMALL

    return [text for text in SMALL if not text.startswith("epochs=")]


def scalars(folder: Path) -> set[str]:
    """Tags of the scalars in a folder of TensorBoard's event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return set(events.Tags()["scalars"])

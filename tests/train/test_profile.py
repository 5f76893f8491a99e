"""`profile.steps`: it changes no number, each rank has a trace, and the parts of the table add up to a step."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.train.profile import OTHER, PARTS, STEP, Launch, Span, parts_of_a_step
from schemas.documents import read_json
from schemas.errors import UserError
from tests.runs import Run, slow_steps, small_settings


@pytest.fixture(scope="module")
def data(many_users: Path) -> Path:
    return many_users


def spans(trace: Path, name: str) -> list[dict[str, Any]]:
    """Where a region ran, on the host."""
    events = json.loads(trace.read_text())["traceEvents"]
    return [event for event in events if event.get("name") == name and event.get("cat") == "user_annotation"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_stay_and_parts_add_up(ranks: int, data: Path, tmp_path: Path) -> None:
    plain = Run(ranks, small_settings(), data, tmp_path / "plain").finish()
    # Over a validation, after step 9, and over the end of an epoch.
    steps_of_epoch = len((plain.folder / "losses.jsonl").read_text().splitlines()) // 2
    last = steps_of_epoch + 2
    run = Run(ranks, small_settings(f"profile.steps=[7,{last}]"), data, tmp_path / "profiled").finish()
    assert run.logs() == plain.logs()
    for rank in range(ranks):
        trace = run.folder / "profile" / f"rank-{rank}.pt.trace.json"
        for region in (STEP, "dare/backward", "dare/optimizer"):
            assert len(spans(trace, region)) == last - 6
    found = read_json(run.folder / "profile" / "step.json")
    assert found["steps"] == [7, last]
    *parts, step = found["parts"]
    assert [part["name"] for part in parts] == [*PARTS.values(), OTHER]
    assert step["name"] == "step"
    assert step["ms"] == pytest.approx(sum(part["ms"] for part in parts), abs=0.01)
    assert sum(part["share"] for part in parts) == pytest.approx(1, abs=0.001)
    assert step["device_ms"] is None
    by_name = {part["name"]: part["ms"] for part in parts}
    measured = spans(run.folder / "profile" / "rank-0.pt.trace.json", "dare/optimizer")
    assert by_name["optimizer"] == pytest.approx(sum(span["dur"] for span in measured) / len(measured) / 1e3, rel=0.01)
    for name in ("backward", "optimizer", "waiting for data"):
        assert by_name[name] > 0
    # The table is shown too.
    assert f"profile of steps 7 to {last}" in run.said(0)
    assert not list((plain.folder).glob("profile*"))


def test_a_stopped_run_has_what_it_made(data: Path, tmp_path: Path) -> None:
    run = Run(1, small_settings("profile.steps=[2,50]"), data, tmp_path / "run", slow_steps, (5,)).finish()
    assert read_json(run.folder / "profile" / "step.json")["steps"] == [2, 5]


def test_steps_that_are_never_made_are_told(data: Path, tmp_path: Path) -> None:
    run = Run(1, small_settings("profile.steps=[20000,30000]", "epochs=1"), data, tmp_path / "run").finish()
    assert "no step of 20000 to 30000 was made" in run.said()
    with pytest.raises(UserError, match=r"profile\.steps.*the first step must not come after the last"):
        small_settings("profile.steps=[30,20]")


def test_a_region_within_another_counts_for_itself() -> None:
    found = parts_of_a_step(
        [
            Span(STEP, 1000, 11_000),
            Span("dare/search", 2000, 6000),
            Span("dare/exchange", 3000, 4000),
            Span("dare/search", 20_000, 25_000),  # of a validation
            Span(STEP, 30_000, 40_000),
            Span("dare/backward", 30_000, 38_000),
        ],
        [Launch(500, 7000), Launch(3500, 2000), Launch(37_999, 4000), Launch(21_000, 9000), Launch(39_000, 1000)],
        steps=2,
    )
    ms = {part.name: (part.ms, part.share, part.device_ms) for part in found if part.ms}
    assert ms == {
        "exchange": (0.5, 0.05, 1.0),
        "search": (1.5, 0.15, 0.0),
        "backward": (4.0, 0.4, 2.0),
        OTHER: (4.0, 0.4, 0.5),
        "step": (10.0, 1.0, 3.5),
    }

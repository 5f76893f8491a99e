"""The benchmarks of a server and of exported models: a real server is asked, swapped and killed; a fault is told."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.serve_http import measure_http, measure_load, soak
from benchmarks.served_clients import Asked
from benchmarks.served_process import ServedProcess
from benchmarks.served_requests import draw_requests
from schemas.errors import UserError
from tests.runs import run_dare
from tests.served import Exported


def test_a_server_is_measured_swapped_and_killed(exported: Exported) -> None:
    folders = [exported.folder, exported.other]
    asked = Asked(folders, length=30, candidates=7)
    with ServedProcess(exported.folder, exported.folder.parent, threads=2, queue=6) as server:
        http = measure_http(asked, server, 8)
        assert http.largest_difference == 0
        assert http.predictor_p50_ms > 0
        assert http.http_p50_ms > 0
        load = measure_load(asked, server, 0.5)
        assert (load.clients, load.errors) == (8, {})
        assert load.highest_per_s > 0
        figures = soak(asked, server, folders, rate=20, seconds=3, swap_every=0.5)
        assert figures.errors == {}
        assert figures.swaps >= 1
        assert figures.in_flight_at_kill + figures.while_down > 0
        lost = figures.in_flight_at_kill + figures.while_down
        versions = {predictor.version for predictor in asked.predictors}
        assert figures.by_version.keys() <= versions
        assert sum(figures.by_version.values()) == figures.requests - lost
        assert figures.memory_mib[0] > 10
        # After all this it answers, and what is not what the Predictor says is no answer.
        asked.requests[0] = replace(asked.requests[0], body=asked.requests[1].body)
        with pytest.raises(UserError, match=r"^scores over HTTP differ from those of the Predictor by "):
            measure_http(asked, server, 1)
        assert measure_load(asked, server, 0.5).errors.keys() == {"other scores"}


def test_requests_are_of_items_that_the_model_knows(exported: Exported) -> None:
    first, second = draw_requests(exported.folder, 2, 40, 5)
    known = {line["product"] for line in exported.log.events + exported.log.shown}
    assert {*first.history["product"], *(each["product"] for each in first.candidates)} <= known
    assert [len(first.history[name]) for name in ("product", "when", "action")] == [40] * 3
    assert first.history["city"].startswith("city ")
    assert len(first.candidates) == 5
    # All behaviours are in the window.
    assert max(first.history["when"]) < min(each["when"] for each in first.candidates)
    assert json.loads(first.body) == {"history": first.history, "candidates": first.candidates}
    assert first.body != second.body
    assert draw_requests(exported.folder, 1, 40, 5)[0].body == first.body


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'none'}: no such folder")):
        ServedProcess(tmp_path / "none", tmp_path).__enter__()


def test_an_export_in_float32_is_what_the_run_says(exported: Exported, tmp_path: Path) -> None:
    options = ("--run", exported.run, "--data", exported.data, "--json")
    code, said, complaint = run_dare(tmp_path, "bench", "serve-quality", exported.folder, *options)
    assert code == 0, complaint
    (figures,) = json.loads(said)
    assert figures["largest_difference"] <= 1e-6
    assert figures["targets_apart"] == 0
    assert figures["auc"] == figures["auc_of_run"]
    assert figures["targets"] > 0
    assert figures["kept_the_same"] == 1


def test_exports_of_different_checkpoints_are_not_compared(exported: Exported, tmp_path: Path) -> None:
    options = ("--run", exported.run, "--data", exported.data)
    code, _, complaint = run_dare(tmp_path, "bench", "serve-quality", exported.folder, exported.other, *options)
    assert code == 1
    assert "export all of one checkpoint" in complaint

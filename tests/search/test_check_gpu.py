"""`make check-gpu` on a machine without a GPU: what the interpreter can do is done, the rest is named as left out."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import check
from benchmarks.gpu.figures import Figure

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

NO_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_what_needs_no_gpu_is_done_and_the_rest_is_left_out(tmp_path: Path) -> None:
    out = tmp_path / "check-gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--out", str(out)]
    # Whether it ends in time is not what is tested.
    shown = subprocess.run([*command, "--seconds", "3000"], env=NO_GPU, stdout=subprocess.PIPE, text=True, check=True)
    outcomes = {outcome["step"]: outcome for outcome in json.loads(out.read_text())}
    assert list(outcomes) == [step.name for step in check.STEPS]
    assert {name for name, outcome in outcomes.items() if outcome["state"] == "done"} == {"versions", "correct"}
    assert {outcome["reason"] for outcome in outcomes.values()} == {"", "needs a GPU"}
    compared, differ = outcomes["correct"]["figures"]
    assert compared["value"] > 50
    assert (differ["value"], differ["at_most"], differ["met"]) == (0, 0, True)
    assert all(name in shown.stdout for name in outcomes)


def test_a_step_that_ends_too_late_has_told_what_it_knew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow.py").write_text(
        "import subprocess, sys, time\n"
        "from benchmarks.gpu.figures import tell\n"
        "tell('first', 2, 'ms', at_least=3)\n"
        "if sys.argv[1] == 'fails': raise ValueError('broken')\n"
        "time.sleep(1000)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    late = check._run(check.Step("sleeps", "slow", 5), gpu=False, seconds=5)
    assert (late.state, late.reason) == ("out of time", "after 5 s")
    failed = check._run(check.Step("fails", "slow", 5), gpu=False, seconds=600)
    assert (failed.state, failed.reason) == ("failed", "ValueError: broken")
    assert late.figures == failed.figures == [Figure("first", 2.0, "ms", at_least=3)]
    assert failed.figures[0].met is False


def test_the_kernels_part_needs_torch_and_triton_alone() -> None:
    loaded = (
        "import sys, benchmarks.gpu.kernel, embeddings.search.topk.reference\n"
        "print([name for name in ('torchrec', 'fbgemm_gpu', 'pydantic', 'numba', 'hypothesis') if name in sys.modules])"
    )
    environment = {**NO_GPU, "TRITON_INTERPRET": "1"}
    shown = subprocess.check_output([sys.executable, "-c", loaded], env=environment, text=True)
    assert shown == "[]\n"

"""`dare prepare` keeps to its memory limit, over a log that takes more without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def dare(*arguments: object) -> dict:
    command = [sys.executable, "-m", "jobs.cli", *map(str, arguments), "--json"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


@pytest.mark.slow
def test_the_memory_limit_holds(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    dare("synth", "--out", log, "events=20_000_000", "items=4_000_000", "categories=9_400")
    arguments = ("prepare", "--preset", "taobao", "--events", log, "events.since=null", "events.until=null")
    free = dare(*arguments, "--out", tmp_path / "free")
    limited = dare(*arguments, "--out", tmp_path / "limited", "memory_limit=1GiB")
    assert free["peak_mib"] > 1024, "a limit that is never reached shows nothing"
    assert limited["peak_mib"] <= 1024
    for name in ("users", "items", "train", "bytes"):
        assert limited[name] == free[name]

"""What a wheel holds: outside a checkout the program has its version, presets, experiments, topologies and pages."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("schemas", "embeddings", "pipeline", "jobs", "benchmarks")
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
# One process for all commands: importing torch is most of the time that each would take.
COMMANDS = """
import json, sys
from jobs.cli import main

for words in json.loads(sys.argv[1]):
    print("$", *words, flush=True)
    sys.argv = ["dare", *words]
    try:
        main()
    except SystemExit as end:
        print(end.code or "")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's contents, with no editable install beside it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # A copy, so that setuptools' `build/` does not appear in the checkout.
    for name in (*PACKAGES, "requirements"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("dare-*.whl")
    target = folder / "installed"
    install = [*PIP, "install", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run(install, check=True, capture_output=True)
    return target


def run(installed: Path, folder: Path, *commands: list[str]) -> str:
    return subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        cwd=folder,
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin", "COLUMNS": "200"},
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ).stdout


@pytest.mark.slow
def test_dependencies_are_the_pins(installed: Path) -> None:
    (metadata,) = installed.glob("dare-*.dist-info/METADATA")
    wanted = [line.partition(": ")[2] for line in metadata.read_text().splitlines() if line.startswith("Requires-Dist")]
    for extra, file in (("", "common"), ("cpu", "torch"), ("cpu", "cpu"), ("cuda", "torch"), ("cuda", "cuda")):
        pins = [line for line in (REPOSITORY / f"requirements/{file}.txt").read_text().splitlines() if "==" in line]
        marker = f'; extra == "{extra}"' if extra else ""
        assert pins
        assert {f"{pin}{marker}" for pin in pins} <= set(wanted)


@pytest.mark.slow
def test_outside_a_checkout(installed: Path, tmp_path: Path) -> None:
    plan = ["plan", "--topology", "h100-16x8", "sizes.items=100_000", "--html", "page.html"]
    said = run(
        installed,
        tmp_path,
        ["--version"],
        ["prepare", "--preset", "taobao", "--events", "missing.csv", "--out", "data"],
        ["experiment", "table1-taobao", "--data", "taobao=missing", "--out", "runs"],
        plan,
        ["bench", "--help"],
    )
    blocks = dict(block.split("\n", 1) for block in said.split("$ ")[1:])
    version, prepare, experiment, planned, bench = blocks.values()
    assert version.startswith("dare 0.")
    assert "missing.csv" in prepare
    assert "missing" in experiment
    assert "data set" in experiment
    assert "h100-16x8: 128 ranks" in planned
    assert "shard-search" in bench  # an extension, which the program finds by its entry point
    assert "<html" in (tmp_path / "page.html").read_text()
    assert not (tmp_path / "data").exists()


def test_every_file_that_is_not_python(installed: Path) -> None:
    """Presets, recipes, experiments, topologies, templates; not what builds containers, nor a Slurm for tests."""
    for package in ("schemas", "pipeline", "jobs"):
        for file in (REPOSITORY / package).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts and file.parent.name not in ("docker", "slurm"):
                assert (installed / file.relative_to(REPOSITORY)).is_file(), file

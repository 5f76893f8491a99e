"""The Dockerfiles, as far as they can be checked without Docker: no image is built here."""

import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DOCKER = REPOSITORY / "jobs/docker"


def instructions(device: str) -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (DOCKER / f"{device}.Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    found = [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]
    assert {name for name, _ in found} <= {"FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER", "CMD"}
    return found


def copied(device: str) -> list[tuple[str, str]]:
    """Sources and where each goes."""
    pairs = []
    for name, rest in instructions(device):
        if name == "COPY":
            *sources, target = rest.split()
            pairs += [(source, target) for source in sources]
    return pairs


def pip_lines(text: str) -> list[str]:
    """What pip is asked for, quiet options left out."""
    found = [
        line.partition("pip install ")[2] for line in text.replace("\\\n", " ").splitlines() if "pip install" in line
    ]
    return [
        " ".join(word for word in shlex.split(line) if not word.startswith(("--quiet", "--disable"))) for line in found
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_copied_is_there_and_reaches_docker(device: str) -> None:
    ignored = (DOCKER / f"{device}.Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    kept = [line[1:] for line in ignored if line.startswith("!")]
    for source, _ in copied(device):
        assert (REPOSITORY / source).exists()
        assert any(fnmatch(source, pattern) for pattern in kept), source


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_packages_are_those_of_the_makefile(device: str) -> None:
    recipe = (REPOSITORY / "Makefile").read_text().partition("-m venv --clear")[2].partition("\nclean:")[0]
    wanted = [
        line.replace("$(DEVICE)", device).replace(" -r requirements/tests.txt", "").replace(" --editable", "")
        for line in pip_lines(recipe)
    ]
    ran = "\n".join(rest for name, rest in instructions(device) if name == "RUN")
    assert pip_lines(ran) == wanted
    files = {source for source, _ in copied(device)}
    for line in wanted:
        assert set(re.findall(r"-[rc] (\S+)", line)) <= files


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_components_find_what_they_expect(device: str) -> None:
    found = instructions(device)
    assert "sys.version_info[:2] != (3, 11)" in (REPOSITORY / "Makefile").read_text()
    assert [rest for name, rest in found if name == "FROM"] == ["python:3.11-slim-bookworm"]
    # torchx's `bash -c ...` is a command; an entry point would take it for its arguments.
    assert "ENTRYPOINT" not in dict(found)
    last = [(name, rest) for name, rest in found if name in ("USER", "WORKDIR")][-2:]
    assert last == [("USER", "1000"), ("WORKDIR", "/runs")]
    ran = "\n".join(rest for name, rest in found if name == "RUN")
    assert "useradd --uid 1000" in ran
    assert "mkdir /data /runs && chown 1000:1000 /data /runs" in ran
    # Triton compiles with gcc; NCCL sends over RDMA with the libraries, of which it says nothing where they lack.
    for package in ("gcc", "libibverbs1", "ibverbs-providers", "librdmacm1"):
        assert (package in ran.split()) == (device == "cuda")
    forced = [rest for name, rest in found if name == "ENV" and rest.startswith("DEVICE=")]
    assert forced == (["DEVICE=cpu"] if device == "cpu" else [])


def test_both_send_the_same_to_docker() -> None:
    cpu, cuda = ((DOCKER / f"{device}.Dockerfile.dockerignore").read_text() for device in ("cpu", "cuda"))
    assert cpu == cuda
    assert [source.replace("cpu", "cuda") for source, _ in copied("cpu")] == [source for source, _ in copied("cuda")]


def test_the_program_runs_from_what_is_copied(tmp_path: Path) -> None:
    source, installed = tmp_path / "src", tmp_path / "installed"
    for name, target in copied("cpu"):
        place = source / target
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, place)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", installed, source], check=True, capture_output=True)
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "import jobs, sys; print(jobs.__file__); from jobs.cli import main; main()",
            "--version",
        ],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert told[0].startswith(str(installed))
    assert any(line.startswith("torchrec ") for line in told)
    for package in ("schemas", "embeddings", "pipeline", "jobs", "benchmarks"):
        for file in (REPOSITORY / package).rglob("*"):
            if file.suffix in (".py", ".yaml"):
                assert (installed / file.relative_to(REPOSITORY)).is_file(), file

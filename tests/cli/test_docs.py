"""What the docs say: commands of the tutorials, the model of add_a_model.md and the examples run; lines are short."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])
LIMIT = 120
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run(folder: Path, *command: str) -> str:
    """Run a command as a reader would whose environment is active, and return what it says."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "160",
    }
    ended = subprocess.run(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert ended.returncode == 0, f"{' '.join(command)}\n{ended.stdout}"
    return ended.stdout


def run_page(name: str, folder: Path) -> list[str]:
    """Write the page's files, run its `bash` blocks in order, and return what each says; not what sets up `.venv`."""
    said = []
    for language, title, text in FENCE.findall((REPOSITORY / "docs" / name).read_text()):
        if title:
            (folder / title).write_text(text)
        elif language == "bash" and "make setup" not in text:
            said.append(run(folder, "bash", "-euo", "pipefail", "-c", text))
    return said


def auc(text: str) -> float:
    """The last AUC in what a command said."""
    return float(re.findall(r"(?:auc|AUC) +(0\.\d+)", text)[-1])


@pytest.mark.examples
def test_tutorial(tmp_path: Path) -> None:
    log, prepared, trained, compared, scored, read, planned = run_page("tutorial.md", tmp_path)
    assert "customer,product,department,bought_at" in log
    assert "500 users" in prepared
    assert auc(trained) > 0.7
    assert "din-short" in compared
    assert "1,500 predictions" in scored
    assert "bought in all: 33%" in read
    assert "samples/s" in planned
    # The second example scores a batch with the run that the tutorial leaves behind.
    lines = run(tmp_path, sys.executable, str(REPOSITORY / "examples/score_a_batch.py"), "runs/dare").splitlines()
    assert sum(bool(re.fullmatch(r"user \d+, item \d+: 0\.\d{4}", line)) for line in lines) == 4
    # And the third one asks what is exported of that run.
    run(tmp_path, "dare", "export", "--run", "runs/dare", "--out", "models/dare")
    example = str(REPOSITORY / "examples/answer_in_python.py")
    *best, first, second, third = run(tmp_path, sys.executable, example, "models/dare", "purchases.csv").splitlines()
    assert len(best) == 5
    assert all(re.fullmatch(r"customer \d+, product \d+: 0\.\d{4}", line) for line in best)
    assert all("% of the attention: {'product':" in line for line in (first, second, third))


@pytest.mark.examples
def test_add_a_model(tmp_path: Path) -> None:
    (said,) = run_page("add_a_model.md", tmp_path)
    assert auc(said) > 0.6


@pytest.mark.examples
def test_add_a_feature(tmp_path: Path) -> None:
    _made, prepared, inspected, trained, scored = run_page("add_a_feature.md", tmp_path)
    assert "18,000 kept" in prepared
    assert "brand" in inspected
    plain, rich = (float(line.split()[2]) for line in trained.splitlines() if re.match(r"(plain|rich) +dare", line))
    assert rich > plain + 0.05, "brand, price and age decide who clicks what"
    assert re.search(r"'item_id': 'SKU-\d{6}'", scored)
    assert "score_buy" in scored


@pytest.mark.examples
def test_train_in_python(tmp_path: Path) -> None:
    example = str(REPOSITORY / "examples/train_in_python.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    alone = auc(run(tmp_path, sys.executable, example, "data"))
    both = auc(run(tmp_path, *launcher, "2", example, "data"))
    assert min(alone, both) > 0.75


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_lines_of_prose_are_short(page: Path) -> None:
    code, long = False, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code and len(line) > LIMIT and not line.lstrip().startswith("|"):
            long.append(number)
    assert not long, f"lines of more than {LIMIT} characters: {long}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_to_pages_and_headings(page: Path) -> None:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        # `make docs` makes the reference of the API.
        if "://" in link or link.startswith("api/"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead, f"links to nothing: {dead}"


def anchors(page: Path) -> set[str]:
    """What links to the headings of a page are called."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_files_of_a_step_are_there() -> None:
    text = (REPOSITORY / "docs/architecture.md").read_text()
    files = re.findall(r"^\| (\d+) \| `([\w/.]+)` \|", text, re.MULTILINE)
    assert [int(number) for number, _ in files] == list(range(1, len(files) + 1))
    missing = [file for _, file in files if not (REPOSITORY / file).is_file()]
    assert not missing, f"docs/architecture.md names files that are not there: {missing}"

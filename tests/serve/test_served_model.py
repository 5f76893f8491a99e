"""Exported models answer as those that were trained: every model, kind of feature and shape of request."""

import json
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch

from embeddings.batch import Batch
from embeddings.model import CtrModel
from embeddings.models import MODELS
from pipeline.export.dense import write_programs
from pipeline.serve.model import ServedModel
from pipeline.serve.program import Graph
from pipeline.serve.rows import TableKey
from schemas.errors import UserError
from schemas.programs import Program
from tests.served_models import dense_state, exported, of_one_user, quantized, served, tables_of
from tests.tolerance import largest, rounding, summands
from tests.toy_model import MANY, OF_ANOTHER_SIZE, ONE, TWO, batch_of, model_of, settings_of, sizes_of

RECENT = {**TWO, "recent": {"content": 3}}
TASKS = {"tasks": [{"name": "label"}, {"name": "buy", "after": "label"}], "mixture": {"experts": 2, "hidden": (8,)}}
SHAPES = {"one sequence": ONE, "latest behaviours too": RECENT, "features of every kind": {**MANY, **TASKS}}
SIZES = ({}, {"targets": 1}, {"longest": 0}, {"longest": 3}, {"targets": 0})
"""Of batches: as usual, one target, empty histories, histories shorter than K, no targets."""


def assert_answers_alike(model: CtrModel, served: ServedModel, batch: Batch, more: float = 0) -> None:
    model.eval()
    with torch.no_grad():
        expected = model(batch).logits
    answer = served.answer(batch)
    allowed = partial(rounding, summands(model, batch))
    assert len(answer.logits) == len(expected)
    for ours, theirs in zip(answer.logits, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=allowed(1 + largest(theirs)) + more, rtol=0)
    for (_, chosen), weight_TK in zip(answer.branches, answer.weights, strict=True):
        assert weight_TK.shape == chosen.index_TK.shape == chosen.valid_TK.shape
        assert not weight_TK[~chosen.valid_TK].any()


# What sets models of another size apart shows with one sequence.
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(
            name, shape, marks=[pytest.mark.slow] if name in OF_ANOTHER_SIZE and shape != "one sequence" else []
        )
        for shape in SHAPES
        for name in MODELS
    ],
)
def test_every_model_answers_as_it_was_trained(name: str, shape: str) -> None:
    model = model_of(settings_of(name, **SHAPES[shape]))
    answering = served(model)
    for seed, size in enumerate(SIZES):
        batch = batch_of(model.settings, seed, **size)
        assert_answers_alike(model, answering, batch)
        if size.get("targets") != 0:
            assert_answers_alike(model, answering, of_one_user(batch))


# Of each program, and of each way to search that has one, a model.
@pytest.mark.parametrize(
    ("name", "shape"),
    [("dare", "features of every kind"), *((name, "one sequence") for name in ("sdim", "twin-mlp-1", "eta", "din"))],
)
def test_programs_that_were_written_answer_alike(name: str, shape: str, tmp_path: Path) -> None:
    model = model_of(settings_of(name, **SHAPES[shape]))
    answering = exported(model, tmp_path)
    for seed, size in enumerate(SIZES):
        assert_answers_alike(model, answering, batch_of(model.settings, seed, **size))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Program]:
    """A dense program: its file, and what a manifest says of it."""
    model, folder = model_of(settings_of("dare")), tmp_path_factory.mktemp("programs")
    record = write_programs(model.settings, sizes_of(model.settings), dense_state(model), folder, compile=False)
    program = record.programs["dense"]
    return folder / program.path, program


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.from_file.default",  # makes a file, and maps it to be written to
        "torch.ops.aten.copy_.default",  # changes a tensor, be it the rows of a table
        "torch.ops.aten.set_.source_Tensor",
        "torch.ops.aten._nested_view_from_buffer.default",
        "torch.ops.prims.add.default",
        "torch.ops.aten.nothing.default",
        "torch.ops.aten.add.nothing",
        "os.system",
        "",
    ],
)
def test_a_program_names_functions_of_tensors_alone(target: str, written: tuple[Path, Program], tmp_path: Path) -> None:
    path, program = written
    Graph(path, program)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    (graph,) = (name for name in content if name.endswith("models/model.json"))
    document = json.loads(content[graph])
    document["graph_module"]["graph"]["nodes"][-1]["target"] = target
    content[graph] = json.dumps(document).encode()
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        for name, part in content.items():
            archive.writestr(name, part)
    with pytest.raises(UserError, match="not a program that this version knows"):
        Graph(tmp_path / "other.pt2", program)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_machine_code_answers_alike_and_nothing_is_pickled(tmp_path: Path) -> None:
    model = model_of(settings_of("twin-no-tr", features=("item",)))
    answering = exported(model, tmp_path, compile=True)
    # Of sums that the compiler orders anew.
    assert_answers_alike(model, answering, batch_of(model.settings, 1), more=1e-5)
    for path in tmp_path.iterdir():
        with zipfile.ZipFile(path) as archive:
            assert not [name for name in archive.namelist() if archive.read(name)[:1] == b"\x80"], path


@pytest.mark.parametrize("shared", [False, True])
def test_coarse_rows_are_searched_and_what_they_find_is_scored_by_the_full_ones(shared: bool) -> None:
    model = model_of(settings_of("twin" if shared else "dare", retrieved={"ads": 12}))
    tables, key = tables_of(model), TableKey("shared" if shared else "attention", "item", None)
    tables[key._replace(search=True)] = quantized(tables[key].table_RD)
    answering, batch = served(model, tables), of_one_user(batch_of(model.settings, 3))
    # K is N: the search keeps all of a window, in an order of its own, so that its rounding changes no logit.
    assert_answers_alike(model, answering, batch)
    seen = answering._local_rows(batch, in_place=True)
    assert seen.scale_R is not None
    assert seen.behaviors["ads"]["item"].rows_Ld.dtype == torch.int8


def test_answering_loads_neither_the_training_program_nor_a_compiler() -> None:
    code = "import sys, pipeline.serve.model; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    for name in ("torchrec", "fbgemm_gpu", "petastorm", "torch._dynamo", "torch._inductor", "sympy"):
        assert name not in loaded, name

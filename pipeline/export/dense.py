"""Programs of an exported model: what it computes once its rows are there, made of the model's own methods.

T = targets, K = behaviours of a branch, U = distinct behaviours of a sequence, R = rows of a small table, N = longest
window, C = targets of a chunk, D = dim of the inherent features together, d = dim of one feature, X = any number.
"""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from embeddings.batch import Branch, Selection
from embeddings.features import IndexedBehaviors, IndexedRows, Rows
from embeddings.layers.mlp import logits_of
from embeddings.layers.pooling import Numbers, all_inputs
from embeddings.layers.projections import Signature
from embeddings.layers.scoring import DotProduct
from embeddings.model import CtrModel
from embeddings.models import build_model
from embeddings.models.din import DinShort
from embeddings.models.eta import Eta
from embeddings.models.sim import SimHard, SimSoft
from embeddings.models.twin import TwinHard, TwinV2
from embeddings.sizes import DataSizes
from embeddings.tables.specs import CONTEXT
from pipeline.progress import stage
from pipeline.serve.inputs import DenseNames, UsedTables
from pipeline.serve.program import load_compiled, this_machine
from schemas.model import ModelSettings
from schemas.programs import Program, ProgramName, Programs, SearchKind

_LOGGER = logging.getLogger("dare.export")

TOLERANCE = 1e-5
"""How far what is compiled may be from the exported program, relative to values of size 1."""
MOST = {"targets": 1 << 20, "behaviors": 1 << 24}
"""No request has more."""


class _Shape(NamedTuple):
    """A tensor that a program takes."""

    dims: tuple[int | str, ...]
    """Sizes; a name stands for any size, the same one wherever it stands."""
    dtype: torch.dtype = torch.float32


class DensePart(nn.Module):
    """What a model computes of rows that are there: attention, representation, prediction.

    Args:
        model: without its tables' rows.
        kind: of its search.
    """

    def __init__(self, model: CtrModel, kind: SearchKind) -> None:
        super().__init__()
        self.model = model
        self.used = UsedTables(model.roles, model.tables.sides, model.tables.sequences)
        self.sequences = [*model.settings.retrieved, *model.settings.recent]
        """Those of the branches."""
        self.shapes = dict(self._shapes(kind))
        """By name, the tensors that `forward` takes, in order."""

    def _shapes(self, kind: SearchKind) -> Iterator[tuple[str, _Shape]]:
        used, settings, tables, sides = self.used, self.model.settings, self.model.tables, self.used.sides
        for of_set in used.target_sets:
            for feature in used.inherent(of_set):
                yield DenseNames.target(of_set, feature), _Shape(("T", tables.spec(of_set, feature).dim))
            for sequence in used.sequences:
                for feature in used.cross(of_set):
                    dim = tables.spec(of_set, feature, sequence).dim
                    yield DenseNames.target(of_set, feature, sequence), _Shape(("T", dim))
        for sequence in used.sequences:
            for of_set in used.history_sets:
                for feature in used.inherent(of_set):
                    dim = tables.spec(of_set, feature).dim
                    yield DenseNames.behaviors(of_set, sequence, feature), _Shape((f"U_{sequence}", dim))
        for number, sequence in enumerate(self.sequences):
            retrieved = number < len(settings.retrieved)
            counts = settings.retrieved if retrieved else settings.recent
            columns = f"N_{sequence}" if retrieved and self.model.attends_all else counts[sequence]
            yield DenseNames.of_branch("index", number), _Shape(("T", columns), torch.int64)
            yield DenseNames.of_branch("valid", number), _Shape(("T", columns), torch.bool)
            if retrieved and kind == "clusters":
                yield DenseNames.of_branch("log_count", number), _Shape(("T", columns))
            for feature in dict.fromkeys(feature for of_set in used.history_sets for feature in used.cross(of_set)):
                yield DenseNames.row(number, feature), _Shape(("T", columns), torch.int64)
            for of_set in used.history_sets:
                for feature in used.cross(of_set):
                    dim = tables.spec(of_set, feature, sequence).dim
                    yield DenseNames.cross(of_set, number, feature), _Shape((f"R_{number}_{feature}", dim))
            if sides.numbers:
                yield DenseNames.of_branch("numbers", number), _Shape(("T", columns, len(sides.numbers)))
        own = [feature for feature in sides.numbers if feature in sides.carried]
        if own:
            yield DenseNames.NUMBERS, _Shape(("T", len(own)))
        for feature in sides.context:
            yield DenseNames.context(feature), _Shape(("T", tables.spec(CONTEXT, feature).dim))
        for feature in sides.context_numbers:
            yield DenseNames.context(feature), _Shape(("T", 1))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Predict, as `CtrModel.forward` does in evaluation.

        Args:
            tensors: those of `shapes`, in order.

        Returns:
            float32: the logits (T,) of each task, then the attention weights (T, K) of each branch, the mean of heads.
        """
        model, given = self.model, dict(zip(self.shapes, tensors, strict=True))
        rows = _GivenRows(self, given)
        weights = model.attend(rows, rows.branches, model.attention)
        input_TI = model.pool_locally(rows, rows.branches, weights)
        numbers = Numbers(
            [given[name] for name in (DenseNames.NUMBERS,) if name in given],
            [
                given[name]
                for number in range(len(rows.branches))
                if (name := DenseNames.of_branch("numbers", number)) in given
            ],
        )
        sides = self.used.sides
        context = [given[DenseNames.context(feature)] for feature in (*sides.context, *sides.context_numbers)]
        seen = all_inputs(input_TI, numbers, weights, pool=model.pool_numbers, context=context)
        means = [weight if weight.dim() == 2 else weight.mean(1) for weight in weights]
        return *logits_of(model.prediction, seen), *means


class _GivenRows:
    """Rows by the names of the tensors that hold them; see `embeddings.features.RowSource`."""

    def __init__(self, part: DensePart, given: Mapping[str, Tensor]) -> None:
        self._used, self._tables, self._given = part.used, part.model.tables, given
        self.branches = [
            Branch(
                sequence,
                Selection(
                    given[DenseNames.of_branch("index", number)],
                    given[DenseNames.of_branch("valid", number)],
                    given.get(DenseNames.of_branch("log_count", number)),
                ),
            )
            for number, sequence in enumerate(part.sequences)
        ]

    def targets(self, name: str, sequence: str, scored: bool = False) -> Rows:
        inherent = [
            self._given[DenseNames.target(name, feature)] for feature in self._tables.inherent_features(name, scored)
        ]
        cross = {
            feature: self._given[DenseNames.target(name, feature, sequence)]
            for feature in self._tables.cross_features(name, scored)
        }
        return Rows(torch.cat(inherent, dim=1), cross)

    def behaviors(self, name: str, sequence: str, selected: Selection, scored: bool = False) -> Rows:
        number = next(number for number, branch in enumerate(self.branches) if branch.chosen is selected)
        inherent = {
            feature: IndexedRows(self._given[DenseNames.behaviors(name, sequence, feature)], selected.index_TK)
            for feature in self._tables.inherent_features(name, scored)
        }
        cross = {
            feature: IndexedRows(
                self._given[DenseNames.cross(name, number, feature)], self._given[DenseNames.row(number, feature)]
            )
            for feature in self._tables.cross_features(name, scored)
        }
        return IndexedBehaviors(inherent, cross)


class _Queries(nn.Module):
    """The queries of a search by a dot product; takes and returns the inherent part, then each cross feature's."""

    def __init__(self, model: CtrModel, scoring: DotProduct) -> None:
        super().__init__()
        self.scoring = scoring
        self.shapes = dict(_target_shapes(model, one_for_all=True))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inherent, *cross = tensors
        queries = self.scoring.queries(Rows(inherent, dict(zip([*self.shapes][1:], cross, strict=True))))
        return tuple(queries.parts())


class _Score(nn.Module):
    """A score of pairs; takes the targets' rows, then the behaviours': inherent, then cross."""

    def __init__(self, model: CtrModel) -> None:
        super().__init__()
        self.scoring = model.scoring
        of_targets = dict(_target_shapes(model, one_for_all=False))
        self.features = [*of_targets][1:]
        self.shapes = {f"target.{name}": shape for name, shape in of_targets.items()} | {
            f"behaviors.{name}": _Shape(("T", "N", shape.dims[1])) for name, shape in of_targets.items()
        }

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        half = 1 + len(self.features)
        target, behaviors = (
            Rows(inherent, dict(zip(self.features, cross, strict=True)))
            for inherent, *cross in (tensors[:half], tensors[half:])
        )
        return (self.scoring(target, behaviors),)


class _Signature(nn.Module):
    """The signature of rows: bool (X, B)."""

    def __init__(self, signature: Signature) -> None:
        super().__init__()
        self.signature = signature
        self.shapes = {"rows": _Shape(("X", signature.directions.in_features))}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (rows_XD,) = tensors
        return (self.signature(rows_XD),)


def _target_shapes(model: CtrModel, *, one_for_all: bool) -> Iterator[tuple[str, _Shape]]:
    name, sides = model.roles.target_attention, model.tables.sides
    yield "inherent", _Shape(("T", sum(model.tables.inherent_dims(name, scored=True).values())))
    for feature, dim in model.tables.cross_dims(name, scored=True).items():
        # A feature that targets have no value of has one row for all; see `embeddings.search.score_parts.search_rows`.
        yield feature, _Shape((1 if one_for_all and feature not in sides.carried else "T", dim))


def search_of(model: CtrModel) -> tuple[SearchKind, nn.Module | None]:
    """How a model searches, and the program that its search needs, if any.

    A model whose search is one of its own needs a line here, and a branch in `pipeline.serve.model`.
    """
    if model.attends_all:
        return "none", None
    if isinstance(model, SimSoft):
        return "dot_product", _Queries(model, model.searching)
    if isinstance(model, SimHard):
        return "category", None
    if isinstance(model, TwinHard):
        return "category_filled", None
    if isinstance(model, DinShort):
        return "latest", None
    if isinstance(model, Eta):
        return "signature", _Signature(model.signature)
    if isinstance(model, TwinV2):
        return "clusters", _Queries(model, model.scoring)
    assert type(model).search_locally is CtrModel.search_locally, f"{model.settings.name} has a search of its own"
    if isinstance(model.scoring, DotProduct):
        return "dot_product", _Queries(model, model.scoring)
    return "score", _Score(model)


class Parts(NamedTuple):
    """What of a model becomes programs."""

    modules: dict[ProgramName, nn.Module]
    """By the programs' names; each has ``shapes``, the tensors that it takes by name."""
    record: Programs
    """For the manifest; without the programs themselves."""


def parts_of(settings: ModelSettings, sizes: DataSizes, dense_state: Mapping[str, Tensor]) -> Parts:
    """Make what becomes programs; arguments as of `write_programs`."""
    model = build_model(settings, sizes, torch.device("meta")).eval()
    # Rows are given to the programs: only what the tables are called and how wide they are is asked of them from here
    # on, so they are no part of what is exported.
    model.__dict__["tables"] = model._modules.pop("tables")
    model.load_state_dict(dense_state)
    model.auxiliary = None
    model.requires_grad_(False)
    kind, searching = search_of(model)
    modules: dict[ProgramName, nn.Module] = {"dense": DensePart(model, kind)}
    if searching is not None:
        names: dict[SearchKind, ProgramName] = {"score": "score", "signature": "signature"}
        modules[names.get(kind, "queries")] = searching
    roles = model.roles
    record = Programs(
        features=model.settings.feature_names,
        search=kind,
        target_attention=roles.target_attention,
        history_attention=roles.history_attention,
        target_representation=roles.target_representation,
        history_representation=roles.history_representation,
        programs={},
    )
    return Parts(modules, record)


@torch.no_grad()
def write_programs(
    settings: ModelSettings,
    sizes: DataSizes,
    dense_state: Mapping[str, Tensor],
    folder: Path,
    *,
    compile: bool = True,
) -> Programs:
    """Write the programs of a model.

    Args:
        settings: of the model.
        sizes: of the data that it was trained on.
        dense_state: all values of `CtrModel.state_dict` but those of tables.
        folder: where they are written.
        compile: also write machine code, where a compiler is at hand.

    Returns:
        What the manifest says of them.
    """
    modules, record = parts_of(settings, sizes, dense_state)
    with stage("trace programs", len(modules), "programs") as progress:
        exported = {}
        for name, module in modules.items():
            exported[name] = _exported(module)
            progress.advance()
    # Compiled before they are saved, which takes away the tensors that a compiler tunes its code with.
    why_not = _why_not_compiled(exported, folder) if compile else None
    programs = {name: _saved(program, folder / f"{name}.pt2", modules[name]) for name, program in exported.items()}
    compiled_for = None
    if compile and why_not is None:
        compiled_for = this_machine()
        programs = {
            name: program.model_copy(update={"compiled": f"{name}.aoti.pt2"}) for name, program in programs.items()
        }
    return record.model_copy(update={"programs": programs, "compiled_for": compiled_for, "why_not_compiled": why_not})


def _exported(part: nn.Module) -> ExportedProgram:
    shapes: Mapping[str, _Shape] = part.shapes  # type: ignore[assignment]
    # Different sizes for different names, so that none is taken for another one's.
    primes = (number for number in count(5) if all(number % other for other in range(2, number)))
    names = dict.fromkeys(dim for shape in shapes.values() for dim in shape.dims if isinstance(dim, str))
    sizes = dict(zip(names, primes, strict=False))
    free = {name: Dim(name, min=0, max=MOST["targets" if name == "T" else "behaviors"]) for name in names}
    example = []
    for shape in shapes.values():
        size = [sizes[dim] if isinstance(dim, str) else dim for dim in shape.dims]
        example.append(
            torch.zeros(size, dtype=shape.dtype) if shape.dtype != torch.bool else torch.ones(size, dtype=torch.bool)
        )
    dynamic = [
        {place: free[dim] for place, dim in enumerate(shape.dims) if isinstance(dim, str)} for shape in shapes.values()
    ]
    return torch.export.export(part, tuple(example), dynamic_shapes=(tuple(dynamic),), strict=False)


def _why_not_compiled(exported: Mapping[ProgramName, ExportedProgram], folder: Path) -> str | None:
    """Compile programs, and compare what they compute; None: all is well, else why there is no machine code."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "no C++ compiler is at hand"
    _LOGGER.info("compiling %d programs for this processor (a minute or two)", len(exported))
    with stage("compile programs", len(exported), "programs") as progress:
        for name, program in exported.items():
            path = folder / f"{name}.aoti.pt2"
            content = BytesIO()
            torch._inductor.aoti_compile_and_package(program, package_path=content)
            path.write_bytes(content.getvalue())
            worst = _difference(program, path)
            if worst > TOLERANCE:
                for other in exported:
                    (folder / f"{other}.aoti.pt2").unlink(missing_ok=True)
                return f"what is compiled of {name} differs by {worst:.1e}"
            progress.advance()
    return None


def _difference(program: ExportedProgram, path: Path) -> float:
    """The largest difference between a program and its machine code, on random tensors, relative to values above 1."""
    draw, example = torch.Generator().manual_seed(0), []
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs:
            size, dtype = (
                [int(each) if isinstance(each, int) else 7 for each in node.meta["val"].shape],
                node.meta["val"].dtype,
            )
            # Indices below the least size of what is indexed.
            example.append(
                torch.randn(size, generator=draw)
                if dtype.is_floating_point
                else torch.randint(0, 2 if dtype == torch.bool else 7, size, generator=draw).to(dtype)
            )
    worst = 0.0
    for ours, theirs in zip(load_compiled(path)(example), program.module()(*example), strict=True):
        distance = (ours.double() - theirs.double()).abs() / theirs.double().abs().clamp(min=1)
        worst = max(worst, float(distance.max()))
    return worst


def _saved(program: ExportedProgram, path: Path, part: nn.Module) -> Program:
    # The archive would hold them pickled.
    program._example_inputs = None
    # Nor does it tell where this program lies on the machine that exports.
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    # Not by torch: what it says of a disk that is full reads like a fault of its own.
    content = BytesIO()
    torch.export.save(program, content)
    path.write_bytes(content.getvalue())
    outputs = [str(each.arg.name) for each in program.graph_signature.output_specs]
    shapes: Mapping[str, _Shape] = part.shapes  # type: ignore[assignment]
    return Program(path=path.name, inputs=tuple(shapes), outputs=tuple(outputs))

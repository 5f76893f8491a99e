"""An exported model that answers: the search over mapped rows, then its programs; without the training program.

T = targets, K = behaviours of a branch, M = behaviours of all users, N = longest window, C = targets of a chunk,
D = dim of the inherent features together, d = dim of one feature, X = any number.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import starmap
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from embeddings.batch import Batch, Branch, History, Selection
from embeddings.features import IndexedRows, Rows
from embeddings.search.by_category import latest, search_by_category
from embeddings.search.clusters import log_counts
from embeddings.search.local import LocalRows, search_by_dot_product, search_by_score, search_by_signature
from embeddings.sizes import DataSizes, check_bounds
from embeddings.tables.specs import TableRoles
from pipeline.serve.inputs import RequestRows, UsedTables
from pipeline.serve.program import Graph, Runs, load_compiled, this_machine
from pipeline.serve.rows import StoredRows, TableKey, open_tables
from schemas.model import Feature, ModelSettings
from schemas.programs import ProgramName, Programs
from schemas.served import ServedManifest

CHUNK_FLOATS = 1 << 24
"""How many floats of behaviours' rows are in memory at once, where a model attends to whole histories."""


@dataclass(frozen=True)
class Answer:
    """What a model says of T targets, and why."""

    logits: tuple[Tensor, ...]
    """float32 (T,) each: log odds of each task, the main one first."""
    branches: tuple[Branch, ...]
    """The behaviours that were attended to: those retrieved of each sequence, then the latest ones."""
    weights: tuple[Tensor, ...]
    """float32 (T, K), for each branch: the behaviours' attention weights, 0 for padding; of several heads the mean."""


class ServedModel:
    """A model that answers. Many threads may ask it at once.

    Args:
        settings: of the model.
        sizes: of the data that it was trained on.
        programs: what it computes.
        run: by name, the programs themselves.
        tables: all tables of the model.
    """

    def __init__(
        self,
        settings: ModelSettings,
        sizes: DataSizes,
        programs: Programs,
        run: Mapping[ProgramName, Runs],
        tables: Mapping[TableKey, StoredRows],
    ) -> None:
        uses = {use.name: use for use in settings.features}
        kept = tuple(uses[name] for name in programs.features)
        # Not validated again: settings of a feature that the model leaves out are without effect.
        self.settings = settings.model_copy(update={"features": kept})
        self.sizes = sizes.used(self.settings.feature_names)
        """Sizes of what the model uses."""
        self._programs, self._run = programs, run
        self._roles = TableRoles(
            programs.target_attention,
            programs.history_attention,
            programs.target_representation,
            programs.history_representation,
        )
        self._sides = sizes.sides(self.settings)
        self._rows = RequestRows(UsedTables(self._roles, self._sides, tuple(settings.retrieved)), tables)
        cross = self._sides.cross_of(scored=True)
        self._queries, self._score = _Queries(run, cross), _Score(run, cross)

    @classmethod
    def load(cls, folder: Path, manifest: ServedManifest | None = None) -> Self:
        """Load an exported model. Rows are read when they are asked for.

        Args:
            folder: of the model.
            manifest: of the folder; None: it is read.

        Raises:
            UserError: the folder is not what `dare export` writes, or a file differs from its checksum.
        """
        manifest = manifest or ServedManifest.read(folder)
        programs, run = manifest.programs, dict[ProgramName, Runs]()
        here = programs.compiled_for == this_machine()
        for name, program in programs.programs.items():
            if here and program.compiled is not None:
                run[name] = load_compiled(manifest.verified(folder, program.compiled))
            else:
                run[name] = Graph(manifest.verified(folder, program.path), program)
        sizes = DataSizes.of(manifest.data, manifest.stream)
        return cls(manifest.model, sizes, programs, run, open_tables(folder, manifest))

    @torch.inference_mode()
    def answer(self, batch: Batch) -> Answer:
        """Predict the targets of a batch.

        Args:
            batch: the targets and their histories, with all features that the model uses; fastest of one user.

        Raises:
            UserError: the batch lacks a sequence or a feature, has ids that the tables do not have or windows longer
                than N; or rows differ from their checksum.
        """
        check_bounds(batch, self.sizes)
        branches = list(starmap(Branch, self._search(batch).items()))
        for sequence, count in self.settings.recent.items():
            branches.append(Branch(sequence, Selection.latest(batch.histories[sequence], count)))
        outputs = self._dense(batch, branches)
        tasks = len(outputs) - len(branches)
        return Answer(tuple(outputs[:tasks]), tuple(branches), tuple(outputs[tasks:]))

    def _search(self, batch: Batch) -> Mapping[str, Selection]:
        retrieved, kind = self.settings.retrieved, self._programs.search
        if kind == "none":
            return {sequence: Selection.everything(batch.histories[sequence]) for sequence in retrieved}
        if kind == "latest":
            return latest(batch, retrieved)
        if kind in ("category", "category_filled"):
            return search_by_category(batch, retrieved, self.sizes.lengths, filled=kind == "category_filled")
        rows = self._local_rows(batch, in_place=kind == "dot_product")
        if kind == "score":
            return search_by_score(rows, self._score, retrieved)
        if kind == "signature":
            return search_by_signature(rows, lambda rows_XD: self._run["signature"]([rows_XD])[0], retrieved)
        return search_by_dot_product(rows, self._queries, retrieved, self._log_counts if kind == "clusters" else None)

    def _local_rows(self, batch: Batch, *, in_place: bool) -> LocalRows:
        """The rows that a search reads; ``in_place``: items' where they lie, whatever their precision."""
        target_set, history_set = self._roles.target_attention, self._roles.history_attention
        features, scale_R = self._sides.inherent_of(scored=True), None
        targets = [self._rows.inherent(target_set, feature, batch.column(feature), batch) for feature in features]
        behaviors: dict[str, dict[Feature, IndexedRows]] = {}
        for sequence in self.settings.retrieved:
            history, found = batch.histories[sequence], dict[Feature, IndexedRows]()
            for feature in features:
                column_M = history.column(feature)
                if feature == "item" and in_place:
                    table = self._rows.table(history_set, feature, search=True)
                    table.check(column_M)
                    found[feature], scale_R = IndexedRows(table.table_RD, column_M), table.scale_R
                else:
                    # Equal values once: a category has many behaviours.
                    value_L, index_M = (
                        (column_M, torch.arange(len(column_M)))
                        if feature == "item"
                        else column_M.unique(return_inverse=True)
                    )
                    rows_Ld = self._rows.inherent(history_set, feature, value_L, batch, search=True)
                    found[feature] = IndexedRows(_at_least_one(rows_Ld), index_M)
            behaviors[sequence] = found
        cross = self._rows.cross[target_set], self._rows.cross[history_set]
        target_TD = torch.cat(targets, dim=1)
        return LocalRows.of(batch, self.sizes.lengths, self._sides, target_TD, behaviors, *cross, scale_R)

    def _log_counts(self, rows_Md: Tensor, history: History) -> Tensor:
        """The weights of clusters (`embeddings.search.local.ClusterWeights`); windows that are all alike share them."""
        size, targets = self.settings.cluster_size, len(history.start_T)
        one = replace(history, start_T=history.start_T[:1], end_T=history.end_T[:1])
        if targets > 1 and bool((history.start_T == one.start_T).all() & (history.end_T == one.end_T).all()):
            return log_counts(rows_Md, one, size).repeat(targets)
        return log_counts(rows_Md, history, size)

    def _dense(self, batch: Batch, branches: list[Branch]) -> list[Tensor]:
        program = self._programs.programs["dense"]
        inputs = self._rows.dense_inputs(batch, branches)
        tensors = [inputs[name] for name in program.inputs]
        targets = len(batch)
        if self._programs.search != "none":
            return self._run["dense"](tensors)
        # The rows of whole histories, target by target, may be too much for the memory.
        longest = max(1, *(branch.chosen.index_TK.shape[1] for branch in branches))
        of_targets = [not name.startswith(("behaviors.", "cross.")) for name in program.inputs]
        floats = longest * sum(tensor.shape[-1] for tensor, cut in zip(tensors, of_targets, strict=True) if not cut)
        chunk = max(2, CHUNK_FLOATS // max(1, floats))
        if targets <= chunk:
            return self._run["dense"](tensors)
        parts = []
        for first in range(0, targets, chunk):
            part = [
                tensor[first : first + chunk] if cut else tensor
                for tensor, cut in zip(tensors, of_targets, strict=True)
            ]
            parts.append(self._run["dense"](part))
        return [torch.cat(outputs) for outputs in zip(*parts, strict=True)]


class _Queries:
    """The queries of a search by a dot product; see `embeddings.search.local.Queries`."""

    def __init__(self, run: Mapping[ProgramName, Runs], cross: tuple[Feature, ...]) -> None:
        self._run, self._cross = run, cross

    def queries(self, target: Rows) -> Rows:
        parts = [target.inherent, *(target.cross[feature] for feature in self._cross)]
        inherent, *cross = self._run["queries"]([part.contiguous() for part in parts])
        return Rows(inherent, dict(zip(self._cross, cross, strict=True)))


class _Score:
    """A score of pairs; takes rows of C targets (C, ...) and of N behaviours of each (C, N, ...)."""

    def __init__(self, run: Mapping[ProgramName, Runs], cross: tuple[Feature, ...]) -> None:
        self._run, self._cross = run, cross

    def __call__(self, target: Rows, behaviors: Rows) -> Tensor:
        parts = [
            part
            for rows in (target, behaviors)
            for part in (rows.inherent, *(rows.cross[feature] for feature in self._cross))
        ]
        return self._run["score"]([part.contiguous() for part in parts])[0]


def _at_least_one(rows_Ld: Tensor) -> Tensor:
    """A row of zeros where there is none, which padding may name."""
    return rows_Ld if len(rows_Ld) else rows_Ld.new_zeros(1, rows_Ld.shape[1])

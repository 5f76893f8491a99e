"""Time to answer a request: an exported model against the same model in eager torch, gather + bmm + topk.

A request is one user's history of N behaviours and T candidates.

T = targets, N = behaviours, K = kept, R = rows of a table, D = dim, C = targets of a chunk, X = rows that are written.
"""

import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from embeddings.batch import Batch, Branch, History, Selection
from embeddings.features import Rows
from embeddings.initialization import initialize
from embeddings.models import build_model
from embeddings.sizes import DataSizes
from pipeline.export.dense import DensePart, parts_of, write_programs
from pipeline.export.export import served_tables
from pipeline.export.rows import Stored, in_precision, write_rows
from pipeline.serve.inputs import RequestRows
from pipeline.serve.model import ServedModel
from pipeline.serve.program import Graph, Runs, load_compiled
from pipeline.serve.rows import StoredRows, TableKey, open_tables
from schemas.errors import UserError
from schemas.model import ModelSettings, TableSet
from schemas.programs import ProgramName
from schemas.served import RowPrecision, ServedManifest, ServedTable

MODELS = ("dare", "twin")
CATEGORIES = 300
CANDIDATES = 500
GATHERED_BYTES = 512 << 20
"""Eager torch writes the gathered rows; as many candidates at a time as this allows."""
DISTINCT_ROWS = 1 << 16
"""Rows of the table repeat after so many: they differ in place, which counts here, and are quickly made."""
USERS = 8
"""Requests are of so many users in turn, so that a history is not in the processor's caches because it was the last."""


@dataclass(frozen=True)
class Case:
    """What is exported, and how long histories are."""

    model: str
    attention_dim: int
    rows: RowPrecision
    """Of items' rows that the search reads; those that are represented alone stay float32."""
    length: int
    """N."""

    def __post_init__(self) -> None:
        for name, allowed in (("model", MODELS), ("rows", get_args(RowPrecision))):
            if getattr(self, name) not in allowed:
                raise UserError(f"--{name}: must be one of {', '.join(allowed)} (not {getattr(self, name)})")


@dataclass(frozen=True)
class ServeFigures:
    """What one case gives."""

    model: str
    length: int
    candidates: int
    attention_dim: int
    rows: RowPrecision
    retrieved: int
    threads: int
    p50_ms: float
    p99_ms: float
    eager_ms: float
    """The shortest of the rounds."""
    vs_eager: float
    """Time of eager torch over ours, p50."""
    search_ms: float
    """Of the p50, the search."""
    same: bool
    """Whether eager torch, on the same rows as floats, gives the same logits."""
    auc_loss: float | None
    """Test AUC of a K_A of 128 less that of this one, the mean over seeds; None: no experiment was given."""


def measure(
    cases: Sequence[Case],
    table_rows: int,
    retrieved: int,
    requests: int,
    rounds: int,
    experiment: Path | None = None,
) -> Iterator[ServeFigures]:
    """Measure cases; those with equal tables should stand together.

    Args:
        cases: what to measure.
        table_rows: rows of the item tables.
        retrieved: K.
        requests: requests of each timing of ours.
        rounds: repetitions of the timing of eager torch.
        experiment: folder of `dare experiment attention-dims-completejourney`.
    """
    logging.getLogger("torch.__trace").propagate = False
    losses = auc_losses(experiment) if experiment else {}
    for case in cases:
        print(f"{case}: {table_rows:,} rows", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="dare-serve-") as folder:
            setup = _Setup(case, table_rows, retrieved, Path(folder))
            yield setup.figures(requests, rounds, losses.get((case.model, case.attention_dim)))


def settings_of(case: Case, retrieved: int) -> ModelSettings:
    """Settings of a case's model: K_R is 128, or for TWIN, which has one size for both uses, K_A."""
    represented = case.attention_dim if case.model == "twin" else 128
    return ModelSettings(
        name=case.model,
        attention=TableSet(dim=case.attention_dim),
        representation=TableSet(dim=represented),
        retrieved={"history": retrieved},
    )


class _Setup:
    """A case's exported model, whose tables are files of a folder, and requests."""

    def __init__(self, case: Case, table_rows: int, retrieved: int, folder: Path) -> None:
        self.case, self._settings = case, settings_of(case, retrieved)
        self._sizes = DataSizes.counted(table_rows - 1, CATEGORIES, {"history": case.length})
        # Its own item tables are small: those of the files are in their place.
        small = build_model(self._settings, DataSizes.counted(1, CATEGORIES, {"history": case.length})).eval()
        initialize(small, 1)
        with torch.no_grad():
            # First weights are so small that all candidates would have the same logits.
            for weight in small.parameters():
                weight.mul_(10)
        dense = {name: value for name, value in small.state_dict().items() if "embedding_bags" not in name}
        self._modules, _ = parts_of(self._settings, self._sizes, dense)
        programs = write_programs(self._settings, self._sizes, dense, folder)
        run: dict[ProgramName, Runs] = {
            name: load_compiled(folder / program.compiled)
            if program.compiled
            else Graph(folder / program.path, program)
            for name, program in programs.programs.items()
        }
        specs = build_model(self._settings, self._sizes, torch.device("meta")).tables.specs.values()
        tables = served_tables([*specs], programs, "fp32", case.rows)
        files = [file for table in tables for file in write_rows(folder, table, _random_rows(table))]
        # What tables ask of a manifest; the rest of it says what raw values mean.
        known: dict[str, Any] = {"tables": tables, "files": tuple(files)}
        manifest = ServedManifest.model_construct(**known)
        self._tables: Mapping[TableKey, StoredRows] = open_tables(folder, manifest)
        for stored in self._tables.values():
            # Read once before any timing, so that no disk is waited for.
            stored.verify()
        self._served = ServedModel(self._settings, self._sizes, programs, run, self._tables)
        self._requests = [_request(user, table_rows, case.length) for user in range(USERS)]

    def figures(self, requests: int, rounds: int, auc_loss: float | None) -> ServeFigures:
        eager = _Eager(self._served, self._modules, self._tables)
        same = all(
            torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)
            for batch in self._requests[:2]
            for ours, theirs in zip(self._served.answer(batch).logits, eager.logits(batch), strict=False)
        )
        # In turns, so that both sides meet the same machine.
        ours, searches, theirs = list[float](), list[float](), list[float]()
        for number in range(rounds):
            theirs.append(_milliseconds(lambda: eager.logits(self._requests[0])))
            for request in range(-(-requests // rounds)):
                batch = self._requests[(request + number) % USERS]
                ours.append(_milliseconds(lambda batch=batch: self._served.answer(batch)))  # type: ignore[misc]
                searches.append(_milliseconds(lambda batch=batch: self._search(batch)))  # type: ignore[misc]
        p50, p99 = np.percentile(ours, [50, 99]).tolist()
        print(f"  ours {p50:.2f} ms, p99 {p99:.2f}; eager torch {min(theirs):.1f} ms", file=sys.stderr, flush=True)
        return ServeFigures(
            model=self.case.model,
            length=self.case.length,
            candidates=CANDIDATES,
            attention_dim=self.case.attention_dim,
            rows=self.case.rows,
            retrieved=self._settings.retrieved["history"],
            threads=torch.get_num_threads(),
            p50_ms=round(p50, 2),
            p99_ms=round(p99, 2),
            eager_ms=round(min(theirs), 1),
            vs_eager=round(min(theirs) / p50, 1),
            search_ms=round(float(np.median(searches)), 2),
            same=same,
            auc_loss=auc_loss,
        )

    @torch.inference_mode()
    def _search(self, batch: Batch) -> object:
        return self._served._search(batch)


class _Eager:
    """The same model as one would write it in torch: every candidate's N rows side by side, a product, `topk`."""

    def __init__(
        self, served: ServedModel, modules: Mapping[ProgramName, nn.Module], tables: Mapping[TableKey, StoredRows]
    ) -> None:
        dense = modules["dense"]
        assert isinstance(dense, DensePart)
        self._dense, self._queries = dense, modules["queries"]
        self._rows = RequestRows(dense.used, tables)
        self._served, self._set = served, dense.used.roles.history_attention
        # As floats: torch has no product of int8 and float32 rows.
        self._tables = {feature: self._floats(feature) for feature in ("item", "category")}

    def _floats(self, feature: str) -> Tensor:
        stored = self._rows.table(self._set, feature, search=True)
        return torch.cat([stored.rows(part) for part in torch.arange(len(stored)).split(1 << 18)])

    @torch.inference_mode()
    def logits(self, batch: Batch) -> list[Tensor]:
        """The logits of each task, (T,)."""
        branches = [Branch("history", self._search(batch))]
        inputs = self._rows.dense_inputs(batch, branches)
        outputs: tuple[Tensor, ...] = self._dense(*(inputs[name] for name in self._dense.shapes))
        return list(outputs[:-1])

    def _search(self, batch: Batch) -> Selection:
        history = batch.histories["history"]
        target = self._rows.used.roles.target_attention
        rows_Td = [self._rows.inherent(target, name, batch.column(name), batch) for name in ("item", "category")]
        position_Rd = self._rows.cross[target]["history"]["position"]
        parts = self._queries(torch.cat(rows_Td, dim=1), position_Rd[:1])
        queries = Rows(parts[0], {"position": parts[1]})
        of_item, of_category = queries.inherent.split([part.shape[1] for part in rows_Td], dim=1)
        count = len(history.item_M)
        position_N = count - torch.arange(count)
        of_position_N = self._rows.cross[self._set]["history"]["position"][position_N] @ queries.cross["position"][0]
        dim = of_item.shape[1] + of_category.shape[1]
        chunk = max(1, GATHERED_BYTES // max(1, 4 * count * dim))
        columns = list[Tensor]()
        for item_CD, category_CD in zip(of_item.split(chunk), of_category.split(chunk), strict=True):
            score_CN = of_position_N.repeat(len(item_CD), 1)
            for feature, query_CD in (("item", item_CD), ("category", category_CD)):
                column_CN = history.column(feature).expand(len(item_CD), -1)
                rows_CND = self._tables[feature].index_select(0, column_CN.flatten()).view(*column_CN.shape, -1)
                score_CN += torch.bmm(rows_CND, query_CD.unsqueeze(2)).squeeze(2)
            columns.append(score_CN.topk(min(count, self._served.settings.retrieved["history"])).indices)
        index_TK = torch.cat(columns)
        return Selection(index_TK, torch.ones_like(index_TK, dtype=torch.bool))


def _random_rows(table: ServedTable) -> Iterator[Stored]:
    """Rows of a table, drawn by its name, which repeat after `DISTINCT_ROWS`."""
    generator = torch.Generator().manual_seed(len(table.name))
    # Whole blocks, as they are written.
    distinct = -(-DISTINCT_ROWS // table.block_rows) * table.block_rows
    stored_XD, scale_X = in_precision(torch.randn(distinct, table.dim, generator=generator), table.precision)
    for first in range(0, table.rows, distinct):
        rows = min(distinct, table.rows - first)
        yield stored_XD[:rows], None if scale_X is None else scale_X[:rows]


def _request(user: int, table_rows: int, length: int) -> Batch:
    """A request: behaviours and candidates of any items."""
    generator = torch.Generator().manual_seed(user)

    def ids(count: int, values: int) -> Tensor:
        return torch.randint(1, values, (count,), generator=generator, dtype=torch.int32)

    history = History(
        item_M=ids(length, table_rows),
        timestamp_M=torch.arange(length),
        features_M={"category": ids(length, CATEGORIES)},
        offset_U=torch.tensor([0, length]),
        start_T=torch.zeros(CANDIDATES, dtype=torch.int64),
        end_T=torch.full((CANDIDATES,), length),
    )
    return Batch(
        histories={"history": history},
        user_T=torch.zeros(CANDIDATES, dtype=torch.int64),
        user_id_U=torch.tensor([user]),
        item_T=ids(CANDIDATES, table_rows),
        timestamp_T=torch.full((CANDIDATES,), length),
        features_T={"category": ids(CANDIDATES, CATEGORIES)},
        labels_T={},
        origin="a request",
    )


def auc_losses(experiment: Path) -> dict[tuple[str, int], float]:
    """By model and K_A: test AUC of K_A 128 less that of this K_A, the mean over seeds.

    Args:
        experiment: folder of `dare experiment attention-dims-completejourney`.

    Raises:
        UserError: it has no results, or none of K_A 128.
    """
    # Loaded by those alone who have an experiment.
    from pyarrow.parquet import read_table

    path = experiment / "results.parquet"
    if not path.is_file():
        raise UserError(f"{path} is missing; run `dare experiment attention-dims-completejourney --out {experiment}`")
    aucs = dict[tuple[str, int], dict[int, float]]()
    for line in read_table(path).to_pylist():
        *_, dim = line["label"].rstrip(")").replace("(", " ").split()
        if line["auc"] is not None and dim.isdigit():
            aucs.setdefault((line["model"], int(dim)), {})[line["seed"]] = line["auc"]
    losses = {}
    for (model, dim), of_seeds in aucs.items():
        whole = aucs.get((model, 128), {})
        shared = sorted(whole.keys() & of_seeds.keys())
        if shared:
            losses[model, dim] = round(fmean(whole[seed] - of_seeds[seed] for seed in shared), 5)
    return losses


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3

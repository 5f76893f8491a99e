"""Small models of the family as they are answered with: their programs, and rows that are held in memory."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from embeddings.batch import Batch
from embeddings.model import CtrModel
from embeddings.sizes import DataSizes
from pipeline.export.dense import parts_of, write_programs
from pipeline.serve.model import ServedModel
from pipeline.serve.program import Graph, load_compiled
from pipeline.serve.rows import TableKey
from schemas.programs import Program
from tests.toy_model import sizes_of

# It tells each step of an export, and pytest would keep all that is told.
logging.getLogger("torch.__trace").propagate = False


@dataclass
class HeldRows:
    """What `pipeline.serve.rows.StoredRows` is to its readers."""

    table_RD: Tensor
    scale_R: Tensor | None = None

    def rows(self, id_X: Tensor) -> Tensor:
        rows = self.table_RD.index_select(0, id_X.flatten()).float()
        if self.scale_R is not None:
            rows *= self.scale_R.index_select(0, id_X.flatten())[:, None]
        return rows.view(*id_X.shape, self.table_RD.shape[1])

    def all_rows(self) -> Tensor:
        return self.rows(torch.arange(len(self.table_RD)))

    def check(self, id_X: Tensor) -> None:
        assert not len(id_X) or 0 <= int(id_X.min()) <= int(id_X.max()) < len(self.table_RD)


def quantized(rows_RD: Tensor) -> HeldRows:
    """Rows as int8, each with a scale of its own."""
    scale_R = rows_RD.abs().amax(1) / 127
    return HeldRows((rows_RD / scale_R.clamp(min=1e-30)[:, None]).round().to(torch.int8), scale_R)


def tables_of(model: CtrModel) -> dict[TableKey, HeldRows]:
    """All rows of a model that is not sharded."""
    return {
        TableKey(spec.set, spec.feature, spec.sequence): HeldRows(rows.detach().clone())
        for spec, rows in model.tables.weights()
    }


def dense_state(model: CtrModel) -> dict[str, Tensor]:
    """All that is no table."""
    return {name: value for name, value in model.state_dict().items() if "embedding_bags" not in name}


def served(
    model: CtrModel, tables: dict[TableKey, HeldRows] | None = None, sizes: DataSizes | None = None
) -> ServedModel:
    """A model as it answers, whose programs are the modules that would be exported."""
    sizes = sizes or sizes_of(model.settings)
    modules, record = parts_of(model.settings, sizes, dense_state(model))
    programs = {
        name: Program(path=f"{name}.pt2", inputs=tuple(module.shapes), outputs=()) for name, module in modules.items()
    }
    record = record.model_copy(update={"programs": programs})

    def runs(module: torch.nn.Module):
        return lambda tensors: list(module(*tensors))

    run = {name: runs(module) for name, module in modules.items()}
    return ServedModel(model.settings, sizes, record, run, tables or tables_of(model))


def exported(model: CtrModel, folder: Path, *, compile: bool = False) -> ServedModel:
    """A model as it answers, whose programs were written and read."""
    sizes = sizes_of(model.settings)
    record = write_programs(model.settings, sizes, dense_state(model), folder, compile=compile)
    assert not compile or record.compiled_for is not None, record.why_not_compiled
    run = {
        name: load_compiled(folder / program.compiled) if compile else Graph(folder / program.path, program)
        for name, program in record.programs.items()
    }
    return ServedModel(model.settings, sizes, record, run, tables_of(model))


def of_one_user(batch: Batch) -> Batch:
    """The batch as a request: all targets are the first user's, with windows of the same history."""
    histories = {}
    for name, history in batch.histories.items():
        first, end = int(history.offset_U[0]), int(history.offset_U[1])
        length = int((history.end_T - history.start_T).max()) if len(batch) else 0
        end_T = torch.full_like(history.end_T, end)
        histories[name] = replace(history, start_T=(end_T - length).clamp(min=first), end_T=end_T)
    return replace(batch, histories=histories, user_T=torch.zeros_like(batch.user_T))

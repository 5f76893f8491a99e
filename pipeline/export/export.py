"""`dare export`: makes a folder of a run's checkpoint that answers requests by itself."""

import hashlib
import logging
from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from embeddings.models import build_model
from embeddings.sizes import DataSizes
from embeddings.tables.specs import TableSpec
from pipeline.evaluate.open_run import choose_checkpoint
from pipeline.export.data_files import write_data_files
from pipeline.export.dense import write_programs
from pipeline.export.rows import Stored, in_precision, write_rows
from pipeline.files import link_or_copy, output_folder
from pipeline.progress import stage
from pipeline.runs.checkpoint import Base, Checkpoint
from pipeline.runs.checkpoint_files import refuse_differences
from pipeline.runs.run_folder import RunFolder
from pipeline.runs.stored_tables import StoredTables
from pipeline.serve.rows import StoredRows
from pipeline.stream.data_set import DataSet
from schemas.errors import UserError
from schemas.manifest import File
from schemas.model import ModelSettings
from schemas.programs import Programs
from schemas.served import (
    FORMAT_VERSION,
    MODEL,
    ROW_BYTES,
    RowPrecision,
    ServedManifest,
    ServedStream,
    ServedTable,
    block_rows,
    file_of,
)
from schemas.train import TrainSettings

CONTENTS = (MODEL, "rows", "dictionaries", "*.arrow", "*.pt2")
"""Names in an exported model's folder."""
WINDOW_BYTES = 16 << 20
"""Bytes of a table, as float32, that are in memory at a time, about."""

SEARCH = "-search"
"""What the name of a copy for the search ends with."""
SEARCHES_WITHOUT_ROWS = ("category", "category_filled", "latest", "none")

_LOGGER = logging.getLogger("dare.export")


def export_run(
    folder: Path,
    out: Path,
    which: str = "best",
    data: Path | None = None,
    *,
    rows: RowPrecision = "fp32",
    attention_rows: RowPrecision | None = None,
    overwrite: bool = False,
    compile: bool = True,
) -> ServedManifest:
    """Export a checkpoint of a run.

    Args:
        folder: of the run.
        out: folder that appears when it is whole.
        which: ``best`` or ``last`` checkpoint, or its step.
        data: folder of the data set; None: the one that the run was trained on.
        rows: precision of the rows of items that the prediction reads.
        attention_rows: precision of those that the search reads; None: as ``rows``.
        overwrite: whether it may take the place of an exported model in ``out``.
        compile: make machine code of the programs, where a compiler is at hand.

    Returns:
        The manifest that was written.

    Raises:
        UserError: run, checkpoint, data and output do not fit each other, or a row is not finite.
        OSError: the disk is full or broken.
    """
    run = RunFolder(folder)
    settings, checkpoint = run.settings(), choose_checkpoint(run, which)
    if which == "best" and checkpoint.score is None:
        _LOGGER.info("%s: no checkpoint is the best; the last one is taken, of step %d", folder, checkpoint.step)
    data_set = DataSet.open(data or run.data_set())
    if not run.has_dictionaries(data_set.folder, data_set.fingerprint, data_set.dictionaries()):
        raise UserError(
            f"{data_set.folder} has other dictionaries than {folder} was trained with: it has changed since, or is "
            "another one; put the data set of the run back, or name it by --data"
        )
    stored, sizes = StoredTables(checkpoint.path), DataSizes.of(data_set.manifest, settings.stream)
    specs = _specs(settings.model, sizes, checkpoint, stored)
    attention_rows = attention_rows or rows
    with output_folder(out, CONTENTS, overwrite=overwrite) as partial:
        programs = write_programs(settings.model, sizes, stored.dense(), partial, compile=compile)
        tables = served_tables(specs, programs, rows, attention_rows)
        of_rows = []
        with stage("write rows", len(tables), "tables") as progress:
            for table in tables:
                of_rows += write_rows(partial, table, _windows(stored, table))
                progress.advance()
        with stage("write dictionaries and features of items"):
            told, of_data = write_data_files(partial, data_set, _read_features(settings, programs))
        manifest = ServedManifest(
            version=_version(checkpoint, rows, attention_rows),
            run=folder.absolute().name,
            step=checkpoint.step,
            record_sha256=_record_sha256(checkpoint),
            rows=rows,
            attention_rows=attention_rows,
            model=settings.model,
            stream=ServedStream(history_length=settings.stream.history_length, sequences=settings.stream.sequences),
            data=told,
            tables=tables,
            programs=programs,
            files=_in_order([*of_rows, *of_data, *_program_files(partial, programs)]),
        )
        manifest.write(partial)
    return manifest


def export_delta(
    folder: Path, out: Path, which: str, full: Path, *, overwrite: bool = False, compile: bool = True
) -> ServedManifest:
    """Export a delta checkpoint of a run by what has changed since the full one that it stands on.

    Files that are equal are the same files, with a second name; nothing is written into those of ``full``. What comes
    out is, file by file, what `export_run` makes of the delta in the precisions of ``full``.

    Args:
        folder: of the run.
        out: folder that appears when it is whole.
        which: ``best`` or ``last`` checkpoint, or its step; it must be a delta.
        full: the exported model of the full checkpoint that the delta stands on.
        overwrite: whether it may take the place of an exported model in ``out``.
        compile: make machine code of the programs, where a compiler is at hand.

    Returns:
        The manifest that was written.

    Raises:
        UserError: run, checkpoint, ``full`` and output do not fit each other, or a row is not finite.
        OSError: the disk is full or broken.
    """
    run, base = RunFolder(folder), ServedManifest.read(full)
    # Tables of the full checkpoint are not read, and not verified: those of ``full`` are in their place.
    checkpoint = choose_checkpoint(run, which, alone=True)
    if checkpoint.base is None:
        raise UserError(f"{checkpoint.path} is a full checkpoint, no delta; export it without --delta")
    if checkpoint.base.record_sha256 != base.record_sha256:
        raise UserError(
            f"--delta {full} is step {base.step} of run {base.run}, not the full checkpoint of step "
            f"{checkpoint.base.step} that {checkpoint.path} stands on; name that one's export, or leave --delta out"
        )
    stored = StoredTables(checkpoint.path)
    with output_folder(out, CONTENTS, overwrite=overwrite) as partial:
        sizes = DataSizes.of(base.data, base.stream)
        programs = write_programs(base.model, sizes, stored.dense(), partial, compile=compile)
        files = _program_files(partial, programs)
        changed = [table for table in base.tables if stored.changed(_source(table))]
        with stage("write rows", len(changed), "tables") as progress:
            for table in changed:
                files += write_rows(partial, table, _changed_windows(StoredRows(full, base, table), stored))
                progress.advance()
        anew = {file.path for file in files} | set(_program_names(base.programs))
        for file in base.files:
            if file.path not in anew:
                file_of(partial, file.path).parent.mkdir(exist_ok=True)
                link_or_copy(file_of(full, file.path), file_of(partial, file.path))
                files.append(file)
        manifest = base.model_copy(
            update={
                "version": _version(checkpoint, base.rows, base.attention_rows),
                "run": folder.absolute().name,
                "step": checkpoint.step,
                "record_sha256": _record_sha256(checkpoint),
                "programs": programs,
                "files": _in_order(files),
            }
        )
        manifest.write(partial)
    return manifest


def served_tables(
    specs: Collection[TableSpec], programs: Programs, rows: RowPrecision, attention_rows: RowPrecision
) -> tuple[ServedTable, ...]:
    """What tables an exported model has, and in which precision.

    Rows of items are in ``attention_rows`` where attention alone reads them, else in ``rows``; where the search reads
    rows that are represented as well, and is to read coarser ones, it has a copy of its own. Small tables stay float32:
    those of cross and context features, and those that training gathers whole.

    Raises:
        UserError: ``attention_rows`` is without effect.
    """
    represented = {programs.target_representation, programs.history_representation}
    tables = []
    for spec in specs:
        coarse = spec.inherent and not spec.gathered
        searched = spec.set == programs.history_attention and programs.search not in SEARCHES_WITHOUT_ROWS
        precision = (rows if spec.set in represented else attention_rows) if coarse else "fp32"
        tables.append(_table(spec, precision))
        if coarse and spec.set in represented and searched and attention_rows != rows:
            tables.append(_table(spec, attention_rows, search=True))
    if attention_rows != rows and not any(
        table.precision == attention_rows for table in tables if table.kind == "inherent"
    ):
        raise UserError(
            f"--attention-rows {attention_rows}: this model shares the rows of attention and representation, and its "
            f"search ({programs.search}) reads none; leave it out, or choose --rows"
        )
    return tuple(tables)


def _table(spec: TableSpec, precision: RowPrecision, *, search: bool = False) -> ServedTable:
    return ServedTable(
        name=f"{spec.name}{SEARCH}" if search else spec.name,
        kind=spec.kind,
        set=spec.set,
        feature=spec.feature,
        sequence=spec.sequence,
        search=search,
        rows=spec.rows,
        dim=spec.dim,
        precision=precision,
        block_rows=block_rows(spec.dim * ROW_BYTES[precision]),
    )


def _source(table: ServedTable) -> str:
    """Name of the table of the checkpoint whose rows a table has."""
    return table.name.removesuffix(SEARCH) if table.search else table.name


def _specs(settings: ModelSettings, sizes: DataSizes, checkpoint: Checkpoint, stored: StoredTables) -> list[TableSpec]:
    """The tables of a model, which must be those of its checkpoint."""
    # On this device a model has shapes alone.
    specs = list(build_model(settings, sizes, torch.device("meta")).tables.specs.values())
    refuse_differences(checkpoint.path, stored.shapes, {spec.name: (spec.rows, spec.dim) for spec in specs})
    return specs


def _read_features(settings: TrainSettings, programs: Programs) -> set[str]:
    """Names of the features that answers need."""
    conditions = (sequence.conditions for sequence in (settings.stream.sequences or {}).values())
    by_category = {"category"} if programs.search in ("category", "category_filled") else set()
    return {*settings.model.feature_names, *by_category}.union(*conditions)


def _window(table: ServedTable) -> int:
    """Rows of a table that are in memory at a time: whole blocks."""
    blocks = WINDOW_BYTES // (4 * table.dim * table.block_rows)
    return max(1, blocks) * table.block_rows


def _windows(stored: StoredTables, table: ServedTable) -> Iterator[Stored]:
    for rows_XD in stored.rows(_source(table), _window(table)):
        yield in_precision(rows_XD, table.precision)


def _changed_windows(base: StoredRows, stored: StoredTables) -> Iterator[Stored]:
    """Rows of an exported table, as they are stored, with those that a delta has in their places."""
    table, count = base.table, _window(base.table)
    firsts = range(0, table.rows, count)
    for first, changes in zip(firsts, stored.changes(_source(table), count), strict=True):
        last = min(first + count, table.rows)
        base.check(torch.arange(first, last, table.block_rows))
        rows_XD = base.table_RD[first:last].clone()
        scale_X = None if base.scale_R is None else base.scale_R[first:last].clone()
        for row_N, values in changes:
            changed_ND, scale_N = in_precision(values, table.precision)
            rows_XD[row_N] = changed_ND
            if scale_X is not None and scale_N is not None:
                scale_X[row_N] = scale_N
        yield rows_XD, scale_X


def _version(checkpoint: Checkpoint, rows: RowPrecision, attention_rows: RowPrecision) -> str:
    """Names a model: the same for equal checkpoints in equal precisions."""
    named = f"{FORMAT_VERSION} {_record_sha256(checkpoint)} {rows} {attention_rows}"
    return hashlib.sha256(named.encode()).hexdigest()[:12]


def _record_sha256(checkpoint: Checkpoint) -> str:
    return Base.of(checkpoint).record_sha256


def _program_names(programs: Programs) -> list[str]:
    return [name for program in programs.programs.values() for name in (program.path, program.compiled) if name]


def _program_files(folder: Path, programs: Programs) -> list[File]:
    return [File.of(folder / name) for name in _program_names(programs)]


def _in_order(files: Collection[File]) -> tuple[File, ...]:
    return tuple(sorted(files, key=lambda file: file.path))

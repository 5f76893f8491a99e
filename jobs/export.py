"""`dare export`: a folder of a checkpoint that answers requests, and its check."""

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from jobs.options import CheckpointOfRun, DataOfRun, Json, Overwrite
from pipeline.errors import printable

if TYPE_CHECKING:
    from schemas.served import ServedManifest

Precision = Literal["fp32", "bf16", "int8"]


def export(
    run: Annotated[Path | None, typer.Option(help="Folder of a run that `dare train` wrote.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the model; appears when it is whole.")] = None,
    checkpoint: CheckpointOfRun = "best",
    data: DataOfRun = None,
    rows: Annotated[Precision | None, typer.Option(help="Precision of the rows of items; fp32 if not given.")] = None,
    attention_rows: Annotated[
        Precision | None, typer.Option(help="Precision of those that the search reads; that of --rows if not given.")
    ] = None,
    delta: Annotated[
        Path | None,
        typer.Option(
            help="The checkpoint is a delta, and this the export of the full one: share what has not changed."
        ),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(help="Compare all files of an exported model with their checksums, and do nothing else."),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Make a folder of a run's checkpoint that answers requests: tables, dictionaries and programs."""
    from schemas.errors import UserError

    if check is not None:
        if run is not None or out is not None:
            raise UserError("--check names the exported model and stands alone; leave --run and --out out")
        # Without torch: a folder is checked wherever it is copied to.
        from schemas.served import ServedManifest

        manifest = ServedManifest.read(check)
        manifest.verify(check)
        _tell(check, manifest, "whole", json=json)
        return
    if run is None or out is None:
        raise UserError("--run names a run's folder and --out that of the model; or --check one to verify")
    if delta is not None and (rows is not None or attention_rows is not None or data is not None):
        raise UserError("--delta: data set and precisions are those of the full export; leave the other options out")

    import warnings

    # What torch says of its own insides.
    warnings.filterwarnings("ignore", category=FutureWarning)

    from pipeline.export.export import export_delta, export_run

    if delta is not None:
        manifest = export_delta(run, out, checkpoint, delta, overwrite=overwrite)
    else:
        manifest = export_run(
            run, out, checkpoint, data, rows=rows or "fp32", attention_rows=attention_rows, overwrite=overwrite
        )
    _tell(out, manifest, "exported", json=json)


def _tell(folder: Path, manifest: "ServedManifest", done: str, *, json: bool) -> None:
    by_precision: dict[str, list[int]] = {}
    for table in manifest.tables:
        by_precision.setdefault(table.precision, []).append(table.rows * table.row_bytes)
    tables = ", ".join(f"{len(of)} in {name} ({sum(of) / 2**20:,.1f} MiB)" for name, of in sorted(by_precision.items()))
    print(
        f"{printable(folder)}: {done}: {manifest.model.name}, step {manifest.step} of {printable(manifest.run)}, "
        f"version {manifest.version}; tables: {tables}"
    )
    if manifest.programs.why_not_compiled is not None:
        print(f"programs are not compiled: {printable(manifest.programs.why_not_compiled)}")
    if json:
        size = sum(file.bytes for file in manifest.files)
        print(dumps({"version": manifest.version, "step": manifest.step, "bytes": size, "files": len(manifest.files)}))

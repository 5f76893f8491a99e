"""Options that several commands of `dare` have."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Json = Annotated[bool, typer.Option("--json", help="End standard output with one JSON object.")]
Config = Annotated[list[Path] | None, typer.Option(help="YAML file of settings; repeatable.")]
DataSetFolder = Annotated[Path, typer.Argument(metavar="DIR", help="Data set that `dare prepare` wrote.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Take the place of what is in the folder.")]
TrainedRun = Annotated[Path, typer.Option(help="Folder of a run that `dare train` wrote.")]
PredictedSplit = Annotated[Literal["train", "validation", "test"], typer.Option(help="What to predict.")]
CheckpointOfRun = Annotated[str, typer.Option(help="Checkpoint of the run: best, last, or its step.")]
PlanFile = Annotated[
    Path | None, typer.Option(help="Sharding plan that `dare plan --save` wrote, for this number of processes.")
]
DataOfRun = Annotated[Path | None, typer.Option(help="Data set; if not given, the one of the run.")]

"""`dare evaluate`: the metrics of a checkpoint on a split."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def evaluate(
    run: Annotated[Path, typer.Option(help="Folder of a run that `dare train` wrote.")],
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="What to predict.")] = "test",
    checkpoint: Annotated[Literal["best", "last"], typer.Option(help="Which checkpoint of the run.")] = "best",
    data: Annotated[Path | None, typer.Option(help="Data set; if not given, the one of the run.")] = None,
    json: Annotated[bool, typer.Option("--json", help="End standard output with one JSON object.")] = False,
) -> None:
    """Compute AUC, GAUC, log loss and the like of a run's checkpoint."""
    import json as json_format

    import torch

    from jobs.ranks import first_rank, on_all_ranks
    from pipeline.evaluate import as_document, evaluate_run

    def work(device: torch.device) -> None:
        evaluation = evaluate_run(run, split, checkpoint, data, device)
        if first_rank():
            for name, value in vars(evaluation).items():
                print(f"{name:20} {value:,}" if isinstance(value, int) else f"{name:20} {value:.5f}")
            if json:
                print(json_format.dumps(as_document(evaluation)))

    on_all_ranks(work)

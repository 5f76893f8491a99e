"""`dare score`: the predictions of a checkpoint on a split, in Parquet."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def score(
    run: Annotated[Path, typer.Option(help="Folder of a run that `dare train` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for the predictions; appears when it is whole.")],
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="What to predict.")] = "test",
    checkpoint: Annotated[Literal["best", "last"], typer.Option(help="Which checkpoint of the run.")] = "best",
    data: Annotated[Path | None, typer.Option(help="Data set; if not given, the one of the run.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Take the place of what is in the folder.")] = False,
) -> None:
    """Write user, item, label and predicted probability of each target."""
    import torch

    from jobs.ranks import first_rank, on_all_ranks
    from pipeline.score import score_run

    def work(device: torch.device) -> None:
        samples = score_run(run, split, checkpoint, data, out, device, overwrite=overwrite)
        if first_rank():
            print(f"{out}: {samples:,} predictions")

    on_all_ranks(work)

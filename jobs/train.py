"""`dare train`: train a model, alone or under `python -m torch.distributed.run`."""

import gc
from pathlib import Path
from typing import Annotated

import typer


def train(
    data: Annotated[Path, typer.Option(help="Data set that `dare prepare` wrote.")],
    run: Annotated[Path, typer.Option(help="Folder of the run; if it has a checkpoint, training goes on from it.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, e.g. model=twin.")
    ] = None,
    config: Annotated[list[Path] | None, typer.Option(help="YAML file of settings; repeatable.")] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Sharding plan that `dare plan --save` wrote, for this number of processes.")
    ] = None,
    score: Annotated[
        Path | None, typer.Option(help="Folder for the best checkpoint's predictions of the test, as by `dare score`.")
    ] = None,
) -> None:
    """Train a model, validate it on the way, and test its best checkpoint."""
    from schemas.settings import load_settings
    from schemas.train import TrainSettings

    settings = load_settings(TrainSettings, config or [], overrides or [])

    import torch

    from jobs.ranks import first_rank, on_all_ranks
    from pipeline.score import score_run
    from pipeline.train.run import train as train_run

    def work(device: torch.device) -> None:
        test = train_run(settings, data, run, device, plan)
        if score is not None and test is not None:
            gc.collect()  # the model that was trained, before another one is made
            score_run(run, "test", "best", None, score, device, overwrite=True)
        if first_rank() and test is not None:
            metrics = [
                f"{shown} {'not defined' if test[name] is None else format(test[name], '.4f')}"
                for name, shown in (("auc", "AUC"), ("gauc", "GAUC"), ("log_loss", "log loss"))
            ]
            print(f"{run}: test of the best checkpoint, of step {test['checkpoint_step']}: {', '.join(metrics)}")

    on_all_ranks(work)

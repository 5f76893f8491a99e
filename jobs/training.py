"""Commands about a model: `dare train`, `dare evaluate` and `dare score`.

Each is one process, or one of several that a launcher such as torchrun starts. torch is imported within the commands,
so that `dare --help` and the commands that need no torch start at once.
"""

import gc
import math
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.options import CheckpointOfRun, Config, DataOfRun, Json, Overwrite, PlanFile, PredictedSplit, TrainedRun
from pipeline.errors import printable


def train(
    data: Annotated[Path, typer.Option(help="Data set that `dare prepare` wrote.")],
    run: Annotated[Path, typer.Option(help="Folder of the run; if it has a checkpoint, training goes on from it.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, e.g. model=twin.")
    ] = None,
    config: Config = None,
    plan: PlanFile = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Folder of a run on an earlier day of the data: begin on its last checkpoint, with new rows."
        ),
    ] = None,
    score: Annotated[
        Path | None, typer.Option(help="Folder for the best checkpoint's predictions of the test, as by `dare score`.")
    ] = None,
) -> None:
    """Train a model, validate it on the way, and test its best checkpoint."""
    from schemas.errors import UserError
    from schemas.manifest import Manifest
    from schemas.settings import load_settings
    from schemas.train import TrainSettings

    # Before torch is imported: a mistake in the settings is told at once.
    settings = load_settings(TrainSettings, config or [], overrides or [])
    if score is not None and not Manifest.read(data).counts.test.targets:
        raise UserError(f"--score {score}: {data} has no targets for a test; leave it out, and use `dare score`")

    import torch

    from jobs.ranks import on_all_ranks
    from pipeline.errors import INTERRUPTED, interrupts
    from pipeline.evaluate.score import score_run
    from pipeline.progress import first_rank
    from pipeline.runs.comparison import METRICS
    from pipeline.train.run import train as train_run

    def work(device: torch.device) -> int:
        test = train_run(settings, data, run, device, plan, source=source)
        if test is None and interrupts.asked and torch.distributed.get_world_size() == 1:
            # Of several ranks any other code than 0 would make a launcher start all of them again.
            return INTERRUPTED
        if score is not None and test is not None:
            gc.collect()  # the model that was trained, before another one is made
            score_run(run, "test", "best", None, score, device, overwrite=True)
        if first_rank() and test is not None:
            metrics = ", ".join(f"{shown} {_defined(test[name], 4)}" for name, shown in METRICS.items())
            print(f"{printable(run)}: test of {_tested(test)}: {metrics}")
            for task, of_task in test.get("tasks", {}).items():
                metrics = ", ".join(f"{shown} {_defined(of_task[name], 4)}" for name, shown in METRICS.items())
                print(f"  {task}: {metrics}")
        return 0

    on_all_ranks(work)


def _defined(value: float | None, digits: int) -> str:
    """A metric as text; one that is not defined is None or, before it is written, nan."""
    return "not defined" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _tested(test: dict[str, Any]) -> str:
    """Which checkpoint a test is of."""
    # Without "checkpoint": by a program that did not write it.
    which = test.get("checkpoint", "best")
    why = "" if which == "best" else " (none was the best: no validation's metric was defined)"
    return f"the {which} checkpoint, of step {test['checkpoint_step']}{why}"


def evaluate(
    run: TrainedRun,
    split: PredictedSplit = "test",
    checkpoint: CheckpointOfRun = "best",
    data: DataOfRun = None,
    plan: PlanFile = None,
    json: Json = False,
) -> None:
    """Compute AUC, GAUC, log loss and the like of a run's checkpoint."""
    import torch

    from jobs.ranks import on_all_ranks
    from pipeline.evaluate.evaluate import as_document
    from pipeline.evaluate.open_run import evaluate_run
    from pipeline.progress import first_rank

    def work(device: torch.device) -> None:
        evaluations = evaluate_run(run, split, checkpoint, data, device, plan)
        if first_rank():
            for task, evaluation in evaluations.items():
                if len(evaluations) > 1:
                    print(f"{task}:")
                for name, value in vars(evaluation).items():
                    print(f"{name:20} {f'{value:,}' if isinstance(value, int) else _defined(value, 5)}")
            if json:
                unknown = {} if evaluations.unknown is None else {"unknown": evaluations.unknown}
                print(dumps(as_document(evaluations) | unknown))

    on_all_ranks(work)


def score(
    run: TrainedRun,
    out: Annotated[Path, typer.Option(help="Folder for the predictions; appears when it is whole.")],
    split: PredictedSplit = "test",
    checkpoint: CheckpointOfRun = "best",
    data: DataOfRun = None,
    plan: PlanFile = None,
    impressions: Annotated[
        list[str] | None,
        typer.Option(help="Files that the data set's impressions came from: write their lines and columns again too."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write user, item, time, label and predicted probability of each target, and what finds it in its log."""
    import torch

    from jobs.ranks import on_all_ranks
    from pipeline.evaluate.score import score_run
    from pipeline.progress import first_rank

    def work(device: torch.device) -> None:
        files = tuple(impressions or ())
        samples = score_run(
            run, split, checkpoint, data, out, device, overwrite=overwrite, plan=plan, impressions=files
        )
        if first_rank():
            print(f"{printable(out)}: {samples:,} predictions")

    on_all_ranks(work)

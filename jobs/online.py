"""`dare online`: a model that learns day by day. One process, or one of several that a launcher starts."""

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from jobs.options import Json
from pipeline.errors import printable


def online(
    file: Annotated[Path, typer.Argument(help="Settings file: days, first, config, train, keep_days.")],
    run: Annotated[Path, typer.Option(help="Folder of the run; what is done in it is not done again.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, e.g. train.model.name=twin.")
    ] = None,
    follow: Annotated[Path | None, typer.Option(help="Folder in which to wait for data sets of further days.")] = None,
    json: Json = False,
) -> None:
    """Measure a model on each day's targets, then let it learn them."""
    from schemas.online import load_online

    # Before torch is imported: a mistake in the settings is told at once.
    settings = load_online(file, overrides or [])

    import torch

    from jobs.ranks import on_all_ranks
    from pipeline.errors import INTERRUPTED, interrupts
    from pipeline.online.run import learn_days
    from pipeline.progress import first_rank

    def work(device: torch.device) -> int:
        learnt = learn_days(settings, run, device, follow=follow, show=lambda line: print(line, flush=True))
        if learnt is None and interrupts.asked and torch.distributed.get_world_size() == 1:
            # Of several ranks any other code than 0 would make a launcher start all of them again.
            return INTERRUPTED
        if first_rank() and learnt is not None:
            skipped = sum(day.skipped for day in learnt)
            said = f", {skipped} of them without targets" if skipped else ""
            print(f"{printable(run)}: {len(learnt)} days are done{said}; days.json, days.png")
            if json:
                print(dumps({"days": [day.model_dump(mode="json") for day in learnt]}))
        return 0

    on_all_ranks(work)

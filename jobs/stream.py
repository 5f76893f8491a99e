"""`dare stream`: what batches of a data set look like, and how fast they come."""

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from schemas.settings import load_settings
from schemas.stream import StreamSettings


def stream(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Data set that `dare prepare` wrote.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, e.g. batch_size=512.")
    ] = None,
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="What to read.")] = "train",
    config: Annotated[list[Path] | None, typer.Option(help="YAML file of settings; repeatable.")] = None,
) -> None:
    """Read one epoch of a split, and tell what came."""
    settings = load_settings(StreamSettings, config or [], overrides or [])
    from tqdm import tqdm

    from pipeline.stream.history_stream import HistoryStream

    with HistoryStream(folder, split, settings, seed=0, shuffle=True) as batches:
        print(f"{split}: {batches.targets:,} targets in {batches.steps_per_epoch:,} batches of {settings.batch_size:,}")
        targets, users, positives, behaviors, windows = 0, 0, 0, 0, 0
        started = time.monotonic()
        for step, batch in enumerate(tqdm(batches, total=batches.steps_per_epoch, unit=" batches", disable=None)):
            if step == 0:
                print(batch.describe())
            targets, users, positives = targets + len(batch), users + batch.users, positives + int(batch.label_T.sum())
            behaviors += sum(len(history.item_M) for history in batch.histories.values())
            windows += sum(int((history.end_T - history.start_T).sum()) for history in batch.histories.values())
        seconds = time.monotonic() - started
    print(
        f"one epoch in {seconds:.1f} s: {targets / seconds:,.0f} samples/s, {positives / targets:.1%} positive, "
        f"{targets / users:.1f} targets a user and batch; {behaviors:,} behaviours stand for the {windows:,} "
        f"that a row for each sample would hold"
    )

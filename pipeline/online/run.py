"""Learns days in their order: measures the model on each of them, then trains it one pass over the day's targets."""

import gc
import json
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.evaluate.auc import Ranks
from pipeline.evaluate.evaluate import defined
from pipeline.evaluate.segments import Segments, evaluate_segments, segment_stream
from pipeline.files import write_whole
from pipeline.online.days import Arrivals, Day, listed_days
from pipeline.online.folder import OnlineFolder
from pipeline.online.report import DayCurves, draw, header, line
from pipeline.runs.checkpoint import from_first_rank
from pipeline.runs.run_folder import RunFolder
from pipeline.stream.data_set import DataSet
from pipeline.train.run import train
from pipeline.train.trainer import StopSignal
from schemas.documents import json_document, read_json
from schemas.errors import UserError
from schemas.online import LearntDay, OnlineSettings

_LOGGER = logging.getLogger("dare.online")
"""Shown by the first rank alone."""

LOOK_EVERY_S = 1.0
"""Seconds between two looks for the next day."""


def learn_days(
    settings: OnlineSettings,
    folder: Path,
    device: torch.device,
    *,
    follow: Path | None = None,
    show: Callable[[str], object] = lambda line: None,
) -> list[LearntDay] | None:
    """Learn the days of the settings that are not done yet, and then, with ``follow``, those that come.

    All ranks of the default process group must call it. It goes on from wherever an earlier call ended, also in the
    middle of a day.

    Args:
        settings: of the run.
        folder: of the run; see docs/days.md.
        device: of this rank.
        follow: folder into which data sets of further days come; None: the listed days are all.
        show: gets the lines of a table, one at the end of each day; on the first rank alone.

    Returns:
        All days that are done, the same on all ranks; None if it was asked to stop before the end.

    Raises:
        UserError: days, settings and folder do not fit each other, and what `pipeline.train.run.train` raises.
    """
    online = OnlineFolder(folder)
    with ExitStack() as stack:
        # One signal for all days: between two of them, and while nothing is there, it ends in order too.
        stop = stack.enter_context(StopSignal())
        if dist.get_rank() == 0:
            stack.enter_context(online.locked())
        dist.barrier()
        queue = _Queue(settings, online, follow)
        learnt: list[LearntDay] = from_first_rank(queue.begin)
        if learnt:
            _LOGGER.info("%s: %d days are done already; the last one is %s", folder, len(learnt), learnt[-1].name)
        curves = stack.enter_context(DayCurves(online.tensorboard, learnt)) if dist.get_rank() == 0 else None
        shown = waits = False
        while True:
            if _any_rank_stops(stop):
                _LOGGER.info(
                    "%s: asked to stop, %d days are done; the same command goes on from there", folder, len(learnt)
                )
                return None
            day: Day | None
            day, learnt = from_first_rank(lambda: queue.next(show))
            if day is None:
                if follow is None:
                    return learnt
                if not waits:
                    _LOGGER.info("%s: waits for days in %s", folder, follow)
                waits = True
                time.sleep(LOOK_EVERY_S)
                continue
            began, waits = time.monotonic(), False
            run = online.run(day.name)
            source = next((online.run(each.name) for each in reversed(learnt) if not each.skipped), None)
            if source is None and settings.first is not None:
                source = RunFolder(Path(settings.first))
            if not _train_day(settings, day, run, source, device, stop):
                return None
            # The model of the day, before that of the next one is made.
            gc.collect()
            if curves is not None:
                before = read_json(run.before_file)["tasks"]
                done = day.record().model_copy(update={"before": before, "seconds": time.monotonic() - began})
                queue.done(done)
                curves.add(done)
                if not shown:
                    show(header())
                show(line(done))
            shown = True


def _train_day(
    settings: OnlineSettings, day: Day, run: RunFolder, source: RunFolder | None, device: torch.device, stop: StopSignal
) -> bool:
    """Measure, and train. Returns whether the day is done; no: it was asked to stop."""

    def before(model: nn.Module, data_set: DataSet) -> None:
        tasks = None if source is None else _metrics(settings, model, data_set, source, device)
        if dist.get_rank() == 0:
            document: dict[str, Any] = {
                "day": day.chain.number,
                "data_set": {"name": day.name, "fingerprint": day.fingerprint},
                "tasks": tasks,
            }
            write_whole(run.before_file, json_document(json.dumps(document, indent=1) + "\n"))

    path = None if source is None else source.path
    return train(settings.train, day.folder, run.path, device, source=path, before=before, stop=stop) is not None


def _metrics(
    settings: OnlineSettings, model: nn.Module, data_set: DataSet, source: RunFolder, device: torch.device
) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """By task and segment, the metrics of a model that has not learnt a day; all ranks must call it."""
    chain = data_set.manifest.chain
    assert chain is not None
    known = [day.fingerprint for day in chain.days].index(source.data_record()["fingerprint"])
    with segment_stream(
        data_set,
        settings.train.stream,
        settings.train.model.read_features,
        dist.get_rank(),
        dist.get_world_size(),
        pin_memory=device.type == "cuda",
    ) as stream:
        by_task = evaluate_segments(model, stream, Segments.of(data_set, known), device)
    return {
        task: {segment: defined(evaluation) for segment, evaluation in segments.items()}
        for task, segments in by_task.items()
    }


def _any_rank_stops(stop: StopSignal) -> bool:
    """Whether a rank was asked to stop; all ranks must call it."""
    return any(asked for (asked,) in Ranks(None).gather_numbers(int(stop.received)))


class _Queue:
    """Which day is next, as the first rank sees it; the others have one that is never asked."""

    def __init__(self, settings: OnlineSettings, online: OnlineFolder, follow: Path | None) -> None:
        self._settings, self._online, self._follow = settings, online, follow
        self._arrivals: Arrivals | None = None
        self._listed: list[Day] = []
        self._learnt: list[LearntDay] = []
        self._first: str | None = None

    def begin(self) -> list[LearntDay]:
        """Make sure that everything fits before anything is written, and return the days that are done."""
        settings, online = self._settings, self._online
        self._learnt = [*online.begun(settings)]
        if not settings.days and self._follow is None:
            raise UserError("days: none are given; name data sets, or a folder to --follow")
        if settings.first is not None:
            first = RunFolder(Path(settings.first))
            first.settings()
            self._first = first.data_record()["fingerprint"]
        if self._follow is not None:
            self._arrivals = Arrivals(self._follow)
        self._listed = listed_days(settings.days, self._learnt, self._first)
        online.begin(settings, self._learnt)
        # What a kill has left, between the end of a day and this.
        self._close_day()
        return self._learnt

    def next(self, show: Callable[[str], object]) -> tuple[Day | None, list[LearntDay]]:
        """The next day with targets, None if none is there yet; and the days that are done."""
        while True:
            day = self._listed[0] if self._listed else None
            if day is None and self._arrivals is not None:
                day = self._arrivals.next(self._learnt, self._first)
            if day is None or day.targets:
                return day, self._learnt
            _LOGGER.warning("%s: day %d has no targets; skipped", day.folder, day.chain.number)
            self.done(day.record().model_copy(update={"skipped": True}))
            show(line(self._learnt[-1]))

    def done(self, day: LearntDay) -> None:
        """Write down that a day is done."""
        self._learnt = [*self._learnt, day]
        self._online.write_days(self._learnt)
        self._listed = [each for each in self._listed if each.name != day.name]
        self._close_day()

    def _close_day(self) -> None:
        self._online.prune(self._learnt, self._settings.keep_days)
        if self._learnt:
            draw(self._learnt, self._online.figure)

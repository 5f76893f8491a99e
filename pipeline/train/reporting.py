"""What a run says about itself while it goes: progress, TensorBoard, the logs of losses and validations.

All ranks have a `RunReport` and call the same methods; the first rank alone shows and writes.
"""

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import psutil
import torch
import torch.distributed as dist

from pipeline.evaluate.evaluate import Validated, as_document
from pipeline.files import write_whole
from pipeline.progress import Progress, time_left
from pipeline.runs.mirror import mirrored
from pipeline.runs.run_folder import RunFolder, StepLog
from pipeline.train.event_file import EventWriter, ahead_of_clock
from pipeline.train.pipeline import Agreement
from schemas.documents import json_document
from schemas.errors import StoreError

_LOGGER = logging.getLogger("dare.train")


class TrainingProgress:
    """Shows on standard error which step a run is at, its speed, its loss and its last validation.

    Args:
        step: steps done before.
        steps: steps in all.
        shown: whether anything is shown at all.
    """

    def __init__(self, step: int, steps: int, shown: bool) -> None:
        self._progress = Progress(steps, self._text, done=step, shown=shown)
        self._step, self._steps = step, steps
        self._samples = 0
        self._line_s, self._line_samples = 0.0, 0
        """Seconds and samples at the last log line."""
        self._loss, self._validation = 0.0, ""

    def advance(self, loss: float, targets: int) -> None:
        """Note that a step is done.

        Args:
            loss: mean loss of the step.
            targets: targets of the step over all ranks.
        """
        self._step += 1
        self._samples += targets
        self._loss = loss
        self._progress.advance()
        # However lately a line was logged: the log of a run ends with its last step.
        if self._step == self._steps:
            self._progress.log()

    def validated(self, auc: float, better: bool, seconds: float) -> None:
        """Note that a validation is done.

        Args:
            auc: its AUC; nan where it is not defined.
            better: whether it is the best one so far.
            seconds: how long it took; speeds are those of training, without it.
        """
        self._validation = f", validation AUC {'not defined' if math.isnan(auc) else format(auc, '.4f')}"
        self._progress.pause(seconds)
        if self._progress.logs:
            # A live line shows the validation by itself; only a log needs a line of its own.
            best = ", the best so far" if better else ""
            _LOGGER.info("step %d/%d%s%s", self._step, self._steps, self._validation, best)

    @property
    def samples_per_s(self) -> float:
        """Samples a second of all ranks together since the start, validations left out."""
        return self._samples / self._progress.seconds

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.__exit__()

    def _text(self, progress: Progress) -> str:
        rate = self.samples_per_s
        if progress.logs:
            # A line tells the speed since the one before it; a live line is renewed too often for that.
            seconds = progress.seconds
            rate = (self._samples - self._line_samples) / max(seconds - self._line_s, 1e-9)
            self._line_s, self._line_samples = seconds, self._samples
        return (
            f"step {self._step}/{self._steps}, {rate:,.0f} samples/s, loss {self._loss:.4f}{self._validation}"
            f"{time_left(progress.seconds_left)}"
        )


class TensorBoard:
    """Writes scalars of steps and validations, score curves, and the run's documents as text, for TensorBoard.

    Args:
        folder: folder of event files.
        step: step of the checkpoint that the run goes on from, or 0. What was written after it is taken back
            (``purge_step``).
        documents: texts by name.
        ahead_s: what `ahead_of_clock` says.
        tasks: names of the tasks, if there are several.
    """

    def __init__(
        self, folder: Path, step: int, documents: dict[str, str], ahead_s: float, tasks: Sequence[str] = ()
    ) -> None:
        # TensorBoard hides the points of ``purge_step`` and after. What a killed run has written beyond its checkpoint
        # is still in the event files of that start, which nobody changes.
        self._ahead_s = ahead_s
        self._writer = EventWriter(folder, step + 1 if step else 0, self._ahead_s)
        # The documents were written at step 0, which is never purged: once is enough.
        if not step:
            for name, content in documents.items():
                self._writer.add_text(name, "".join(f"    {line}\n" for line in content.splitlines()), 0, self._time())
        self._process, self._tasks = psutil.Process(), tasks
        self._began, self._samples, self._waited_s = time.monotonic(), 0, 0.0

    def count(self, targets: int) -> None:
        """Note that a step is done, with so many targets over all ranks."""
        self._samples += targets

    def step(
        self, step: int, agreed: Agreement, learning_rates: dict[str, float], norms: dict[str, float], waited_s: float
    ) -> None:
        """Add a point to the curves.

        Args:
            step: number of the step.
            agreed: what the ranks have agreed on at the step.
            learning_rates: learning rates of the dense parameters and of the sets of tables, by name.
            norms: gradient norms of the same.
            waited_s: seconds that this rank has waited for data since it began.
        """
        now = time.monotonic()
        seconds = max(now - self._began, 1e-9)
        self._scalar("loss/train", agreed.loss, step)
        for task, loss in zip(self._tasks, agreed.task_losses, strict=True) if self._tasks else ():
            self._scalar(f"loss/{task}", loss, step)
        self._scalar("speed/samples_per_s", self._samples / seconds, step)
        self._scalar("speed/waiting_for_data", (waited_s - self._waited_s) / seconds, step)
        self._scalar("memory/resident_gib", self._process.memory_info().rss / 2**30, step)
        if torch.cuda.is_available():
            self._scalar("memory/cuda_peak_gib", torch.cuda.max_memory_allocated() / 2**30, step)
        for name, rate in learning_rates.items():
            self._scalar(f"learning_rate/{name}", rate, step)
        for name, norm in norms.items():
            self._scalar(f"gradient_norm/{name}", norm, step)
        # Each point tells the speed since the one before it.
        self._began, self._samples, self._waited_s = now, 0, waited_s

    def validation(self, step: int, results: Mapping[str, Validated], seconds: float) -> None:
        """Add a validation, which took ``seconds``: the curves of the main task, and below its name those of others."""
        at: dict[str, Any] = {"global_step": step, "walltime": self._time()}
        for number, (task, (evaluation, scores)) in enumerate(results.items()):
            below = f"{task}/" if number else ""
            for name, value in asdict(evaluation).items():
                # Counts of samples and users are the same each time; the metrics are the floats. One that is not
                # defined has no point: TensorBoard would draw nan as a point somewhere.
                if isinstance(value, float) and not math.isnan(value):
                    self._scalar(f"validation/{below}{name}", value, step)
            if evaluation.positives:
                self._writer.add_pr_curve_raw(f"validation/{below}precision_recall", **at, **scores.pr_curve)
            for label, histogram in scores.histograms.items():
                self._writer.add_histogram_raw(f"validation_logits/{below}{label}", **at, **histogram)
        self._scalar("speed/validation_s", seconds, step)
        self._began += seconds  # the speed is that of training

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def _scalar(self, name: str, value: float, step: int) -> None:
        self._writer.add_scalar(name, value, step, self._time())

    def _time(self) -> float:
        return time.time() + self._ahead_s


TELL_EVERY_S = 5.0
"""Least seconds between two writes of the progress file."""


class RunReport:
    """All that a run shows and writes while it goes. All ranks have one; that of the first rank alone does anything.

    Args:
        run: folder of the run.
        step: step of the checkpoint that the run goes on from, or 0.
        steps: steps in all.
        documents: texts for TensorBoard, by name.
        tasks: names of the tasks, if there are several.
    """

    def __init__(
        self, run: RunFolder, step: int, steps: int, documents: dict[str, str], tasks: Sequence[str] = ()
    ) -> None:
        self._open = ExitStack()
        self._speaks = dist.get_rank() == 0
        self._run, self._step, self._steps, self._written = run, step, steps, time.monotonic()
        self._progress = self._open.enter_context(TrainingProgress(step, steps, self._speaks))
        if self._speaks:
            self._mirror = self._open.enter_context(mirrored(run))
            logs = self._mirror.local
            # Made in this order, closed in the reverse one: the progress file is written first, with the last step,
            # even if a log or TensorBoard then cannot be closed.
            self._losses, self._validations = StepLog(logs.losses, step), StepLog(logs.validations, step)
            self._open.callback(self._losses.close)
            self._open.callback(self._validations.close)
            ahead_s = ahead_of_clock(run.tensorboard)
            self._board = self._open.enter_context(TensorBoard(logs.tensorboard, step, documents, ahead_s, tasks))
            self._write_progress()
            self._open.callback(self._write_progress)

    def step(self, step: int, agreed: Agreement) -> None:
        """Note that a step is done."""
        self._step = step
        self._progress.advance(agreed.loss, agreed.targets)
        if self._speaks:
            self._losses.add(step, loss=agreed.loss)
            self._board.count(agreed.targets)
            if time.monotonic() - self._written > TELL_EVERY_S:
                self._write_progress()

    def point(
        self, step: int, agreed: Agreement, learning_rates: dict[str, float], norms: dict[str, float], waited_s: float
    ) -> None:
        """Add a point to the curves; arguments as for `TensorBoard.step`."""
        if self._speaks:
            self._losses.flush()
            self._board.step(step, agreed, learning_rates, norms, waited_s)

    def validation(self, step: int, results: Mapping[str, Validated], seconds: float, better: bool) -> None:
        """Note a validation of each task, which took ``seconds``; ``better``: it is the best one so far."""
        evaluations = {task: result.evaluation for task, result in results.items()}
        self._progress.validated(next(iter(evaluations.values())).auc, better, seconds)
        if self._speaks:
            self._validations.add(step, **as_document(evaluations))
            self._validations.flush()
            self._board.validation(step, results, seconds)
            self._mirror.publish()

    def flush(self) -> None:
        """Write to the files what was noted up to now; to be called before a checkpoint of it is saved.

        Raises:
            StoreError: the run is at a URL, and its store fails.
        """
        if self._speaks:
            self._losses.flush()
            self._validations.flush()
            self._mirror.publish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _write_progress(self) -> None:
        record = {"step": self._step, "steps": self._steps, "samples_per_s": round(self._progress.samples_per_s, 1)}
        # A disk that is full, a store that fails, is no reason to stop: the next checkpoint finds it out.
        with suppress(OSError, StoreError):
            # Not synced: a disk that is busy with a checkpoint would keep training waiting.
            write_whole(self._run.progress_file, json_document(json.dumps(record) + "\n"), sync=False)
        self._written = time.monotonic()

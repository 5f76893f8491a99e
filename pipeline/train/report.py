"""Everything that a run writes about itself while it goes: progress, TensorBoard, losses, validations."""

import json
import time
from contextlib import ExitStack, suppress
from typing import Self

import torch.distributed as dist

from pipeline.evaluate import as_document
from pipeline.metrics.distribution import ScoreDistribution
from pipeline.metrics.evaluation import Evaluation
from pipeline.run_folder import RunFolder, write_whole
from pipeline.train.agreement import Agreement
from pipeline.train.progress import Progress
from pipeline.train.step_log import StepLog

TELL_EVERY_S = 5.0
"""Least time between two writes of the progress file."""


class Report:
    """All ranks have one; only the first one's says anything.

    Args:
        run: the folder.
        step: of the checkpoint that the run goes on from, or 0.
        steps: in all.
        documents: texts for TensorBoard, by name.
    """

    def __init__(self, run: RunFolder, step: int, steps: int, documents: dict[str, str]) -> None:
        self._open = ExitStack()
        self._speaks = dist.get_rank() == 0
        self._run, self._step, self._steps, self._told = run, step, steps, time.monotonic()
        self._progress = self._open.enter_context(Progress(step, steps, self._speaks))
        if self._speaks:
            from pipeline.train.tensorboard import TensorBoard  # Takes a while to import.

            self._losses, self._validations = StepLog(run.losses, step), StepLog(run.validations, step)
            self._open.callback(self._losses.close)
            self._open.callback(self._validations.close)
            self._board = self._open.enter_context(TensorBoard(run.tensorboard, step, documents))
            self._tell()
            self._open.callback(self._tell)

    def step(self, step: int, agreed: Agreement) -> None:
        """A step is done."""
        self._step = step
        self._progress.advance(agreed.loss, agreed.targets)
        if self._speaks:
            self._losses.add(step, loss=agreed.loss)
            self._board.count(agreed.targets)
            if time.monotonic() - self._told > TELL_EVERY_S:
                self._tell()

    def point(
        self, step: int, agreed: Agreement, learning_rates: dict[str, float], norms: dict[str, float], waited_s: float
    ) -> None:
        """A point of the curves; see `TensorBoard.step`."""
        if self._speaks:
            self._losses.flush()
            self._board.step(step, agreed, learning_rates, norms, waited_s)

    def validation(
        self, step: int, evaluation: Evaluation, scores: ScoreDistribution, seconds: float, better: bool
    ) -> None:
        """A validation is done."""
        self._progress.validated(evaluation.auc, better, seconds)
        if self._speaks:
            self._validations.add(step, **as_document(evaluation))
            self._validations.flush()
            self._board.validation(step, evaluation, scores, seconds)

    def flush(self) -> None:
        """Let the files say all up to now: a checkpoint is about to."""
        if self._speaks:
            self._losses.flush()
            self._validations.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _tell(self) -> None:
        record = {"step": self._step, "steps": self._steps, "samples_per_s": round(self._progress.samples_per_s, 1)}
        with suppress(OSError):  # no reason to stop
            write_whole(self._run.progress_file, json.dumps(record) + "\n")
        self._told = time.monotonic()

"""How far a run is, for the person who started it: a live line on a terminal, elsewhere a line now and then.

What TensorBoard shows of a run; written by the first rank.

Everything that a run writes about itself while it goes: progress, TensorBoard, losses, validations.
"""

import json
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Self

import psutil
import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pipeline.evaluate.distribution import ScoreDistribution
from pipeline.evaluate.evaluate import as_document
from pipeline.evaluate.metrics import Evaluation
from pipeline.files import write_whole
from pipeline.runs.run_folder import RunFolder, StepLog
from pipeline.train.pipeline import Agreement

LINE_EVERY_S = 15.0
"""Where nobody watches: seconds between two lines."""


class Progress:
    """Shown on standard error by the first rank.

    Args:
        step: steps done before.
        steps: steps in all.
        shown: show anything at all.
    """

    def __init__(self, step: int, steps: int, shown: bool) -> None:
        self._live = shown and sys.stderr.isatty()
        self._plain = shown and not self._live
        self._bar = tqdm(initial=step, total=steps, unit="step", desc="train", disable=not self._live, smoothing=0.1)
        self._first, self._step, self._steps = step, step, steps
        self._began = self._told = time.monotonic()
        self._samples = self._samples_told = 0
        self._validation = ""

    def advance(self, loss: float, targets: int) -> None:
        """A step is done: its loss, and its targets over all ranks."""
        self._step += 1
        self._samples += targets
        now = time.monotonic()
        if self._live:
            rate = self.samples_per_s
            self._bar.set_postfix_str(f"{rate:,.0f} samples/s, loss {loss:.4f}{self._validation}", refresh=False)
            self._bar.update()
        elif self._plain and (now - self._told >= LINE_EVERY_S or self._step == self._steps):
            rate = (self._samples - self._samples_told) / max(now - self._told, 1e-9)
            left = (now - self._began) / (self._step - self._first) * (self._steps - self._step)
            self._say(
                f"step {self._step}/{self._steps}, {rate:,.0f} samples/s, loss {loss:.4f}{self._validation}, "
                f"{duration(left)} left"
            )
            self._told, self._samples_told = now, self._samples

    def validated(self, auc: float, better: bool, seconds: float) -> None:
        """A validation is done, which took so long; ``better``: than ever before."""
        self._validation = f", validation AUC {auc:.4f}"
        self._began, self._told = self._began + seconds, self._told + seconds  # the speed is that of training
        if self._plain:
            self._say(f"step {self._step}/{self._steps}{self._validation}{', the best so far' if better else ''}")

    @property
    def samples_per_s(self) -> float:
        """Of all ranks together since the start, validations left out."""
        return self._samples / max(time.monotonic() - self._began, 1e-9)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Minutes and seconds, and hours if there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class TensorBoard:
    """Scalars of steps and validations, score curves, and the run's documents as text.

    Args:
        folder: of event files.
        step: of the checkpoint that the run goes on from; what was written after it is taken back (``purge_step``).
        documents: texts by name.
    """

    def __init__(self, folder: Path, step: int, documents: dict[str, str]) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else 0, flush_secs=15)
        if not step:
            for name, content in documents.items():
                self._writer.add_text(name, "".join(f"    {line}\n" for line in content.splitlines()), 0)
        self._process = psutil.Process()
        self._began, self._samples, self._waited_s = time.monotonic(), 0, 0.0

    def count(self, targets: int) -> None:
        """A step is done, with so many targets over all ranks."""
        self._samples += targets

    def step(
        self, step: int, agreed: Agreement, learning_rates: dict[str, float], norms: dict[str, float], waited_s: float
    ) -> None:
        """A point of the curves.

        Args:
            step: the step.
            agreed: of the step.
            learning_rates: of the dense parameters and of the sets of tables.
            norms: of gradients.
            waited_s: seconds that this rank has waited for data since it began.
        """
        now = time.monotonic()
        seconds = max(now - self._began, 1e-9)
        self._scalar("loss/train", agreed.loss, step)
        self._scalar("speed/samples_per_s", self._samples / seconds, step)
        self._scalar("speed/waiting_for_data", (waited_s - self._waited_s) / seconds, step)
        self._scalar("memory/resident_gib", self._process.memory_info().rss / 2**30, step)
        if torch.cuda.is_available():
            self._scalar("memory/cuda_peak_gib", torch.cuda.max_memory_allocated() / 2**30, step)
        for name, rate in learning_rates.items():
            self._scalar(f"learning_rate/{name}", rate, step)
        for name, norm in norms.items():
            self._scalar(f"gradient_norm/{name}", norm, step)
        self._began, self._samples, self._waited_s = now, 0, waited_s

    def validation(self, step: int, evaluation: Evaluation, scores: ScoreDistribution, seconds: float) -> None:
        """A validation, which took so long."""
        for name, value in asdict(evaluation).items():
            if isinstance(value, float):
                self._scalar(f"validation/{name}", value, step)
        self._scalar("speed/validation_s", seconds, step)
        self._writer.add_pr_curve_raw("validation/precision_recall", global_step=step, **scores.pr_curve)
        for label, histogram in scores.histograms.items():
            self._writer.add_histogram_raw(f"validation_logits/{label}", global_step=step, **histogram)
        self._began += seconds  # the speed is that of training

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def _scalar(self, name: str, value: float, step: int) -> None:
        self._writer.add_scalar(name, value, step)


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

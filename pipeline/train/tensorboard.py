"""What TensorBoard shows of a run; written by the first rank."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Self

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter

from pipeline.metrics.distribution import ScoreDistribution
from pipeline.metrics.evaluation import Evaluation
from pipeline.train.agreement import Agreement


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

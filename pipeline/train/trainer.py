"""The training loop, what asks it to stop, and the state from which it goes on."""

import math
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.stateful import Stateful
from torchrec.distributed import DistributedModelParallel

from embeddings.gradient_routing import GradientNorms
from pipeline.errors import interrupts
from pipeline.evaluate.evaluate import Validated, evaluate
from pipeline.runs.checkpoint_files import keys_in, load
from pipeline.runs.checkpoint_writer import CheckpointWriter
from pipeline.stream.history_stream import HistoryStream
from pipeline.train.optimizer import DenseOptimizer, TableRates
from pipeline.train.pipeline import Agreement, SearchPrefetchPipeline, StartedAgreement, agree
from schemas.train import TrainSettings

if TYPE_CHECKING:
    # A step need not load them.
    from pipeline.train.profile import StepProfile
    from pipeline.train.reporting import RunReport


def seed_all(seed: int) -> None:
    """Seed the random number generators of Python, numpy and torch."""
    random.seed(seed)
    # numpy takes 32 bits and no sign.
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The states of this rank's random number generators: Python's, numpy's and torch's."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: dict[str, Any]) -> None:
    """Let the generators go on from what `random_state` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Schedulers send SIGTERM some time before they kill a process; Ctrl-C sends SIGINT; a terminal that closes, or a
connection to it that breaks, sends SIGHUP."""


class StopSignal:
    """Within the block, SIGTERM, SIGINT and SIGHUP set ``received`` and do nothing else. In the main thread only.

    A second SIGINT ends the process at once (`KeyboardInterrupt`). A SIGHUP that is ignored, as under ``nohup``, stays
    so.
    """

    def __init__(self) -> None:
        self.received = False
        self.interrupted = False
        """Whether it was SIGINT: a person waits."""

    def __enter__(self) -> Self:
        numbers = [number for number in SIGNALS if number != signal.SIGHUP or not _is_ignored(number)]
        self._former = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def release(self) -> None:
        """Let a SIGINT end the process again, from here to the block's end: nothing is left to save.

        Raises:
            KeyboardInterrupt: a rank alone has received one already, too late for a step to see it.
        """
        signal.signal(signal.SIGINT, self._former[signal.SIGINT])
        if self.interrupted and dist.get_world_size() == 1:
            raise KeyboardInterrupt

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if number == signal.SIGINT:
            self.interrupted = interrupts.asked = True
            # For a person who does not want to wait for the step and the checkpoint.
            signal.signal(signal.SIGINT, self._former[signal.SIGINT])


def _is_ignored(number: int) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN


class Trainer(Stateful):
    """Trains a sharded model; a checkpoint is its state.

    Args:
        settings: the run's settings.
        model: sharded, with weights.
        stream: batches of the train split.
        validation: stream of the validation split, in file order; None: the data have none.
        device: this rank's device.
    """

    def __init__(
        self,
        settings: TrainSettings,
        model: DistributedModelParallel,
        stream: HistoryStream,
        validation: HistoryStream | None,
        device: torch.device,
    ) -> None:
        self.settings, self.model, self.stream, self.device = settings, model, stream, device
        self.step = self.epoch = self.step_of_epoch = 0
        """Steps done; the epoch of the next step; and how many steps of that epoch are done."""
        self.steps_before = 0
        """Steps that the optimizers' states have seen in the runs that this one goes on from."""
        self.best = -math.inf
        """The metric of the best validation so far."""
        self.not_better = 0
        """How many validations in a row were no better than the best one."""
        self._validation = validation
        # The tables need none: TorchRec has fused theirs into the backward pass.
        self._optimizer = DenseOptimizer(model, settings.dense)
        self._table_rates = TableRates(model.fused_optimizer, settings.tables)
        # The pipeline takes the next batch while a step runs, so the stream is one batch ahead: steps are counted here.
        self._pipeline = SearchPrefetchPipeline(model, self._optimizer, device)

    @property
    def steps(self) -> int:
        """Steps at the end of training; where it has ended early, those that were made."""
        if self.done:
            return self.step
        # Counted from the start of the present epoch: epochs that are done keep the number of steps that they had, also
        # if the number of ranks has changed since. If it has changed within the present one, that has a number of its
        # own.
        later = (self.settings.epochs - self.epoch - 1) * self.stream.steps_per_epoch
        return self.step - self.step_of_epoch + self.stream.steps_of(self.epoch) + later

    @property
    def done(self) -> bool:
        """Whether all epochs are done, or training has ended early."""
        return self.epoch >= self.settings.epochs or self.ended_early

    @property
    def ended_early(self) -> bool:
        """Whether ``validation.patience`` has run out; the same on all ranks, whose metrics are of all of them."""
        patience = self.settings.validation.patience
        return patience is not None and self.not_better >= patience

    def train(
        self, checkpoints: CheckpointWriter, report: "RunReport", stop: StopSignal, profile: "StepProfile | None" = None
    ) -> None:
        """Train to the end, or until a rank was asked to stop; either way the last state is saved.

        All ranks must call it.

        Args:
            checkpoints: saves states.
            report: shows and logs what happens.
            stop: whether this rank was asked to stop.
            profile: profiles some of the steps.

        Raises:
            UserError: a loss that is not finite, data that cannot be read, a checkpoint that cannot be written.
        """
        batches, started = iter(self.stream), list[StartedAgreement]()
        while not self.done:
            # Of the step that is about to be made: hooks must be there when its forward pass runs. All ranks measure
            # the same steps, because the norms are summed over ranks.
            norms = GradientNorms() if (self.step + 1) % self.settings.log_every == 0 else None
            if profile is not None:
                profile.begin(self.step + 1)
            self._optimizer.steps_of_run = self.steps
            self._table_rates.set(self.step + 1, self.steps)
            try:
                output = self._pipeline.progress(batches, norms)
            except StopIteration:
                # The stream has gone on to the next epoch by itself; the pipeline would say for ever that its data are
                # used up.
                self._pipeline.reset()
                batches = iter(self.stream)
                continue
            started.append(agree(self.step + 1, output, self._optimizer.gradient_norm, stop.received))
            if profile is not None:
                profile.end(self.step + 1)
            self._advance()
            # Items are seen a second time from the next epoch on: models often are at their best right before.
            ends = self._is_due(self.settings.validation.every) or self.step_of_epoch == 0
            due = self._validation is not None and ends
            full, delta_every = self._is_due(self.settings.checkpoint.every), self.settings.checkpoint.delta_every
            saves = full or (delta_every is not None and self.step % delta_every == 0)
            # What the ranks agree on is looked at when the next step is under way, so that the host does not wait for a
            # GPU in between; unless something depends on it now.
            agreed = self._settle(started, report, all_of_them=due or saves or norms is not None)
            stops = agreed is not None and agreed.stop
            if stops:
                # The step after the one in which it was agreed is made already: it is the last.
                self._settle(started, report, all_of_them=True)
            if norms is not None:
                assert agreed is not None
                self._report_norms(report, agreed, norms)
            # The validation comes before the checkpoint: its score is saved with the very weights that it has measured.
            better = due and self._validate(report)
            if better or stops or saves or self.ended_early:
                # The logs first: what they have beyond the checkpoint is cut off when the run goes on, but what they
                # lack is never written again.
                report.flush()
                checkpoints.save(self.state_dict(), self.step, self.best if better else None, full=full)
            if stops:
                break
            # A checkpoint that failed in the background (a full disk) ends the run now, not when the next one is due.
            checkpoints.check()
        checkpoints.wait()

    def _advance(self) -> None:
        self.step += 1
        self.step_of_epoch += 1
        if self.step_of_epoch == self.stream.steps_of(self.epoch):
            self.epoch, self.step_of_epoch = self.epoch + 1, 0

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.done

    def _settle(self, started: list[StartedAgreement], report: "RunReport", *, all_of_them: bool) -> Agreement | None:
        """Look at what was agreed on after the steps before the last, or after all; report it, and return the latest.

        A stop that was agreed on in any of them is in what is returned.
        """
        agreed = None
        while len(started) > (0 if all_of_them else 1):
            former, step = agreed, started[0].step
            agreed = started.pop(0).result()
            if former is not None and former.stop:
                agreed = agreed._replace(stop=True)
            report.step(step, agreed)
        return agreed

    def _report_norms(self, report: "RunReport", agreed: Agreement, norms: GradientNorms) -> None:
        model, of_tables = self.settings.model, self._table_rates.fraction
        rates = {
            "dense": self._optimizer.learning_rate,
            "attention": model.attention.learning_rate * of_tables,
            "representation": model.representation.learning_rate * of_tables,
        }
        by_name = {str(role): norm for role, norm in norms.norms().items()}
        by_name["dense"] = float(self._optimizer.gradient_norm)
        report.point(self.step, agreed, rates, by_name, self.stream.waited_s)

    def _validate(self, report: "RunReport") -> bool:
        """Evaluate on the validation split, and return whether the result is the best so far."""
        began = time.monotonic()
        assert self._validation is not None
        metrics = evaluate(self.model, self._validation, self.device)
        results = {task: Validated(each.compute(), each.distribution()) for task, each in metrics.items()}
        task = self.settings.validation.task or next(iter(results))
        score = getattr(results[task].evaluation, self.settings.validation.metric)
        better: bool = score > self.best  # never where it is nan
        self.not_better = 0 if better else self.not_better + 1
        if better:
            self.best = score
        report.validation(self.step, results, time.monotonic() - began, better)
        return better

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how training goes on."""
        return {
            "model": self.model.state_dict(),
            "table_optimizer": self.model.fused_optimizer.state_dict(),
            "dense_optimizer": self._optimizer.state_dict(),
            # The stream's own place would be a batch too far: it is that of the batch which the pipeline already holds.
            "stream": self.stream.state_at(self.epoch, self.step_of_epoch),
            "progress": {
                "step": self.step,
                "best": self.best,
                "not_better": self.not_better,
                "steps_before": self.steps_before,
            },
            # Under a name of its own for each rank: torch.distributed.checkpoint takes values of one name on several
            # ranks for copies, and keeps one.
            "random": {str(dist.get_rank()): random_state()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            UserError: it is of another data set.
        """
        # First, because it refuses a state of other data or other settings.
        self.stream.load_state_dict(state_dict["stream"])
        progress = state_dict["progress"]
        self.step, self.best, self.not_better = progress["step"], progress["best"], progress.get("not_better", 0)
        self._load_parameters(state_dict, progress.get("steps_before", 0))
        self.epoch, self.step_of_epoch = self.stream.epoch, self.stream.step
        for states in state_dict["random"].values():
            set_random_state(states)

    def _load_parameters(self, state_dict: dict[str, Any], steps_before: int) -> None:
        """Take the parameters and the optimizers' states; they have seen ``steps_before`` beside those of this run."""
        self.steps_before = self._optimizer.steps_before = steps_before
        self.model.load_state_dict(state_dict["model"])
        self.model.fused_optimizer.load_state_dict(state_dict["table_optimizer"])
        self._optimizer.load_state_dict(state_dict["dense_optimizer"])
        # FBGEMM counts the steps beside the optimizers' state (Adam corrects its moments by the count), so no state
        # brings it back.
        self.model.fused_optimizer.set_optimizer_step(steps_before + self.step)

    def start_from(self, fill: Callable[[dict[str, Any]], int]) -> None:
        """Begin with parameters and optimizers' states of another run; all ranks must call it.

        Args:
            fill: puts them into a state's tensors, and returns how many steps the optimizers have made.
        """
        self._optimizer.prepare_to_load()
        own = self.state_dict()
        state = {key: own[key] for key in ("model", "table_optimizer", "dense_optimizer")}
        self._load_parameters(state, fill(state))

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint; all ranks must call it.

        Raises:
            UserError: it is of another model or another data set.
        """
        # Before `state_dict`: a checkpoint is loaded into tensors that are there.
        self._optimizer.prepare_to_load()
        state = self.state_dict()
        keys = keys_in(checkpoint)
        if not any(key.startswith(f"random.{dist.get_rank()}.") for key in keys):
            state["random"] = {}  # a rank that was not there when it was saved
        if "stream.changes" in keys:
            state["stream"]["changes"] = []  # the ranks changed within the epoch before it was saved, too
        # Saved before there was a patience, which counts from here on, or before a run could begin on another one.
        for name in ("not_better", "steps_before"):
            if f"progress.{name}" not in keys:
                del state["progress"][name]
        load(state, checkpoint)
        self.load_state_dict(state)

"""A run from its beginning, or from its last checkpoint, to its test."""

import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from embeddings.initialization import initialize
from embeddings.machine import check_stream
from embeddings.sharding import sharded_model
from pipeline.evaluate.evaluate import MAIN, as_document, evaluate
from pipeline.evaluate.metrics import NOT_EVALUATED
from pipeline.evaluate.open_run import choose_checkpoint, load_model
from pipeline.files import write_whole
from pipeline.runs.checkpoint import Checkpoint, aside, best_of, checkpoints_in, damage_of, from_first_rank, set_aside
from pipeline.runs.checkpoint_writer import CheckpointWriter
from pipeline.runs.job_record import recorded
from pipeline.runs.plan_file import plan_text, read_plan
from pipeline.runs.run_folder import RunFolder, settings_text
from pipeline.stream.data_set import DataSet
from pipeline.stream.history_stream import HistoryStream
from pipeline.train.reporting import RunReport
from pipeline.train.trainer import StopSignal, Trainer, seed_all
from schemas.documents import is_named, json_document
from schemas.errors import UserError
from schemas.shards import SPLITS
from schemas.train import MAY_CHANGE, TrainSettings, differing

_LOGGER = logging.getLogger("dare.train")
"""Shown by the first rank alone."""


def train(
    settings: TrainSettings,
    data: Path,
    folder: Path,
    device: torch.device,
    plan: Path | None = None,
    *,
    source: Path | None = None,
    before: Callable[[nn.Module, DataSet], None] | None = None,
    stop: StopSignal | None = None,
) -> dict[str, Any] | None:
    """Train in ``folder``, going on from its last checkpoint if it has one; then test the best checkpoint.

    Without targets for validation the last checkpoint is the best, and without those for a test its metrics are None.
    All ranks of the default process group must call it.

    Args:
        settings: of the run.
        data: folder of the data set.
        folder: of the run; see docs/training.md.
        device: of this rank.
        plan: file of a sharding plan to follow, for this number of ranks; None: one is made.
        source: folder of a run, on whose last checkpoint this one begins (`pipeline.train.warm_start`); None: weights
            are drawn. A run that goes on needs it no more.
        before: is called on all ranks by a run that begins, with its model, before the first step.
        stop: whether this rank was asked to stop, where the caller listens; None: this function does.

    Returns:
        The test's metrics, what ``test.json`` holds; None if the run was asked to stop before its end.

    Raises:
        UserError: settings, data and run folder do not fit each other; a loss that is not finite; a checkpoint that
            cannot be written.
    """
    run = RunFolder(folder)
    with ExitStack() as stack:
        # Before anything slow: a signal while the model is built is not lost, the run saves and ends after its first
        # step.
        listens = stop is None
        if stop is None:
            stop = stack.enter_context(StopSignal())
        data_set = DataSet.open(data)
        check_stream(settings.stream, data_set.manifest)
        _refuse_missing_labels(settings, data_set)
        if dist.get_rank() == 0:
            # One rank holds the lock for all of them.
            stack.enter_context(run.locked())
        # No rank reads the folder before it is held: an earlier job could still write a checkpoint while this one looks
        # for the last.
        dist.barrier()
        checkpoints_there = from_first_rank(lambda: checkpoints_in(run.checkpoints))
        source = _source_to_take(run, source, bool(checkpoints_there))
        if checkpoints_there:
            _refuse_changed(run, settings, data_set)
            tested = _test_of_finished(run, settings)
            if tested is not None:
                _LOGGER.info("%s: finished already, at step %d; see %s", folder, tested["steps"], run.test_file)
                return tested
        resumed, damaged = _checkpoint_to_resume(run, checkpoints_there)
        # For what a rank draws by itself. The first weights and the order of the data come from keys of the seed alone,
        # so that they do not depend on the number of ranks.
        seed_all(settings.seed + dist.get_rank())
        if settings.deterministic:
            _compute_deterministically()
        if settings.compute != "fp32" and device.type != "cuda":
            raise UserError(f"compute={settings.compute} needs CUDA; on a CPU: compute=fp32")
        begins_on = None
        if source is not None and resumed is None:
            # Loaded by the runs that use it alone. What is refused is refused before a model is built.
            from pipeline.train.warm_start import open_source, start_from

            begins_on = open_source(source, settings, data_set)
        model = sharded_model(settings, data_set.manifest, device, read_plan(plan) if plan else None)
        # All splits at once: what is wrong with one is told now, not after the training. A day of a chain has targets
        # for training alone.
        splits = ["train", *(split for split in SPLITS[1:] if data_set.targets_G[split].any())]
        streams = {split: stack.enter_context(_stream(data, split, settings, device)) for split in splits}
        trainer = Trainer(settings, model, streams["train"], streams.get("validation"), device)
        # A fresh run draws its weights; a resumed one takes them, the optimizers' state and its place in the data from
        # the checkpoint.
        if begins_on is not None:
            start_from(begins_on, trainer, settings, data_set)
        elif resumed is None:
            initialize(model, settings.seed)
            if settings.init:
                # Loaded by the runs that use it alone.
                from pipeline.train.pretrained import load_vectors

                load_vectors(model, settings.init, data_set)
        else:
            trainer.resume(resumed.path)
            # An epoch that is begun counts: it cannot be taken back.
            _refuse_fewer_epochs(run, settings.epochs, trainer.epoch + (trainer.step_of_epoch > 0), trainer.step)
        starts = run.starts()
        # Every rank must have read test.json and job.json before rank 0 removes the one and rewrites the other.
        dist.barrier()
        documents = {run.settings_file.name: settings_text(settings), run.plan_file.name: plan_text(model.plan)}
        if dist.get_rank() == 0:
            for checkpoint in damaged:
                set_aside(checkpoint.path)
            beside = {} if begins_on is None else {run.source_file.name: begins_on.document()}
            run.begin(documents | beside, data, data_set.fingerprint, data_set.dictionaries(), data_set.lineage())
        stack.enter_context(recorded(run, starts, trainer.step, device))
        if not trainer.done:
            ranks = dist.get_world_size()
            processes = f"{ranks} process{'es' if ranks > 1 else ''}"
            beginning = _beginning(resumed, streams["train"])
            _LOGGER.info("%s: %s, %d steps on %s", folder, beginning, trainer.steps, processes)
            without = [split for split in SPLITS if split not in streams]
            # What is measured before it is learnt is a day, whose targets are all for training.
            if without and before is None:
                _LOGGER.info("%s: no targets for %s: %s", data, " and ".join(without), _without(without))
            if resumed is None:
                _tell_unused_features(settings, data_set)
                if before is not None:
                    before(model, data_set)
            deltas = None
            if settings.checkpoint.delta_every is not None:
                # Loaded by the runs that use it alone.
                from pipeline.runs.delta import DeltaState

                deltas = DeltaState(trainer.model, resumed)
            writer = CheckpointWriter(run.checkpoints, settings.checkpoint.keep, documents, deltas)
            checkpoints = stack.enter_context(writer)
            profile = None
            if settings.profile.steps is not None:
                # Loaded by the runs that use it alone.
                from pipeline.train.profile import StepProfile

                profile = StepProfile(settings.profile.steps, run.profile, device)
            tasks = [task.name for task in settings.model.tasks] if len(settings.model.tasks) > 1 else []
            with RunReport(run, trainer.step, trainer.steps, documents, tasks) as report, profile or nullcontext():
                trainer.train(checkpoints, report, stop, profile)
            # The other ranks know only that their parts are written. Rank 0 names the checkpoint after that, and
            # `_test` would otherwise miss the last one.
            dist.barrier()
            if not trainer.done:
                _LOGGER.info(
                    "%s: asked to stop, saved at step %d; the same command goes on from there", folder, trainer.step
                )
                return None
        if trainer.ended_early:
            _LOGGER.info(
                "%s: ended early at step %d, after %d validations without a better one (validation.patience)",
                *(folder, trainer.step, trainer.not_better),
            )
        if listens:
            stop.release()
        return _test(run, trainer, streams.get("test"), device)


def _compute_deterministically() -> None:
    """From here on, let torch compute by deterministic algorithms alone; it refuses operations that have none."""
    # cuBLAS reads it with its first product: with one workspace a stream, sums are always cut up in the same way.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # It would write NaN into all new memory, in case that someone reads what nobody has written: a second time for
    # every tensor of every step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _tell_unused_features(settings: TrainSettings, data_set: DataSet) -> None:
    used = settings.model.feature_names
    # A data set always has categories, if only the unknown one.
    known = [record.name for record in data_set.manifest.declared if record.rows or record.is_number]
    unused = [name for name in known if name not in used]
    if unused:
        _LOGGER.info("the data set has more features than model.features names; not used: %s", ", ".join(unused))


def _refuse_missing_labels(settings: TrainSettings, data_set: DataSet) -> None:
    labels = data_set.manifest.labels
    for task in settings.model.tasks:
        if task.name not in labels:
            raise UserError(
                f"model.tasks: {data_set.folder} has no label {task.name}; its labels: {', '.join(labels) or 'none'}"
            )


def _refuse_changed(run: RunFolder, settings: TrainSettings, data_set: DataSet) -> None:
    changed = {key: values for key, values in differing(settings, run.settings()).items() if key not in MAY_CHANGE}
    if changed:
        differences = ", ".join(f"{key} is {now!r}, was {before!r}" for key, (now, before) in changed.items())
        raise UserError(
            f"{run.path}: the run was begun with other settings: {differences}; "
            "use the same to go on, or another folder to begin anew"
        )
    if run.data_record()["fingerprint"] != data_set.fingerprint:
        raise UserError(
            f"{run.path}: the run was begun with another data set, {run.data_set()} as it was then, "
            f"not {data_set.folder}; use the same to go on, or another folder to begin anew"
        )


def _source_to_take(run: RunFolder, given: Path | None, begun: bool) -> Path | None:
    """The folder of the run that this one begins on; None: on none, or it has begun."""
    if given is None and (begun or not from_first_rank(lambda: is_named(run.source_file))):
        return None
    from pipeline.train.warm_start import source_to_take  # loaded by the runs that use it alone

    return source_to_take(run, given, begun)


def _checkpoint_to_resume(
    run: RunFolder, checkpoints: Sequence[Checkpoint]
) -> tuple[Checkpoint | None, list[Checkpoint]]:
    """The newest checkpoint that is whole, and those after it, which are damaged; all ranks must call it.

    Training makes anew what is after it. What is before it is not made anew: the best checkpoint is verified now, and
    not when the training that it is compared with is done.
    """
    damaged = list[Checkpoint]()
    for resumed in reversed(checkpoints):
        damage = damage_of(resumed)
        if damage is None:
            break
        _LOGGER.warning("%s is damaged: %s", resumed.path, damage)
        damaged.append(resumed)
    else:
        if damaged:
            raise UserError(
                f"{run.path}: no checkpoint is whole; restore one from a copy, or use another folder to begin anew"
            )
        return None, []
    if damaged:
        names = ", ".join(aside(checkpoint.path).name for checkpoint in damaged)
        _LOGGER.warning("%s: goes on after step %d instead; the damaged is kept as %s", run.path, resumed.step, names)
    before = [checkpoint for checkpoint in checkpoints if checkpoint.step < resumed.step]
    best = best_of([*before, resumed])
    # One whose record cannot be read might be the best.
    for checkpoint in before:
        if checkpoint is best or checkpoint.damage is not None:
            damage = damage_of(checkpoint)
            if damage is not None:
                raise UserError(
                    f"{checkpoint.path} is damaged ({damage}), and the test at the end may need it, as the best; "
                    "restore it from a copy, or remove its folder to go on without it"
                )
    return resumed, damaged


def _test_of_finished(run: RunFolder, settings: TrainSettings) -> dict[str, Any] | None:
    """The test of a run that has nothing left to do; None: it goes on.

    A run is finished while ``test.json`` is there; its last checkpoint may have been deleted since.
    """
    if not run.test_file.is_file():
        return None
    former = run.settings()
    if settings.epochs > former.epochs:
        return None
    test = run.test()
    patience = settings.validation.patience
    if test.get("ended_early") and (patience is None or patience > (former.validation.patience or 0)):
        return None
    _refuse_fewer_epochs(run, settings.epochs, former.epochs, test["steps"])
    return test


def _refuse_fewer_epochs(run: RunFolder, epochs: int, begun: int, step: int) -> None:
    if epochs < begun:
        raise UserError(
            f"{run.path}: epochs is {epochs}, but epoch {begun} of the run is begun or done already, "
            f"at step {step}; give at least {begun}, or another folder to begin anew"
        )


def _stream(data: Path, split: str, settings: TrainSettings, device: torch.device) -> HistoryStream:
    return HistoryStream(
        data,
        split,
        settings.stream,
        seed=settings.seed,
        shuffle=split == "train",
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        pin_memory=device.type == "cuda",
        user_fraction=settings.validation.fraction if split == "validation" else 1.0,
        features=settings.model.read_features,
    )


def _test(run: RunFolder, trainer: Trainer, stream: HistoryStream | None, device: torch.device) -> dict[str, Any]:
    # The parameters alone: nothing is trained any more, so optimizers and random states may stay as they are.
    checkpoint = choose_checkpoint(run, "best")
    if stream is None:
        evaluations = {task.name: NOT_EVALUATED for task in trainer.settings.model.tasks} or {MAIN: NOT_EVALUATED}
    else:
        load_model(trainer.model, checkpoint.path)
        evaluations = {task: metrics.compute() for task, metrics in evaluate(trainer.model, stream, device).items()}
    # Where no validation was defined, there is no best one.
    chosen = "last" if checkpoint.score is None else "best"
    result = {
        **as_document(evaluations),
        "steps": trainer.step,
        "checkpoint": chosen,
        "checkpoint_step": checkpoint.step,
    }
    if trainer.ended_early:
        result["ended_early"] = True
    if dist.get_rank() == 0:
        # Its presence is what "finished" means to everyone who looks, so it comes after all that it tells of.
        write_whole(run.test_file, json_document(json.dumps(result, indent=1) + "\n"))
    return result


def _without(splits: Sequence[str]) -> str:
    """What a run does without the targets of some splits."""
    words = {"validation": "the last checkpoint counts", "test": "the test has no metrics"}
    return ", ".join(words[split] for split in splits)


def _beginning(resumed: Checkpoint | None, stream: HistoryStream) -> str:
    if resumed is None:
        return "begins"
    return f"goes on after step {resumed.step}" + (f" with {stream.change}" if stream.change else "")

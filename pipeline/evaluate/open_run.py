"""The model of a run's checkpoint, and the data to evaluate it on."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.types import ShardingPlan

from embeddings.machine import check_stream
from embeddings.sharding import sharded_model
from pipeline.evaluate.evaluate import evaluate, tasks_of
from pipeline.evaluate.metrics import Evaluation
from pipeline.runs.checkpoint import Checkpoint, best_of, checkpoints_in, damage_of, from_first_rank, is_there
from pipeline.runs.checkpoint_files import load
from pipeline.runs.plan_file import read_plan
from pipeline.runs.run_folder import RunFolder
from pipeline.stream.data_set import DataSet
from pipeline.stream.history_stream import HistoryStream
from pipeline.stream.translation import PLURAL, Translation
from schemas.errors import UserError

_LOGGER = logging.getLogger("dare.evaluate")
"""Shown by the first rank alone."""


def choose_checkpoint(run: RunFolder, which: str, *, alone: bool = False) -> Checkpoint:
    """Return a checkpoint of a run, all of whose files have been compared with their checksums.

    All ranks must call it, and get the same one. While a run goes on, its older checkpoints are removed: if that of
    the choice is, the choice is made again.

    Args:
        run: folder of the run.
        which: ``best``, ``last``, or a step. Where no checkpoint was validated, the last one is the best.
        alone: of a delta, not also the files of the full checkpoint that it stands on.

    Raises:
        UserError: the run has no such checkpoint, or it is damaged.
    """
    while True:
        checkpoint = from_first_rank(lambda: _named(run, which))
        damage = damage_of(replace(checkpoint, base=None) if alone else checkpoint)
        if damage is None:
            return checkpoint
        if is_there(checkpoint):
            others = [str(each.step) for each in checkpoints_in(run.checkpoints) if each.step != checkpoint.step]
            choice = f", or take another one by --checkpoint: {', '.join(others)}" if others else ", or train on"
            raise UserError(f"{checkpoint.path} is damaged ({damage}); restore it from a copy{choice}")


def _named(run: RunFolder, which: str) -> Checkpoint:
    """Return a checkpoint by its name, which is `choose_checkpoint`'s ``which``."""
    checkpoints = checkpoints_in(run.checkpoints)
    if not checkpoints:
        raise UserError(f"{run.path}: no checkpoint yet; train first")
    if which == "last":
        return checkpoints[-1]
    if which == "best":
        # One whose record is damaged might be the best.
        unknown = next((each for each in checkpoints if each.damage is not None), None)
        return unknown or best_of(checkpoints) or checkpoints[-1]
    found = next((each for each in checkpoints if str(each.step) == which), None)
    if found is None:
        steps = ", ".join(str(checkpoint.step) for checkpoint in checkpoints)
        raise UserError(f"{run.path}: no checkpoint {which!r}; choose best, last, or one of the steps {steps}")
    return found


def load_chosen(model: nn.Module, run: RunFolder, which: str, checkpoint: Checkpoint) -> None:
    """Load a model's parameters from what `choose_checkpoint` has chosen, or from its next choice if that is gone.

    All ranks must call it.

    Raises:
        UserError: the checkpoint is of another model, or damaged.
    """
    while True:
        try:
            return load_model(model, checkpoint.path)
        except UserError:
            if is_there(checkpoint):
                raise
            checkpoint = choose_checkpoint(run, which)


def load_model(model: nn.Module, checkpoint: Path) -> None:
    """Load a model's parameters and nothing else; all ranks must call it.

    Raises:
        UserError: the checkpoint is of another model.
    """
    # The dictionary's tensors are the model's own, and loading fills them in place; `load_state_dict` then takes what
    # is not a tensor.
    state = {"model": model.state_dict()}
    load(state, checkpoint)
    model.load_state_dict(state["model"])


@contextmanager
def opened_run(
    folder: Path,
    split: str,
    which: str,
    data: Path | None,
    device: torch.device,
    plan: Path | None = None,
    *,
    lines: bool = False,
) -> Iterator[tuple[nn.Module, HistoryStream]]:
    """Open the model of a run's checkpoint, and the stream of a split for this rank; all ranks must call it.

    Args:
        folder: folder of the run.
        split: ``train``, ``validation`` or ``test``.
        which: ``best`` or ``last`` checkpoint, or its step.
        data: folder of the data set; None: the one that the run was trained on.
        device: device of this rank.
        plan: file of a sharding plan to follow, for this number of ranks; None: that of the run where it was trained on
            as many ranks of such a device, else one is made.
        lines: batches say which lines of the impressions their targets are, where the data set does.

    Raises:
        UserError: run, checkpoint, data and plan do not fit each other; the model does not fit the ranks.
    """
    run = RunFolder(folder)
    # Chosen and verified before a model is built, which takes a while.
    settings, checkpoint = run.settings(), choose_checkpoint(run, which)
    if which == "best" and checkpoint.score is None:
        _LOGGER.info("%s: no checkpoint is the best; the last one is taken, of step %d", folder, checkpoint.step)
    data_set = DataSet.open(data or run.data_set())
    # Stored negatives: those that training draws are others in each epoch.
    stream_settings = settings.stream.model_copy(update={"negatives": None})
    check_stream(stream_settings, data_set.manifest)
    features = settings.model.read_features
    translation = _translation(run, data_set, features)
    with HistoryStream(
        data_set.folder,
        split,
        stream_settings,
        seed=settings.seed,
        # In file order: a user's targets come together, and scores come out in the order of the shards.
        shuffle=False,
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        pin_memory=device.type == "cuda",
        features=features,
        lines=lines,
        translation=translation,
    ) as stream:
        # Tables are those of training, whatever ids this data set has.
        manifest = data_set.manifest if translation is None else translation.trained.manifest
        model = sharded_model(settings, manifest, device, read_plan(plan) if plan else _plan_of(run, device))
        load_chosen(model, run, which, checkpoint)
        yield model, stream


def _translation(run: RunFolder, data_set: DataSet, features: Collection[str]) -> Translation | None:
    """What gives the data set's samples the ids of the run's; None: they have them.

    Rows of another dictionary would give predictions that look right and mean nothing.
    """
    if run.has_dictionaries(data_set.folder, data_set.fingerprint, data_set.dictionaries()):
        return None
    trained = DataSet.open(run.data_set())
    if not run.has_dictionaries(trained.folder, trained.fingerprint, trained.dictionaries()):
        raise UserError(
            f"{data_set.folder} has other dictionaries than {run.path} was trained with, and {trained.folder}, which "
            "could tell what they were, has changed since; put that data set back, or train anew"
        )
    translation = Translation.between(data_set, trained, features)
    words = {kind: PLURAL.get(kind, f"values of {kind}") for kind in translation.ids}
    unknown = ", ".join(
        f"{number:,} of {len(translation.ids[kind]) - 1:,} {words[kind]}"
        for kind, number in translation.unknown.items()
    )
    unknown += "".join(f"; it has no {words[kind]}" for kind, ids in translation.ids.items() if len(ids) == 1)
    _LOGGER.info("%s: ids are translated to those of %s; unknown there: %s", data_set.folder, run.path, unknown)
    return translation


def _plan_of(run: RunFolder, device: torch.device) -> ShardingPlan | None:
    """The plan that the run was last trained by, if it is for ranks like these."""
    starts = run.starts()
    if not starts or not run.plan_file.is_file():
        return None
    topology = starts[-1].get("topology") or {}
    alike = (topology.get("ranks"), topology.get("device")) == (dist.get_world_size(), device.type)
    return read_plan(run.plan_file) if alike else None


class Evaluations(dict[str, Evaluation]):
    """The metrics of each task, by its name."""

    unknown: dict[str, dict[str, int]] | None = None
    """Where ids were translated: by ``item`` and the name of each feature, how many ``ids`` the data set has, and how
    many of them are ``unknown`` to the run."""


def evaluate_run(
    folder: Path, split: str, which: str, data: Path | None, device: torch.device, plan: Path | None = None
) -> Evaluations:
    """Compute each task's metrics of a run's checkpoint on a split; arguments and errors are those of `opened_run`."""
    with opened_run(folder, split, which, data, device, plan) as (model, stream):
        if not stream.data_set.manifest.labeled:
            raise UserError(
                f"{stream.data_set.folder}: its impressions have no labels, so there is nothing to compare predictions "
                "with; `dare score` writes them"
            )
        labels = stream.data_set.manifest.labels
        missing = [task.name for task in tasks_of(model) if task.name not in labels]
        if missing:
            said = f"{stream.data_set.folder}: no label {', '.join(missing)}, which the model predicts; its labels"
            if len(missing) == len(tasks_of(model)):
                raise UserError(f"{said} are {', '.join(labels)}: prepare it with impressions.labels by those names")
            _LOGGER.warning("%s are %s: metrics of what is missing are not defined", said, ", ".join(labels))
        evaluations = Evaluations(
            {task: metrics.compute() for task, metrics in evaluate(model, stream, device).items()}
        )
        if stream.translation is not None:
            evaluations.unknown = {
                kind: {"ids": len(stream.translation.ids[kind]) - 1, "unknown": number}
                for kind, number in stream.translation.unknown.items()
            }
        return evaluations

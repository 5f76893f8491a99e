"""The beginning of a run on the checkpoint of another one, whose data set this run's continues."""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element
from torchrec.distributed.model_parallel import get_unwrapped_module

from embeddings.initialization import initialize
from embeddings.model import CtrModel
from pipeline.paths import location
from pipeline.runs.checkpoint import Checkpoint, checkpoints_in, damage_of, from_first_rank, is_there
from pipeline.runs.checkpoint_files import keys_in, load_values, refuse_differences, shapes_of
from pipeline.runs.delta import table_of
from pipeline.runs.run_folder import RunFolder
from pipeline.stream.data_set import DataSet
from pipeline.train.grown_tables import NewRows, fill_with_means, move_rows
from pipeline.train.trainer import Trainer
from schemas.documents import json_document
from schemas.errors import UserError
from schemas.row_layout import RowLayout
from schemas.train import TrainSettings, flat

_LOGGER = logging.getLogger("dare.train")
"""Shown by the first rank alone."""

_MAY_DIFFER = ("learning_rate", "epsilon", "memory", "weight")
"""Settings of tables and tasks that decide no shape, by the last part of their key."""
_MAY_DIFFER_KEYS = ("model.search", "model.communication", "model.cluster_size")
_COUNTS = ("model.retrieved.", "model.recent.")
"""How many behaviours of a sequence: which sequences there are decides shapes, the numbers do not."""


@dataclass(frozen=True)
class Source:
    """The checkpoint that a run begins on."""

    run: RunFolder
    checkpoint: Checkpoint
    fingerprint: str
    """Fingerprint of the data set that it was trained on."""
    day: int | None
    """Which day of the chain that is, or its dictionaries are; None: rows are those of this run's data set."""

    def document(self) -> str:
        """Return what `RunFolder.source_file` holds."""
        record = {"run": str(self.run.path.absolute()), "step": self.checkpoint.step, "fingerprint": self.fingerprint}
        return json_document(json.dumps(record, indent=1) + "\n")


def source_to_take(run: RunFolder, given: Path | None, begun: bool) -> Path | None:
    """Return the folder of the run that a run begins on; None: on none, or it has begun.

    Args:
        run: the run that begins.
        given: what the user says; None: nothing, so that it is what was said when the run was started first.
        begun: whether it has a checkpoint.

    Raises:
        UserError: the run has begun in another way, or is itself what is given.
    """
    recorded = from_first_rank(run.source)
    former = None if recorded is None else location(recorded["run"])
    if not begun:
        if given is not None and given.absolute() == run.path.absolute():
            raise UserError(f"--from {given}: that is the run itself; choose another folder for --run")
        return given or former
    if given is not None and (former is None or former.absolute() != given.absolute()):
        how = "with drawn weights" if former is None else f"from {former}"
        raise UserError(
            f"{run.path}: the run was begun {how}, not from {given}; leave --from out to go on, or choose another "
            "folder"
        )
    return None


def open_source(folder: Path, settings: TrainSettings, data_set: DataSet) -> Source:
    """Choose the last checkpoint of a run that is whole, and make sure that a run may begin on it; all ranks must call.

    Raises:
        UserError: the run has no checkpoint that is whole, another model, or was trained on data that the data set does
            not continue.
    """
    run = RunFolder(folder)
    _refuse_other_shapes(folder, settings, run.settings())
    record = run.data_record()
    day = _day_of(record, folder, data_set)
    if settings.new_rows == "category_mean" and any(name.startswith("item_") for name in settings.init):
        raise UserError("new_rows=category_mean: new items begin with the vectors of init; leave one of the two out")
    return Source(run, _last_whole(run), record["fingerprint"], day)


def _last_whole(run: RunFolder) -> Checkpoint:
    checkpoints = from_first_rank(lambda: checkpoints_in(run.checkpoints))
    if not checkpoints:
        raise UserError(
            f"--from {run.path}: the run has no checkpoint: it has none yet, or `dare online` keeps those of later "
            "days alone; train it, or name another run"
        )
    for checkpoint in reversed(checkpoints):
        damage = damage_of(checkpoint)
        if damage is None:
            return checkpoint
        if is_there(checkpoint):
            _LOGGER.warning("%s is damaged: %s", checkpoint.path, damage)
    raise UserError(f"--from {run.path}: no checkpoint is whole; restore one from a copy, or train the run again")


def _day_of(record: dict[str, Any], folder: Path, data_set: DataSet) -> int | None:
    """Which day of the data set's chain a run has learnt rows of; None: rows are the same."""
    trained = record.get("dictionaries_of") or record["fingerprint"]
    own = data_set.manifest.dictionaries_of or data_set.fingerprint
    if trained == own or record.get("dictionaries") == data_set.dictionaries():
        return None
    days = data_set.days_before
    if trained in days:
        return days.index(trained)
    if own in record.get("days", ()):
        raise UserError(
            f"--from {folder}: {data_set.folder} is an earlier day than that of {record['folder']}, which the run was "
            "trained on; give a later one"
        )
    raise UserError(
        f"--from {folder}: {data_set.folder} does not continue {record['folder']}, which the run was trained on, and "
        "has other dictionaries: prepare it with --extend or --dictionaries, or train without --from"
    )


def _refuse_other_shapes(folder: Path, settings: TrainSettings, former: TrainSettings) -> None:
    ours, theirs = _deciding(settings), _deciding(former)
    different = [
        key
        for key in dict.fromkeys([*ours, *theirs])
        if ours.get(key) != theirs.get(key)
        and not (key.startswith(_COUNTS) and None not in (ours.get(key), theirs.get(key)))
    ]
    if different:
        told = ", ".join(f"{key} is {ours.get(key)!r}, and {theirs.get(key)!r} in that run" for key in different)
        raise UserError(f"--from {folder}: {told}; what decides the shapes of a model must be the same")


def _deciding(settings: TrainSettings) -> dict[str, Any]:
    """The settings that decide which parameters a model has, and their shapes."""
    values = {f"model.{key}": value for key, value in flat(settings.model).items()}
    values["model.tasks"] = [
        f"{task.name} after {task.after}" if task.after else task.name for task in settings.model.tasks
    ]
    kept = {
        key: value
        for key, value in values.items()
        if key.rsplit(".", 1)[-1] not in _MAY_DIFFER and key not in _MAY_DIFFER_KEYS
    }
    sequences = settings.stream.sequences
    if sequences is None:
        return kept | {"stream.history_length": settings.stream.history_length}
    return kept | {f"stream.sequences.{name}.length": sequence.length for name, sequence in sequences.items()}


def start_from(source: Source, trainer: Trainer, settings: TrainSettings, data_set: DataSet) -> None:
    """Give a run the parameters and optimizers' states of a checkpoint; all ranks must call it.

    Rows that are new are drawn by the number of the day, or are means (``new_rows``); their optimizers' states are
    those of a run that begins. Vectors of ``init`` are for new rows alone.

    Args:
        source: what it begins on.
        trainer: of the run, which has made no step.
        settings: of the run.
        data_set: its data.

    Raises:
        UserError: the checkpoint is of another model, or damaged.
    """
    chain, began = data_set.manifest.chain, time.monotonic()
    initialize(trainer.model, settings.seed, chain.number if chain is not None and source.day is not None else 0)
    if settings.init:
        # Loaded by the runs that use it alone.
        from pipeline.train.pretrained import load_vectors

        load_vectors(trainer.model, settings.init, data_set)
    trainer.start_from(lambda state: _fill(state, trainer, source, settings, data_set))
    _LOGGER.info(
        "%s: begins on step %d of %s, read in %.1f s",
        *(data_set.folder.name, source.checkpoint.step, source.run.path, time.monotonic() - began),
    )


def _fill(state: dict[str, Any], trainer: Trainer, source: Source, settings: TrainSettings, data_set: DataSet) -> int:
    """Fill a state's tensors; returns the steps that the optimizers have made."""
    model = get_unwrapped_module(trainer.model)
    assert isinstance(model, CtrModel)
    checkpoint = source.checkpoint.path
    wanted, paths = flatten_state_dict(state)
    saved, shapes = keys_in(checkpoint), shapes_of(state)
    grown = _grown(shapes, saved, model, source, data_set)
    of_state = {key: shape for key, shape in saved.items() if key.split(".")[0] in state and key not in grown}
    refuse_differences(checkpoint, of_state, {key: shape for key, shape in shapes.items() if key not in grown})
    # Tensors are loaded in place.
    loaded: dict[str, Any] = {key: value for key, value in wanted.items() if key not in grown}
    steps = [key for key in ("progress.step", "progress.steps_before") if key in saved]
    loaded |= dict.fromkeys(steps, 0)
    load_values(loaded, checkpoint)
    for key in loaded.keys() & wanted.keys():
        if not isinstance(wanted[key], torch.Tensor | ShardedTensor):
            set_element(state, paths[key], loaded[key])
    new = None
    if source.day is not None and data_set.manifest.placed_items:
        new = NewRows.since(source.day, data_set)
        _LOGGER.info("items: %s rows go on, %s begin anew", f"{new.kept:,}", f"{len(new.place_N):,}")
    for key, feature in grown.items():
        former, shape = saved[key], shapes[key]
        assert former is not None
        assert shape is not None
        of_items = feature == "item"
        layout = RowLayout.of_places if of_items else _by_id
        # A rank without the table takes part, for the others read together with it.
        move_rows(
            key, wanted.get(key), checkpoint, former, (layout(former[0]), layout(shape[0])), new if of_items else None
        )
    if source.day is not None and new is not None and settings.new_rows == "category_mean":
        tables = {key: wanted[key] for key, feature in grown.items() if feature == "item" and key.startswith("model.")}
        fill_with_means(tables, source.day, data_set)
    return sum(int(loaded[key]) for key in steps)


def _by_id(rows: int) -> RowLayout:
    """The layout of a table whose rows lie at their ids."""
    return RowLayout(rows - 1, 1)


def _grown(
    shapes: dict[str, tuple[int, ...] | None],
    saved: dict[str, tuple[int, ...] | None],
    model: CtrModel,
    source: Source,
    data_set: DataSet,
) -> dict[str, str]:
    """Keys of what has more rows than in the checkpoint, or others, with the feature whose rows these are."""
    if source.day is None:
        return {}
    numbered = {each.name for each in data_set.manifest.declared if each.encoding == "dictionary"}
    placed = data_set.manifest.placed_items
    grown = {}
    for key, shape in shapes.items():
        table, former = table_of(key), saved.get(key)
        if table is None or former is None or shape is None:
            continue
        feature = model.tables.specs[table].feature
        # Also where there are no more rows of items than before: some may have another owner.
        moves = placed if feature == "item" else feature in numbered and former != shape
        if moves and former[1:] == shape[1:] and former[0] <= shape[0]:
            grown[key] = feature
    return dict(sorted(grown.items()))

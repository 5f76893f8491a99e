"""The data sets of an experiment: those that are there, or made in its folder by `dare synth` and `dare prepare`."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.experiment.child import Child, stop_all
from pipeline.files import write_whole
from pipeline.stream.data_set import DataSet
from pipeline.train.trainer import StopSignal
from schemas.documents import json_document, read_json
from schemas.errors import StoppedError, UserError
from schemas.experiment import DataSource
from schemas.prepare import PRESETS, PrepareSettings
from schemas.settings import load_settings
from schemas.train import flat

_LOGGER = logging.getLogger("dare.experiment")


def check_sources(sources: Mapping[str, DataSource], given: Mapping[str, Path]) -> None:
    """Make sure that all data sets are there or can be made, before anything is.

    Args:
        sources: by name.
        given: folders that take the place of a source.

    Raises:
        UserError: one is not there and cannot be made; the message says what to do.
    """
    for name in given:
        if name not in sources:
            raise UserError(f"--data {name}=...: the experiment has no such data set; it has {', '.join(sources)}")
    for name, source in sources.items():
        folder = given.get(name) or (Path(source.folder) if source.folder else None)
        if folder is not None:
            DataSet.open(folder)
        elif source.preset is not None:
            _check_preset(name, source)


def _check_preset(name: str, source: DataSource) -> None:
    assert source.preset is not None
    if source.preset not in PRESETS:
        raise UserError(f"data.{name}.preset: must be one of {', '.join(PRESETS)} (not {source.preset!r})")
    try:
        load_settings(PrepareSettings, [PRESETS[source.preset]], source.prepare)
    except UserError as error:
        # All other settings of a preset have values: what lacks is the log itself, which people must bring.
        if "events.files" not in str(error):
            raise UserError(f"data.{name}.prepare: {error}") from None
        raise UserError(
            f"data.{name}: its log does not come with this program; prepare it, "
            f"dare prepare --preset {source.preset} --events FILE --out FOLDER, and give --data {name}=FOLDER"
        ) from None


def open_data_sets(
    sources: Mapping[str, DataSource], given: Mapping[str, Path], out: Path, dare: Sequence[str]
) -> dict[str, DataSet]:
    """Open all data sets; those that are to be made and are not there yet are made.

    Args:
        sources: by name.
        given: folders that take the place of a source.
        out: folder of the experiment.
        dare: the command, such as ``python -m jobs.cli``.

    Returns:
        The data sets, by name.

    Raises:
        UserError: a data set cannot be made, or was made with other settings before.
    """
    data_sets = {}
    for name, source in sources.items():
        folder = given.get(name) or (Path(source.folder) if source.folder else _made(name, source, out / "data", dare))
        data_sets[name] = DataSet.open(folder)
    return data_sets


def _made(name: str, source: DataSource, parent: Path, dare: Sequence[str]) -> Path:
    folder, recipe = parent / name, parent / f"{name}.json"
    definition = json.dumps({key: value for key, value in flat(source).items() if value is not None}, indent=1) + "\n"
    remedy = f"remove it and {folder} to make the data set anew"
    # `dare prepare` gives the folder its name at the end: if it is there, it is whole.
    if folder.is_dir():
        if not recipe.is_file() or read_json(recipe, remedy=remedy) != json.loads(definition):
            raise UserError(
                f"{folder} was made with other settings than data.{name} has now; "
                "remove it to make it anew, or choose another --out"
            )
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    # Before the data: a folder without it is not known to be of these settings.
    write_whole(recipe, json_document(definition))
    log = parent / f"{name}.log"
    events: list[str] = []
    if source.synth is not None:
        file = parent / f"{name}.parquet"
        settings = [f"{key}={value}" for key, value in flat(source.synth).items()]
        _LOGGER.info("%s: generating behaviours", name)
        _do(name, [*dare, "synth", "--out", str(file), "--overwrite", *settings], log)
        events = ["--events", str(file)]
    _LOGGER.info("%s: preparing %s", name, folder)
    # Generated behaviours have the generic column names.
    preset = source.preset or "generic"
    _do(name, [*dare, "prepare", "--preset", preset, *events, "--out", str(folder), *source.prepare], log)
    return folder


def _do(name: str, command: Sequence[str], log: Path) -> None:
    with StopSignal() as stop:
        child = Child(command, {}, log)
        try:
            # The child has a session of its own, so Ctrl-C reaches this process alone, which then stops it.
            while child.wait(1) is None:
                if stop.received:
                    raise StoppedError("stopped while a data set was made; the same command goes on")
        finally:
            stop_all([child])
    if child.code:
        raise UserError(f"data.{name}: {child.complaint()}; see {log}")

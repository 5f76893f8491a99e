"""The folder of a run: what is where in it, who may write in it, and its logs of steps.

A log of steps has a line for each step: JSON objects that begin with the step, in order.
"""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pipeline.files import about, is_locked, locked, write_whole
from pipeline.paths import location
from pipeline.runs.lease import is_leased, leased
from schemas.documents import (
    is_named,
    json_document,
    json_line,
    log_lines,
    notice_unverified,
    read_bytes,
    read_json,
    verify_yaml,
    yaml_document,
)
from schemas.errors import UserError
from schemas.settings import load_settings
from schemas.storage import RemotePath
from schemas.train import TrainSettings

LOCK = ".lock"
"""Lock file in a run's folder, held by the process that trains in it."""
LOOK_S = 1.0
"""Seconds to wait for the lock: `RunFolder.is_locked` holds it for a moment, a training for much longer."""

METRICS = ("auc", "gauc", "log_loss")
"""Metrics of a test; None where one is not defined."""
TEST_KEYS = {"steps": int, "checkpoint_step": int} | dict.fromkeys(METRICS, float | int | None)
"""What `RunFolder.test_file` must have."""


@dataclass(frozen=True)
class RunFolder:
    """Paths and documents of a run; see docs/training.md."""

    path: Path

    @property
    def settings_file(self) -> Path:
        """File of the settings, YAML; may be given to ``dare train --config``."""
        return self.path / "settings.yaml"

    @property
    def data_file(self) -> Path:
        """File that says where the data set is, with its fingerprint and its dictionaries; JSON."""
        return self.path / "data_set.json"

    @property
    def source_file(self) -> Path:
        """File that says on which run's checkpoint this one has begun; JSON. Without it the weights were drawn."""
        return self.path / "source.json"

    @property
    def plan_file(self) -> Path:
        """File of the sharding plan of the last start; may be given to ``dare train --plan``."""
        return self.path / "plan.json"

    @property
    def job_file(self) -> Path:
        """File of all starts: when, where, with what program, how they ended; JSON, see `pipeline.runs.job_record`."""
        return self.path / "job.json"

    @property
    def progress_file(self) -> Path:
        """File that says how far the run is and how fast it goes, as of some seconds ago; JSON."""
        return self.path / "progress.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def losses(self) -> Path:
        """Log of the steps' losses."""
        return self.path / "losses.jsonl"

    @property
    def validations(self) -> Path:
        """Log of the validations' metrics, with a line for each step that was validated."""
        return self.path / "validations.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def profile(self) -> Path:
        """Folder of the traces and the table of steps that were profiled."""
        return self.path / "profile"

    @property
    def test_file(self) -> Path:
        """File of the best checkpoint's metrics on the test split; JSON. It is there only while the run is finished."""
        return self.path / "test.json"

    @property
    def before_file(self) -> Path:
        """File of what the model was measured on before it learnt, of a day of `dare online`; JSON."""
        return self.path / "before.json"

    def settings(self) -> TrainSettings:
        """Return the settings of the run.

        Raises:
            UserError: not the folder of a run, or its settings are not ones that this program knows.
        """
        if not self.settings_file.is_file():
            raise UserError(
                f"{self.path}: no {self.settings_file.name}: not the folder of a run; see `dare train --run`"
            )
        text = read_bytes(self.settings_file)
        if not text.strip():
            raise UserError(f"{self.settings_file} is damaged (empty); restore it from a checkpoint's folder")
        if not verify_yaml(self.settings_file, text):
            notice_unverified(self.path)
        try:
            return load_settings(TrainSettings, [self.settings_file])
        except UserError as error:
            told = str(error)
            raise UserError(told if str(self.settings_file) in told else f"{self.settings_file}: {told}") from None

    def data_record(self) -> dict[str, Any]:
        """Return what the run says of the data set that it was trained on.

        Returns:
            ``folder``, ``fingerprint``; unless an older program wrote it, ``dictionaries``; of a data set that follows
            others, what `pipeline.stream.data_set.DataSet.lineage` says.

        Raises:
            UserError: the run does not say, or the document is damaged.
        """
        return read_json(self.data_file, {"folder": str, "fingerprint": str})

    def data_set(self) -> Path:
        """Return the folder of the data set that the run was trained on; errors are those of `data_record`."""
        return location(self.data_record()["folder"])

    def source(self) -> dict[str, Any] | None:
        """Return the ``run``, the ``step`` and the ``fingerprint`` of the data that this run has begun on, or None.

        Raises:
            UserError: the document is damaged.
        """
        if not is_named(self.source_file):
            return None
        return read_json(self.source_file, {"run": str, "step": int, "fingerprint": str})

    def test(self) -> dict[str, Any]:
        """Return the test's metrics, ``steps`` and ``checkpoint_step``.

        Raises:
            UserError: there is no test, or the document is damaged.
        """
        return read_json(self.test_file, TEST_KEYS, "remove it, and `dare train` tests the run again")

    def progress(self) -> dict[str, Any] | None:
        """Return ``step``, ``steps`` and ``samples_per_s`` as of some seconds ago; None: nothing is known yet.

        Raises:
            UserError: the document is damaged.
        """
        if not is_named(self.progress_file):
            return None
        keys = {"step": int, "steps": int, "samples_per_s": float | int}
        return read_json(self.progress_file, keys, "remove it, nothing else depends on it")

    def starts(self) -> list[dict[str, Any]]:
        """Return all starts of the run so far, the first one first; none: it has not begun.

        Raises:
            UserError: the record is damaged.
        """
        # Not `exists`, which takes a link that leads nowhere for nothing.
        if not is_named(self.job_file):
            return []
        remedy = "without the file, the run goes on"
        starts: list[Any] = read_json(self.job_file, {"starts": list}, remedy)["starts"]
        if not (starts and all(isinstance(start, dict) for start in starts)):
            raise UserError(f"{self.job_file} is damaged (no list of starts); {remedy}")
        return starts

    def begin(
        self,
        documents: Mapping[str, str],
        data: Path,
        fingerprint: str,
        dictionaries: dict[str, Any],
        lineage: Mapping[str, Any] | None = None,
    ) -> None:
        """Write what the run is about. A former test is removed: the run is about to change its model.

        Args:
            documents: texts by name: settings.yaml, plan.json, source.json.
            data: folder of the data set.
            fingerprint: fingerprint of the data set.
            dictionaries: dictionaries of the data set, what `DataSet.dictionaries` returns.
            lineage: what `DataSet.lineage` returns.
        """
        # First: once anything else is rewritten, test.json would speak of another state of the run.
        self.test_file.unlink(missing_ok=True)
        for name, text in documents.items():
            write_whole(self.path / name, text)
        record = {"folder": str(data.absolute()), "fingerprint": fingerprint, "dictionaries": dictionaries}
        record |= lineage or {}
        write_whole(self.data_file, json_document(json.dumps(record, indent=1) + "\n"))

    def has_dictionaries(self, data: Path, fingerprint: str, dictionaries: dict[str, Any]) -> bool:
        """Whether ids mean in a data set what they meant in training. Arguments are those of `begin`.

        Vocabularies of features that the model does not have may differ.

        Raises:
            UserError: the run does not say what they meant.
        """
        record = self.data_record()
        if record["fingerprint"] == fingerprint:
            return True
        # Another data set will do if its ids have the same meaning: those of items and categories always, of behaviour
        # types and scenes only where the model looks at them.
        trained = record.get("dictionaries")
        if not isinstance(trained, dict):
            raise UserError(
                f"{data} is not the data set of {self.path} as it was in training, and {self.data_file.name} does not "
                "say with which dictionaries that was: an older program wrote it; give that data set, or train anew"
            )
        features = self.settings().model.feature_names
        if "features" in trained or "features" in dictionaries:
            # Of versions that say it in different ways, raw ids are matched.
            return _of_used(trained, features) == _of_used(dictionaries, features)
        used = {"items": True, "categories": True, "behaviors": "behavior" in features, "scenes": "scene" in features}
        return not any(used[name] and trained.get(name) != dictionaries[name] for name in used)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process, until the block or the process ends.

        A folder that was made for this, and is still empty at the end, is removed.

        Raises:
            UserError: another process holds it, or the folder is something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; --run names a folder")
        # A run writes many files: never into a folder of something else, where names might clash.
        if self.path.is_dir() and self._content() and not self.settings_file.is_file():
            raise UserError(f"{self.path} is not empty and not the folder of a run; choose another one")
        # A run that is refused (wrong settings, no data) shall leave no empty folder behind.
        made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{self.path}: a part of this path is a file; --run names a folder") from None
        refusal = f"another process is training in {self.path}; wait for it or stop it"
        if isinstance(self._lock_file, RemotePath):
            with leased(self._lock_file, refusal):
                yield
            return
        with locked(self._lock_file, refusal, LOOK_S):
            try:
                with about(self.path):
                    yield
            finally:
                if made and not self._content():
                    with suppress(OSError):
                        self._lock_file.unlink()
                        self.path.rmdir()

    def is_locked(self) -> bool:
        """Whether a process holds the folder. Looking does not hinder one that is about to hold it."""
        file = self._lock_file
        return is_leased(file) if isinstance(file, RemotePath) else is_locked(file)

    @property
    def _lock_file(self) -> Path:
        # A file, not the folder itself: network file systems pass only locks of files on to other hosts.
        return self.path / LOCK

    def _content(self) -> bool:
        return any(entry.name != LOCK for entry in self.path.iterdir())


def _of_used(dictionaries: Mapping[str, Any], features: Collection[str]) -> dict[str, Any]:
    """What matters of a data set's dictionaries to a model with some features."""
    of_features = dictionaries.get("features")
    if not isinstance(of_features, dict):
        return dict(dictionaries)
    return {**dictionaries, "features": {name: of_features[name] for name in features if name in of_features}}


def settings_text(settings: TrainSettings) -> str:
    """Return settings as YAML with their checksum, as they stand in `RunFolder.settings_file`."""
    return yaml_document(OmegaConf.to_yaml(OmegaConf.create(settings.model_dump(mode="json"))))


class StepLog:
    """Appends lines to a log of steps. Where a run goes on from a checkpoint, lines of later steps are cut off first.

    Args:
        path: the file, JSON lines.
        step: step of the checkpoint; 0: the run begins.

    Raises:
        UserError: a line of the file is damaged.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = (len(line) for line, content in log_lines(path) if content["step"] <= step)
        path.touch()
        os.truncate(path, sum(kept))
        # Opened after the cut, to append: the next line follows the checkpoint's.
        self._stream = path.open("a")

    def add(self, step: int, **values: float | None) -> None:
        """Append the line of a step; it is in the file after `flush`."""
        self._stream.write(json_line({"step": step, **values}))

    def flush(self) -> None:
        """Write all lines to the file, so that others see them."""
        self._stream.flush()

    def close(self) -> None:
        """Flush, and close the file."""
        self._stream.close()


def read_step_log(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a log of steps, in order; none if there is no file.

    Raises:
        UserError: a line is damaged.
    """
    return [content for _, content in log_lines(path)]

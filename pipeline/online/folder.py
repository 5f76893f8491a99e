"""The folder of an online run: its settings, what is written down of its days, and their runs."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from pydantic import TypeAdapter, ValidationError

from pipeline.files import locked, remove_folder, write_whole
from pipeline.runs.checkpoint import prune
from pipeline.runs.run_folder import RunFolder
from schemas.documents import json_document, read_json, yaml_document
from schemas.errors import UserError
from schemas.online import LearntDay, OnlineSettings, refuse_changed
from schemas.settings import load_settings

LOCK = ".online.lock"
"""Lock file, held by the first rank. Not the name of a run's, by which runs are found."""
LOOK_S = 1.0
"""Seconds to wait for it."""

_DAYS = TypeAdapter(tuple[LearntDay, ...])


@dataclass(frozen=True)
class OnlineFolder:
    """Paths and documents of an online run; see docs/days.md."""

    path: Path

    @property
    def settings_file(self) -> Path:
        """File of the settings, YAML."""
        return self.path / "online.yaml"

    @property
    def days_file(self) -> Path:
        """File of all days that are done, with what was measured before each was learnt; JSON."""
        return self.path / "days.json"

    @property
    def figure(self) -> Path:
        """Picture of the metrics by day, PNG."""
        return self.path / "days.png"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files, whose steps are days."""
        return self.path / "tensorboard"

    def run(self, name: str) -> RunFolder:
        """The run of a day, by its name."""
        return RunFolder(self.path / "days" / name)

    def begun(self, settings: OnlineSettings) -> tuple[LearntDay, ...]:
        """Make sure that the folder is of a run with these settings, or of none yet.

        Returns:
            Days that are done, the first one first.

        Raises:
            UserError: it was begun with other settings, or its documents are damaged.
        """
        if not self.settings_file.is_file():
            return ()
        refuse_changed(settings, load_settings(OnlineSettings, [self.settings_file]), self.path)
        return self.days()

    def begin(self, settings: OnlineSettings, learnt: Sequence[LearntDay]) -> None:
        """Write what the run is about, and what is done of it."""
        # The list of days first: settings without one are damage.
        self.write_days(learnt)
        text = OmegaConf.to_yaml(OmegaConf.create(settings.model_dump(mode="json")))
        write_whole(self.settings_file, yaml_document(text))

    def days(self) -> tuple[LearntDay, ...]:
        """Return the days that are done, the first one first.

        Raises:
            UserError: the document is missing or damaged.
        """
        remedy = "restore it from a copy"
        content = read_json(self.days_file, {"days": list}, remedy)["days"]
        try:
            return _DAYS.validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{self.days_file} is damaged ({where}: {first['msg']}); {remedy}") from None

    def write_days(self, learnt: Sequence[LearntDay]) -> None:
        """Write down the days that are done."""
        document = {"days": [day.model_dump(mode="json") for day in learnt]}
        write_whole(self.days_file, json_document(json.dumps(document, indent=1) + "\n"))

    def prune(self, learnt: Sequence[LearntDay], keep: int) -> None:
        """Remove the checkpoints of all days but the last ``keep``; of these, those beside the last and the best."""
        runs = [self.run(day.name) for day in learnt if not day.skipped]
        for run in runs[:-keep]:
            # A kill leaves the folder under its hidden name.
            shutil.rmtree(run.checkpoints.with_name(f".{run.checkpoints.name}.removed"), ignore_errors=True)
            if run.checkpoints.is_dir():
                remove_folder(run.checkpoints)
        for run in runs[-keep:]:
            prune(run.checkpoints, 1)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process, until the block or the process ends.

        Raises:
            UserError: another process holds it, or the folder is something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; --run names a folder")
        if self.path.is_dir() and not self.settings_file.is_file():
            # Beside the lock, what a kill leaves right after the beginning.
            own = {LOCK, self.days_file.name}
            if any(entry.name not in own and not entry.name.endswith(".tmp") for entry in self.path.iterdir()):
                raise UserError(f"{self.path} is not empty and not the folder of `dare online`; choose another one")
        made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{self.path}: a part of this path is a file; --run names a folder") from None
        with locked(self.path / LOCK, f"another process is at work in {self.path}; wait for it or stop it", LOOK_S):
            try:
                yield
            finally:
                # What is refused leaves nothing behind.
                if made and [entry.name for entry in self.path.iterdir()] == [LOCK]:
                    with suppress(OSError):
                        (self.path / LOCK).unlink()
                        self.path.rmdir()

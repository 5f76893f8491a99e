"""TensorBoard's event files, named so that it reads those of one run in the order in which they were written."""

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensorboard.compat import tf
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.event_file_writer import EventFileWriter, _AsyncWriter
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.writer import FileWriter

EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\.")
"""Beginning of the name of an event file, with the second at which it was begun."""
VERSION = "brain.Event:2"
FLUSH_S = 15
WAITING_EVENTS = 10
"""How many events may wait to be written before adding one more waits too."""


def ahead_of_clock(folder: Path) -> float:
    """Return by how many seconds TensorBoard's times must be ahead of this machine's clock; mostly 0.

    TensorBoard reads event files in the order of their names, which begin with the time. If the clock went back after
    an earlier start (another node, an empty battery), the new file would be read first, and the old one would then
    purge all that is new. So no new file is older than what is there.
    """
    times = [0.0]
    for file in folder.glob("events.out.tfevents.*"):
        if match := EVENT_FILE.match(file.name):
            # When it was begun and when its last event was written, by the clock of then.
            times += [float(match[1]), file.stat().st_mtime]
    # A whole second ahead: names have no fractions.
    return max(0.0, max(times) + 1 - time.time())


class EventWriter(SummaryWriter):
    """A writer of one event file, which TensorBoard reads after those that are in the folder.

    Args:
        folder: folder of event files.
        purge_step: TensorBoard hides what earlier files have of this step and of later ones.
        ahead_s: what `ahead_of_clock` says.
    """

    def __init__(self, folder: Path, purge_step: int, ahead_s: float) -> None:
        self._begun = time.time() + ahead_s
        super().__init__(str(folder), purge_step=purge_step)

    def _get_file_writer(self) -> Any:
        # In place of torch's own, whose file has the clock's time in its name.
        if self.file_writer is None:
            writer: Any = _Files(_EventFile(self.log_dir, self._begun))
            # torch says that both are None, as they are at first.
            self.file_writer, self.all_writers = writer, {self.log_dir: writer}  # type: ignore[assignment]
            for event in (
                Event(step=self.purge_step, file_version=VERSION),
                Event(step=self.purge_step, session_log=SessionLog(status=SessionLog.START)),
            ):
                writer.add_event(event, self.purge_step, self._begun)
        return self.file_writer


class _Files(FileWriter):
    def __init__(self, event_writer: EventFileWriter) -> None:
        self.event_writer = event_writer


class _EventFile(EventFileWriter):
    """TensorBoard's writer, with a time in the file's name that is given."""

    def __init__(self, folder: str, begun: float) -> None:
        name = f"events.out.tfevents.{int(begun):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._logdir = folder
        tf.io.gfile.makedirs(folder)
        self._file_name: Any = os.path.join(folder, name)
        self._general_file_writer = tf.io.gfile.GFile(self._file_name, "wb")
        self._async_writer = _AsyncWriter(RecordWriter(self._general_file_writer), WAITING_EVENTS, FLUSH_S)
        self.add_event(Event(wall_time=begun, file_version=VERSION))
        self.flush()

    def add_event(self, event: Event) -> None:
        """Add an event; it is written by a thread, whose error comes here with the next one."""
        with self._named():
            super().add_event(event)

    def flush(self) -> None:
        """Write the events that wait."""
        with self._named():
            super().flush()

    def close(self) -> None:
        """Write the events that wait, and close the file."""
        with self._named():
            super().close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file_name) from error

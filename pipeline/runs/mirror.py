"""What a run appends to while it goes: in its own folder or, where that is at a URL, in one that is uploaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.runs.run_folder import RunFolder
from pipeline.upload import scratch_folder
from schemas.storage import RemotePath


class Mirror:
    """Logs and event files of a run.

    Args:
        run: folder of the run.
        local: where files are written; ``run`` itself, or a folder of this machine.
    """

    def __init__(self, run: RunFolder, local: RunFolder) -> None:
        self.local = local
        self._run = run
        self._published: dict[Path, tuple[int, int]] = {}

    def publish(self) -> None:
        """Upload what has changed since the last time; nothing is to be done for a folder on a disk.

        Raises:
            UserError: the store cannot be reached, or refuses.
        """
        if self.local is self._run:
            return
        for file in sorted(path for path in self.local.path.rglob("*") if path.is_file()):
            state = file.stat()
            now = (state.st_size, state.st_mtime_ns)
            target = self._run.path / file.relative_to(self.local.path).as_posix()
            if self._published.get(file) != now and isinstance(target, RemotePath):
                target.upload(file)
                self._published[file] = now


@contextmanager
def mirrored(run: RunFolder) -> Iterator[Mirror]:
    """Open the logs of a run, those of earlier starts included; what was written is published at the end.

    Raises:
        UserError: the store cannot be reached, or refuses.
    """
    if not isinstance(run.path, RemotePath):
        yield Mirror(run, run)
        return
    with scratch_folder() as folder:
        local = RunFolder(folder)
        for former, copy in ((run.losses, local.losses), (run.validations, local.validations)):
            if former.exists():
                copy.write_bytes(former.read_bytes())
        mirror = Mirror(run, local)
        try:
            yield mirror
        finally:
            mirror.publish()

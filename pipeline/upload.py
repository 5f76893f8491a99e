"""What commands write to a URL: into a folder of this machine first, then file by file to the store.

A store has no name that a folder gets when it is whole. So one file is the last: without it, a folder is nothing, and
the next command writes over it.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from schemas.errors import UserError
from schemas.storage import RemotePath

UPLOADS = 8
"""Files that are on their way at once."""


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder on the disk of temporary files (``TMPDIR``), which goes away with the block or the process."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="dare-"))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be made: {error.strerror}; set TMPDIR to another folder") from None
    process = os.getpid()

    def leave_nothing() -> None:
        # A child that was forked in the block has its own end, and this folder is not its own.
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(leave_nothing)
    try:
        yield folder
    finally:
        leave_nothing()
        atexit.unregister(leave_nothing)


def upload_files(folder: Path, out: RemotePath, *, but: str = "") -> None:
    """Upload the files of a folder of this machine, but for one.

    Raises:
        StoreError: the store cannot be reached, or refuses.
    """
    names = sorted(path.name for path in folder.iterdir() if path.name != but)
    with ThreadPoolExecutor(UPLOADS, "upload") as uploads:
        list(uploads.map(lambda name: (out / name).upload(folder / name), names))


@contextmanager
def remote_output(
    out: RemotePath,
    contents: Collection[str],
    last: str,
    *,
    overwrite: bool,
    meet: Callable[[], object] = lambda: None,
) -> Iterator[Path]:
    """A folder of this machine to write into, whose files are at ``out`` when the block has ended well.

    Args:
        out: the folder at the store.
        contents: patterns of the names that such a folder holds; with others in it, it is never overwritten.
        last: name of the file that makes the folder whole; made empty if the block has not.
        overwrite: ``out`` may hold an earlier output that is whole.
        meet: waits for other processes that upload files of their own; called before the first file is uploaded and
            before the last one.

    Raises:
        UserError: ``out`` holds an output (unless ``overwrite``) or something else; the store fails.
    """
    if out.is_file():
        raise UserError(f"{out} is a file; --out names a folder")
    former = list(out.files())
    names = [str(file.relative_to(out)) for file in former]
    foreign = [name for name in names if not any(PurePosixPath(name).match(each) for each in (*contents, last))]
    if foreign:
        raise UserError(f"{out} holds {foreign[0]!r}, which this command did not write; choose another folder")
    if last in names and not overwrite:
        raise UserError(f"{out} is not empty; choose another folder or pass --overwrite")
    with scratch_folder() as folder:
        yield folder
        for hidden in folder.glob(".*"):
            shutil.rmtree(hidden)
        # First of all, so that what is there from here on is no output.
        (out / last).unlink(missing_ok=True)
        with ThreadPoolExecutor(UPLOADS, "upload") as uploads:
            list(uploads.map(lambda file: file.unlink(missing_ok=True), former))
        meet()
        upload_files(folder, out, but=last)
        meet()
        if (folder / last).exists():
            (out / last).upload(folder / last)
        else:
            (out / last).write_bytes(b"")

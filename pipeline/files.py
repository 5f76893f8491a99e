"""Writing what is there whole or not at all, files and folders, and the locks that keep two writers apart.

A file or folder is written under another name beside it and renamed when it is complete and on the disk: a reader, or a
run that begins after a kill or a power cut, never sees half of it. Locks are files that a process holds; the kernel
lets go of them when it dies.
"""

import atexit
import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from filelock import FileLock, Timeout

from schemas.errors import UserError
from schemas.storage import RemotePath

SUCCESS = "_SUCCESS"
"""Name of the empty file that makes a folder at a URL whole, as Spark and Hadoop call it."""


def write_whole(path: Path, content: str | bytes, *, sync: bool = True) -> None:
    """Write a file that is there with all its content, or not at all.

    Args:
        path: of the file.
        content: text is written as UTF-8.
        sync: wait for the disk; without, a power cut may leave half of the file. For what is soon written again.

    Raises:
        OSError: it cannot be written; what was at ``path`` before is still there.
    """
    if isinstance(path, RemotePath):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return
    with whole_file(path, sync=sync) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """A name beside ``path`` to write a file under; ``sync`` is that of `write_whole`.

    The file takes the place of ``path`` if the block ends well and is removed if it fails. What a killed process left
    under that name is overwritten by the next one. Of a path at a URL, the name is that of a file of this machine.
    """
    if isinstance(path, RemotePath):
        from pipeline.upload import scratch_folder

        with scratch_folder() as folder:
            yield folder / path.name
            path.upload(folder / path.name)
        return
    # In the same folder, because a rename is atomic only within a file system.
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with about(path):
            yield unfinished
            if sync:
                give_name(unfinished, path)
            else:
                unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Within the block, an error of the operating system that names no file is one of ``path``.

    Writing to a file that is open says "no space left" and not where.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def give_name(unfinished: Path, path: Path) -> None:
    """Rename a file or a folder that is complete, so that not even a power cut leaves half of it under the new name.

    What is in it is on the disk before the name is, and the name is when this returns.

    Raises:
        OSError: the disk is full or broken.
    """
    for folder, _, files in os.walk(unfinished):  # nothing, if it is a file
        for name in files:
            _sync(Path(folder, name))
        _sync(Path(folder))
    if not unfinished.is_dir():
        _sync(unfinished)
    unfinished.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems have nothing to sync of a folder, and say so.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)


@contextmanager
def output_folder(out: Path, contents: Collection[str], *, overwrite: bool, last: str = SUCCESS) -> Iterator[Path]:
    """A folder beside ``out`` to write into; takes the place of ``out`` if the block ends well, goes away if it fails.

    Where ``out`` is a URL, the folder is on the disk of temporary files; see `pipeline.upload.remote_output`.

    What a killed run left behind is removed by the next one. Entries that begin with a dot are removed at the end.

    Args:
        out: the folder.
        contents: patterns of the names that such a folder holds; with others in it, it is never overwritten.
        overwrite: ``out`` may hold an earlier output.
        last: name of the file that makes the folder at a URL whole.

    Raises:
        UserError: ``out`` is not empty (unless ``overwrite``) or not an earlier output, it cannot be made, or another
            process writes it.
    """
    if isinstance(out, RemotePath):
        from pipeline.upload import remote_output  # Loaded by those who need it alone.

        with remote_output(out, contents, last, overwrite=overwrite) as folder:
            yield folder
        return
    # Absolute, because hidden names are made from the last part of the path: ``.`` has none. Where a link leads, there
    # the folder is to be: perhaps on another disk.
    out = Path(os.path.realpath(out)) if out.is_symlink() else out.absolute()
    if not out.name:
        raise UserError(f"{out}: no folder that can be written; --out names one below it")
    partial, former, lock = (out.with_name(f".{out.name}.{kind}") for kind in ("partial", "former", "lock"))
    _check_replaceable(out, contents, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror}") from None
    process = os.getpid()

    def leave_nothing() -> None:
        # A child that was forked in the block has its own end, and this folder is not its own.
        if os.getpid() == process:
            shutil.rmtree(partial, ignore_errors=True)
            # While it is held: whoever has opened it meanwhile sees that it is gone, and makes a new one.
            lock.unlink(missing_ok=True)

    # Beside the folder, not in it: the folder's contents move to another name while the lock is held.
    with about(out), locked(lock, f"another process is writing {out}; wait for it or stop it"):
        # For a process that ends at once, without unwinding: see `pipeline.errors.end_at_once`.
        atexit.register(leave_nothing)
        try:
            # Another process may have finished between the first look and the lock.
            _check_replaceable(out, contents, overwrite)
            for left in (partial, former):
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir()
            yield partial
            # Work files of the block: they are no part of the output.
            for hidden in partial.glob(".*"):
                shutil.rmtree(hidden)
            if out.exists():
                # Two renames: a folder cannot take the place of one that is not empty. A kill in between leaves
                # ``former``, which the next run removes, and no ``out``.
                out.rename(former)
            give_name(partial, out)
            shutil.rmtree(former, ignore_errors=True)
        except BaseException:
            if former.exists() and not out.exists():
                former.rename(out)
            raise
        finally:
            leave_nothing()
            atexit.unregister(leave_nothing)


def _check_replaceable(out: Path, contents: Collection[str], overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file; --out names a folder")
    entries = sorted(out.iterdir())
    if entries and not overwrite:
        raise UserError(f"{out} is not empty; choose another folder or pass --overwrite")
    foreign = [path.name for path in entries if not any(path.match(pattern) for pattern in contents)]
    if foreign:
        raise UserError(f"{out} holds {foreign[0]!r}, which this command did not write; choose another folder")


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file of this machine that nobody changes a second name; where the disk knows no such links, copy it."""
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(source, target)


def remove_tree(path: Path) -> None:
    """Remove a folder with all that is in it; nothing, where it is not there or a disk does not let it go."""
    if isinstance(path, RemotePath):
        path.remove_tree()
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder of this machine that nobody ever sees half removed: it loses its name first.

    A kill may leave ``.NAME.removed`` behind.
    """
    hidden = path.with_name(f".{path.name}.removed")
    path.rename(hidden)
    shutil.rmtree(hidden)


@contextmanager
def locked(file: Path, refusal: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a lock file for this process alone, until the block or the process ends, however it ends.

    The file and its folder are made if they are not there, and stay. A process that is forked in the block does not
    hold the lock.

    Args:
        file: of the lock.
        refusal: what to say where another process holds it.
        wait_s: seconds to wait for it.

    Raises:
        UserError: another process holds it, or the file cannot be made or locked.
    """
    # A file system without `flock` is refused: filelock's way out, the mere existence of the file, outlives a kill. Not
    # kept by thread, because a generator's `finally` may run in another one.
    lock = FileLock(file, timeout=wait_s, fallback_to_soft=False, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(refusal) from None
    except OSError as error:
        raise UserError(f"{file} cannot be locked: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


def is_locked(file: Path) -> bool:
    """Whether a process holds a lock file. Looking makes no file and needs no right to write."""
    try:
        handle = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        # Not by filelock, which could only try to take the lock: it would make the file, and two who look would see
        # each other. Shared locks do not. One who wants to hold the lock must outwait a look: see ``wait_s``.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def check_output_file(path: Path) -> None:
    """Make sure that a file can be written, before there is anything to write. Its folder is made.

    Raises:
        UserError: it cannot.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Rights and space are told by trying: permission bits say little on a network file system.
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None

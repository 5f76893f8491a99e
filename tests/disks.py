"""A disk that a test can fill."""

import gc
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A disk of so many KiB at ``folder``, which is made; the test is skipped where nobody may mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        # A file that pyarrow could not write is open until its writer is collected.
        gc.collect()
        subprocess.run(["umount", str(folder)], check=True)

"""A file with a line for each step: JSON objects that begin with the step, in order."""

import json
from pathlib import Path
from typing import Any


class StepLog:
    """Appends lines. When a run goes on from a checkpoint, what was written after it is cut off.

    Args:
        path: the file.
        step: of the checkpoint; 0: from the start.
    """

    def __init__(self, path: Path, step: int) -> None:
        path.touch()
        with path.open("rb+") as former:
            end = 0
            for line in former:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
                end += len(line)
            former.truncate(end)
        self._stream = path.open("a")

    def add(self, step: int, **values: float | None) -> None:
        """A line; in the file after `flush`."""
        self._stream.write(json.dumps({"step": step, **values}) + "\n")

    def flush(self) -> None:
        """Let others see all lines."""
        self._stream.flush()

    def close(self) -> None:
        """Flush, and be done."""
        self._stream.close()


def read_step_log(path: Path) -> list[dict[str, Any]]:
    """All whole lines."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]

"""How a step of the check tells what it has measured: a line at a time, so that a step that is ended has told the rest.

This file needs Python alone.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Self

PREFIX = "figure "


@dataclass(frozen=True)
class Figure:
    """One thing that a step has found."""

    name: str
    value: float | str
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal."""
        if self.at_least is None and self.at_most is None:
            return None
        value = float(self.value)
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    @property
    def goal(self) -> str:
        """The goal in words; empty without one."""
        least = "" if self.at_least is None else f">= {self.at_least:g}"
        most = "" if self.at_most is None else f"<= {self.at_most:g}"
        return f"{least} {most}".strip()

    @classmethod
    def from_line(cls, line: str) -> Self | None:
        """The figure that `tell` has printed; None for any other line."""
        return cls(**json.loads(line.removeprefix(PREFIX))) if line.startswith(PREFIX) else None


def tell(
    name: str, value: float | str, unit: str = "", at_least: float | None = None, at_most: float | None = None
) -> None:
    """Print a figure for `benchmarks.gpu.check`, at once."""
    value = value if isinstance(value, str) else float(f"{value:.6g}")
    print(PREFIX + json.dumps(asdict(Figure(name, value, unit, at_least, at_most))), flush=True)


def run_step(steps: Mapping[str, Callable[[], None]]) -> None:
    """Run the step that the command line names."""
    steps[sys.argv[1]]()

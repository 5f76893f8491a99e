"""How many processes a job has, and on how many nodes."""

import re
from dataclasses import dataclass

from torchx.specs.finder import ComponentValidationException


class JobError(ValueError, ComponentValidationException):
    """A job that cannot be described as asked; torchx's command line shows these without a traceback."""


@dataclass(frozen=True)
class Processes:
    """Nodes of a job and processes of each."""

    nodes: int
    per_node: int

    @classmethod
    def parse(cls, text: str, gpus: int) -> "Processes":
        """Read ``nodes`` or ``nodes x processes``.

        Args:
            text: such as ``2`` or ``2x8``.
            gpus: of a node; if processes are not said there is one for each, or two if there are none.

        Raises:
            ValueError: another text, none of something, or more processes than GPUs.
        """
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
        if match is None:
            raise JobError(f"-j {text}: nodes, or nodes x processes of each, are wanted, such as 2 or 2x8")
        nodes, per_node = int(match[1]), int(match[2] or gpus or 2)
        if not nodes or not per_node:
            raise JobError(f"-j {text}: at least one node and one process are needed")
        if gpus and per_node > gpus:
            raise JobError(f"-j {text}: {per_node} processes on nodes of {gpus} GPUs; each needs one of its own")
        return cls(nodes, per_node)

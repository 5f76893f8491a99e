"""What a manifest of an exported model says of its programs: the dense part, and what its search computes."""

from typing import Literal

from schemas.settings import Settings

ProgramName = Literal["dense", "queries", "score", "signature"]

SearchKind = Literal["dot_product", "clusters", "score", "signature", "category", "category_filled", "latest", "none"]
"""How behaviours are searched: by a dot product of rows, of those that stand for clusters, by any score of a pair, by
the distance of signatures, the latest of the target's category (``filled``: then the latest of the others), the latest
of all; ``none``: all are attended to."""


class Program(Settings):
    """A function of tensors, exported by torch."""

    path: str
    """File of the graph and its weights, relative to the manifest."""
    inputs: tuple[str, ...]
    """Names of the tensors that it takes, in order."""
    outputs: tuple[str, ...]
    """Names of the tensors that it returns, in order."""
    compiled: str | None = None
    """File of machine code that computes the same; None: there is none."""


class CompiledFor(Settings):
    """Where compiled programs run: elsewhere the graphs are run instead."""

    torch: str
    """Version of torch."""
    processor: str
    """Instructions that the code uses, as ``torch.backends.cpu.get_cpu_capability()`` names them."""
    machine: str
    """Architecture, as ``platform.machine()`` names it."""


class Programs(Settings):
    """All that an exported model computes after its rows are there, and where its rows come from."""

    features: tuple[str, ...]
    """Names of the features that the model uses, in the order of its settings."""
    search: SearchKind
    target_attention: str
    """The set of tables of the targets' attention rows."""
    history_attention: str
    target_representation: str
    history_representation: str
    programs: dict[ProgramName, Program]
    compiled_for: CompiledFor | None = None
    """None: no program is compiled."""
    why_not_compiled: str | None = None
    """In a line, if no program is compiled though it was asked for."""

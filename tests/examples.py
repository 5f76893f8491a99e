"""How many examples the dear properties are tried with: those that write files or train for each."""

import os


def examples(quick: int, explored: int) -> int:
    """``quick`` in `make test`; ``explored`` in `make test-slow`, whose examples are others each time."""
    return explored if os.environ.get("HYPOTHESIS_PROFILE") == "explore" else quick

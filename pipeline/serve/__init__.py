"""Answers of an exported model: without the training program, the run and the data set that it was made of."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.serve.predictor import Predictor

__all__ = ["Predictor"]


def __getattr__(name: str) -> Any:
    # Stores of histories, which are rooms of this package too, need no model.
    if name == "Predictor":
        from pipeline.serve.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

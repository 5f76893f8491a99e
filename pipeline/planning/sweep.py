"""Dry runs over combinations of a few settings.

What would make a model fit: changes that are tried with the planner, each alone, from small to large.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

from embeddings.sizes import DataSizes
from pipeline.planning.dry_run import DryRun, dry_run
from schemas.errors import UserError
from schemas.model import ModelSettings
from schemas.plan import PlanSettings

SHORT: dict[str, tuple[str, ...]] = {
    "attention_dim": ("model", "attention", "dim"),
    "representation_dim": ("model", "representation", "dim"),
    "batch_size": ("stream", "batch_size"),
    "history_length": ("stream", "history_length"),
    "nodes": ("cluster", "nodes"),
    "items": ("sizes", "items"),
}
"""Names that a sweep knows beside ``ranks``, and the settings that they stand for."""

NAMES = ("ranks", *SHORT)

Axis = tuple[str, tuple[int, ...]]


def axis(text: str) -> Axis:
    """``name=1,2,3`` as a name and its values.

    Raises:
        UserError: another form, an unknown name, no whole numbers above 0.
    """
    name, equals, values = text.partition("=")
    if name not in NAMES:
        raise UserError(f"--sweep {text}: unknown name; known are {', '.join(NAMES)}")
    try:
        numbers = tuple(int(value) for value in values.split(","))
    except ValueError:
        numbers = ()
    if not equals or not numbers or min(numbers) < 1:
        raise UserError(f"--sweep {text}: is written {name}=1,2,3, with whole numbers above 0")
    return name, numbers


def sweep(settings: PlanSettings, sizes: DataSizes, axes: Sequence[Axis]) -> Iterator[tuple[dict[str, int], DryRun]]:
    """A dry run of each combination.

    Raises:
        UserError: a combination that is not possible.
    """
    for values in product(*(numbers for _, numbers in axes)):
        point = dict(zip((name for name, _ in axes), values, strict=True))
        of_point, of_sizes = settings, sizes
        for name, value in point.items():
            if name == "ranks":
                of_point = changed(of_point, {"cluster": _nodes(of_point, value)})
                continue
            change: dict[str, Any] = {}
            place = change
            *outer, last = SHORT[name]
            for key in outer:
                place = place.setdefault(key, {})
            place[last] = value
            if name == "items":
                of_sizes = DataSizes(**{**vars(of_sizes), "items": value})
                continue
            if name == "history_length":
                if settings.stream.sequences:
                    raise UserError("--sweep history_length: the stream has sequences with lengths of their own")
                of_sizes = DataSizes(**{**vars(of_sizes), "lengths": {"history": value}})
            of_point = changed(of_point, change)
        yield point, dry_run(of_point, of_sizes)


def _nodes(settings: PlanSettings, ranks: int) -> dict[str, int]:
    """So many ranks: on as many nodes as they fill, or on a part of one."""
    each = settings.cluster.devices_per_node
    if ranks <= each:
        return {"nodes": 1, "devices_per_node": ranks}
    if ranks % each:
        raise UserError(f"--sweep ranks={ranks}: nodes have {each} devices; give a multiple of it, or fewer")
    return {"nodes": ranks // each}


MOST_NODES = 64
"""Times the nodes of the cluster that are tried."""


def remedies(failed: DryRun) -> Iterator[str]:
    """Changes that fit, as settings to give to ``dare plan``; from each kind the smallest one.

    Args:
        failed: a dry run that does not fit.
    """
    settings, model = failed.settings, failed.settings.model
    yield from _more_nodes(failed)
    if failed.search == "local" and not model.auxiliary_loss:
        yield from _tried(failed, {"model": {"search": "shard"}}, "model.search=shard")
    shared = model.attention == model.representation
    if not shared:
        yield from _dims(failed, ("attention",))
        yield from _dims(failed, ("representation",))
    yield from _dims(failed, ("attention", "representation"))
    if settings.cluster.device == "cuda":
        for key, value in (("precision", "fp16"), ("memory", "host")):
            changes = {concern: {key: value} for concern in ("attention", "representation")}
            words = " ".join(f"model.{concern}.{key}={value}" for concern in changes)
            yield from _tried(failed, {"model": changes}, words)
    yield from _smallest(
        failed,
        lambda batch: ({"stream": {"batch_size": batch}}, f"stream.batch_size={batch}"),
        _halves(settings.stream.batch_size, 16),
    )


def _more_nodes(failed: DryRun) -> Iterator[str]:
    """The fewest nodes that hold it: doubled until they do, then halved in on."""
    had = failed.settings.cluster.nodes
    low, high = had, had
    while high < had * MOST_NODES:
        high *= 2
        if _fits(failed, {"cluster": {"nodes": high}}):
            break
        low = high
    else:
        return
    while high - low > max(1, high // 16):
        middle = (low + high) // 2
        low, high = (low, middle) if _fits(failed, {"cluster": {"nodes": middle}}) else (middle, high)
    yield f"cluster.nodes={high} ({high * failed.settings.cluster.devices_per_node:,} ranks)"


def _dims(failed: DryRun, concerns: tuple[str, ...]) -> Iterator[str]:
    """The largest smaller dim that fits."""
    model: ModelSettings = failed.settings.model

    def change(halved: int) -> tuple[dict[str, Any], str]:
        dims = {concern: max(4, getattr(model, concern).dim // halved // 4 * 4) for concern in concerns}
        words = " ".join(f"model.{concern}.dim={dim}" for concern, dim in dims.items())
        return {"model": {concern: {"dim": dim} for concern, dim in dims.items()}}, words

    largest = max(getattr(model, concern).dim for concern in concerns)
    yield from _smallest(failed, change, [halved for halved in (2, 4, 8, 16) if largest // halved >= 4])


def _halves(value: int, least: int) -> list[int]:
    found = []
    while value // 2 >= least:
        value //= 2
        found.append(value)
    return found


def _smallest(failed: DryRun, change: Callable[[int], tuple[dict[str, Any], str]], steps: list[int]) -> Iterator[str]:
    for step in steps:
        values, words = change(step)
        if _fits(failed, values):
            yield words
            return


def _tried(failed: DryRun, values: dict[str, Any], words: str) -> Iterator[str]:
    if _fits(failed, values):
        yield words


def _fits(failed: DryRun, values: dict[str, Any]) -> bool:
    return dry_run(changed(failed.settings, values), failed.sizes).feasible


def changed(settings: PlanSettings, values: dict[str, Any]) -> PlanSettings:
    """The settings with some of them changed, checked again.

    Raises:
        UserError: they do not fit each other.
    """
    merged = settings.model_dump()

    def merge(into: dict[str, Any], part: dict[str, Any]) -> None:
        for key, value in part.items():
            if isinstance(value, dict) and isinstance(into.get(key), dict):
                merge(into[key], value)
            else:
                into[key] = value

    merge(merged, values)
    return PlanSettings.model_validate(merged)

"""Dry runs with changed settings: over combinations of a few of them, and in search of what makes a model fit."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

from embeddings.models import MODELS
from embeddings.sizes import DataSizes
from pipeline.planning.dry_run import DryRun, dry_run
from schemas.errors import UserError
from schemas.model import ModelSettings
from schemas.plan import PlanSettings
from schemas.settings import load_settings

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
"""The short name of a setting, and its values in a sweep."""

Changes = dict[str, Any]
"""Settings that change, nested by section."""


def axis(text: str) -> Axis:
    """Read an axis that is written ``name=1,2,3``.

    Raises:
        UserError: it is written otherwise, its name is unknown, or a value is no whole number above 0.
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
    """Make a dry run of each combination of the axes' values; the last axis changes fastest.

    Args:
        settings: of everything that no axis changes.
        sizes: of the data.
        axes: at least one.

    Yields:
        The value of each axis by its name, and the dry run.

    Raises:
        UserError: a combination is not possible.
    """
    for values in product(*(numbers for _, numbers in axes)):
        point = dict(zip((name for name, _ in axes), values, strict=True))
        # One setting after the other: ranks and items are no plain settings, a length is one of two things.
        of_point, of_sizes = settings, sizes
        for name, value in point.items():
            if name == "ranks":
                of_point = changed(of_point, {"cluster": _nodes(of_point, value)})
                continue
            if name == "items":
                of_sizes = DataSizes(**{**vars(of_sizes), "items": value})
                continue
            if name == "history_length":
                if settings.stream.sequences:
                    raise UserError("--sweep history_length: the stream has sequences with lengths of their own")
                # Sizes are made of settings before the sweep: a length must change in both.
                of_sizes = DataSizes(**{**vars(of_sizes), "lengths": {"history": value}})
            change: Changes = {SHORT[name][-1]: value}
            for section in reversed(SHORT[name][:-1]):
                change = {section: change}
            of_point = changed(of_point, change)
        yield point, dry_run(of_point, of_sizes)


def _nodes(settings: PlanSettings, ranks: int) -> dict[str, int]:
    """Settings of a cluster of so many ranks: on as many nodes as they fill, or on a part of one."""
    each = settings.cluster.devices_per_node
    if ranks <= each:
        return {"nodes": 1, "devices_per_node": ranks}
    if ranks % each:
        raise UserError(f"--sweep ranks={ranks}: nodes have {each} devices; give a multiple of it, or fewer")
    return {"nodes": ranks // each}


MOST_NODES = 64
"""Remedies have at most so many times the nodes of the cluster."""


def remedies(failed: DryRun) -> Iterator[str]:
    """Changes with which a model fits, each alone; of each kind the smallest one.

    Args:
        failed: a dry run that does not fit.

    Yields:
        Settings as they are given to ``dare plan``.
    """
    settings, model = failed.settings, failed.settings.model
    yield from _more_nodes(failed)
    if failed.search == "local" and not model.auxiliary_loss:
        yield from _tried(failed, {"model": {"search": "shard"}}, "model.search=shard")
    # A model with one set of tables has equal settings for both roles, and is refused with others (`TableRoles.sets`).
    shared = model.attention == model.representation
    if not shared:
        yield from _dims(failed, ("attention",))
        yield from _dims(failed, ("representation",))
    yield from _dims(failed, ("attention", "representation"))
    if settings.cluster.device == "cuda":
        # Neither exists on a CPU (`check_tables`), and what a shard searches must be on the device.
        both = ("attention", "representation")
        yield from _tables(failed, both, "precision", "fp16")
        if failed.search == "local":
            yield from _tables(failed, both, "memory", "host")
        elif not MODELS[model.name].roles.attention & MODELS[model.name].roles.representation:
            yield from _tables(failed, ("representation",), "memory", "host")
    yield from _smallest(
        failed,
        lambda batch: ({"stream": {"batch_size": batch}}, f"stream.batch_size={batch}"),
        _halves(settings.stream.batch_size, 16),
    )


def _more_nodes(failed: DryRun) -> Iterator[str]:
    """The fewest nodes that hold the model, to a sixteenth: doubled until they do, then bisected."""
    had = failed.settings.cluster.nodes
    low, high = had, had
    # Doubling first: from one node to sixty-four it takes six dry runs, not sixty-three.
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


def _dims(failed: DryRun, roles: tuple[str, ...]) -> Iterator[str]:
    """The least halving of the dims of these roles that fits."""
    model: ModelSettings = failed.settings.model

    def change(divisor: int) -> tuple[Changes, str]:
        # FBGEMM takes dims that are multiples of 4.
        dims = {role: max(4, getattr(model, role).dim // divisor // 4 * 4) for role in roles}
        words = " ".join(f"model.{role}.dim={dim}" for role, dim in dims.items())
        return {"model": {role: {"dim": dim} for role, dim in dims.items()}}, words

    largest = max(getattr(model, role).dim for role in roles)
    yield from _smallest(failed, change, [divisor for divisor in (2, 4, 8, 16) if largest // divisor >= 4])


def _halves(value: int, least: int) -> list[int]:
    halves = []
    while value // 2 >= least:
        value //= 2
        halves.append(value)
    return halves


def _smallest(failed: DryRun, change: Callable[[int], tuple[Changes, str]], values: list[int]) -> Iterator[str]:
    """The words of the first change that fits; ``values`` are tried in order."""
    for value in values:
        changes, words = change(value)
        if _fits(failed, changes):
            yield words
            return


def _tables(failed: DryRun, roles: tuple[str, ...], key: str, value: str) -> Iterator[str]:
    """One value of a setting for all tables of these roles, if it fits."""
    words = " ".join(f"model.{role}.{key}={value}" for role in roles)
    yield from _tried(failed, {"model": {role: {key: value} for role in roles}}, words)


def _tried(failed: DryRun, changes: Changes, words: str) -> Iterator[str]:
    if _fits(failed, changes):
        yield words


def _fits(failed: DryRun, changes: Changes) -> bool:
    return dry_run(changed(failed.settings, changes), failed.sizes).feasible


def changed(settings: PlanSettings, changes: Changes) -> PlanSettings:
    """The settings with some of them changed, checked again.

    Args:
        settings: to begin with; they stay as they are.
        changes: of some of them.

    Raises:
        UserError: they do not fit each other.
    """
    # Through text and validation again, not by `model_copy`: a change may not fit the rest.
    return load_settings(PlanSettings, values=_merged(settings.model_dump(mode="json"), changes))


def _merged(values: Changes, changes: Changes) -> Changes:
    return values | {
        key: _merged(values[key], value) if isinstance(value, dict) and isinstance(values.get(key), dict) else value
        for key, value in changes.items()
    }

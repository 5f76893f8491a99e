"""Dry runs over combinations of a few settings."""

from collections.abc import Iterator, Sequence
from itertools import product

from embeddings.plan.dry_run import DryRun, dry_run
from embeddings.plan.remedies import changed
from embeddings.sizes import DataSizes
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
        ValueError: another form, an unknown name, no whole numbers above 0.
    """
    name, equals, values = text.partition("=")
    if name not in NAMES:
        raise ValueError(f"--sweep {text}: unknown name; known are {', '.join(NAMES)}")
    try:
        numbers = tuple(int(value) for value in values.split(","))
    except ValueError:
        numbers = ()
    if not equals or not numbers or min(numbers) < 1:
        raise ValueError(f"--sweep {text}: is written {name}=1,2,3, with whole numbers above 0")
    return name, numbers


def sweep(settings: PlanSettings, sizes: DataSizes, axes: Sequence[Axis]) -> Iterator[tuple[dict[str, int], DryRun]]:
    """A dry run of each combination.

    Raises:
        ValueError: a combination that is not possible.
    """
    for values in product(*(numbers for _, numbers in axes)):
        point = dict(zip((name for name, _ in axes), values, strict=True))
        of_point, of_sizes = settings, sizes
        for name, value in point.items():
            if name == "ranks":
                of_point = changed(of_point, {"cluster": _nodes(of_point, value)})
                continue
            change: dict = {}
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
                    raise ValueError("--sweep history_length: the stream has sequences with lengths of their own")
                of_sizes = DataSizes(**{**vars(of_sizes), "lengths": {"history": value}})
            of_point = changed(of_point, change)
        yield point, dry_run(of_point, of_sizes)


def _nodes(settings: PlanSettings, ranks: int) -> dict[str, int]:
    """So many ranks: on as many nodes as they fill, or on a part of one."""
    each = settings.cluster.devices_per_node
    if ranks <= each:
        return {"nodes": 1, "devices_per_node": ranks}
    if ranks % each:
        raise ValueError(f"--sweep ranks={ranks}: nodes have {each} devices; give a multiple of it, or fewer")
    return {"nodes": ranks // each}

"""What would make a model fit: changes that are tried with the planner, each alone, from small to large."""

from collections.abc import Callable, Iterator

from embeddings.plan.dry_run import DryRun, dry_run
from schemas.model import ModelSettings
from schemas.plan import PlanSettings

MOST_NODES = 64
"""Times the nodes of the cluster that are tried."""


def remedies(failed: DryRun) -> Iterator[str]:
    """Changes that fit, as settings to give to ``dare plan``; from each kind the smallest one.

    Args:
        failed: a dry run that does not fit.
    """
    settings, model = failed.settings, failed.settings.model
    yield from _nodes(failed)
    if failed.search == "home" and not model.auxiliary_loss:
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


def _nodes(failed: DryRun) -> Iterator[str]:
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

    def change(halved: int) -> tuple[dict, str]:
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


def _smallest(failed: DryRun, change: Callable[[int], tuple[dict, str]], steps: list[int]) -> Iterator[str]:
    for step in steps:
        values, words = change(step)
        if _fits(failed, values):
            yield words
            return


def _tried(failed: DryRun, values: dict, words: str) -> Iterator[str]:
    if _fits(failed, values):
        yield words


def _fits(failed: DryRun, values: dict) -> bool:
    return dry_run(changed(failed.settings, values), failed.sizes).feasible


def changed(settings: PlanSettings, values: dict) -> PlanSettings:
    """The settings with some of them changed, checked again.

    Raises:
        ValueError: they do not fit each other.
    """
    merged = settings.model_dump()

    def merge(into: dict, part: dict) -> None:
        for key, value in part.items():
            if isinstance(value, dict) and isinstance(into.get(key), dict):
                merge(into[key], value)
            else:
                into[key] = value

    merge(merged, values)
    return PlanSettings.model_validate(merged)

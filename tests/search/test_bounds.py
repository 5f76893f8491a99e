"""A batch that points outside of tables or histories is refused by name, on every rank, before anyone searches."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from embeddings.batch import Batch, History
from schemas.errors import UserError
from tests.launcher import run_ranks
from tests.toy_model import TWO, batch_of, model_of, settings_of, sharded_like

SEQUENCE = "content"  # the second one; its windows have up to 9 behaviours


def spoiled(column: str, value: int) -> Callable[[Batch, History], None]:
    """Give one behaviour another value."""

    def spoil(batch: Batch, history: History) -> None:
        (history.item_M if column == "item" else history.features_M[column])[3] = value

    return spoil


def window(start: int, end: int, *, behind: bool = False) -> Callable[[Batch, History], None]:
    """Give one target another window, counted from the first behaviour, or from behind the last one."""

    def spoil(batch: Batch, history: History) -> None:
        first = len(history.item_M) if behind else 0
        history.start_T[2], history.end_T[2] = first + start, first + end

    return spoil


def target_scene(batch: Batch, history: History) -> None:
    batch.features_T["scene"][1] = 4


WRONG: dict[str, tuple[Callable[[Batch, History], None], str]] = {
    "behaviour type": (spoiled("behavior", 5), "behavior 5, but the behavior tables have 5 rows"),
    "negative behaviour type": (spoiled("behavior", -1), "behavior -1, but the behavior tables have 5 rows"),
    "scene": (spoiled("scene", 4), "scene 4, but the scene tables have 4 rows"),
    "scene of a target": (target_scene, "scene 4, but the scene tables have 4 rows"),
    "item": (spoiled("item", 51), "item 51, but the item tables have 51 rows"),
    "negative item": (spoiled("item", -(2**31)), "item -2147483648, but the item tables have 51 rows"),
    "category": (spoiled("category", 9), "category 9, but the category tables have 4 rows"),
    "behind": (window(-1, 1, behind=True), "a window of content is outside of its behaviours"),
    "before": (window(-1, 1), "a window of content is outside of its behaviours"),
    "backwards": (window(2, 1), "a window of content is outside of its behaviours"),
    "too long": (window(0, 10), "a history of 10 behaviours in content; the model was built for 9"),
}


def refused() -> list[str]:
    """What this rank says of each batch, of which only that of the last rank is wrong; nothing where none is."""
    settings, said = settings_of("dare", **TWO), []
    model = sharded_like(model_of(settings))
    for spoil, _ in [*WRONG.values(), (None, "")]:
        batch = batch_of(settings, seed=dist.get_rank())
        if spoil is not None and dist.get_rank() == dist.get_world_size() - 1:
            spoil(batch, batch.histories[SEQUENCE])
        try:
            assert torch.isfinite(model(batch).logit_T).all()
            said.append("")
        except UserError as error:
            said.append(str(error))
    return said


@pytest.mark.slow
def test_all_ranks_refuse_the_batch_of_one() -> None:
    """They end together: a rank that went on would wait in the next collective."""
    (alone,), (other, concerned) = run_ranks(1, refused), run_ranks(2, refused)
    expected = [message for _, message in WRONG.values()]
    assert alone == [f"toy batch 0: {message}" for message in expected] + [""]
    assert concerned == [f"toy batch 1: {message}" for message in expected] + [""]
    # The last batches are right, and all ranks still are in step.
    assert other == [f"the batch of rank 1: {message}" for message in expected] + [""]

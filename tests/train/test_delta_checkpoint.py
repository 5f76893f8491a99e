"""Delta checkpoints: a full one and the rows that have changed since are the state, bit for bit, or are refused."""

import json
import shutil
from collections.abc import Iterator
from itertools import chain as chained
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from embeddings.distributed.changed_rows import RowMarks
from embeddings.distributed.process_group import process_group
from pipeline.runs.checkpoint import RECORD, checkpoints_in, damage_of, final_path, prune
from schemas.errors import UserError
from schemas.train import TrainSettings
from tests.delta_checkpoints import SETTINGS, Values, loaded, read_by_the_format, trained
from tests.launcher import run_ranks
from tests.runs import small_settings
from tests.toy_batch import part, toy_batch
from tests.trainers import CPU, SplitBatches


class FewTargets(SplitBatches):
    """Batches that leave most rows of the item table alone."""

    def __iter__(self) -> Iterator[Any]:
        for step in range(self.step, self.steps_per_epoch):
            yield part(toy_batch(step, users=2, targets=4, longest=4), dist.get_rank(), dist.get_world_size())


def whole(of_ranks: list[Values]) -> dict[str, bytes]:
    """The values of all ranks together, by key."""
    # What is not sharded is the same on all of them.
    return {
        key: b"".join(dict(sorted(chained.from_iterable(of[key] for of in of_ranks))).values()) for key in of_ranks[0]
    }


def goes_on(settings: TrainSettings, data: Path, folder: Path) -> tuple[dict[int, Values], int]:
    """Train; each checkpoint has its state, and from a delta training goes on as if nothing had been.

    Returns:
        The states by step, and how many of them are of deltas.
    """
    losses, states = trained(settings, data, folder)
    checkpoints = checkpoints_in(folder)
    assert [each.step for each in checkpoints] == sorted(states) == [1, 2, 3, 4, 5, 6]
    for checkpoint in checkpoints:
        assert loaded(settings, data, checkpoint) == states[checkpoint.step]
    # A full one comes after the one, after the other another delta that stands on the same.
    for checkpoint in (checkpoints[1], checkpoints[3]):
        assert checkpoint.base is not None
        step, again = checkpoint.step, folder.with_name(f"{folder.name}-from-{checkpoint.step}")
        if dist.get_rank() == 0:
            again.mkdir()
            for each in (step, checkpoint.base.step):
                shutil.copytree(final_path(folder, each), final_path(again, each))
        dist.barrier()
        further, later = trained(settings, data, again, checkpoint)
        assert (further, later) == (losses[step:], {each: states[each] for each in states if each >= step})
        there = {each.step: each for each in checkpoints_in(again)}
        assert all(damage_of(each) is None for each in there.values())
        assert there[5].base
        assert there[5].base.step == 3
        assert loaded(settings, data, there[5]) == states[5]
    return states, sum(each.base is not None for each in checkpoints)


@pytest.fixture(scope="module")
def data(few_users: Path) -> Path:
    return few_users


MODELS: dict[str, tuple[str, ...]] = {
    "rowwise_adagrad": (),
    "adagrad, sgd": ("model.attention.optimizer=adagrad", "model.representation.optimizer=sgd"),
    "shared tables": ("model.name=twin", "model.attention.dim=8"),
    "another optimizer a feature": ("model.attention.features={item: {optimizer: adagrad, dim: 8}}",),
    "searched locally": ("model.search=local",),
}


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_a_delta_has_the_state_of_its_step(data: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    with process_group(CPU):
        assert goes_on(small_settings(*SETTINGS, *overrides), data, tmp_path / "run")[1] == 3


def goes_on_table_by_table(settings: TrainSettings, data: Path, folder: Path) -> tuple[dict[int, Values], int]:
    """Do what `goes_on` does with each table on one rank, as the planner has it where a table has too few rows."""
    from embeddings import planning

    planning._leaves_out_a_rank = lambda rows, ranks: True
    return goes_on(settings, data, folder)


@pytest.mark.slow
def test_tables_that_one_rank_has(data: Path, tmp_path: Path) -> None:
    settings = small_settings(*SETTINGS, "model.search=local")
    of_ranks = run_ranks(2, goes_on_table_by_table, settings, data, tmp_path / "two")
    assert [deltas for _, deltas in of_ranks] == [3, 3]
    # The ranks have the states of different tables.
    assert len({frozenset(states[5]) for states, _ in of_ranks}) == 2


def test_other_ranks_read_a_delta(data: Path, tmp_path: Path) -> None:
    settings = small_settings(*SETTINGS)
    of_ranks = run_ranks(2, goes_on, settings, data, tmp_path / "two")
    assert [deltas for _, deltas in of_ranks] == [3, 3]
    with process_group(CPU):
        for checkpoint in checkpoints_in(tmp_path / "two"):
            states = [states[checkpoint.step] for states, _ in of_ranks]
            assert whole([loaded(settings, data, checkpoint)]) == whole(states)
        _, states = trained(settings, data, tmp_path / "one")
    *_, delta, _ = checkpoints_in(tmp_path / "one")
    assert delta.base is not None
    assert whole(run_ranks(3, loaded, settings, data, delta)) == whole([states[delta.step]])


def test_a_delta_has_the_rows_that_were_looked_up(data: Path, tmp_path: Path) -> None:
    settings = small_settings(*SETTINGS)
    with process_group(CPU):
        _, states = trained(settings, data, tmp_path, None, FewTargets)
    key = "model.tables.inherent.representation.embedding_bags.item_representation.weight"
    tables = {step: np.frombuffer(state[key][0][1], np.float32).reshape(51, 8) for step, state in states.items()}
    for step, base in ((2, 1), (4, 3), (5, 3)):
        tensors = read_by_the_format(final_path(tmp_path, step) / "rows-0.safetensors")
        rows = tensors["rows.item_representation"]
        changed = (tables[step] != tables[base]).any(1).nonzero()[0]
        assert 0 < len(changed) <= len(rows) < 51
        assert set(changed) <= set(rows)
        assert (tensors[key] == tables[step][rows]).all()
        # Every row that was looked up is there, whether or not it has changed; none other is.
        targets = [toy_batch(each, users=2, targets=4, longest=4) for each in range(base, step)]
        possible = {0} | {int(item) for of in targets for item in (*of.item_T, *of.histories["history"].column("item"))}
        assert set(rows) <= possible


@given(st.data())
def test_marks_are_those_of_a_definition(draw: st.DataObject) -> None:
    rows = draw.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    bags = draw.draw(st.integers(1, 3))
    marks, expected = RowMarks(rows, CPU), [torch.zeros(count, dtype=torch.bool) for count in rows]
    for _ in range(draw.draw(st.integers(0, 3))):
        ids, ends = list[int](), [0]
        for number, count in enumerate(rows):
            for _ in range(bags):
                bag = draw.draw(st.lists(st.integers(0, count - 1), max_size=3))
                expected[number][bag] = True
                ids += bag
                ends.append(len(ids))
        marks.after_lookup(torch.nn.Identity(), (torch.tensor(ids, dtype=torch.int64), torch.tensor(ends)), {}, None)
        with torch.no_grad():
            every = torch.arange(rows[0])
            marks.after_lookup(torch.nn.Identity(), (every, torch.tensor([0, len(every)])), {}, None)
    for number in range(len(rows)):
        assert torch.equal(marks.of(number), expected[number])
    marks.clear()
    assert not any(marks.of(number).any() for number in range(len(rows)))


def test_what_stays(tmp_path: Path) -> None:
    for step, base, score in ((4, None, None), (5, 4, 0.9), (6, 4, None), (8, None, 0.8), (9, 8, None), (10, 8, None)):
        folder = final_path(tmp_path, step)
        folder.mkdir()
        record: dict[str, Any] = {"step": step, "score": score}
        if base is not None:
            record["base"] = {"step": base, "record_sha256": "0" * 64}
        (folder / RECORD).write_text(json.dumps(record))

    def steps() -> list[int]:
        return [checkpoint.step for checkpoint in checkpoints_in(tmp_path)]

    prune(tmp_path, 2)
    # The best one, 5, needs 4; 6 is no longer one of the last two deltas.
    assert steps() == [4, 5, 8, 9, 10]
    prune(tmp_path, 1)
    assert steps() == [4, 5, 8, 10]
    shutil.rmtree(final_path(tmp_path, 5))
    prune(tmp_path, 1)
    assert steps() == [8, 10]


@pytest.mark.parametrize("every", [4, 500])
def test_deltas_come_between_full_ones(every: int) -> None:
    with pytest.raises(UserError, match=f"delta_every: {every} steps is not less than checkpoint.every, {every}"):
        small_settings(f"checkpoint.every={every}", f"checkpoint.delta_every={every}")

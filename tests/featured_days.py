"""Days of a chain with features of every kind, whose items get rows, lose them, and hand them on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from schemas.manifest import Day, data_set_fingerprint
from tests.featured import KINDS, WORDS, Encoder, Log, write_featured

FIRST_WORDS = {
    name: words[: -2 if len(words) > 3 else -1] if KINDS[name][2] == "dictionary" else words
    for name, words in WORDS.items()
}
"""What is known on day 0: each dictionary lacks values, which come later."""


def day_of(folder: Path) -> Day:
    """What a later day says of a data set."""
    fingerprint = data_set_fingerprint(folder)
    return Day(fingerprint=fingerprint, first_timestamp=0, last_timestamp=0, sources=())


def first_log(users: int, seed: int, *, text: bool = True) -> Log:
    """A log without the values that come later."""
    log = Log.random(users, seed, items=24, text=text)
    for row in _rows(log):
        for name, words in FIRST_WORDS.items():
            value = row.get(name)
            if isinstance(value, list):
                row[name] = [each for each in value if each in words]
            elif value not in words:
                row[name] = None if name in row else row.pop(name, None)
    return log


def _rows(log: Log) -> list[dict[str, Any]]:
    lines = [row for user in log.users for row in (*user["history"], *user["targets"])]
    return [*log.users, *log.items.values(), *lines]


@dataclass
class Days:
    """Two days: the same users and targets, but more items and values on the second one."""

    folders: tuple[Path, Path]
    encoders: tuple[Encoder, Encoder]
    log: Log
    """Of day 0: what is in it has a row on both days, or on neither."""
    evicted: frozenset[Any]
    """Items that have a row on day 0 alone."""
    reused: frozenset[Any]
    """New items with the rows of those."""
    moved: frozenset[Any]
    """Items that have lost their row and have got another one."""

    @property
    def kept(self) -> dict[Any, tuple[int, int]]:
        """By item whose row goes on, its places on both days."""
        first, second = self.encoders
        return {
            name: (first.place(name), second.place(name))
            for name in first.item
            if first.place(name) and name not in self.evicted | self.moved
        }

    @property
    def new(self) -> dict[Any, int]:
        """By item whose row begins anew, its place."""
        second = self.encoders[1]
        return {name: second.place(name) for name in second.item if second.place(name) and name not in self.kept}


def write_days(folder: Path, largest: tuple[int, int], *, users: int = 40, seed: int = 1, text: bool = True) -> Days:
    """Write both days; ``largest`` are the largest rows, of which few belong to an item.

    The second has the users and targets of the first. Some items that nobody meets are evicted, some have another row.
    """
    log, rng = first_log(users, seed, text=text), np.random.default_rng(seed)
    spare = {f"spare {number}" if text else 1000 + number: log.items[name] for number, name in enumerate(log.items)}
    before = Log(log.users, log.items | spare, log.rare)
    with_row = [name for name in before.items if name not in log.rare]
    # Row 1 and the largest one are taken on both days: the ends of the table.
    rows = [1, largest[0], *(2 + rng.permutation(largest[0] - 2)[: len(with_row) - 2]).tolist()]
    row = dict(zip(with_row, rows, strict=True))
    first = Encoder(before, seed, FIRST_WORDS).with_rows(row, {}, largest[0])
    write_featured(folder / "first", before, seed, encoder=first)

    names = [name for name in spare if row[name] not in (1, largest[0])]
    evicted, moved = names[:8], names[8:12]
    newcomers = [f"new {number}" if text else 2000 + number for number in range(20)]
    catalog = {name: log.items[other] for name, other in zip(newcomers, log.items, strict=False)}
    after = Log(log.users, before.items | catalog, log.rare)
    fresh = (largest[0] + 1 + rng.permutation(largest[1] - largest[0] - 1)).tolist()
    later = row | dict.fromkeys([*evicted, *moved], 0)
    # Freed rows first, as prepare gives them; all but two of them.
    later |= dict(zip(newcomers[:6], [row[name] for name in evicted[:6]], strict=True))
    later |= dict(zip([*newcomers[6:18], *moved], [largest[1], *fresh], strict=False))
    days = dict.fromkeys([*newcomers, *moved], 1)
    second = Encoder(after, seed + 1, WORDS, first).with_rows(later, days, largest[1])
    write_featured(folder / "second", after, seed, encoder=second, days=(day_of(folder / "first"),))
    return Days(
        (folder / "first", folder / "second"),
        (first, second),
        log,
        frozenset(evicted),
        frozenset(newcomers[:6]),
        frozenset(moved),
    )

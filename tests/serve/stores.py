"""A plain-Python store to compare stores with: it keeps all that ever came, and sorts when it is asked."""

from typing import Any

from pipeline.serve.stored_columns import StoredColumn, StoredColumns

COLUMNS = StoredColumns(
    user="user",
    user_type="integer",
    item="item",
    timestamp="time",
    behaviors=(
        StoredColumn(name="item", kind="integer"),
        StoredColumn(name="kind", kind="text"),
        StoredColumn(name="price", kind="number"),
        StoredColumn(name="tags", kind="text", several=True),
        StoredColumn(name="sizes", kind="integer", several=True),
    ),
    users=(StoredColumn(name="city", kind="text"),),
)
OF_EVENTS = ("time", *(column.name for column in COLUMNS.behaviors))

Event = tuple[Any, ...]


def columns_of(events: list[Event]) -> dict[str, list[Any]]:
    """Events as requests have them."""
    lists = {name: [event[number] for event in events] for number, name in enumerate(OF_EVENTS)}
    for name in ("tags", "sizes"):
        lists[name] = [None if value is None else list(value) for value in lists[name]]
    return lists


def events_of(history: dict[str, Any]) -> list[Event]:
    """Events of a history."""
    lists = [history[name] for name in OF_EVENTS]
    return [
        tuple(tuple(value) if isinstance(value, list) else value for value in event)
        for event in zip(*lists, strict=True)
    ]


class PlainStore:
    """Keeps every event that ever came, each as often as it is there, in the order of arrival."""

    def __init__(self, keep: int, per_second: int = 1) -> None:
        self.keep, self.per_second = keep, per_second
        self.came: dict[int | str, list[Event]] = {}

    def kept(self, user: int | str) -> list[int]:
        """Which of the events that came are among the last ones by time."""
        came = self.came.get(user, [])
        return sorted(range(len(came)), key=lambda number: came[number][0] // self.per_second)[-self.keep :]

    def history(self, user: int | str) -> list[Event]:
        return [self.came[user][number] for number in self.kept(user)]

    def add(self, user: int | str, events: list[Event], *, repeats: bool = False) -> tuple[int, int, int]:
        """Returns how many are new, known and not kept."""
        came = self.came.setdefault(user, [])
        before, there = self.kept(user), len(came)
        others = [number for number in range(there) if number not in before]
        # An event that came is the same as one before; first it is one of those that are kept.
        free = [*before, *others]
        known = 0
        seen: set[Event] = set()
        for event in events:
            equal = next((number for number in free if came[number] == event), None)
            if equal in before or (event in seen and not repeats):
                known += 1
            if equal is not None:
                free.remove(equal)
            elif repeats or event not in seen:
                came.append(event)
            seen.add(event)
        new = sum(number >= there for number in self.kept(user))
        return new, known, len(events) - new - known

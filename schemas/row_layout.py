"""Where rows lie in an item table that grows.

Tables are sharded by equal ranges of rows, and rows are numbered in the order in which days give them: without a
layout, all that is new would lie on the last ranks.

X = any shape.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

STRIPES = 1 << 10
"""Stripes of a large table: many more than ranks, so that any number of these has about equal shares."""
LEAST_ROWS = 1 << 16
"""A table with fewer rows has one stripe: places are rows."""


@dataclass(frozen=True)
class RowLayout:
    """Deals rows out to stripes in turns: consecutive rows lie in different stripes, row 0 at place 0."""

    rows: int
    """The largest row."""
    stripes: int

    @classmethod
    def of(cls, rows: int) -> Self:
        """The layout of a table whose largest row is ``rows``."""
        return cls(rows, STRIPES if rows >= LEAST_ROWS else 1)

    @classmethod
    def of_places(cls, places: int) -> Self:
        """The layout of a table of so many places; ``rows`` is the largest row that fits into it."""
        layout = cls(places - 1, STRIPES if places > LEAST_ROWS else 1)
        assert layout.places == places, f"no item table has {places} places"
        return layout

    @property
    def height(self) -> int:
        """Places of a stripe; the last ones may be empty."""
        return -(-(self.rows + 1) // self.stripes)

    @property
    def places(self) -> int:
        """Places of the table, that of row 0 included."""
        return self.stripes * self.height

    def place(self, row_X: NDArray[np.int32]) -> NDArray[np.int32]:
        """The place of each row, int32."""
        return (row_X % self.stripes * self.height + row_X // self.stripes).astype(np.int32)

    def row(self, place_X: NDArray[np.int32]) -> NDArray[np.int32]:
        """The row at each place, int32; larger than ``rows`` where a place is empty."""
        return (place_X % self.height * self.stripes + place_X // self.height).astype(np.int32)

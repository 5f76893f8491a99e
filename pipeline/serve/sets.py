"""Sets of ids in a request, and numbers that stand for them: what `embeddings.batch.Bags` are to a data set.

B = bags, E = ids of all of them, X = places that have one.
"""

import itertools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embeddings.batch import Bags

I64 = NDArray[np.int64]
I32 = NDArray[np.int32]


class RequestBags:
    """Numbers the sets of a feature in a request, those of items and those that are brought; 0 is the empty one.

    A data set's own numbers would do for its items, but what looks at bags takes time for all that there are.
    """

    def __init__(self) -> None:
        self._lengths: list[I64] = [np.zeros(1, np.int64)]
        self._ids: list[I32] = []
        self._count = 1

    def add(self, length_B: I64, id_E: I32, bag_X: I64) -> I32:
        """Add bags, and return the number of each place's bag, (X,).

        Args:
            length_B: how many ids each bag has.
            id_E: the ids, ascending within each bag.
            bag_X: which of the bags each place has.
        """
        number_B = np.where(length_B > 0, self._count + np.arange(len(length_B)), 0).astype(np.int32)
        self._lengths.append(length_B)
        self._ids.append(id_E)
        self._count += len(length_B)
        return number_B[bag_X]

    def add_sets(self, id_E: I32, parent_E: I64, count: int, bag_X: I64) -> I32:
        """Add bags of ids in any order, from which what is unknown or comes twice is left out; see `add`.

        Args:
            id_E: the ids, 0 where one is unknown.
            parent_E: the bag of each.
            count: number of bags.
            bag_X: which of the bags each place has.
        """
        parent_E, id_E = parent_E[id_E > 0], id_E[id_E > 0]
        order_E = np.lexsort((id_E, parent_E))
        parent_E, id_E = parent_E[order_E], id_E[order_E]
        new_E = np.ones(len(id_E), bool)
        new_E[1:] = (id_E[1:] != id_E[:-1]) | (parent_E[1:] != parent_E[:-1])
        return self.add(np.bincount(parent_E[new_E], minlength=count), id_E[new_E], bag_X)

    @property
    def lists(self) -> tuple[I64, I32]:
        """Where each bag begins, and where the last one ends, (B + 1,); and all ids."""
        length_B = np.concatenate(self._lengths)
        offset_B1 = np.concatenate([np.zeros(1, np.int64), np.cumsum(length_B)])
        return offset_B1, np.concatenate([np.zeros(0, np.int32), *self._ids])

    def ranks(self, number_X: I32) -> I64:
        """Numbers that sort as the ids of bags do, (X,): as bags of a data set are numbered."""
        offset_B1, id_E = self.lists
        # Bytes of integers sort as they do where large ones come first.
        content = id_E.astype(">i4").tobytes()
        bags = [content[4 * a : 4 * b] for a, b in itertools.pairwise(offset_B1.tolist())]
        rank = {bag: place for place, bag in enumerate(sorted(set(bags)))}
        return np.array([rank[bag] for bag in bags], np.int64)[number_X]

    def with_any(self, allowed: NDArray[np.bool_], number_X: I32) -> NDArray[Any]:
        """Whether any id of each place's bag is allowed, (X,)."""
        offset_B1, id_E = self.lists
        before_E = np.concatenate([np.zeros(1, np.int64), np.cumsum(allowed[id_E])])
        has_one_B: NDArray[np.bool_] = np.diff(before_E[offset_B1]) > 0
        return has_one_B[number_X]

    def bags(self) -> Bags:
        """All bags as tensors."""
        offset_B1, id_E = self.lists
        return Bags(torch.from_numpy(offset_B1), torch.from_numpy(id_E))

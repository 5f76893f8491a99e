"""The few collectives that saving a checkpoint needs, through the store in which the ranks have met.

They need no process group. A second one would be a full mesh of sockets over gloo, with a thousand ranks more files a
process than it may open; and collectives of training's own group must not mix with those of the thread that writes. A
store is a star: one more connection of each rank to the first one's process.
"""

import pickle
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.checkpoint.utils import _DistWrapper


class StoreCollectives(_DistWrapper):
    """What torch.distributed.checkpoint does with a group, done with a store: objects to the first rank and back.

    `reduce_scatter` and `all_reduce` are torch's, with its way of telling every rank what has failed on one. All ranks
    must call the same methods in the same order. Each message has a key of its own, which whoever reads it removes.

    Args:
        store: of all ranks, used by nobody else: a wait blocks its connection. The messages' keys begin with ``name``.
        name: no other messages in the store may have it.
        rank: this rank.
        ranks: number of ranks.
        timeout: how long to wait for another rank's message.
    """

    def __init__(self, store: Store, name: str, rank: int, ranks: int, timeout: timedelta) -> None:
        # Without a group torch's class is for one rank alone; what communicates is replaced below.
        super().__init__(None, use_dist=False, coordinator_rank=0)
        self.rank, self.is_coordinator = rank, rank == 0
        self._store, self._ranks, self._timeout = PrefixStore(name, store), ranks, timeout
        self._store.set_timeout(timeout)
        self._messages = 0

    def get_world_size(self) -> int:
        """Return the number of ranks."""
        return self._ranks

    def gather_object(self, object: Any) -> list[Any] | None:
        """Send an object to the first rank.

        Returns:
            On the first rank the objects of all ranks, else None.

        Raises:
            DistError: a rank has sent nothing in time; the store is gone with the first rank.
        """
        keys = self._keys()
        if not self.is_coordinator:
            self._send(keys[self.rank], object)
            return None
        return [object, *self._taken(keys[1:], range(1, self._ranks))]

    def scatter_object(self, object_list: list[Any] | None) -> Any:
        """Send each rank its object; the first rank alone gives them.

        Returns:
            This rank's object.

        Raises:
            DistError: the first rank has sent nothing in time, or the store is gone with it.
        """
        keys = self._keys()
        if not self.is_coordinator:
            return self._taken([keys[self.rank]], [0])[0]
        assert object_list is not None
        for key, each in zip(keys[1:], object_list[1:], strict=True):
            self._send(key, each)
        return object_list[0]

    def broadcast_object(self, object: Any) -> Any:
        """Send the first rank's object to all; arguments and errors are those of `scatter_object`."""
        return self.scatter_object([object] * self._ranks)

    def _keys(self) -> list[str]:
        """The keys of the next messages, one a rank."""
        self._messages += 1
        return [f"{self._messages}/{rank}" for rank in range(self._ranks)]

    def _send(self, key: str, object: Any) -> None:
        self._store.set(key, pickle.dumps(object))  # type: ignore[arg-type]  # It takes bytes too.

    def _taken(self, keys: Sequence[str], senders: Sequence[int]) -> list[Any]:
        """Wait for the messages of these keys, and remove them."""
        if not keys:
            return []
        try:
            values = self._store.multi_get(list(keys))
        except dist.DistStoreError:
            missing = [str(rank) for key, rank in zip(keys, senders, strict=True) if not self._store.check([key])]
            raise dist.DistStoreError(
                f"nothing has come from rank {', '.join(missing)} for {self._timeout.total_seconds():.0f} s"
            ) from None
        for key in keys:
            self._store.delete_key(key)
        return [pickle.loads(value) for value in values]

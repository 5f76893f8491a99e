"""A search on the shards whose input is on its way, so that other work is done meanwhile."""

from contextlib import nullcontext

import torch

from embeddings.batch import Batch
from embeddings.search.on_shard import ShardedTopK
from embeddings.search.selection import Selection
from embeddings.tables import CrossRows


class BegunSearch:
    """Sends a batch's ids to the shards at once; what is compared with them is read when the result is asked for.

    Every rank must begin, and must ask for the result, in the same order as the others.

    Args:
        top_k: the search.
        batch: on the device of the tables.
        stream: of a GPU, to begin on, which has waited for the batch; None: the current one, or a CPU.
    """

    def __init__(self, top_k: ShardedTopK, batch: Batch, stream: torch.cuda.Stream | None = None) -> None:
        self.batch, self._top_k, self._stream = batch, top_k, stream
        self._context = top_k.create_context()
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            self._input = top_k.input_dist(self._context, batch).wait()

    def selected(self, target_cross: CrossRows, history_cross: CrossRows) -> dict[str, Selection]:
        """The K best behaviours of each target, by sequence.

        Args:
            target_cross: by sequence, all rows of the targets' cross tables.
            history_cross: the same of the behaviours'.
        """
        self._context.target_cross, self._context.history_cross = target_cross, history_cross
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            asked = self._input.wait()
        if self._stream is not None:
            here = torch.cuda.current_stream()
            here.wait_stream(self._stream)
            self._context.record_stream(here)
            asked.record_stream(here)
        best = self._top_k.compute(self._context, asked)
        selected: dict[str, Selection] = self._top_k.output_dist(self._context, best).wait()
        return selected

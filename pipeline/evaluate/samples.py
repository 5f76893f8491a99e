"""The samples that a rank has evaluated, in chunks: 13 bytes each, however small the batches.

N = samples of a batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Samples of a chunk."""


@dataclass(frozen=True)
class Chunk:
    """Columns of some samples, on the CPU."""

    user_id: Tensor
    """int64."""
    label: Tensor
    """bool."""
    logit: Tensor
    """float32."""

    def __len__(self) -> int:
        return len(self.label)

    def part(self, start: int, end: int) -> "Chunk":
        """Return the samples start .. end, sharing memory with these."""
        return Chunk(self.user_id[start:end], self.label[start:end], self.logit[start:end])


class EvaluatedSamples:
    """User, label and logit of the samples that a rank has evaluated. Grows by batches, which it copies to the CPU."""

    def __init__(self) -> None:
        self._chunks: list[Chunk] = []
        self._size = 0
        self.wrong_logits = 0
        """How many logits were not finite."""
        self.wrong_labels = 0
        """How many labels were neither 0 nor 1."""

    def __len__(self) -> int:
        return self._size

    def add(self, user_id_N: Tensor, label_N: Tensor, logit_N: Tensor) -> None:
        """Append a batch, on any device. Wrong values are counted, not refused, so that no rank fails alone.

        Args:
            user_id_N: (N,) int64.
            label_N: (N,) float32, 0 or 1.
            logit_N: (N,) float32.
        """
        assert user_id_N.shape == label_N.shape == logit_N.shape == (len(label_N),)
        # On the CPU, where an epoch's samples fit; a GPU's memory is for the tables.
        assert (user_id_N.dtype, logit_N.dtype) == (torch.int64, torch.float32)
        user_id_N, label_N, logit_N = user_id_N.detach().cpu(), label_N.detach().cpu(), logit_N.detach().cpu()
        self.wrong_logits += int((~logit_N.isfinite()).sum())
        self.wrong_labels += int(((label_N != 0) & (label_N != 1)).sum())
        batch = Chunk(user_id_N, label_N > 0, logit_N)
        # Copied into large chunks: as many small tensors as there were batches would cost more than the samples in
        # them.
        done = 0
        while done < len(batch):
            filled = self._size % CHUNK
            if not filled:
                self._chunks.append(Chunk(user_id_N.new_empty(CHUNK), batch.label.new_empty(CHUNK), torch.empty(CHUNK)))
            count = min(CHUNK - filled, len(batch) - done)
            free, source = self._chunks[-1].part(filled, filled + count), batch.part(done, done + count)
            free.user_id.copy_(source.user_id)
            free.label.copy_(source.label)
            free.logit.copy_(source.logit)
            self._size += count
            done += count

    def chunks(self) -> Iterator[Chunk]:
        """Yield the samples in the order in which they were added; no chunk is empty."""
        for index, chunk in enumerate(self._chunks):
            yield chunk.part(0, min(CHUNK, self._size - index * CHUNK))

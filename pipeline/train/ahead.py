"""The order of a step's parts: while a batch's gradients are computed, the next one is on its way to the shards."""

from collections.abc import Iterator

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module
from torchrec.distributed.train_pipeline import TrainPipelineBase

from embeddings.batch import Batch
from embeddings.model import CtrModel
from pipeline.train.click_task import ClickTask, StepOutput
from pipeline.train.dense_optimizer import DenseOptimizer


class SearchAheadPipeline(TrainPipelineBase[Batch, StepOutput]):
    """TorchRec's pipeline, which copies the next batch to the device, and begins its search besides.

    Ids do not depend on weights, so a step computes what it would compute without. On a GPU the ids travel on a stream
    of their own, beside forward and backward; gloo's threads carry them beside a CPU's backward.

    Args:
        model: sharded.
        optimizer: of the dense parameters.
        device: of this rank.
    """

    _cur_batch: Batch | None

    def __init__(self, model: DistributedModelParallel, optimizer: DenseOptimizer, device: torch.device) -> None:
        super().__init__(ClickTask(model), optimizer, device)
        inner = get_unwrapped_module(model)
        assert isinstance(inner, CtrModel)
        self._ctr_model = inner
        self._ids_stream = torch.cuda.Stream() if device.type == "cuda" else None

    def progress(self, dataloader_iter: Iterator[Batch]) -> StepOutput:
        """Make a step with the next batch.

        Raises:
            StopIteration: there is none.
        """
        if not self._connected:
            self._connect(dataloader_iter)
        batch = self._cur_batch
        if batch is None:
            raise StopIteration
        following = self._next_batch(dataloader_iter)
        self._optimizer.zero_grad()
        self._wait_for_batch(batch)
        loss, output = self._model(batch)
        self._cur_batch = following
        if following is not None:
            self._copy_batch_to_gpu(following)
            self._begin()
        self._backward(loss)
        self._optimizer.step()
        return output

    def reset(self) -> None:
        """Forget the batch that was to come."""
        super().reset()
        self._ctr_model.begun = None

    def _begin(self) -> None:
        assert self._cur_batch is not None
        if self._ids_stream is not None and self._memcpy_stream is not None:
            self._ids_stream.wait_stream(self._memcpy_stream)
        self._ctr_model.begin(self._cur_batch, self._ids_stream)

"""One step of training: what it computes, in which order, and what the ranks agree on after it.

While the gradients of a batch are computed, the ids of the next one are on their way to the shards.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module
from torchrec.distributed.train_pipeline import TrainPipelineBase
from torchrec.streamable import Pipelineable

from embeddings.batch import Batch
from embeddings.features import RowHook
from embeddings.loss import labels_of, task_losses, weighted_sum
from embeddings.model import CtrModel
from embeddings.search.sharded import SearchChannel, SearchHandle
from pipeline.train.optimizer import DenseOptimizer
from schemas.errors import UserError

# It has the methods that TorchRec's pipelines want; said here, so that those who answer requests need no TorchRec.
Pipelineable.register(Batch)


class StepOutput(NamedTuple):
    """What one rank knows of a step that it has made."""

    loss: Tensor
    """Scalar, detached; the mean over ranks is the loss of the global batch."""
    task_losses: Tensor
    """That of each task by itself, before its weight, (tasks,)."""
    targets: int
    """Number of targets in the rank's batch."""
    origin: str
    """Where the rank's batch comes from, for messages."""


class ClickTask(nn.Module):
    """The model with the loss of its tasks, as TorchRec's pipelines want it.

    The tables' optimizers run in its backward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        inner = get_unwrapped_module(model)
        assert isinstance(inner, CtrModel)
        self._tasks = inner.settings.tasks

    def forward(
        self, batch: Batch, handle: SearchHandle | None = None, row_hook: RowHook | None = None
    ) -> tuple[Tensor, StepOutput]:
        """The loss with its gradient, and what there is to report; arguments as of `CtrModel.forward`."""
        labels = labels_of(batch, self._tasks)
        losses = task_losses(self.model(batch, handle, row_hook), labels, batch.weight_T)
        loss = weighted_sum(losses, self._tasks)
        return loss, StepOutput(loss.detach(), torch.stack(losses).detach(), len(batch), batch.origin)


class Agreement(NamedTuple):
    """What all ranks know of a step."""

    loss: float
    """Loss of the global batch."""
    task_losses: tuple[float, ...]
    """Loss of each task by itself, before its weight."""
    targets: int
    """Number of targets in the global batch."""
    stop: bool
    """A rank was asked to stop."""


class StartedAgreement:
    """An exchange of what each rank knows of a step, which is on its way; arguments as of `agree`."""

    def __init__(self, step: int, output: StepOutput, gradient_norm: Tensor, stop: bool) -> None:
        self.step, self._output = step, output
        self._sound = torch.isfinite(output.loss) & torch.isfinite(gradient_norm)
        # A loss that is nan would make the sum nan, and no rank could tell whose it was: it counts as 0, and the fault
        # is counted beside it. float64 holds counts exactly up to 2^53. One small vector, because the cost of the
        # exchange is its latency; made on the device, for an upload would wait for it.
        numbers = output.loss.new_zeros(4 + len(output.task_losses), dtype=torch.float64)
        numbers[0], numbers[3] = torch.where(self._sound, output.loss, 0), ~self._sound
        numbers[1].fill_(output.targets)
        numbers[2].fill_(stop)
        numbers[4:] = torch.where(self._sound, output.task_losses, 0)
        self._work = dist.all_reduce(numbers, async_op=True)
        self._numbers = numbers
        self._copied: torch.cuda.Event | None = None
        if numbers.is_cuda:
            # To the host as soon as the device is there, while the host goes on.
            self._work.wait()
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def result(self) -> Agreement:
        """Wait for the exchange; all ranks must call it, in the order of the steps.

        Raises:
            UserError: the loss or the gradients are not finite, on all ranks; names the step and the batch of the ranks
                concerned.
        """
        if self._copied is not None:
            self._copied.synchronize()
        else:
            self._work.wait()
        loss, targets, stops, faults, *of_tasks = self._numbers.tolist()
        # The sum is the same on all ranks, so all of them go into the gather in there, and none goes on alone.
        if faults:
            _raise_not_finite(self.step, self._output, bool(self._sound))
        ranks = dist.get_world_size()
        return Agreement(loss / ranks, tuple(of_task / ranks for of_task in of_tasks), int(targets), stops > 0)


def agree(step: int, output: StepOutput, gradient_norm: Tensor, stop: bool) -> StartedAgreement:
    """Start to exchange what each rank knows of a step, in one small all-reduce; all ranks must call it after a step.

    Args:
        step: number of the step.
        output: what this rank has made of it.
        gradient_norm: norm of the dense parameters' gradients, scalar.
        stop: whether this rank was asked to stop.
    """
    return StartedAgreement(step, output, gradient_norm, stop)


def _raise_not_finite(step: int, output: StepOutput, sound: bool) -> None:
    origins: list[str | None] = [None] * dist.get_world_size()
    mine = None if sound else f"{output.origin} (loss {output.loss.item():g})"
    dist.all_gather_object(origins, mine)
    unsound = [origin for origin in origins if origin]
    more = f" and {len(unsound) - 1} more" if len(unsound) > 1 else ""
    raise UserError(
        f"step {step}: loss or gradients are not finite, in {unsound[0]}{more}; this step is not saved; "
        "begin a new run, in another folder, with lower learning rates or with dense.clip_norm"
    )


class SearchPrefetchPipeline(TrainPipelineBase[Batch, StepOutput]):
    """TorchRec's pipeline, which copies the next batch to the device ahead of time, and starts its search besides.

    Ids do not depend on weights, so a step computes the same numbers as without it. On a GPU the ids travel on a stream
    of their own, beside forward and backward; gloo's threads carry them beside a CPU's backward.

    Args:
        model: sharded.
        optimizer: of the dense parameters.
        device: this rank's device.
    """

    _cur_batch: Batch | None

    def __init__(self, model: DistributedModelParallel, optimizer: DenseOptimizer, device: torch.device) -> None:
        super().__init__(ClickTask(model), optimizer, device)
        inner = get_unwrapped_module(model)
        assert isinstance(inner, CtrModel)
        self._ctr_model = inner
        inner.warm_search(device)
        self._channel: SearchChannel | None = None
        if inner.searches_on_shards:
            group = dist.new_group() if dist.get_world_size() > 1 else dist.group.WORLD
            assert isinstance(group, dist.ProcessGroup)
            self._channel = SearchChannel(group, torch.cuda.Stream() if device.type == "cuda" else None)
        self._handle: SearchHandle | None = None
        """The search of ``_cur_batch``, which was started in the step before."""

    def progress(self, dataloader_iter: Iterator[Batch], row_hook: RowHook | None = None) -> StepOutput:
        """Make a step with the next batch.

        Args:
            dataloader_iter: where batches come from; the same one until `reset`.
            row_hook: watches the gradients of this step's rows.

        Raises:
            StopIteration: no batch is left.
        """
        if not self._connected:
            with record_function("dare/data"):
                self._connect(dataloader_iter)
        # What the step before has prepared: a batch that is on its way to the device, and its ids on theirs to the
        # shards.
        batch, handle = self._cur_batch, self._handle
        if batch is None:
            raise StopIteration
        with record_function("dare/data"):
            next_batch = self._next_batch(dataloader_iter)
        self._optimizer.zero_grad()
        # On a GPU the current stream waits for the copy here; on a CPU there is nothing to wait for.
        self._wait_for_batch(batch)
        output: StepOutput
        loss, output = self._model(batch, handle, row_hook)
        self._cur_batch, self._handle = next_batch, None
        # Between forward and backward on every rank: collectives must come in the same order on all of them. Either all
        # have a next batch or none has, because an epoch has the same number of steps for every rank.
        if next_batch is not None:
            self._copy_batch_to_gpu(next_batch)
            with record_function("dare/exchange"):
                self._handle = self._start_search()
        # The tables' optimizers run in here: ids do not depend on them, so the next batch's may travel meanwhile.
        with record_function("dare/backward"):
            self._backward(loss)
        with record_function("dare/optimizer"):
            self._optimizer.step()
        return output

    def reset(self) -> None:
        """Drop the batch that was prefetched, and its search."""
        super().reset()
        self._handle = None

    def _start_search(self) -> SearchHandle | None:
        """Start the search of the batch that was just copied, where shards search; elsewhere `forward` does it all."""
        # `_copy_batch_to_gpu` has put the copy into ``_cur_batch``. The search must be started with that very object,
        # which is the one that `forward` will be given.
        assert self._cur_batch is not None
        if not self._ctr_model.searches_on_shards:
            return None
        stream = self._channel.stream if self._channel else None
        if stream is not None and self._memcpy_stream is not None:
            # The ids that are sent are those of the copy, which must be complete before.
            stream.wait_stream(self._memcpy_stream)
        return self._ctr_model.start_search(self._cur_batch, self._channel)

"""Train a model from Python, without the command line.

    python examples/train_in_python.py FOLDER
    python -m torch.distributed.run --nproc-per-node 2 examples/train_in_python.py FOLDER

A small log is generated and prepared in FOLDER, DARE is trained on it for two epochs, and the metrics of the validation
split are printed. `pipeline.train.run.train` does all of this and more (checkpoints, resuming, curves, a test at the
end) in one call; what stands here is for those who want a loop of their own.
"""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from embeddings.distributed.process_group import leave, process_group
from embeddings.initialization import initialize
from embeddings.loss import click_loss
from embeddings.sharding import sharded_model
from pipeline.evaluate.evaluate import evaluate
from pipeline.ingest.prepare import prepare
from pipeline.stream.history_stream import HistoryStream
from pipeline.synth.files import synthesize
from pipeline.train.optimizer import DenseOptimizer
from schemas.manifest import Manifest
from schemas.model import ModelSettings, TableSet
from schemas.prepare import Events, PaperSplit, PrepareSettings
from schemas.stream import StreamSettings
from schemas.synth import SynthSettings
from schemas.train import TrainSettings

SETTINGS = TrainSettings(
    epochs=2,
    model=ModelSettings(
        name="dare",
        attention=TableSet(dim=8),  # K_A: decides what is looked at
        representation=TableSet(dim=16),  # K_R: says what it means
        retrieved={"history": 10},  # K of the N behaviours below
        hidden=(64, 32),
    ),
    stream=StreamSettings(batch_size=512, history_length=50),
)


def make_data(folder: Path) -> Path:
    """Generate a log of 40,000 behaviours and cut it into user-history shards."""
    log, data = folder / "events.parquet", folder / "data"
    if not data.exists():
        synthesize(SynthSettings(events=40_000, items=2_000, categories=50), log, overwrite=True)
        split = PaperSplit(min_behaviors=20, train_targets=8)
        prepare(PrepareSettings(events=Events(files=(str(log),)), split=split), data)
    return data


def train(data: Path, device: torch.device) -> None:
    """The loop; every rank runs it and gets its own part of every global batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    # Tables are made in their shards, so that nothing is ever as large as a whole table; then the weights are drawn.
    model = sharded_model(SETTINGS, Manifest.read(data), device)
    initialize(model, SETTINGS.seed)
    # The tables' optimizers run in the backward pass. This one is for everything else.
    optimizer = DenseOptimizer(model, SETTINGS.dense)

    def stream(split: str) -> HistoryStream:
        shuffle = split == "train"
        return HistoryStream(data, split, SETTINGS.stream, seed=SETTINGS.seed, shuffle=shuffle, rank=rank, world=world)

    with stream("train") as batches, stream("validation") as validation:
        for epoch in range(SETTINGS.epochs):
            for batch in batches:
                batch = batch.to(device)
                optimizer.zero_grad()
                loss = click_loss(model(batch), batch.label_T)
                loss.backward()
                optimizer.step()
            (metrics,) = evaluate(model, validation, device).values()  # of one task
            found = metrics.compute()  # over all ranks, the same on each
            if rank == 0:
                print(f"epoch {epoch + 1}: AUC {found.auc:.4f}, log loss {found.log_loss:.4f}")


def main() -> None:
    """Under torchrun there are several processes; the first one makes the data."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # what torch tells TorchRec
    folder = Path(sys.argv[1])
    device = torch.device("cpu")
    with process_group(device):
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            make_data(folder)
        dist.barrier()
        train(folder / "data", device)
    leave(0)  # ends the process without the interpreter's shutdown, which gloo's threads do not survive


if __name__ == "__main__":
    main()

"""Score a batch that one builds oneself, with the model of a run's checkpoint.

    python examples/score_a_batch.py RUN

RUN is the folder of a run that `dare train` wrote. Two users are made up from the items that the run was trained on,
each with a few behaviours; three items are scored for the first one and one for the second. Dense ids (`items.parquet`
and `item_features.arrow` of the data set) are what a model knows; 0 stands for an item that it has not seen.

T = targets, U = users, M = behaviours of all users.
"""

import sys
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import torch

from embeddings.batch import Batch, History
from embeddings.distributed.process_group import leave, process_group
from embeddings.sharding import sharded_model
from pipeline.evaluate.open_run import choose_checkpoint, load_model
from pipeline.runs.run_folder import RunFolder
from schemas.manifest import Manifest


def int32(values: list[int]) -> torch.Tensor:
    """Ids are int32."""
    return torch.tensor(values, dtype=torch.int32)


def make_batch(data: Path) -> tuple[Batch, list[int]]:
    """The batch, and the raw ids of its four targets."""
    items = pq.read_table(data / "items.parquet").sort_by([("frequency", "descending")]).to_pydict()
    raw, dense = items["raw_id"], items["id"]
    # What belongs to items stands beside them, row i for the item of dense id i.
    of_items = pa.ipc.open_file(data / "item_features.arrow").read_all()["category"].to_pylist()
    category = [of_items[item] for item in dense]

    seen = [0, 1, 2, 3, 4, 5, 6]  # rows of `items`: four behaviours of the first user, then three of the second
    wanted = [7, 0, 8, 7]  # what is scored: three items for the first user, one for the second
    now = 1_700_000_000
    history = History(
        item_M=int32([dense[row] for row in seen]),
        timestamp_M=torch.tensor([now - 3600 * age for age in (72, 48, 24, 1, 96, 95, 2)]),  # seconds, in order
        features_M={"category": int32([category[row] for row in seen])},  # by name, as the data set declares them
        offset_U=torch.tensor([0, 4, 7]),  # user u has the behaviours offset_U[u] .. offset_U[u + 1]
        # Each target sees the window start_T .. end_T: behaviours of its own user, at most `stream.history_length`,
        # all of them earlier than the target.
        start_T=torch.tensor([0, 0, 0, 4]),
        end_T=torch.tensor([4, 4, 4, 7]),
    )
    batch = Batch(
        histories={"history": history},
        user_T=torch.tensor([0, 0, 0, 1]),
        user_id_U=torch.tensor([101, 102]),  # not used by the model
        item_T=int32([dense[row] for row in wanted]),
        timestamp_T=torch.full((4,), now),
        features_T={"category": int32([category[row] for row in wanted])},
        labels_T={"label": torch.zeros(4)},  # nobody knows yet
        origin="a batch made by hand",  # for error messages
    )
    return batch, [raw[row] for row in wanted]


def main() -> None:
    """Load the best checkpoint, predict, print."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # what torch tells TorchRec
    run, device = RunFolder(Path(sys.argv[1])), torch.device("cpu")
    data = run.data_set()
    with process_group(device):  # of this process alone; under torchrun, every rank would score a batch of its own
        model = sharded_model(run.settings(), Manifest.read(data), device)
        load_model(model, choose_checkpoint(run, "best").path)
        model.eval()
        batch, raw_items = make_batch(data)
        with torch.no_grad():
            probability_T = model(batch).logit_T.sigmoid()
        for user, item, probability in zip(batch.user_T.tolist(), raw_items, probability_T.tolist(), strict=True):
            print(f"user {batch.user_id_U[user]}, item {item}: {probability:.4f}")
    leave(0)


if __name__ == "__main__":
    main()

"""DARE and TWIN said again, slowly and in plain torch: one target after the other, dense tables, no TorchRec.

Written from the paper's formulas, not from `embeddings`; nothing here is shared with it but the batch.
"""

import math

import torch
from torch import Tensor, nn

from embeddings.batch import Batch, History


class ReferenceModel(nn.Module):
    """``shared`` tables: TWIN; else DARE. ``rows`` and the dims are by feature, ``retrieved`` by sequence.

    Tables are named ``{concern}/{feature}`` for item and category, ``{concern}/{sequence}/{feature}`` for the others.
    """

    def __init__(
        self,
        rows: dict[str, int],
        attention_dims: dict[str, int],
        representation_dims: dict[str, int],
        retrieved: dict[str, int],
        shared: bool,
        auxiliary: bool = False,
    ) -> None:
        super().__init__()
        self.features = list(rows)
        self.crosses = [feature for feature in rows if feature not in ("item", "category")]
        self.retrieved, self.shared = retrieved, shared
        self.embedding = nn.ModuleDict()
        for concern, dims in {"attention": attention_dims, "representation": representation_dims}.items():
            if shared and concern == "attention":
                continue
            for feature, dim in dims.items():
                for name in [""] if feature in ("item", "category") else [f"{sequence}/" for sequence in retrieved]:
                    self.embedding[f"{concern}/{name}{feature}"] = nn.Embedding(rows[feature], dim)
        inherent = sum(dim for feature, dim in representation_dims.items() if feature in ("item", "category"))
        cross = sum(representation_dims.values()) - inherent
        inputs = inherent + len(retrieved) * (cross + 2 * (inherent + cross))
        self.mlp = nn.Sequential(
            nn.BatchNorm1d(inputs),
            nn.Linear(inputs, 200),
            nn.PReLU(init=0.1),
            nn.Linear(200, 80),
            nn.PReLU(init=0.1),
            nn.Linear(80, 1),
        )
        self.auxiliary = (
            nn.Sequential(nn.BatchNorm1d(inputs), nn.Linear(inputs, 200), nn.PReLU(init=0.1), nn.Linear(200, 1))
            if auxiliary
            else None
        )

    def look(self, concern: str, sequence: str, feature: str, row: Tensor) -> Tensor:
        concern = "representation" if self.shared else concern
        name = feature if feature in ("item", "category") else f"{sequence}/{feature}"
        return self.embedding[f"{concern}/{name}"](row)

    def behavior_rows(self, batch: Batch, history: History, target: int) -> dict[str, Tensor]:
        window = range(int(history.start_T[target]), int(history.end_T[target]))
        seconds = [int(batch.timestamp_T[target]) - int(history.timestamp_M[m]) for m in window]
        rows = {
            "item": [int(history.item_M[m]) for m in window],
            "category": [int(history.category_M[m]) for m in window],
            "position": [len(window) - n for n in range(len(window))],
            "interval": [min(33, 1 + math.floor(math.log2(1 + max(0, gone)))) for gone in seconds],
            "behavior": [int(history.behavior_type_M[m]) for m in window],
            "scene": [int(history.scene_M[m]) for m in window],
        }
        return {feature: torch.tensor(rows[feature], dtype=torch.int64) for feature in self.features}

    def target_rows(self, batch: Batch, target: int) -> dict[str, Tensor]:
        rows = {
            "item": batch.item_T[target],
            "category": batch.category_T[target],
            "position": torch.tensor(0),
            "interval": torch.tensor(0),
            "behavior": torch.tensor(0),
            "scene": batch.scene_T[target],
        }
        return {feature: rows[feature].long() for feature in self.features}

    def scores(self, sequence: str, target: dict[str, Tensor], behaviors: dict[str, Tensor]) -> Tensor:
        def side(rows: dict[str, Tensor], features: list[str]) -> Tensor:
            return torch.cat([self.look("attention", sequence, f, rows[f]) for f in features], dim=-1)

        score = 0
        inherent = [feature for feature in self.features if feature in ("item", "category")]
        for part in [inherent, *[[feature] for feature in self.crosses]]:
            q, k = side(target, part), side(behaviors, part)
            score = score + (k @ q) / math.sqrt(len(q))
        return score

    def retrieve(self, batch: Batch, sequence: str, target: int) -> list[int]:
        """Places in the window, the best first; of equal scores the earlier."""
        rows = self.behavior_rows(batch, batch.histories[sequence], target)
        score = self.scores(sequence, self.target_rows(batch, target), rows).tolist()
        return sorted(range(len(score)), key=lambda n: (-score[n], n))[: self.retrieved[sequence]]

    def inputs(self, batch: Batch, target: int, whole: bool) -> Tensor:
        shown = self.target_rows(batch, target)
        parts = [self.look("representation", "", f, shown[f]) for f in self.features if f in ("item", "category")]
        for sequence in self.retrieved:
            rows = self.behavior_rows(batch, batch.histories[sequence], target)
            if not whole:
                kept = torch.tensor(self.retrieve(batch, sequence, target), dtype=torch.int64)
                rows = {feature: row[kept] for feature, row in rows.items()}
            weight = self.scores(sequence, shown, rows).softmax(0)
            v = torch.cat([self.look("representation", sequence, f, shown[f]) for f in self.features])
            e = torch.cat([self.look("representation", sequence, f, rows[f]) for f in self.features], dim=-1)
            summed = sum((weight[i] * e[i] for i in range(len(weight))), torch.zeros_like(v))
            by_target = sum((weight[i] * (e[i] * v) for i in range(len(weight))), torch.zeros_like(v))
            parts += [self.look("representation", sequence, f, shown[f]) for f in self.crosses]
            parts += [summed, by_target]
        return torch.cat(parts)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        kept = torch.stack([self.inputs(batch, target, whole=False) for target in range(len(batch))])
        logit = self.mlp(kept).squeeze(1)
        if self.auxiliary is None:
            return logit, None
        everything = torch.stack([self.inputs(batch, target, whole=True) for target in range(len(batch))])
        return logit, self.auxiliary(everything).squeeze(1)

    def loss(self, batch: Batch) -> Tensor:
        loss = nn.BCEWithLogitsLoss()
        logit, auxiliary = self(batch)
        label = batch.label_T.to(logit.dtype)
        return loss(logit, label) + (0 if auxiliary is None else loss(auxiliary, label))


def correspondence(reference: ReferenceModel) -> dict[str, str]:
    """Name of each parameter and buffer of the reference -> its name in a `CtrModel`."""
    names = {}
    for name in reference.state_dict():
        if name.startswith("embedding."):
            concern, *sequence, feature = name.removeprefix("embedding.").removesuffix(".weight").split("/")
            name_of_set = "shared" if reference.shared else concern
            table = "_".join([*sequence, feature, name_of_set])
            place = "cross" if sequence else f"inherent.{name_of_set}"
            names[name] = f"tables.{place}.embedding_bags.{table}.weight"
        elif not name.endswith("num_batches_tracked"):
            ours = name.replace("mlp.", "prediction.layers.", 1)
            ours = ours if ours != name else name.replace("auxiliary.", "auxiliary.layers.", 1)
            ours = ours.replace("running_mean", "running_mean_F").replace("running_var", "running_variance_F")
            names[name] = ours
    return names

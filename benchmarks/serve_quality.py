"""Whether exported models say what their run says: probabilities, AUC, and what their searches keep.

T = targets of a batch, K = kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from embeddings.batch import Selection
from embeddings.loss import labels_of
from pipeline.evaluate.evaluate import predictions, tasks_of
from pipeline.evaluate.metrics import Metrics
from pipeline.evaluate.open_run import opened_run
from pipeline.serve.model import Answer, ServedModel
from schemas.errors import UserError
from schemas.served import RowPrecision, ServedManifest
from schemas.shards import UNLABELED

CLOSE = 1e-6
"""Probabilities that differ by more are others."""


@dataclass(frozen=True)
class QualityFigures:
    """What one exported model gives on the test split, of the main task."""

    model: str
    """Name of its folder."""
    rows: RowPrecision
    attention_rows: RowPrecision
    targets: int
    largest_difference: float
    """Between its probabilities and those of the run's checkpoint, as `dare score` writes them."""
    targets_apart: int
    """Targets whose probability differs by more than 1e-6. In float32 these are those alone for which scores of the
    last behaviour that is kept and of the first one that is not differ by the rounding of a sum."""
    auc: float
    auc_of_run: float
    """Of the same targets by the checkpoint, as `dare evaluate` computes it."""
    auc_loss: float
    kept_the_same: float | None
    """Share of the behaviours that the search of the first model keeps which this one's keeps too; None: no search."""


class _Side:
    """What an exported model has said so far."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest, self.model = folder, ServedManifest.read(folder), ServedModel.load(folder)
        self.metrics, self.difference, self.apart, self.kept, self.same = Metrics(), 0.0, 0, 0, 0

    def figures(self, targets: int, auc_of_run: float) -> QualityFigures:
        auc = self.metrics.compute().auc
        return QualityFigures(
            model=self.folder.name,
            rows=self.manifest.rows,
            attention_rows=self.manifest.attention_rows,
            targets=targets,
            largest_difference=self.difference,
            targets_apart=self.apart,
            auc=round(auc, 6),
            auc_of_run=round(auc_of_run, 6),
            auc_loss=round(auc_of_run - auc, 6),
            kept_the_same=round(self.same / self.kept, 5) if self.kept else None,
        )


def measure(
    run: Path, folders: Sequence[Path], data: Path | None, most: int | None, device: torch.device
) -> list[QualityFigures]:
    """Compare exported models with the checkpoint that they were exported from; in a process group of one rank.

    Args:
        run: folder of the run.
        folders: exported models, all of one checkpoint. The first one's search is what others' are compared with.
        data: folder of the data set; None: the one of the run.
        most: about how many targets of the test split, whole batches; None: all.
        device: of this rank.

    Raises:
        UserError: models of different checkpoints, or what `opened_run` raises.
    """
    sides = [_Side(folder) for folder in folders]
    steps = {side.manifest.step for side in sides}
    if len(steps) > 1:
        raise UserError(f"models of the steps {', '.join(map(str, sorted(steps)))}: export all of one checkpoint")
    of_run, targets = Metrics(), 0
    with opened_run(run, "test", str(steps.pop()), data, device) as (model, stream):
        tasks = tasks_of(model)
        for batch, logits in predictions(model, stream, device):
            label_T, user_id_T = labels_of(batch, tasks)[0], batch.user_id_U[batch.user_T]
            labeled_T = label_T != UNLABELED
            logit_T, targets = logits[0].cpu(), targets + len(batch)
            of_run.add(user_id_T[labeled_T], label_T[labeled_T], logit_T[labeled_T])
            reference: Answer | None = None
            for side in sides:
                answer = side.model.answer(batch)
                reference = reference or answer
                ours_T = answer.logits[0]
                apart_T = (ours_T.double().sigmoid() - logit_T.double().sigmoid()).abs()
                side.difference = max(side.difference, float(apart_T.max()))
                side.apart += int((apart_T > CLOSE).sum())
                side.metrics.add(user_id_T[labeled_T], label_T[labeled_T], ours_T[labeled_T])
                for wanted, found in zip(reference.branches, answer.branches, strict=True):
                    if wanted.sequence in side.model.settings.retrieved:
                        side.kept += int(wanted.chosen.valid_TK.sum())
                        side.same += _shared(wanted.chosen, found.chosen)
            if most is not None and targets >= most:
                break
    auc = of_run.compute().auc
    return [side.figures(targets, auc) for side in sides]


def _shared(wanted: Selection, found: Selection) -> int:
    """How many behaviours both searches keep."""
    index_TK: Tensor = torch.where(wanted.valid_TK, wanted.index_TK, -1)
    other_TK: Tensor = torch.where(found.valid_TK, found.index_TK, -2)
    return int((index_TK[:, :, None] == other_TK[:, None, :]).any(dim=2).sum())

"""The loss of a batch that is spread over ranks.

T = targets of this rank.
"""

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from embeddings.distributed.collectives import ranks, sum_over_ranks
from embeddings.model import Prediction


def click_loss(prediction: Prediction, label_T: Tensor) -> Tensor:
    """The log loss of clicks, such that gradients averaged over ranks are those of the global batch's mean loss.

    DistributedDataParallel averages the dense gradients over ranks, TorchRec divides the tables' by their number
    (`torchrec.distributed.comm_ops.set_gradient_division`). So each rank returns the sum over its targets, times ranks,
    over the global number of targets: the mean of what the ranks return is the mean over the global batch.

    Args:
        prediction: of T targets; if it has an auxiliary logit, the log loss of that is added.
        label_T: float32, 0 or 1.

    Returns:
        float32 scalar; 0 on a rank without targets, which must call it and its backward pass nevertheless.
    """
    # Counted in each step, because ranks may have different numbers of targets, or none. The clamp is for a step in
    # which no rank has any.
    targets = sum_over_ranks(label_T.new_full((), len(label_T))).clamp(min=1)
    # A sum, because the mean of an empty batch would be not a number. On logits, which stay exact where a sigmoid would
    # round to 0 or 1.
    total = binary_cross_entropy_with_logits(prediction.logit_T, label_T, reduction="sum")
    if prediction.auxiliary_logit_T is not None:
        total = total + binary_cross_entropy_with_logits(prediction.auxiliary_logit_T, label_T, reduction="sum")
    return total * (ranks() / targets)

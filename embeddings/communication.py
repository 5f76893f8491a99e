"""Floats as they travel between ranks: as they are, or in 16 bits (TorchRec's codecs)."""

from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
from torchrec.distributed.types import QuantizedCommCodecs

from schemas.model import Communication

WIRE_BYTES: dict[Communication, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Of a float on its way."""


def codecs(communication: Communication) -> QuantizedCommCodecs:
    """What encodes and decodes floats (forward) and their gradients (backward).

    Gradients travel as bfloat16 in both 16-bit settings: those of a mean loss are too small for float16.
    """
    values = {"fp32": CommType.FP32, "fp16": CommType.FP16, "bf16": CommType.BF16}[communication]
    gradients = CommType.FP32 if communication == "fp32" else CommType.BF16
    return get_qcomm_codecs(QCommsConfig(forward_precision=values, backward_precision=gradients))

"""SIGTERM asks to stop after the step: schedulers send it before they kill."""

import signal
from types import FrameType
from typing import Self


class StopSignal:
    """Within the block, SIGTERM sets ``received`` and does nothing else. In the main thread only."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> Self:
        self._former = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._former)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

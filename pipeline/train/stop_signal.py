"""SIGTERM or SIGINT asks to stop after the step: schedulers send the one before they kill, Ctrl-C the other."""

import signal
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Within the block these signals set ``received`` and do nothing else, but for a second SIGINT, which ends the
    process at once (`KeyboardInterrupt`). In the main thread only.
    """

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> Self:
        self._former = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

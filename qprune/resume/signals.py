"""SIGTERM and SIGINT as a wish to stop after the present step."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """A run ended early as it was asked to; everything is saved. No Exception: nothing that handles errors should handle this."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + the signal's number: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.number


class Stop:
    """asked     the number of the signal that came, 0 if none did
    patience  seconds after the first signal in which others mean the same
    """

    def __init__(self, patience: float = 0.0) -> None:
        self.asked, self.patience = 0, patience
        self._since = math.inf

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Meanwhile the first SIGTERM or SIGINT sets `asked`, the second ends the process as it usually does. Only the main thread can
        listen; elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._since >= self.patience:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked, self._since = self.asked or number, min(self._since, now)

"""Ctrl-C and SIGTERM as a wish to stop at the next safe place."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """Context manager: `got` names the signal that came. A second Ctrl-C stops at once.

    Signals can only be caught in the main thread; elsewhere nothing is.
    """

    def __init__(self) -> None:
        self.got: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.got is not None:
            raise KeyboardInterrupt
        self.got = signal.Signals(number).name

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

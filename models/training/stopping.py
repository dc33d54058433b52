"""How a run is asked to stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SECOND_SIGNAL = 5.0  # s; torchrun passes the terminal's Ctrl-C on to processes that have had it already


class Interrupted(Exception):
    """Someone asked the run to stop (Ctrl-C or SIGTERM), and it saved what it had."""


class Stopping:
    """Turns the first Ctrl-C or SIGTERM into a flag; a second one ends the process at once.

    Args:
        grace: seconds after the first in which another is taken for the same.
    """

    def __init__(self, grace: float = 0.0) -> None:
        self.asked = False
        self.grace = grace
        self._first = 0.0

    def _ask(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.asked and now - self._first >= self.grace:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._first = True, now

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Take over the signals; does nothing outside the main thread, where Python allows no handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

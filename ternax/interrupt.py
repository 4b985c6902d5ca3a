"""Ctrl-C at chosen points: nothing is cut in two, and what was measured is kept."""

import signal
import threading

from ternax import watchdog


class Stop:
    """Notes a signal and raises KeyboardInterrupt at the next `check`.

        with Stop() as stop:
            for piece in work:
                stop.check()
                piece()

    A second SIGINT interrupts at once. Only the main thread may change signal handlers;
    in another one nothing changes.

    Attributes:
      seen: the signal that came first, or None: a loop that saves before it ends asks here.
    """

    def __init__(self, *signals: signal.Signals):
        """signals: those to note, by default SIGINT alone."""
        self.seen: signal.Signals | None = None
        self._signals = signals or (signal.SIGINT,)
        self._previous: dict = {}

    def __enter__(self):
        self.seen, self._previous = None, {}
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in self._signals}
        return self

    def __exit__(self, kind, error, traceback):
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _note(self, number, frame):
        if self.seen is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.seen = self.seen or signal.Signals(number)

    def check(self) -> None:
        """Raises KeyboardInterrupt if there was a signal; tells the watchdog that all goes on."""
        watchdog.tick()
        if self.seen is not None:
            raise KeyboardInterrupt

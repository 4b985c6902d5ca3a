"""Ctrl-C at chosen points: nothing is cut in two, and what was measured is kept."""

import signal
import threading


class Stop:
    """Notes a SIGINT and raises KeyboardInterrupt at the next `check`.

        with Stop() as stop:
            for piece in work:
                stop.check()
                piece()

    A second SIGINT interrupts at once. Only the main thread may change signal handlers;
    in another one nothing changes.
    """

    def __enter__(self):
        self._seen, self._previous = False, None
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind, error, traceback):
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _note(self, number, frame):
        if self._seen:
            raise KeyboardInterrupt
        self._seen = True

    def check(self) -> None:
        """Raises KeyboardInterrupt if there was a SIGINT."""
        if self._seen:
            raise KeyboardInterrupt

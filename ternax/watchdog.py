"""A run that hangs ends: nothing finished for so long, then one sentence and exit code 7.

A process that waits for another on an accelerator waits for ever, and no exception comes.
"""

import faulthandler
import os
import sys
import threading
import time

from ternax.errors import PeerFailed

# What holds the interpreter's lock keeps the sentence back; then faulthandler ends the process.
_GRACE_S = 10


class Watchdog:
    """Ends the process once `tick` was not called for `limit_s` seconds.

    Attributes:
      limit_s: seconds that one step may take, compilation included.
      who: begins the sentence: "process 1".
    """

    def __init__(self, limit_s: float, who: str):
        self.limit_s, self.who = limit_s, who
        self._last = time.monotonic()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        self.tick()

    def tick(self) -> None:
        self._last = time.monotonic()
        faulthandler.dump_traceback_later(self.limit_s + _GRACE_S, exit=True)

    def _watch(self) -> None:
        while (left := self._last + self.limit_s - time.monotonic()) > 0:
            time.sleep(left)
        faulthandler.dump_traceback()
        sys.stdout.flush()
        print(
            f"error: {self.who}: nothing finished for {self.limit_s:g} s, so a step hangs: here or "
            "in a process that it waits for; the stacks are above",
            file=sys.stderr,
            flush=True,
        )
        os._exit(PeerFailed.exit_code)


_watchdog: Watchdog | None = None


def arm(limit_s: float, who: str) -> None:
    """From now on `tick` must be called every `limit_s` seconds."""
    global _watchdog
    _watchdog = Watchdog(limit_s, who)


def tick() -> None:
    """Something finished. Nothing happens unless a watchdog is armed."""
    if _watchdog is not None:
        _watchdog.tick()

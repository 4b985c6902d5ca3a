"""How a command ends badly: the exit code and the one line that says why."""

import errno
import os
import sys

from ternax import processes
from ternax.errors import PeerFailed, TernaxError


def describe(error: BaseException) -> tuple[int, str]:
    """The exit code of an error and the one line that says it."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    if isinstance(error, TernaxError):
        return error.exit_code, str(error)
    if processes.is_lost_peer(error):
        return PeerFailed.exit_code, f"a peer process is gone or does not answer: {first}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return 3, f"out of memory: {first}; fewer --layers, a smaller --batch or --config need less"
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EFBIG,
    ):
        place = f"{error.filename}: " if error.filename else ""
        return 6, f"cannot write: {place}{error.strerror}"
    return 1, f"unexpected {type(error).__name__}: {first} (--debug shows where)"


def flush_or_discard() -> None:
    """Writes what stdout still holds or, where it takes no more, gives that up.

    Else the interpreter would try once more at its end, fail, and exit with 120.
    """
    try:
        sys.stdout.flush()
    except OSError:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (OSError, ValueError):  # not a file at all
            pass

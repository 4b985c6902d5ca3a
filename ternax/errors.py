"""Errors a user can cause. Each is one line on stderr and one exit code.

The message says what was expected, what was found and what to do. Experiments
print it and exit with `exit_code`; library callers catch the class.
"""


class TernaxError(Exception):
    """Base of every error a user can cause."""

    exit_code = 1


class UsageError(TernaxError):
    """A flag, field, name or argument that cannot be used."""

    exit_code = 2


class BackendUnavailable(UsageError):
    """A kernel backend asked for by name that this machine or shape rules out."""


class DoesNotFit(TernaxError):
    """The planned memory exceeds what is free; nothing was allocated."""

    exit_code = 3


class BadModelFile(TernaxError):
    """A model file that cannot be read: `path`, `where` (tensor or offset), `why`."""

    exit_code = 4

    def __init__(self, path, where, why):
        super().__init__(f"{path}: {where}: {why}")
        self.path, self.where, self.why = path, where, why


class NumericCheckFailed(TernaxError):
    """A number that had to agree with its reference did not."""

    exit_code = 5


class Diverged(NumericCheckFailed):
    """A training loss that is not finite. `step`: the update that met it, from 1."""

    def __init__(self, step: int, message: str):
        super().__init__(message)
        self.step = step


class OutputError(TernaxError):
    """Results cannot be written; what was measured before is on disk."""

    exit_code = 6


class PeerFailed(TernaxError):
    """A process beside this one ended badly, or said something that cannot be read."""

    exit_code = 7


class Preempted(TernaxError):
    """Told to end by the system; what was done is saved, and the same command goes on."""

    exit_code = 75


class Interrupted(TernaxError):
    """Stopped by the user; what was measured is saved and marked incomplete."""

    exit_code = 130

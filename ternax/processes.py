"""The processes of one run, through JAX's own distributed runtime: joining it, and being one.

Every process runs the same command; `join` makes the devices of all of them jax's devices. Only
the first one writes and prints. A process that is lost ends the others: at its next exchange,
or, where that waits for ever, when the runtime has missed its heartbeat.
"""

import dataclasses
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence

from ternax import roll_call
from ternax.errors import UsageError

HEARTBEAT_S = 20
# How long the processes of a run wait for one another at its beginning.
JOIN_S = 60
_LAST_WORDS_S = 1.0


@dataclasses.dataclass(frozen=True)
class Member:
    """Which process of a run this is. coordinator: "host:port" of the first one."""

    index: int = 0
    count: int = 1
    coordinator: str = ""


_member = Member()


def current() -> Member:
    """This process: the only one, unless `join` was called."""
    return _member


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return _member.index == 0


def meet(where: str) -> None:
    """Returns when every process of the run has come to the place called `where`."""
    if _member.count > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(where)


def agreed(seen: signal.Signals | None) -> signal.Signals | None:
    """The signal that any process of the run has seen, the same in all; all must ask at once."""
    if _member.count == 1:
        return seen
    import numpy as np
    from jax.experimental import multihost_utils

    found = int(multihost_utils.process_allgather(np.int32(seen or 0)).max())
    return signal.Signals(found) if found else None


def of_first(numbers: Sequence[int]) -> list[int]:
    """The numbers that the first process has, in all of them; all must ask at once."""
    if _member.count == 1:
        return list(numbers)
    import numpy as np
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(np.array(numbers, np.int32)).tolist()


def find(
    coordinator: str | None, count: int | None, index: int | None, environ: Mapping[str, str]
) -> Member | None:
    """What the flags, or else SLURM, say of this process; None where it runs alone.

    Raises:
      UsageError: some of the three flags without the others, or values that cannot be.
    """
    given = [coordinator is not None, count is not None, index is not None]
    if not any(given):
        count = int(environ.get("SLURM_NTASKS", "1"))
        if "SLURM_PROCID" not in environ or count == 1:
            return None
        node = _first_node(environ["SLURM_JOB_NODELIST"])
        # Two jobs on a node need two ports.
        port = 12288 + int(environ["SLURM_JOB_ID"]) % 4096
        return Member(int(environ["SLURM_PROCID"]), count, f"{node}:{port}")
    if coordinator is None or count is None or index is None:
        raise UsageError("--coordinator, --processes and --process go together, found some of them")
    if not re.fullmatch(r".+:[1-9]\d{0,4}", coordinator):
        raise UsageError(f"--coordinator must be host:port, found {coordinator!r}")
    if index >= count:
        raise UsageError(f"--process counts from 0 to {count - 1}, found {index}")
    return Member(index, count, coordinator)


def join(member: Member, says: str, heartbeat_s: int = HEARTBEAT_S, join_s: int = JOIN_S) -> None:
    """Makes this process part of the run; before jax first looks at its devices.

    Args:
      says: what all processes must agree on: command, model, versions.
      heartbeat_s: how long a process may be silent before the others give up.
      join_s: how long they wait for one another to come.

    Raises:
      PeerFailed: a process that does not come, or runs something else; by its number.
      UsageError: a port that is taken.
    """
    global _member
    roll_call.call(member.coordinator, member.count, member.index, says, join_s)
    import jax

    # Else JAX's notifier takes SIGTERM for itself, and nothing is saved.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator_address=member.coordinator,
        num_processes=member.count,
        process_id=member.index,
        initialization_timeout=join_s,
        heartbeat_timeout_seconds=heartbeat_s,
        shutdown_timeout_seconds=heartbeat_s,
    )
    _member = member


def _first_node(nodes: str) -> str:
    """The first host of SLURM's list: "node[03-07,11],gpu1" -> "node03"."""
    found = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    if found is None:
        raise UsageError(f"SLURM_JOB_NODELIST names no host, found {nodes!r}")
    return found[1] + (found[2] or "")


def leave(code: int) -> int:
    """The exit code of this process, handed back; in a run of several that failed, it ends here.

    The runtime would first wait for the others, who may never come.
    """
    if _member.count > 1 and code:
        sys.stdout.flush()
        sys.stderr.flush()
        if _member.index == 0:
            # With it goes the runtime's service, and then the others are aborted: after they spoke.
            time.sleep(_LAST_WORDS_S)
        os._exit(code)
    return code


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error of jax says that another process is gone."""
    text = str(error)
    signs = ("Gloo", "NCCL", "coordination", "Connection closed by peer", "heartbeat")
    return _member.count > 1 and any(sign in text for sign in signs)

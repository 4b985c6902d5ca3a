"""The processes of one run, through JAX's own distributed runtime: joining it, and being one.

Every process runs the same command; `join` makes the devices of all of them jax's devices. Only
the first one writes and prints. A process that is lost ends the others: at its next exchange,
or, where that waits for ever, when the runtime has missed its heartbeat.
"""

import dataclasses
import os
import re
import socket
import sys
from collections.abc import Mapping

from ternax.errors import PeerFailed, UsageError

HEARTBEAT_S = 20
# How long the processes of a run wait for one another at its beginning.
JOIN_S = 60
_KEY = "ternax/run/"


@dataclasses.dataclass(frozen=True)
class Member:
    """Which process of a run this is. coordinator: "host:port" of the first one."""

    index: int = 0
    count: int = 1
    coordinator: str | None = None


_member = Member()


def current() -> Member:
    """This process: the only one, unless `join` was called."""
    return _member


def find(
    coordinator: str | None, count: int | None, index: int | None, environ: Mapping[str, str]
) -> Member | None:
    """What the flags, or else SLURM, say of this process; None where it runs alone.

    Raises:
      UsageError: some of the three flags without the others, or values that cannot be.
    """
    given = [coordinator is not None, count is not None, index is not None]
    if not any(given):
        tasks = environ.get("SLURM_NTASKS", "1")
        if "SLURM_PROCID" not in environ or tasks == "1":
            return None
        return Member(int(environ["SLURM_PROCID"]), int(tasks))
    if not all(given):
        raise UsageError("--coordinator, --processes and --process go together, found some of them")
    assert coordinator is not None and count is not None and index is not None
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
    import jax

    if member.index == 0 and member.coordinator is not None:
        _check_port(member.coordinator)
    explicit = {}
    if member.coordinator is not None:
        explicit = dict(
            coordinator_address=member.coordinator,
            num_processes=member.count,
            process_id=member.index,
        )
    # Else JAX's notifier takes SIGTERM for itself, and nothing is saved.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **explicit,
            initialization_timeout=join_s,
            heartbeat_timeout_seconds=heartbeat_s,
            shutdown_timeout_seconds=heartbeat_s,
        )
    except Exception as error:
        raise PeerFailed(_who_is_missing(member, str(error), join_s)) from error
    _member = member
    _agree(member, says, join_s)


def _check_port(coordinator: str) -> None:
    """UsageError where another program listens on the coordinator's port of this machine."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UsageError(
                f"--coordinator={coordinator}: port {port} is taken on this machine "
                f"({error.strerror}): name another"
            ) from error


def _who_is_missing(member: Member, why: str, join_s: int) -> str:
    tasks = sorted({int(found) for found in re.findall(r"task:(\d+)", why)} - {member.index})
    those = ", ".join(map(str, tasks)) or ("0" if member.index else "a peer")
    at = f" at {member.coordinator}" if member.coordinator else ""
    return (
        f"process {those} did not come within {join_s} s{at}: expected {member.count} processes, "
        "each with its own --process; start what is missing, or correct --processes"
    )


def _agree(member: Member, says: str, join_s: int) -> None:
    """PeerFailed, with the first difference, unless all processes say the same."""
    from jax._src.distributed import global_state

    client = global_state.client
    client.key_value_set(f"{_KEY}{member.index}", says)
    for index in range(member.count):
        try:
            other = client.blocking_key_value_get(f"{_KEY}{index}", 1000 * join_s)
        except Exception as error:
            raise PeerFailed(f"process {index} went away before it said what it runs") from error
        if other != says:
            mine, theirs = (text.split("\n") for text in (says, other))
            pairs = [(a, b) for a, b in zip(mine, theirs, strict=False) if a != b]
            a, b = pairs[0] if pairs else (f"{len(mine)} lines", f"{len(theirs)} lines")
            raise PeerFailed(
                f"process {index} runs something else: {b!r}, process {member.index}: {a!r}; all "
                "processes of a run take the same command"
            )



def leave(code: int) -> int:
    """The exit code of this process, handed back; in a run of several that failed, it ends here.

    The runtime would first wait for the others, who may never come.
    """
    if _member.count > 1 and code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error of jax says that another process is gone."""
    text = str(error)
    signs = ("Gloo", "NCCL", "coordination", "Connection closed by peer", "heartbeat")
    return _member.count > 1 and any(sign in text for sign in signs)

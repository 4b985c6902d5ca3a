"""Who is there, before a run of several processes begins: by name, with a sentence each can print.

JAX's runtime aborts in C++ when a process does not come, and knows nothing of what each one runs.
So the first process listens on the coordinator's port, hears everyone, tells all of them the
same verdict and makes room on the port for the runtime.
"""

import contextlib
import json
import socket
import time

from ternax.errors import PeerFailed, UsageError

_MOST_BYTES = 1 << 20


def call(address: str, count: int, index: int, says: str, timeout_s: float) -> None:
    """Returns once `count` processes that say the same have come.

    Args:
      address: "host:port" where process 0 listens.
      index: of this process.
      says: what all must agree on, a line for each fact.
      timeout_s: how long to wait for the others.

    Raises:
      UsageError: process 0 cannot listen there.
      PeerFailed: who did not come, or runs something else.
    """
    host, _, port = address.rpartition(":")
    if index == 0:
        verdict = _hear(int(port), count, says, timeout_s)
    else:
        verdict = _report((host.strip("[]"), int(port)), index, says, timeout_s)
    if verdict:
        raise PeerFailed(verdict)


def _hear(port: int, count: int, says: str, timeout_s: float) -> str:
    """Process 0: hears the others and tells them the verdict; "" when all is well."""
    end = time.monotonic() + timeout_s
    try:
        listener = socket.create_server(("", port))
    except OSError as error:
        raise UsageError(
            f"port {port} is taken on this machine ({error.strerror}): name another --coordinator"
        ) from error
    came: dict[int, str] = {0: says}
    with contextlib.ExitStack() as stack:
        stack.enter_context(listener)
        peers = []
        while len(came) < count and (left := end - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                peer = stack.enter_context(listener.accept()[0])
                peer.settimeout(5.0)
                index, said = json.loads(_line(peer))
            except (OSError, ValueError, TypeError):
                continue  # nobody of ours
            peers.append(peer)
            if index in came:
                came[index] = "a second process of this number"
            else:
                came[index] = said
        verdict = _verdict(came, count, timeout_s)
        for peer in peers:
            with contextlib.suppress(OSError):
                peer.sendall((json.dumps(verdict) + "\n").encode())
    return verdict


def _report(address: tuple[str, int], index: int, says: str, timeout_s: float) -> str:
    """Any other process: says what it runs and hears the verdict."""
    end = time.monotonic() + timeout_s + 5.0  # process 0 gives up first, and tells why
    while time.monotonic() < end:
        try:
            with socket.create_connection(address, timeout=5.0) as peer:
                peer.sendall((json.dumps([index, says]) + "\n").encode())
                peer.settimeout(max(1.0, end - time.monotonic()))
                return str(json.loads(_line(peer)))
        except (OSError, ValueError):
            time.sleep(0.2)  # not yet there, or somebody else
    place = f"{address[0]}:{address[1]}"
    return f"process 0 does not answer at {place}: is it there, and the port its own?"


def _line(peer: socket.socket) -> bytes:
    found = b""
    while not found.endswith(b"\n") and len(found) < _MOST_BYTES:
        more = peer.recv(1 << 16)
        if not more:
            break
        found += more
    return found


def _verdict(came: dict[int, str], count: int, timeout_s: float) -> str:
    missing = [str(i) for i in range(count) if i not in came]
    if missing:
        return (
            f"process {', '.join(missing)} did not come within {timeout_s:g} s: expected "
            f"{count} processes, found {len(came)}"
        )
    for index, said in sorted(came.items()):
        mine, theirs = came[0].split("\n"), said.split("\n")
        if mine != theirs:
            only_theirs = " ".join(line for line in theirs if line not in mine)
            only_mine = " ".join(line for line in mine if line not in theirs)
            return (
                f"process {index} runs something else: {only_theirs!r} where process 0 has "
                f"{only_mine!r}; all processes of a run take the same command"
            )
    return ""

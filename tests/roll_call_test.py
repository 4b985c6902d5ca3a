"""Who came and what they run: every process gets the same sentence, over real sockets."""

import concurrent.futures
import socket

import pytest

from ternax import launch, roll_call
from ternax.errors import PeerFailed, UsageError


def verdicts(count: int, says: dict[int, str], timeout_s: float = 10.0) -> set[str]:
    """What the processes named in `says` are told, each in a thread; "" where all is well."""
    address = f"127.0.0.1:{launch.free_port()}"

    def one(item):
        try:
            roll_call.call(address, count, *item, timeout_s)
        except PeerFailed as error:
            return str(error)
        return ""

    with concurrent.futures.ThreadPoolExecutor(len(says)) as pool:
        return set(pool.map(one, says.items()))


def test_all_there():
    assert verdicts(4, dict.fromkeys(range(4), "decode\n70b")) == {""}


def test_one_is_missing():
    assert verdicts(4, {0: "a", 2: "a"}, 1.0) == {
        "process 1, 3 did not come within 1 s: expected 4 processes, found 2"
    }


def test_one_runs_something_else():
    [told] = verdicts(3, {0: "x\n--batch=1", 1: "x\n--batch=1", 2: "x\n--batch=2"})
    assert told.startswith("process 2 runs something else: '--batch=2' where process 0 has")


def test_who_is_not_of_ours_is_not_counted():
    """A stranger's bytes on the port: the others still find each other."""
    port = launch.free_port()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(roll_call.call, f"127.0.0.1:{port}", 2, 0, "a", 10.0)
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\n")
                break
            except ConnectionRefusedError:
                pass
        second = pool.submit(roll_call.call, f"127.0.0.1:{port}", 2, 1, "a", 10.0)
        assert first.result() is second.result() is None


def test_a_taken_port():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} is taken"):
            roll_call.call(f"127.0.0.1:{port}", 2, 0, "a", 1.0)


def test_nobody_listens():
    address = f"127.0.0.1:{launch.free_port()}"
    with pytest.raises(PeerFailed, match="process 0 does not answer"):
        roll_call.call(address, 2, 1, "a", -4.5)

"""A process in which nothing finishes any more ends by itself, and says so."""

import subprocess
import sys
import time

SCRIPT = """
import time
from ternax import interrupt, watchdog

watchdog.arm(1.0, "process 3")
with interrupt.Stop() as stop:
    for _ in range(20):
        time.sleep(0.1)
        stop.check()
print("worked for longer than the limit", flush=True)
time.sleep(60)
"""


def test_what_hangs_ends_and_what_works_does_not():
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.stdout == "worked for longer than the limit\n"
    assert done.returncode == 7 and time.monotonic() - start < 30
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: process 3: nothing finished for 1 s, so a step hangs")
    assert "Thread" in done.stderr and "time.sleep" not in last


def test_without_one_nothing_happens():
    from ternax import watchdog

    watchdog.tick()
    assert watchdog._watchdog is None

"""Zeros on huge pages: zeros, and on Linux on huge pages if there are any."""

import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from ternax.kernels.cpu import backend as cpu
from ternax.kernels.memory import zeros

SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")

# The flags of an array's memory, from the map of this process.
MAPPED = """
import ctypes, re
from ternax.kernels.memory import zeros
x = zeros((96, 1 << 20), "uint8").block_until_ready()
first = x.unsafe_buffer_pointer() + (8 << 20)  # inside, whatever the alignment
maps = re.findall(
    r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags: (.*?)$", open("/proc/self/smaps").read(), re.M | re.S
)
print(*(flags for begin, end, flags in maps if int(begin, 16) <= first < int(end, 16)))
"""


@pytest.mark.parametrize("shape", [(3, 5), (7, 1 << 20), (1, (1 << 23) + 37)])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "uint16"])
def test_all_of_it_is_zero(shape, dtype):
    # Memory that held something else before.
    np.testing.assert_array_equal(jnp.ones(shape, dtype), 1)
    x = zeros(shape, dtype)
    assert x.shape == shape and x.dtype == dtype
    assert not np.asarray(x).any()


@pytest.mark.skipif(
    cpu.why_not("cpu", None, None) is not None
    or not SETTING.exists()
    or "[never]" in SETTING.read_text(),
    reason="needs the CPU library, and huge pages in this system",
)
def test_huge_pages_are_asked_for_large_ones():
    done = subprocess.run(
        [sys.executable, "-c", MAPPED], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    # Advised so; how many it got depends on what the system has free.
    assert "hg" in done.stdout.split()

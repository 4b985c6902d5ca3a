"""A split model's decode step as a compiler for H200s sees it: bytes and exchanges as planned."""

import os
import re
import subprocess
import sys

import pytest

from ternax import collectives
from ternax.kernels import aot
from tests import split


def test_a_decode_step_compiles_for_four_h200():
    if reason := aot.why_not():
        pytest.skip(reason)
    # A process of its own: jax takes up its CUDA plugin only before it first looks at devices.
    command = [sys.executable, "-m", "experiments.aot", "--config=70b", "--layers=2"]
    done = subprocess.run(
        command, cwd=split.ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""}
    )
    assert done.returncode == 0, done.stderr  # 5 where exchanges are not those planned
    compiled, planned = (
        int(re.findall(rf"{word}\s+([\d,]+) bytes", done.stdout)[0].replace(",", ""))
        for word in ("compiled", "planned")
    )
    # Beside weights and cache a step takes a token, a flag and a key a row, and a count.
    assert compiled - planned == 4 + 1 + 8 + 4


def test_exchanges_of_a_gpu_program():
    """As XLA:GPU writes them: some are started and awaited, some are not."""
    body = 'metadata={op_name="jit(decode)/while/body/while/body/psum"}'
    text = "\n".join(
        [
            f"  %a = f32[1,1]{{1,0}} all-reduce(%x), channel_id=1, {body}",
            f"  %b = ((s32[1,8192]{{1,0}}), s32[1,8192]{{1,0}}) all-reduce-start(%y), {body}",
            f"  %c = s32[1,8192]{{1,0}} all-reduce-done(%b), {body}",
            '  %d = f32[96]{0} all-gather(%z), metadata={op_name="jit(decode)/while/body/x"}',
        ]
    )
    assert collectives.of_program(text, 3) == [
        collectives.Collective("all-reduce", 32768, 3),
        collectives.Collective("all-gather", 384, 1),
        collectives.Collective("all-reduce", 4, 3),
    ]

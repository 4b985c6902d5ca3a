"""Host memory of two processes that load one model together, told by the kernel (VmHWM)."""

import dataclasses
import os
import socket
import subprocess
import sys

import jax
from flax import nnx

import ternax
from ternax import configs
from tests import split

_LOAD = """
import gc, sys
from ternax import machine, mesh, processes

path, port, index = sys.argv[1:]
processes.join(processes.Member(int(index), 2, f"localhost:{port}"), "load", join_s=120)
import jax
import ternax
from flax import nnx

place = mesh.make_mesh(mesh.parse("tensor:2"))
ternax.load(path, mesh=place)  # what is compiled once, and its libraries, are no load's
gc.collect()
assert machine.reset_peak()
before = machine.resident_bytes()
model = ternax.load(path, mesh=place)
held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
print(machine.peak_resident_bytes() - before, held)
"""


def test_a_process_holds_its_share_and_one_tensor(tmp_path):
    config = dataclasses.replace(
        configs.get_config("tiny-llama"),
        hidden_size=2048,
        intermediate_size=8192,
        num_heads=32,
        num_kv_heads=32,
        head_dim=64,
        num_layers=8,
        vocab_size=264,
    )
    model = ternax.load(config)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    tensor = 8192 * 2048 // 4
    ternax.save(model, tmp_path / "model")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # What malloc keeps for later in each of tensorstore's threads is not the load's.
    env = os.environ | {"PYTHONPATH": str(split.ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    env |= {"JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _LOAD, str(tmp_path / "model"), str(port), str(index)],
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        for index in range(2)
    ]
    for process in started:
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0
        peak, held = map(int, said.split()[-2:])
        assert held < 0.51 * nbytes
        # A tensor, and what reads it: orbax and its threads take 29 MB. Less than the whole model.
        assert peak < held + tensor + 40e6 < nbytes, (peak, held, tensor)

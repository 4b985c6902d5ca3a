"""Decode attention as a compiler for an H200 sees it: two launches a layer, and no copy of a cache.

The program is decode's: a scan over layers in a loop over tokens, the cache carried and given away.
"""

import json
import pathlib
import subprocess
import sys

import pytest

from ternax.kernels import aot

ROOT = pathlib.Path(__file__).resolve().parents[2]
# A processor has 228 KiB, of which it keeps 1 KiB for each block.
PROCESSOR_BYTES = 228 * 1024

_SCRIPT = """
import json
import sys

import jax
import jax.numpy as jnp
from jax import lax

from ternax.kernels import aot
from ternax.kernels.attention import step_attention

dtype, batch = sys.argv[1], int(sys.argv[2])
layers, heads, groups, width, slots = 3, 64, 8, 128, 1024

def decode(qkv, rope, stores, start, length):
    def layer(carry, index):
        qkv, stores = carry
        out, *stores = step_attention(qkv, rope, *stores, start, length, index)
        out = out.reshape(batch, 1, -1)
        return (jnp.concatenate([out, out[:, :, : 2 * groups * width]], axis=2), stores), None

    def token(_, carry):
        qkv, stores, length = carry
        (qkv, stores), _ = lax.scan(layer, (qkv, stores), jnp.arange(layers))
        return qkv, stores, length + 1

    return lax.fori_loop(0, 16, token, (qkv, stores, length))

shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)
stores = [shape(dtype, layers, batch, groups, slots, width)] * 2
stores += [shape("float32", layers, batch, groups, slots)] * 2 if dtype == "int8" else [None] * 2
place = shape("int32", batch), shape("int32")
qkv = shape("float32", batch, 1, (heads + 2 * groups) * width)
rope = [shape("float32", batch, 1, 1, width // 2)] * 2
aot.devices("h200")
with aot.dumped_kernels() as folder:
    compiled = aot.compile_for("h200", decode, qkv, rope, stores, *place, donate=(2,))
    kernels = aot.kernels(folder)
    names = {name: aot.disassembled(folder, name).count("HGMMA") for name in kernels}
memory = compiled.memory_analysis()
cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stores))
print(json.dumps({
    "kernels": kernels,
    "tensor_core_instructions": names,
    "launches": compiled.as_text().count('custom_call_target="mosaic_gpu_v2"'),
    "copies": [line for line in compiled.as_text().splitlines() if " copy(" in line],
    "cache_bytes": cache,
    "alias_bytes": memory.alias_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
}))
"""


@pytest.mark.parametrize(
    "dtype, batch, launches, tile, blocks",
    [
        # Two launches; two blocks share a processor.
        ("uint16", 2, 2, 64, 2),
        ("int8", 2, 2, 64, 2),
        # Key heads of rows fill the processors: one launch, larger tiles.
        ("uint16", 16, 1, 128, 1),
    ],
)
def test_it_compiles_for_an_h200(dtype, batch, launches, tile, blocks):
    if reason := aot.why_not():
        pytest.skip(reason)
    # A process of its own: jax takes up its CUDA plugin only before it first looks at devices.
    command = [sys.executable, "-c", _SCRIPT, dtype, str(batch)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["launches"] == len(found["kernels"]) == launches
    for kernel in found["kernels"].values():
        assert kernel["spill_bytes"] == kernel["serialized_wgmma"] == 0
        assert kernel["registers"] <= 128
        assert blocks * (kernel["shared_bytes"] + 1024) <= PROCESSOR_BYTES
    attend, *combine = (count for _, count in sorted(found["tensor_core_instructions"].items()))
    # K of a wgmma is 16: of keys a head's 128 columns, of values, either half of them, the slots.
    assert attend == tile // 64 * 128 // 16 + 2 * tile // 16 and not any(combine)
    # The whole cache is written where it is; what lies beside it is less than a layer of it.
    assert found["alias_bytes"] >= found["cache_bytes"]
    assert found["temporary_bytes"] < found["cache_bytes"] / 3
    assert not [line for line in found["copies"] if "1024,128]" in line or "8,1024]" in line]

"""Stored models loaded onto a mesh: each device's share is what `random_model` would make there."""

import concurrent.futures
import dataclasses
import json

import jax
import numpy as np
from flax import nnx

import ternax
from ternax import configs, launch
from tests import split
from tests.sharding_test import SMALL

_LOADED = """
from ternax.random_weights import random_model

def bits(model):
    leaves = jax.tree_util.tree_flatten_with_path(nnx.state(model))[0]
    return {str(path): [(leaf.shape, shard.device.id, np.asarray(shard.data).tobytes())
                        for shard in leaf.addressable_shards]
            for path, leaf in leaves}

cases = (
    ("tiny-llama", "absmean", ["tensor:8"]),
    ("tiny-bitnet", "int4,group_size=16", ["tensor:2", "data:2,tensor:4"]),
)
for name, scheme, meshes in cases:
    config = small(name, vocab_size=8 * 37, scheme=scheme)
    path = f"{sys.argv[1]}/{name}"
    ternax.save(random_model(config), path)
    for text in meshes:
        mesh = mesh_of(text)
        expected = bits(random_model(config, layout=layout_of(mesh, config)))
        found = bits(ternax.load(path, mesh=mesh))
        for leaf in expected:
            assert found[leaf] == expected[leaf], (name, text, leaf)
print("equal")
"""


def test_a_stored_model_on_a_mesh(tmp_path):
    assert split.run(SMALL + _LOADED, 8, str(tmp_path)) == "equal\n"


_STORED = """
from ternax.errors import UsageError
from ternax.gather import whole_model
from ternax.noise import make_noise

def bits(model):
    leaves = jax.tree_util.tree_flatten_with_path(nnx.state(model))[0]
    return {str(path): np.asarray(leaf).tobytes() for path, leaf in leaves}

folder, key = sys.argv[1], jax.random.key(3)
config = small("tiny-bitnet", vocab_size=8 * 37, hidden_size=256, num_heads=16)
# 8 devices hold each of its 4 kv heads twice.
meshes = [mesh_of("tensor:2"), mesh_of("tensor:8")]

# What is stored, in each form: its floats packed as they are read.
ternax.save(ternax.load(config, packed=False), f"{folder}/floats")
one = ternax.load(f"{folder}/floats", backend="reference")
for name, form in (("hf", "hf"), ("tq2.gguf", "gguf:TQ2_0")):
    ternax.save(one, f"{folder}/{name}", form)
for path, expected in (("floats", one), ("hf", None), ("tq2.gguf", None)):
    path = f"{folder}/{path}"
    expected = bits(expected or ternax.load(path))
    for mesh in meshes:
        many = ternax.load(path, mesh=mesh, backend="reference")
        assert bits(whole_model(many)) == expected, (path, mesh.shape)

# What is struck: every kind of noise on weights, and what is saved afterwards.
for spec, selection in (
    ("bitflip,rate=0.02,policy=zero", dict(select=".*")),
    ("sign_flip,rate=0.1", dict(select="layers.*(k|down)", rows=0.5)),
    ("scale_bits,rate=0.05", {}),
    ("gaussian,sigma=0.2", dict(select="layers.*(q|o)")),
):
    noise = make_noise(spec)
    struck, counts = ternax.perturb(one, noise, key, copy=True, **selection)
    assert sum(counts.values()) > 0
    for mesh in meshes:
        many = ternax.load(f"{folder}/floats", mesh=mesh, backend="reference")
        many, others = ternax.perturb(many, noise, key, **selection)
        assert others == counts, (spec, mesh.shape)
        assert bits(whole_model(many)) == bits(struck), (spec, mesh.shape)
    if noise.domain == "packed":
        ternax.save(many, f"{folder}/struck")
        assert bits(ternax.load(f"{folder}/struck")) == bits(struck)
try:
    ternax.load(config, packed=False, mesh="data:8")
except UsageError as error:
    print(error)
"""


def test_stored_struck_and_saved_as_on_one_device(tmp_path):
    said = split.run(SMALL + _STORED, 8, str(tmp_path)).splitlines()
    assert len(said) == 1 and "mesh belong to packed=True" in said[0]


_DATA = """
from ternax import taps
from ternax.noise import make_noise

config = small("tiny-bitnet")
tokens = np.random.default_rng(0).integers(0, 264, (4, 9)).astype(np.int32)
noise, key = make_noise("sign_flip,rate=0.1"), jax.random.key(3)
one, counts = ternax.perturb(ternax.load(config, backend="reference"), noise, key)
many = ternax.load(config, backend="reference", mesh=mesh_of("data:4"))
many, others = ternax.perturb(many, noise, key)
assert others == counts and sum(counts.values()) > 0
found, logits = many(tokens), np.asarray(one(tokens))
assert len(found.sharding.device_set) == 4 and found.addressable_shards[0].data.shape[0] == 1
assert np.abs(found - logits).max() < 1e-5  # norms of one row and of four round apart
# What each projection reads is put together from all devices that split it.
reads = taps.projection_inputs(one, tokens[:2])
many = ternax.load(config, backend="reference", mesh=mesh_of("data:2,tensor:2"))
many, _ = ternax.perturb(many, noise, key)
for name, read in taps.projection_inputs(many, tokens[:2]).items():
    assert np.abs(read - reads[name]).max() < 1e-5, name
print("equal")
"""


def test_noise_over_data_and_what_projections_read():
    """The same strikes on every copy, each of which reads its rows of a batch."""
    assert split.run(SMALL + _DATA, 4) == "equal\n"


_READS = """
from ternax.noise import make_noise

tokens = np.random.default_rng(0).integers(0, 264, (2, 9)).astype(np.int32)
for name, spec, limit, mesh in json.loads(sys.argv[1]):
    config, noise, key = small(name), make_noise(spec), jax.random.key(3)
    one, counts = ternax.perturb(ternax.load(config, backend="reference"), noise, key)
    many = ternax.load(config, backend="reference", mesh=mesh_of(mesh))
    many, others = ternax.perturb(many, noise, key)
    assert others == counts
    assert np.abs(many(tokens) - one(tokens)).max() <= limit, (name, spec, mesh)
print("equal")
"""


def test_reads_of_split_projections():
    """One device's errors: to the bit where nothing rounds otherwise, else within its reach.

    What is read is whole on each device in front of q and gate, and split in front of o and down;
    what comes out the other way round, with every kv head twice on 8 devices.
    """
    cases = [
        ["tiny-llama", "input_gaussian,sigma=0.02", 0.0, "data:2,tensor:4"],
        ["tiny-bitnet", "read_gaussian,sigma=0.05", 1e-5, "tensor:8"],
    ]
    assert split.run(SMALL + _READS, 8, json.dumps(cases)) == "equal\n"


_TOGETHER = """
import ternax
from ternax import processes
from tests.checkpoint.split_test import shared_config

folder, coordinator, index = sys.argv[1:]
processes.join(processes.Member(int(index), 2, coordinator), "save")
for mesh in ("tensor:2", "data:2"):
    model = ternax.load(shared_config(), mesh=mesh)
    assert not model.layers.attn.o.data[...].is_fully_addressable
    ternax.save(model, f"{folder}/{mesh}")
"""


def shared_config():
    """Its matrices and tables divide by two."""
    changes = {"num_layers": 1, "intermediate_size": 256, "vocab_size": 264}
    return dataclasses.replace(configs.get_config("tiny-llama"), **changes)


def test_two_processes_save_one_model(tmp_path):
    """Each holds a half, or a copy; the first one writes, and one device loads the whole."""
    shared = (str(tmp_path), f"127.0.0.1:{launch.free_port()}")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda i: split.run("import sys" + _TOGETHER, 1, *shared, i), "01"))
    expected = jax.tree.leaves(nnx.state(ternax.load(shared_config())))
    for mesh in ("tensor:2", "data:2"):
        found = jax.tree.leaves(nnx.state(ternax.load(tmp_path / mesh)))
        for leaf, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(leaf, other)

"""Stored models loaded onto a mesh: each device's share is what `random_model` would make there."""

from tests import split
from tests.sharding_test import SMALL

_LOADED = """
from ternax.random_weights import random_model

def bits(model):
    leaves = jax.tree_util.tree_flatten_with_path(nnx.state(model))[0]
    return {str(path): [(leaf.shape, shard.device.id, np.asarray(shard.data).tobytes())
                        for shard in leaf.addressable_shards]
            for path, leaf in leaves}

for name, scheme in (("tiny-llama", "absmean"), ("tiny-bitnet", "int4,group_size=16")):
    config = small(name, vocab_size=8 * 37, scheme=scheme)
    path = f"{sys.argv[1]}/{name}"
    ternax.save(random_model(config), path)
    for text in ("tensor:2", "tensor:8", "data:2,tensor:4"):
        # A scale group of o and of down stays whole on 8 devices: 16 codes each.
        mesh = mesh_of(text)
        expected = bits(random_model(config, layout=layout_of(mesh, config)))
        found = bits(ternax.load(path, mesh=mesh))
        for leaf in expected:
            assert found[leaf] == expected[leaf], (name, text, leaf)
print("equal")
"""


def test_a_stored_model_on_a_mesh(tmp_path):
    assert split.run(SMALL + _LOADED, 8, str(tmp_path)) == "equal\n"


_REFUSED = """
from ternax.errors import UsageError

config = small("tiny-llama")
model = ternax.load(config, mesh=mesh_of("tensor:2"))
ternax.save(ternax.load(config, packed=False), f"{sys.argv[1]}/float")
for call in (
    lambda: ternax.save(model, f"{sys.argv[1]}/x"),
    lambda: ternax.perturb(model, "sign_flip,rate=0.1", jax.random.key(0)),
    lambda: ternax.load(f"{sys.argv[1]}/float", mesh=mesh_of("tensor:2")),
    lambda: ternax.load(config, packed=False, mesh="data:8"),
):
    try:
        call()
    except UsageError as error:
        print(error)
"""


def test_what_a_split_model_cannot_do(tmp_path):
    said = split.run(SMALL + _REFUSED, 8, str(tmp_path)).splitlines()
    assert len(said) == 4
    assert "save: the model is split over tensor:2" in said[0]
    assert "perturb: the model is split over tensor:2" in said[1]
    assert "holds floats, which are packed whole" in said[2]
    assert "mesh belong to packed=True" in said[3]


_STRUCK = """
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
print("equal")
"""


def test_noise_over_data():
    """The same strikes on every copy, each of which reads its rows of a batch."""
    assert split.run(SMALL + _STRUCK, 4) == "equal\n"

"""`load` gives back what `save` wrote, to the bit, and refuses in one line what is not whole."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import ternax
from ternax import configs
from ternax.checkpoint.loading import load
from ternax.checkpoint.saving import save
from ternax.edit import pack_model
from ternax.errors import BadModelFile, UsageError
from ternax.models import MODELS
from ternax.quant import SCHEMES
from ternax.random_weights import random_model
from tests.checkpoint import stored

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOKENS = np.arange(6, dtype=np.int32)[None]


def float_model(name: str, scheme: str = "absmean", **changes):
    config = dataclasses.replace(configs.get_config(name), scheme=scheme, num_layers=2, **changes)
    return MODELS[config.family](config, rngs=nnx.Rngs(1))


def packed_model(name: str, scheme: str = "absmean", **tables):
    """Random codes, and f32 leaves that differ everywhere, as no scheme makes them so soon."""
    config = dataclasses.replace(configs.get_config(name), scheme=scheme, num_layers=2)
    model = random_model(config, seed=3, **tables)
    random = np.random.default_rng(4)
    for node in (node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Variable)):
        value = node.get_value()
        if value.dtype == np.float32:
            node.set_value(jax.numpy.asarray(random.normal(size=value.shape).astype(np.float32)))
    return model


def same(found, expected) -> None:
    assert stored.bits(found) == stored.bits(expected)
    assert stored.static(found) == stored.static(expected)
    assert found.config == expected.config


PACKED = [name for name in SCHEMES if name not in ("nf4", "nvfp4")]  # floats, no kernel has them
SPELLED = [*PACKED, "int4,granularity=group,group_size=16", "twn,granularity=row"]


@pytest.mark.parametrize("name", ["tiny-bitnet", "tiny-llama"])
@pytest.mark.parametrize("scheme", SPELLED)
def test_packed_round_trip(tmp_path, name, scheme):
    model = packed_model(name, scheme)
    save(model, tmp_path / "model")
    same(load(tmp_path / "model"), model)


@pytest.mark.parametrize("name", ["tiny-bitnet", "tiny-llama"])
def test_float_round_trip(tmp_path, name):
    model = float_model(name)
    save(model, tmp_path / "model")
    found = load(tmp_path / "model", packed=False)
    same(found, model)
    np.testing.assert_array_equal(found(TOKENS), model(TOKENS))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_float_model_under_every_scheme(tmp_path, scheme):
    """The stored floats depend on no scheme, so one file serves them all."""
    save(float_model("tiny-llama"), tmp_path / "model")
    inputs = "none" if scheme == "none" else "int8"
    expected = float_model("tiny-llama", scheme, inputs=inputs)
    same(load(tmp_path / "model", scheme=scheme, packed=False), expected)
    if scheme == "twn":
        same(load(tmp_path / "model", scheme=scheme), pack_model(expected))


@pytest.mark.parametrize("embed, head", [("f32", "int4"), ("bf16", "bf16")])
def test_table_dtypes(tmp_path, embed, head):
    model = packed_model("tiny-llama", embed_dtype=embed, head_dtype=head)
    save(model, tmp_path / "model")
    same(load(tmp_path / "model"), model)


def test_code_of_its_own_is_loaded_by_who_names_it(tmp_path):
    own = "ternax.quant.ternary:TWN"
    model = packed_model("tiny-bitnet", own)
    ternax.save(model, tmp_path / "mine")
    same(ternax.load(tmp_path / "mine", scheme=own), model)
    with pytest.raises(BadModelFile, match=f"ask for scheme={own}"):
        ternax.load(tmp_path / "mine")


def test_a_loaded_model_answers_alike(tmp_path):
    model = packed_model("tiny-bitnet")
    save(model, tmp_path / "model")
    found = ternax.load(tmp_path / "model")
    np.testing.assert_array_equal(found(TOKENS), model(TOKENS))
    first = ternax.load(str(tmp_path / "model"), layers=1)
    assert first.config.num_layers == 1
    whole = stored.bits(model)
    for path, (*_, data) in stored.bits(first).items():
        assert data == whole[path][2][: len(data)], path
    pinned = ternax.load(tmp_path / "model", backend="reference")
    assert pinned.layers.attn.qkv.backend == "reference"


# --- What is not whole ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "model"
    save(packed_model("tiny-bitnet"), path)
    return path


@pytest.fixture
def saved(whole, tmp_path):
    return pathlib.Path(shutil.copytree(whole, tmp_path / "model"))


CODES, SCALE = "layers.1.mlp.up.codes", "layers.0.attn.k.scale"


def _truncated(path):
    file = path / "manifest.json"
    file.write_bytes(file.read_bytes()[:-200])


def _binary(path):
    (path / "manifest.json").write_bytes(bytes(range(256)))


def _other_json(path):
    (path / "manifest.json").write_text("[1, 2]")


def _by_hand(path):
    file = path / "manifest.json"
    file.write_text(file.read_text().replace('"norm_eps": 1e-05', '"norm_eps": 0.5'))


def _change(**fields):
    return lambda path: stored.edit_manifest(path, lambda content: content.update(fields))


def _config(**fields):
    return lambda path: stored.edit_manifest(path, lambda c: c["config"].update(fields))


def _without_field(path):
    stored.edit_manifest(path, lambda content: content["config"].pop("head_dim"))


def _without_leaf(path):
    arrays = stored.read_weights(path)
    del arrays[CODES]
    stored.write_weights(path, arrays)


def _without_leaf_or_entry(path):
    _without_leaf(path)
    stored.edit_manifest(path, lambda content: content["leaves"].pop(CODES))


def _extra_leaf(path):
    stored.edit_leaf(path, "layers.7.mlp.up.codes", np.zeros((2, 2), np.uint8), honest=False)


def _extra_leaf_and_entry(path):
    stored.edit_leaf(path, "layers.7.mlp.up.codes", np.zeros((2, 2), np.uint8), honest=True)


def _leaf(name, change, honest=True):
    def edit(path):
        stored.edit_leaf(path, name, change(stored.read_weights(path)[name].copy()), honest=honest)

    return edit


def _put(index, value):
    def change(array):
        array[index] = value
        return array

    return change


def _emptied(path):
    shutil.rmtree(path)
    path.mkdir()


def _a_file(path):
    shutil.rmtree(path)
    path.write_text("weights")


def _without_weights(path):
    shutil.rmtree(path / "weights")


def _without_data(path):
    for file in (path / "weights").rglob("d/*"):
        file.unlink()


@pytest.mark.parametrize(
    "damage, where, why",
    [
        (_truncated, "manifest.json", "damaged, no JSON"),
        (_binary, "manifest.json", "damaged, no JSON"),
        (_other_json, "manifest.json", "expected format 'ternax model'"),
        (_by_hand, "manifest.json", "damaged or edited"),
        (_change(version=2), "manifest.json", "expected version 1, found 2"),
        (_change(layout=2), "manifest.json", "expected packing layout 1, found 2"),
        (_change(surprise=1), "manifest.json", "a field is missing or unknown: .*surprise"),
        (_without_field, "manifest.json", "a field is missing or unknown: .*head_dim"),
        (_config(num_heads=3), "manifest.json", "num_heads must be a multiple"),
        (_config(scheme="ternary"), "manifest.json", "expected one of absmean"),
        (_config(scheme="os:system"), "manifest.json", "its scheme is code of its own"),
        (_config(hidden_size=32), "embedding.codes", "expected uint8 .* by its config"),
        (_config(num_layers=3), "layers.2.attn.k.codes", "missing in the manifest"),
        (_without_leaf, CODES, "missing in weights, expected by the manifest"),
        (_without_leaf_or_entry, CODES, "missing in the manifest, expected by its config"),
        (_extra_leaf, "layers.7.mlp.up.codes", "in weights, but unknown to the manifest"),
        (_extra_leaf_and_entry, "layers.7.mlp.up.codes", "in the manifest, but unknown to"),
        (
            _leaf(CODES, lambda codes: codes.astype(np.int32), honest=False),
            CODES,
            r"expected uint8 \(1, 144, 16\) by the manifest, found int32",
        ),
        (
            _leaf(SCALE, lambda scale: scale.astype(np.float64)),
            SCALE,
            "expected float32 .* by its config, found float64",
        ),
        (_leaf(CODES, lambda codes: codes[:, :-1]), CODES, "expected uint8"),
        (_leaf(CODES, _put((0, 5, 3), 0), honest=False), CODES, "sha256 is not the manifest's"),
        (_leaf(CODES, _put((0, 5, 3), 0b01110101)), CODES, "holds code 3"),
        (_leaf(SCALE, _put((0, 0, 0), np.nan)), SCALE, "a value that is not finite"),
        (_leaf("layers.1.mlp_norm.weight", _put(0, np.inf)), "layers.1.mlp_norm.weight", "finite"),
        (_leaf("embedding.codes", _put((0, 0, 0), 0)), "embedding.codes", "holds code 0"),
        (_without_weights, "weights", "cannot be read, it is damaged"),
        (_without_data, "weights", "cannot be read, it is damaged"),
        (_emptied, "manifest.json", "missing: ternax.save writes one"),
        (_a_file, "manifest.json", "expected a directory by ternax.save, found a file"),
        (shutil.rmtree, "manifest.json", "expected a directory .* found nothing there"),
    ],
)
def test_what_is_not_whole_is_refused_by_name(saved, damage, where, why):
    damage(saved)
    with pytest.raises(BadModelFile, match=why) as refused:
        load(saved)
    assert refused.value.where == where
    assert refused.value.exit_code == 4
    assert "\n" not in str(refused.value) and str(saved) in str(refused.value)


def test_a_flipped_bit(saved):
    """Found by the store's own checksum, or by the leaf's sha256; or it is in bytes nobody reads.

    The store leaves such bytes behind: nodes that a later one replaced.
    """
    before, refused = load(saved), []
    for file in [p for p in (saved / "weights").rglob("*") if p.parent.name == "d"]:
        data = file.read_bytes()
        place = len(data) // 2
        file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        try:
            same(load(saved), before)
        except BadModelFile as error:
            refused.append(str(error))
        file.write_bytes(data)
    assert any("damaged" in line for line in refused)
    assert all("\n" not in line for line in refused)


def test_the_helpers_of_the_test_above_change_nothing_else(saved):
    before = load(saved)
    stored.edit_manifest(saved, lambda content: None)
    stored.write_weights(saved, stored.read_weights(saved))
    same(load(saved), before)


@pytest.mark.parametrize(
    "asked, why",
    [
        (dict(scheme="twn"), "scheme=twn: the weights in .* are made with absmean"),
        (dict(embed_dtype="bf16"), "embed_dtype=bf16: .* int8"),
        (dict(packed=False), "latent floats are gone"),
        (dict(layers=3), "layers must lie between 1 and 2"),
    ],
)
def test_packed_weights_stay_what_they_are(whole, asked, why):
    with pytest.raises(UsageError, match=why):
        load(whole, **asked)
    load(whole, scheme="absmean", embed_dtype="int8", layers=2)


# --- Memory ---------------------------------------------------------------------------------

LOAD = """
import sys
from ternax import configs, measure
from ternax.checkpoint.loading import load
load(sys.argv[1], layers=1).embedding.data.get_value().block_until_ready()
measure.reset_peak()
before = measure.peak_resident_bytes()
model = load(sys.argv[1])
print(measure.peak_resident_bytes() - before)
"""


def test_memory_peaks_near_the_packed_model(tmp_path):
    """82 MiB, 10 a layer: a load may hold one as read, as unpacked and as checked beside them."""
    config = dataclasses.replace(
        configs.get_config("tiny-llama"),
        hidden_size=2048,
        intermediate_size=4096,
        num_heads=32,
        num_kv_heads=32,
        head_dim=64,
        num_layers=8,
    )
    model = ternax.load(config)
    # What malloc keeps for later in each of tensorstore's threads is not the load's.
    free_at_once = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    save(model, tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "model")],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | free_at_once,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert nbytes > 60e6
    assert int(done.stdout) < 1.1 * nbytes + 4 * nbytes / 8


def test_progress_counts_every_byte(whole):
    seen = []
    load(whole, progress=lambda name, nbytes: seen.append((name, nbytes)))
    assert [name for name, _ in seen] == ["tables and norm", "layers.0", "layers.1"]
    leaves = json.loads((whole / "manifest.json").read_text())["leaves"].values()
    sizes = [np.prod(leaf["shape"]) * np.dtype(leaf["dtype"]).itemsize for leaf in leaves]
    assert sum(nbytes for _, nbytes in seen) == sum(sizes)

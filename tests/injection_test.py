"""`perturb`: what is selected changes, as struck codes do, and nothing else does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ternax
from ternax import injection, striking, targets
from ternax.errors import DoesNotFit, UsageError
from ternax.kernels.packing import unpack_numpy
from ternax.noise import make_noise
from ternax.random_weights import tensor_key

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
KEY = jax.random.key(7)


def load(**options):
    return ternax.load("tiny-bitnet", **options)


@pytest.fixture(scope="module")
def clean():
    return load()


def leaves(model):
    return {
        "/".join(map(str, path)): np.asarray(leaf)
        for path, leaf in nnx.to_flat_state(nnx.state(model))
        for leaf in [leaf.get_value()]
    }


def codes(model, name):
    """int8 [K, N] of one layer's matrix."""
    pattern = name.replace(name.split(".")[1], "*", 1)
    target = next(t for t in targets.targets(model) if t.name == pattern)
    data = np.asarray(target.node.data.get_value())[int(name.split(".")[1]), 0]
    rows = data[target.first : target.first + target.width]
    return unpack_numpy(rows, target.node.format, target.node.shape[0])


def changed(first, second):
    one, two = leaves(first), leaves(second)
    assert one.keys() == two.keys()
    return {name for name in one if not np.array_equal(one[name], two[name], equal_nan=True)}


@pytest.mark.parametrize(
    "spec",
    ["trit_resample,rate=0.1", "sign_flip,rate=0.3,unit=block", "stuck_cells,rate=0.1,repair=sign"],
)
def test_packed_words_are_struck_as_codes_are(clean, spec):
    noise = make_noise(spec)
    noisy, counts = ternax.perturb(clean, noise, KEY, copy=True)
    for layer, part in ((0, "attn.k"), (2, "mlp.up"), (1, "mlp.down")):
        key = jax.random.fold_in(tensor_key(KEY, f"layers.*.{part}"), layer)
        name = f"layers.{layer}.{part}"
        wanted, count = noise(key, jnp.asarray(codes(clean, name)))
        np.testing.assert_array_equal(codes(noisy, name), wanted, err_msg=name)
        assert counts[name] == int(count) > 0
    assert len(counts) == 3 * 7
    assert changed(clean, noisy) == {
        n for n in leaves(clean) if n.startswith("layers") and n.endswith("data")
    }


def test_a_bit_flip_is_struck_as_on_the_matrix_alone(clean):
    noise = make_noise("bitflip,rate=0.05,policy=nearest")
    noisy, counts = ternax.perturb(clean, noise, KEY, select=r"layers\.1\.attn\.v", copy=True)
    target = targets.selected(clean, r"layers\.1\.attn\.v")[0]
    assert list(counts) == ["layers.1.attn.v"]
    before, after = codes(clean, "layers.1.attn.v"), codes(noisy, "layers.1.attn.v")
    assert counts["layers.1.attn.v"] == (before != after).sum() > 0
    assert set(np.unique(after)) <= {-1, 0, 1}
    for other in ("layers.1.attn.q", "layers.0.attn.v", "layers.1.mlp.gate"):
        np.testing.assert_array_equal(codes(clean, other), codes(noisy, other))
    assert target.first == clean.config.hidden_size + target.width  # behind q and k


def test_order_and_selection_change_no_draw(clean):
    noise = make_noise("sign_flip,rate=0.2")
    whole, counts = ternax.perturb(clean, noise, KEY, copy=True)
    parts, found = clean, {}
    for select in (r"layers\.\d\.mlp\..*", r"layers\.2\.attn\..*", r"layers\.[01]\.attn\..*"):
        parts, more = ternax.perturb(parts, noise, KEY, select=select, copy=True)
        found |= more
    assert found == counts and changed(whole, parts) == set()


def test_chunks_change_no_draw(clean, monkeypatch):
    noise = make_noise("bitflip,rate=0.1,burst=3")
    whole, counts = ternax.perturb(clean, noise, KEY, copy=True)
    monkeypatch.setattr(striking, "_CHUNK_BYTES", 64)
    striking.strike.clear_cache()
    chunked, found = ternax.perturb(clean, noise, KEY, copy=True)
    striking.strike.clear_cache()
    assert found == counts and changed(whole, chunked) == set()


@pytest.mark.parametrize(
    "spec", ["sign_flip,rate=0.0", "gaussian,sigma=0.0", "input_grid,step=0.0", "scale_bits,rate=0"]
)
def test_strength_zero_changes_no_bit(clean, spec):
    noisy, counts = ternax.perturb(clean, make_noise(spec), KEY, copy=True)
    assert changed(clean, noisy) == set() and set(counts.values()) == {0}
    assert nnx.split(noisy)[0] == nnx.split(clean)[0]


def test_buffers_are_donated_unless_copied():
    model = load()
    data = model.layers.mlp.down.data.get_value()
    ternax.perturb(model, make_noise("sign_flip,rate=0.1"), KEY, copy=True)
    assert not data.is_deleted()
    noisy, _ = ternax.perturb(model, make_noise("sign_flip,rate=0.1"), KEY)
    assert noisy is model and data.is_deleted()


def test_rows_and_layers_narrow_what_is_struck(clean):
    noise = make_noise("stuck,rate=1.0")
    noisy, counts = ternax.perturb(
        clean, noise, KEY, select=".*mlp.down", layers=range(1, 3), rows=0.5, copy=True
    )
    assert list(counts) == ["layers.1.mlp.down", "layers.2.mlp.down"]
    after = codes(noisy, "layers.1.mlp.down")
    dead = (after == 0).all(axis=0)
    assert 0.25 < dead.mean() < 0.75
    before = codes(clean, "layers.1.mlp.down")
    np.testing.assert_array_equal(after[:, ~dead], before[:, ~dead])


def test_tables_and_raw_codes(clean):
    noisy, counts = ternax.perturb(
        clean, make_noise("bitflip,rate=0.01"), KEY, select="embedding|head", copy=True
    )
    assert min(counts.values()) > 0 and np.isfinite(noisy(TOKENS)).all()
    raw, _ = ternax.perturb(clean, make_noise("bitflip,rate=0.1,policy=raw"), KEY, copy=True)
    assert 2 in codes(raw, "layers.0.mlp.up") and raw.layers.mlp.down.backend == "reference"
    assert np.isfinite(raw(TOKENS)).all()


def test_scales_fused_matrices_have_one_each(clean):
    noise = make_noise("scale_bits,rate=0.2")
    noisy, counts = ternax.perturb(clean, noise, KEY, select=".*attn.q", copy=True)
    assert set(counts.values()) == {1}
    scale, width = np.asarray(noisy.layers.attn.qkv.scale.get_value()), clean.config.hidden_size
    assert (scale[..., :width] == scale[..., :1]).all()
    before = np.asarray(clean.layers.attn.qkv.scale.get_value())
    np.testing.assert_array_equal(scale[..., width:], before[..., width:])


def test_norms_have_names_of_their_own(clean):
    noise = make_noise("norm_bits,rate=0.01")
    select = r"layers\.1\..*|norm"
    noisy, counts = ternax.perturb(clean, noise, KEY, select=select, copy=True)
    assert set(counts) == {
        "norm",
        *(f"layers.1.{n}" for n in ("attn_norm", "attn.sub_norm", "mlp_norm", "mlp.sub_norm")),
    }
    before, after = leaves(clean), leaves(noisy)
    moved = {name: int((before[name] != after[name]).sum()) for name in changed(clean, noisy)}
    assert all("norm" in name for name in moved) and sum(moved.values()) == sum(counts.values())
    assert not np.array_equal(
        noisy.layers.mlp_norm.weight.get_value()[1], clean.layers.mlp_norm.weight.get_value()[1]
    )
    for layer in (0, 2):
        np.testing.assert_array_equal(
            noisy.layers.mlp_norm.weight.get_value()[layer],
            clean.layers.mlp_norm.weight.get_value()[layer],
        )


def test_analog_weights_become_floats_and_the_rest_stays(clean):
    noisy, counts = ternax.perturb(
        clean, make_noise("gaussian,sigma=0.1"), KEY, select=r"layers\.1\.attn\.k", copy=True
    )
    linear = noisy.layers.attn.qkv
    assert linear.format == "f32" and list(counts) == ["layers.1.attn.k"]
    old = codes(clean, "layers.1.attn.k").astype(float)
    target = targets.selected(clean, r"layers\.1\.attn\.k")[0]
    part = slice(target.first, target.first + target.width)
    scale = float(np.asarray(clean.layers.attn.qkv.scale.get_value())[1, 0, 0, target.first])
    errors = np.asarray(linear.data.get_value())[1, 0, part].T / scale - old
    assert counts["layers.1.attn.k"] == errors.size
    assert abs(errors.std() - 0.1) < 0.01 and abs(errors.mean()) < 0.01
    # Layers that are not struck multiply the same numbers.
    np.testing.assert_allclose(
        np.asarray(linear.data.get_value())[0, 0, part].T,
        codes(clean, "layers.0.attn.k") * scale,
        rtol=1e-6,
    )
    assert np.isfinite(noisy(TOKENS)).all()


@pytest.mark.parametrize("spec", ["input_gaussian,sigma=0.02", "read_gaussian,sigma=0.05"])
def test_reads_depend_on_the_token_alone(clean, spec):
    noisy, _ = ternax.perturb(clean, make_noise(spec), KEY, select=".*mlp.down", copy=True)
    logits = np.asarray(noisy(TOKENS))
    assert 1e-4 < np.abs(logits - np.asarray(clean(TOKENS))).max()
    # Another batch, another order: the same noise. XLA may round floats otherwise.
    np.testing.assert_allclose(noisy(TOKENS[::-1])[::-1], logits, atol=1e-4)
    np.testing.assert_allclose(noisy(TOKENS[1:])[0], logits[1], atol=1e-4)


@pytest.mark.parametrize(
    "spec, options, words",
    [
        ("sign_flip,rate=0.1", {"select": ".*mlp.upp"}, "nothing is named '.*mlp.upp'; nearest: "),
        ("sign_flip,rate=0.1", {"select": "("}, "no regular expression"),
        ("sign_flip,rate=0.1", {"layers": range(7, 9)}, "in layers 7 to 8"),
        (
            "sign_flip,rate=0.1",
            {"select": "embedding"},
            "expected weights in trit2, found embedding in int8",
        ),
        ("gaussian,sigma=0.1", {"select": "embedding"}, "expected projections"),
        ("bitflip,rate=0.1,storage=tq1_0", {"select": "embedding"}, "storage tq1_0 is of trits"),
        ("input_clip,cut=0.1", {"select": ".*attn.q"}, "q, k, v read one input; select all"),
        ("norm_bits,rate=0.1", {"select": ".*up"}, "nothing is named '.*up'"),
        ("norm_bits,rate=0.1", {"rows": 0.5}, "is on whole norms"),
        ("sign_flip,rate=0.1", {"rows": 1.5}, "rows must lie in"),
    ],
)
def test_refusals_change_nothing(clean, spec, options, words):
    before = leaves(clean)
    with pytest.raises(UsageError, match=words.replace(".", r"\.").replace("*", r"\*")):
        ternax.perturb(clean, make_noise(spec), KEY, **options)
    assert all(np.array_equal(before[name], leaf) for name, leaf in leaves(clean).items())


def test_floats_are_refused(clean, monkeypatch):
    with pytest.raises(UsageError, match="expected a packed model"):
        targets.selected(load(packed=False), targets.EVERYTHING)
    monkeypatch.setattr(injection, "memory_available_bytes", lambda: 1000)
    with pytest.raises(DoesNotFit, match="become f32"):
        ternax.perturb(clean, make_noise("gaussian,sigma=0.1"), KEY, copy=True)

"""`convert`: what it packs, what it says it lost, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ternax import configs, edit
from ternax.calibrate import Calibration, LayerStream, block_of
from ternax.convert import convert
from ternax.errors import UsageError
from ternax.models import MODELS
from ternax.quant import make_scheme

LAYERS = 2
NAMES = [
    f"layers.{i}.{part}"
    for i in range(LAYERS)
    for part in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
]


def make_model(name="tiny-llama", scheme="none,dtype=f32", inputs="none"):
    config = dataclasses.replace(
        configs.get_config(name), num_layers=LAYERS, scheme=scheme, inputs=inputs
    )
    return MODELS[config.family](config, rngs=nnx.Rngs(3))


def calibration(**changes):
    # Few tokens that repeat, so that inputs are far from white.
    tokens = np.random.default_rng(0).integers(0, 20, (6, 32)).astype(np.int32)
    return Calibration(tokens, **changes)


def kernels(model):
    return {
        f"layers.{i}.{pattern.removeprefix('layers.*.')}": np.asarray(linear.kernel[...][i])
        for pattern, linear in edit.float_linears(model)
        for i in range(LAYERS)
    }


def same_leaves(found, expected):
    assert nnx.graphdef(found.layers) == nnx.graphdef(expected.layers)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(found), nnx.state(expected))


TOKENS = np.arange(2 * 12, dtype=np.int32).reshape(2, 12) * 7 % 259


@pytest.fixture(scope="module")
def converted():
    """One calibrated GPTQ conversion in floats: (model, errors, the weights before)."""
    model = make_model()
    before = kernels(model)
    return *convert(model, "gptq", calibration=calibration(), packed=False), before


def test_without_calibration_it_is_pack_model():
    found, errors = convert(make_model(), "twn", inputs="int8")
    same_leaves(found, edit.pack_model(make_model(scheme="twn", inputs="int8")))
    assert (found.config.scheme, found.config.inputs) == ("twn", "int8")
    assert [error.name for error in errors] == NAMES
    assert all(error.output_snr_db is None for error in errors)


def test_own_schemes_keep_what_they_learnt():
    from tests.quant.conformance_test import load_guide_scheme

    def trained():
        model = make_model(scheme=load_guide_scheme())
        gain = model.layers.mlp.up.scheme.gain
        gain.set_value(gain[...] * jnp.linspace(0.5, 2, gain.shape[-1]))
        return model

    same_leaves(convert(trained())[0], edit.pack_model(trained()))


def test_errors_are_what_was_lost(converted):
    model, errors, before = converted
    after = kernels(model)
    assert [error.name for error in errors] == NAMES and set(before) == set(NAMES)
    for error in errors:
        w, v = before[error.name].astype(np.float64), after[error.name].astype(np.float64)
        relative = np.linalg.norm(w - v) / np.linalg.norm(w)
        assert error.relative_error == pytest.approx(relative, rel=1e-4)
        assert 0.3 < relative < 0.9 and error.shape == w.shape
        assert error.nonzero_share == pytest.approx(np.mean(v != 0))
        assert error.bits_per_weight == 2 + 32 / len(w)
        assert error.seconds > 0
        assert all(len(np.unique(np.abs(column))) <= 2 for column in v.T), "not ternary"


def test_snr_is_that_of_the_outputs(converted):
    """Each layer on what the quantized layers before it put out."""
    model, errors, before = converted
    by_name = {error.name: error for error in errors}
    stream, original = LayerStream(model, calibration()), make_model()
    after = kernels(model)
    for layer in range(LAYERS):
        grams = stream.observe(block_of(original, layer), "none")
        for part, gram in grams.items():
            name = f"layers.{layer}.{part}"
            h, w = np.asarray(gram, np.float64), before[name].astype(np.float64)
            lost = w - after[name]
            snr = 10 * np.log10(np.sum(w * (h @ w)) / np.sum(lost * (h @ lost)))
            assert by_name[name].output_snr_db == pytest.approx(snr, abs=0.05), name
        stream.advance(block_of(model, layer))
    # And the scheme saw these statistics: its codes are not those of plain rounding.
    w, trits = before[name], np.sign(after[name])
    scheme = make_scheme("gptq", w.shape)
    plain, direct = jax.jit(lambda w, h: (scheme.quantize(w), scheme.quantize(w, h)))(w, gram)
    assert np.mean(direct.codes[0] == trits) > 0.9 and np.mean(plain.codes[0] == trits) < 0.85


@pytest.mark.parametrize("scheme, plain", [("ls", "absmean"), ("gptq", "optimal,granularity=row")])
def test_calibration_brings_outputs_nearer(scheme, plain):
    given = calibration(feed="float")  # every layer is shown the same under both
    _, found = convert(make_model(), scheme, calibration=given)
    _, plain = convert(make_model(), plain, calibration=given)
    for a, b in zip(found, plain, strict=True):
        assert a.output_snr_db > b.output_snr_db, a.name


def test_packed_and_float_results_are_one_model(converted):
    model, _, _ = converted
    tables = dict(embed_dtype="f32", head_dtype="f32")
    packed, _ = convert(make_model(), "gptq", calibration=calibration(), **tables)
    assert edit.is_packed(packed) and packed.config.scheme == "gptq"
    assert model.config.scheme == "none,dtype=f32"
    np.testing.assert_allclose(packed(TOKENS), model(TOKENS), atol=2e-4)
    assert not np.allclose(make_model()(TOKENS), model(TOKENS), atol=0.1)


def test_what_is_converted_is_what_the_model_multiplies_by():
    """A BitNet's latent weights are not its function: its trits are kept exactly."""
    found, errors = convert(make_model("tiny-bitnet", "absmean"), "optimal", packed=False)
    assert max(error.relative_error for error in errors) < 1e-4
    np.testing.assert_allclose(
        found(TOKENS), make_model("tiny-bitnet", "absmean")(TOKENS), atol=1e-3
    )


def test_inputs_change_with_it():
    found, errors = convert(make_model(), "nf4", packed=False, inputs="int8")
    assert found.config.inputs == found.layers.mlp.down.inputs == "int8"
    # 4.5 bits in blocks of 64; mlp.down has K = 176, which 16 divides.
    assert {error.bits_per_weight for error in errors} == {4.5, 5.0, 6.0}
    assert all(0.05 < error.relative_error < 0.12 for error in errors)


def test_nothing_is_lost_where_nothing_is_rounded():
    _, errors = convert(make_model(), "none,dtype=f32", calibration=calibration())
    assert all(error.relative_error == 0 and error.output_snr_db is None for error in errors)


REFUSED = {
    "a format without kernels": (("nvfp4",), {}, "format nvfp4 cannot be packed"),
    "a scheme that is none": (("terny",), {}, "expected one of absmean"),
    "groups that do not fit": (("twn,granularity=group",), {}, "divides K = 64"),
    "unknown inputs": (("ls",), dict(inputs="int3"), "inputs must be one of int8, none"),
    "tables": (("ls",), dict(head_dtype="fp8"), "head_dtype must be one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_change_nothing(case):
    arguments, options, match = REFUSED[case]
    model = make_model()
    graph = nnx.graphdef(model)
    with pytest.raises(UsageError, match=match):
        convert(model, *arguments, **options)
    assert nnx.graphdef(model) == graph


def test_packed_models_are_refused():
    with pytest.raises(UsageError, match="found one that is packed already"):
        convert(edit.pack_model(make_model(scheme="twn")), "ls")

"""X^T X of every projection's inputs, against a forward pass of its own in float64 numpy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ternax import configs
from ternax.calibrate import Calibration, LayerStream, block_of
from ternax.errors import UsageError
from ternax.models import MODELS
from ternax.nn.rope import frequencies

LENGTH, ROWS = 9, 5


def make_model(name, inputs="none"):
    config = dataclasses.replace(
        configs.get_config(name), num_layers=2, scheme="none,dtype=f32", inputs=inputs
    )
    model = MODELS[config.family](config, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(0)
    for _, node in nnx.iter_modules(model):  # norms that are not all ones show where they act
        if type(node).__name__ == "RMSNorm":
            size = rng.uniform(0.5, 2, node.weight.shape)
            node.weight.set_value(jnp.asarray(size, jnp.float32))
    return model


def tokens(config):
    return np.random.default_rng(2).integers(0, config.vocab_size, (ROWS, LENGTH)).astype(np.int32)


def norm(x, weight, eps):
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def rounded(x, inputs):
    if inputs == "none":
        return x
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.rint(x / scale) * scale


def rotated(x, angles):
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def numpy_block(block, config, x, inputs):
    """One sequence x [T, D] through a block: (output, {"attn.q": inputs of the product}).

    The products themselves read unrounded inputs, as those of the model under test do.
    """

    def weight(module):
        return np.asarray(module.kernel[...], np.float64)

    def scale(module):
        return np.asarray(module.weight[...], np.float64)

    attn, mlp, eps, seen = block.attn, block.mlp, config.norm_eps, {}
    entered = norm(x, scale(block.attn_norm), eps)
    seen["attn.q"] = seen["attn.k"] = seen["attn.v"] = entered
    heads = [
        (entered @ weight(p)).reshape(LENGTH, -1, config.head_dim) for p in (attn.q, attn.k, attn.v)
    ]
    rates = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angles = np.arange(LENGTH)[:, None] * rates.astype(np.float64)
    q, k, v = rotated(heads[0], angles), rotated(heads[1], angles), heads[2]
    out = np.empty(q.shape)
    for h in range(q.shape[1]):
        g = h // (config.num_heads // config.num_kv_heads)
        scores = q[:, h] @ k[:, g].T / np.sqrt(config.head_dim)
        scores[np.triu_indices(LENGTH, 1)] = -np.inf
        share = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, h] = share / share.sum(-1, keepdims=True) @ v[:, g]
    out = out.reshape(LENGTH, -1)
    if attn.sub_norm is not None:
        out = norm(out, scale(attn.sub_norm), eps)
    seen["attn.o"] = out
    x = x + out @ weight(attn.o)
    entered = norm(x, scale(block.mlp_norm), eps)
    seen["mlp.gate"] = seen["mlp.up"] = entered
    gate = entered @ weight(mlp.gate)
    gate = gate / (1 + np.exp(-gate)) if config.activation == "silu" else np.maximum(gate, 0) ** 2
    inner = gate * (entered @ weight(mlp.up))
    if mlp.sub_norm is not None:
        inner = norm(inner, scale(mlp.sub_norm), eps)
    seen["mlp.down"] = inner
    return x + inner @ weight(mlp.down), {n: rounded(z, inputs) for n, z in seen.items()}


@pytest.mark.parametrize("inputs", ["none", "int8"])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-bitnet"])
def test_statistics_are_those_of_a_forward_pass(name, inputs):
    model = make_model(name)
    stream = LayerStream(model, Calibration(tokens(model.config), batch=2))  # the last batch is 1
    assert stream.num_tokens == ROWS * LENGTH
    table = np.asarray(model.embedding.weight[...], np.float64)
    hidden = [table[row] for row in tokens(model.config)]
    for layer in range(2):
        block = block_of(model, layer)
        graph = nnx.graphdef(block)
        found = stream.observe(block, inputs)
        assert nnx.graphdef(block) == graph, "observing changed the block"
        both = [numpy_block(block, model.config, x, inputs) for x in hidden]
        hidden = [x for x, _ in both]
        for part, gram in found.items():
            rows = np.concatenate([seen[part] for _, seen in both])
            expected = rows.T @ rows
            # int8: a value at a rounding edge may fall on its other side, one step in 127.
            bound = 1e-4 if inputs == "none" else 5e-3
            error = np.abs(np.asarray(gram) - expected).max() / np.abs(expected).max()
            assert error < bound, f"{part} of layer {layer}"
        assert len(found) == 7
        stream.advance(block)


def test_what_a_layer_is_given_decides_what_the_next_one_sees():
    model = make_model("tiny-llama")
    stream = LayerStream(model, Calibration(tokens(model.config)))
    block = block_of(model, 0)
    for linear in (block.attn.q, block.mlp.down):
        linear.kernel.set_value(jnp.round(linear.kernel[...] * 4) / 4)
    stream.advance(block)
    second = block_of(model, 1)
    found = stream.observe(second, "none")
    table = np.asarray(model.embedding.weight[...], np.float64)
    hidden = [
        numpy_block(block, model.config, table[row], "none")[0] for row in tokens(model.config)
    ]
    rows = np.concatenate(
        [numpy_block(second, model.config, x, "none")[1]["mlp.down"] for x in hidden]
    )
    np.testing.assert_allclose(
        found["mlp.down"], rows.T @ rows, rtol=1e-3, atol=1e-3 * np.abs(rows).max()
    )


REFUSED = {
    "no tokens": (dict(tokens=np.zeros((0, 4), np.int32)), "expected tokens .n, T."),
    "a flat list": (dict(tokens=np.zeros(4, np.int32)), "found .4,. and 8"),
    "no batch": (dict(tokens=np.zeros((2, 4), np.int32), batch=0), "batch of at least 1"),
    "another feed": (
        dict(tokens=np.zeros((2, 4), np.int32), feed="both"),
        "quantized, float, found 'both'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_calibration(case):
    fields, match = REFUSED[case]
    with pytest.raises(UsageError, match=match):
        Calibration(**fields)


def test_tokens_the_model_does_not_take():
    model = make_model("tiny-llama")
    with pytest.raises(UsageError, match="has tokens 0 to 258, found 0 to 259"):
        LayerStream(model, Calibration(np.array([[0, 259]], np.int32)))
    with pytest.raises(UsageError, match="context of 256 tokens, found 257"):
        LayerStream(model, Calibration(np.zeros((1, 257), np.int32)))

"""Counts from a shape against the abstract model's, and against published numbers."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from ternax import configs, cost, engine
from ternax.anatomy import Shape
from ternax.errors import UsageError
from ternax.formats import FORMATS, get_format
from ternax.kernels.backends import BACKENDS
from ternax.nn.cache import init_cache
from ternax.random_weights import abstract_model

PLANNED = ("tiny-llama", "1b", "70b", "bitnet-2b4t", "bitnet-3b")


@pytest.mark.parametrize("name", configs.CONFIGS)
def test_parameters_are_the_abstract_models(name):
    shape = Shape.of(configs.get_config(name))
    assert (shape.parameters, shape.projection_parameters) == cost.count_parameters(
        configs.get_config(name)
    )


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize(
    "scheme, stored, table",
    [
        ("absmean,granularity=row", "trit2", "int8"),
        ("int8", "int8", "int8"),
        ("none", "fp16", "bf16"),
    ],
)
def test_bytes_are_the_plans(name, scheme, stored, table):
    """One formula in two places would drift: every part of a step, to the byte."""
    config = configs.get_config(name)
    planned = cost.plan(
        config, scheme=scheme, embed_dtype=table, head_dtype=table, batch=2, context=64
    )
    load = Shape.of(config).load(stored, embedding=table, head=table)
    by_plan = planned.load
    # The plan holds scales of 1 for floats too, and the cache's own counters.
    scales = planned.bytes["scales"] if scheme == "none" else 0
    assert by_plan.projection_bytes - scales == load.projection_bytes
    assert 0 <= (by_plan.kv_bytes_per_token - load.kv_bytes_per_token) * 128 < 64
    for part in ("head_bytes", "embedding_bytes", "embedding_row_bytes"):
        assert 0 <= getattr(by_plan, part) - getattr(load, part) <= 4, part
    assert by_plan.projection_macs == load.projection_macs == planned.ternary_parameters


def test_an_int8_cache_is_the_plans():
    planned = cost.plan("1b", kv_dtype="int8", context=64)
    found = Shape.of(configs.get_config("1b")).kv_bytes_per_token("int8")
    assert 0 <= planned.load.kv_bytes_per_token - found < 1


@pytest.mark.parametrize(
    "name, batch, prompt",
    [
        ("tiny-llama", 2, 300),
        ("tiny-llama", 1, 40),
        ("tiny-bitnet", 3, 200),
        ("tiny-bitnet", 90, 2),
    ],
)
def test_temporaries_are_the_compilers(name, batch, prompt):
    """What XLA allocates for prefill beside weights and cache, to the byte but for a few scalars;
    codes that the library keeps are its own."""
    if reason := BACKENDS["cpu"].why_not("cpu", None, None):
        pytest.skip(reason)
    config = dataclasses.replace(configs.get_config(name), max_context=512)
    graph, leaves = nnx.split(abstract_model(config, backend="cpu"))
    cache = jax.eval_shape(lambda: init_cache(config, batch, prompt + 8))
    keys = jax.eval_shape(lambda: engine.row_keys(0, batch))
    tokens = jax.ShapeDtypeStruct((batch, prompt), jnp.int32)
    lowered = engine.prefill.lower(engine.Program(graph), leaves, tokens, cache, keys)
    found = lowered.compile().memory_analysis().temp_size_in_bytes
    shape = Shape.of(config)
    codes = 2 * batch * prompt * shape.intermediate_size
    expected = shape.activation_bytes(batch, prompt, prompt + 8, fused=True) - codes
    assert found == pytest.approx(expected, rel=0.01, abs=4096)
    assert expected + codes < shape.activation_bytes(batch, prompt, prompt + 8)


def test_published_sizes():
    """The 2B-4T file of microsoft/bitnet-b1.58-2B-4T has 1,178,623,988 bytes."""
    shape = Shape.of(configs.get_config("2b4t"))
    assert shape.load("i2_s").weight_bytes == pytest.approx(1_178_623_988, rel=2e-3)
    assert shape.kv_bytes_per_token() == 76_800
    llama2 = Shape("llama2-7b", 4096, 11008, 32, 32, 32, 128, 32000)
    assert llama2.parameters == 6_738_415_616  # meta-llama/Llama-2-7b, safetensors index
    ungated = Shape("x", 8192, 28672, 80, 64, 64, 128, 0, mlp_matrices=2)
    assert ungated.projection_parameters == 80 * 11 * 8192**2


@pytest.mark.parametrize(
    "name, bits",
    [
        ("q4_0", 4.5),
        ("q8_0", 8.5),
        ("q6_k", 6.5625),
        ("q4_k", 4.5),
        ("nvfp4", 4.5),
        ("mxfp4", 4.25),
        ("tq1_0", 1.6875),
        ("tq2_0", 2.0625),
        ("trit2", 2),
        ("sherry", 1.25),
    ],
)
def test_bits_a_weight(name, bits):
    assert get_format(name).bits_per_weight == bits
    # A scale a row adds its 32 bits to 4096 weights.
    assert 0 <= get_format(name).nbytes(4096, 1024) * 8 / (4096 * 1024) - bits <= 32 / 4096


def test_ggml_blocks():
    """Bytes of a block, as ggml-common.h asserts them."""
    for name, weights, nbytes in (
        ("q4_0", 32, 18),
        ("q8_0", 32, 34),
        ("q6_k", 256, 210),
        ("q4_k", 256, 144),
        ("tq1_0", 256, 54),
        ("tq2_0", 256, 66),
    ):
        assert get_format(name).nbytes(weights, 1) == nbytes


def test_names():
    assert get_format("BF16") is FORMATS["fp16"]
    with pytest.raises(UsageError, match="no format is named 'int3'; known: fp32"):
        get_format("int3")
    with pytest.raises(UsageError, match="multiple of num_kv_heads, found 4 and 3"):
        Shape("x", 8, 8, 1, 4, 3, 2, 8)


def test_no_jax():
    code = (
        "import sys, ternax.roofline, ternax.configs.hardware\n"
        "from ternax.anatomy import Shape\nfrom ternax.configs import get_config\n"
        "Shape.of(get_config('70b')).load('trit2')\n"
        "print([name for name in ('jax', 'numpy', 'flax') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")

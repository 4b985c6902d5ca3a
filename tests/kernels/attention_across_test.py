"""A KV cache split by slots: attention against numpy's, logits and texts against one device's."""

from ternax import cost
from tests import split
from tests.sharding_test import SMALL, abstract

_KERNEL = """
from ternax.kernels.attention_across import step_attention_across

# One row of two begins late; new tokens lie across the border between two stretches of 512.
batch, tokens, groups, heads, width, length = 2, 3, 2, 4, 8, 511
random = np.random.default_rng(0)
k, v = (random.normal(size=(2, batch, groups, 1024, width)).astype(np.float32) for _ in "kv")
qkv = random.normal(size=(batch, tokens, heads + 2 * groups, width)).astype(np.float32)
rope = (np.ones((batch, tokens, 1, width // 2), np.float32),
        np.zeros((batch, tokens, 1, width // 2), np.float32))
start = np.array([0, 400], np.int32)

def body(qkv, k, v):
    return step_attention_across(
        qkv, rope, k, v, None, None, start, jnp.int32(length), jnp.int32(1), "sequence")[:3]

for text in ("sequence:2", "sequence:4"):
    layout = layout_of(mesh_of(text), small("tiny-llama"))
    stretch = P(None, None, None, "sequence")
    run = spread(layout, body, (P(), stretch, stretch), (P(), stretch, stretch))
    out, new_k, new_v = map(np.asarray, jax.jit(run)(qkv.reshape(batch, tokens, -1), k, v))
    all_k, all_v = k.copy(), v.copy()
    for store, first in ((all_k, heads), (all_v, heads + groups)):
        new = qkv[:, :, first : first + groups]
        store[1, :, :, length : length + tokens] = np.moveaxis(new, 1, 2)
    assert np.array_equal(new_k, all_k) and np.array_equal(new_v, all_v), text
    for b in range(batch):
        for t in range(tokens):
            for h in range(heads):
                seen = slice(start[b], length + t + 1)
                keys, values = (s[1, b, h // 2, seen].astype(float) for s in (all_k, all_v))
                score = keys @ qkv[b, t, h].astype(float) / np.sqrt(width)
                weight = np.exp(score - score.max())
                assert np.abs(out[b, t, h] - weight @ values / weight.sum()).max() < 1e-6, text

# Stored as bf16 and int8, against what one device stores and finds.
from ternax.kernels.attention import step_attention

for dtype in (jnp.uint16, jnp.int8):
    stores = [random.integers(0, 100, k.shape).astype(dtype) for _ in "kv"]
    scales = [random.random(k.shape[:-1]).astype(np.float32) for _ in "kv"]
    scales = scales if dtype == jnp.int8 else [None, None]
    place = start, jnp.int32(length), jnp.int32(1)
    arguments = (qkv.reshape(batch, tokens, -1), rope, *stores, *scales, *place)
    expected = step_attention(*arguments, backend="reference")
    held = [stretch, stretch, *[s if s is None else stretch for s in scales]]
    run = spread(
        layout,
        lambda *arguments: step_attention_across(*arguments, "sequence"),
        (P(), (P(), P()), *held, P(), P(), P()), (P(), *held))
    found = jax.jit(run)(*arguments)
    assert np.abs(np.asarray(found[0]) - np.asarray(expected[0])).max() < 1e-5, dtype
    for one, other in zip(found[1:], expected[1:]):
        assert one is other or np.array_equal(one, other), dtype
print("equal")
"""


def test_parts_are_put_together_as_numpy_attends():
    assert split.run(SMALL + _KERNEL, 4) == "equal\n"


_MODEL = """
from ternax.nn.cache import cache_specs, init_cache
from ternax.steps import Steps
from ternax.workload import Workload
from tests import hlo

prompts = np.random.default_rng(0).integers(0, 264, (2, 30)).astype(np.int32)

def logits(model, kv_dtype):
    # Of the prompt and of twelve steps behind it, with a cache of 48 slots.
    graph, leaves = nnx.split(model)
    layout = model.layout
    cache = init_cache(model.config, 2, 42, kv_dtype, layout=layout)

    def body(leaves, tokens, cache):
        return nnx.merge(graph, leaves).forward(tokens, cache, last_only=True)

    if layout is not None:
        rows, held = layout.partition(["batch"]), cache_specs(layout, cache)
        body = spread(layout, body, (layout.specs(leaves), rows, held), (rows, held))
    step, tokens, found = jax.jit(body), prompts, []
    for i in range(12):
        out, cache = step(leaves, tokens, cache)
        found.append(np.asarray(out))
        tokens = np.full((2, 1), 7 * i, np.int32)
    return np.concatenate(found, 1)

# In f32: what stands on the edge of a stored step, of int8 or bf16, may tip over.
kv_dtype = "f32"
for name, changes, meshes in (
    ("tiny-llama", {}, ["sequence:2", "sequence:2,tensor:2"]),
    ("tiny-bitnet", {"inputs": "none"}, ["sequence:4"]),
):
    config = small(name, **changes)
    expected = logits(ternax.load(config, backend="reference"), kv_dtype)
    for text in meshes:
        many = ternax.load(config, mesh=mesh_of(text), backend="reference")
        apart = np.abs(logits(many, kv_dtype) - expected).max()
        assert apart < 1e-5, (name, text, apart)
    steps = Steps(many, Workload(batch=2, prompt_length=30, num_tokens=30, kv_dtype=kv_dtype))
    steps.compile_decode()
    found = collectives.of_program(steps.program_text(), config.num_layers)
    assert found == collectives.planned(many.layout, 2), found
    assert hlo.copies(steps.program_text(), steps.new_cache().k.nbytes // 8) == []
print("equal")
"""


def test_logits_are_those_of_one_device():
    """And a step exchanges what was planned, and copies no cache."""
    assert split.run(SMALL + _MODEL, 4) == "equal\n"


def test_a_device_holds_its_stretch():
    whole = cost.plan("70b", context=131072)
    for n in (2, 4):
        part = cost.plan("70b", context=131072, layout=abstract("70b", f"sequence:{n}"))
        assert (part.bytes["cache"] - 8) * n == whole.bytes["cache"] - 8  # start and length
        assert part.weight_bytes == whole.weight_bytes
        assert part.step_bytes["cache"] < 1.001 * whole.step_bytes["cache"] / n

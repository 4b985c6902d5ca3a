"""The plan against the arrays it plans, its bounds, and what it says would fit."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import pytest
from flax import nnx

from ternax import configs, cost, measure
from ternax.cost import MARGIN_BYTES, RUNTIME_BYTES
from ternax.errors import UsageError
from ternax.nn.cache import init_cache
from ternax.nn.linear import PackedLinear
from ternax.nn.table import PackedTable
from ternax.random_weights import random_model

ROOT = pathlib.Path(__file__).resolve().parent.parent
PARTS = ("projections", "scales", "norms", "embedding", "head", "cache", "activations", "runtime")
LLAMA, BITNET = (configs.get_config(f"tiny-{family}") for family in ("llama", "bitnet"))


# --- The plan and the arrays -----------------------------------------------------------------


def nbytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def real_bytes(model) -> dict[str, int]:
    """Part -> bytes of a model that exists, by another route than the plan's."""
    linears = [node for _, node in nnx.iter_modules(model) if isinstance(node, PackedLinear)]
    tables = {
        path[-1]: node.packed
        for path, node in nnx.iter_modules(model)
        if isinstance(node, PackedTable)
    }
    found = {
        "projections": sum(linear.packed.data.nbytes for linear in linears),
        "scales": sum(nbytes([linear.packed.scale, linear.packed.zero]) for linear in linears),
        "embedding": nbytes(tables["embedding"]),
        "head": nbytes(tables["head"]) if "head" in tables else 0,
    }
    return found | {"norms": nbytes(nnx.state(model)) - sum(found.values())}


@pytest.mark.parametrize(
    "config, scheme, kv, tables",
    [
        (LLAMA, "absmean", "bf16", ("int8", "int4")),
        (LLAMA, "int4,group_size=16", "int8", ("bf16", "f32")),
        (BITNET, "none", "f32", ("int4", "int4")),
    ],
    ids=["llama-absmean", "llama-int4-groups", "bitnet-none"],
)
def test_planned_bytes_are_the_arrays_bytes(config, scheme, kv, tables):
    config = dataclasses.replace(config, scheme=scheme, num_layers=2)
    embed, head = tables
    planned = cost.plan(
        config, batch=3, context=40, kv_dtype=kv, embed_dtype=embed, head_dtype=head
    )
    model = random_model(config, embed_dtype=embed, head_dtype=head)
    real = real_bytes(model) | {"cache": nbytes(init_cache(config, 3, 40, kv))}
    assert {part: planned.bytes[part] for part in real} == real
    assert planned.weight_bytes == nbytes(nnx.state(model))


def test_parts_sum_to_the_total():
    planned = cost.plan(LLAMA, batch=2, context=64)
    assert tuple(planned.bytes) == PARTS
    assert planned.total_bytes == sum(planned.bytes[part] for part in PARTS)
    assert planned.bytes["runtime"] == RUNTIME_BYTES
    assert planned.weight_bytes == sum(planned.bytes[part] for part in PARTS[:5])


def test_the_70b():
    planned = cost.plan("70b")
    assert planned.parameters == 70_553_706_496
    assert planned.ternary_parameters == 68_451_041_280
    assert planned.bytes["projections"] == 17_112_760_320  # 2 bits each
    assert 2 < planned.bits_per_weight < 2.01
    # int8 [V, D] and an f32 scale a row, twice: the head is not tied.
    assert planned.bytes["head"] == planned.bytes["embedding"] == 128_256 * (8_192 + 4)
    # bf16 keys and values of 80 layers, 8 heads of 128, and the cache's own few counters.
    assert 0 <= planned.bytes["cache"] - 128 * 80 * 8 * 128 * 2 * 2 < 64


def test_a_name_and_a_config_are_one():
    assert cost.plan("2b4t") == cost.plan(configs.get_config("bitnet-2b4t"))
    assert cost.plan("1b", scheme="int8") == cost.plan(
        dataclasses.replace(configs.get_config("1b"), scheme="int8")
    )


@pytest.mark.parametrize(
    "scheme, bits",
    [("absmean", 2), ("sign", 2), ("int4,group_size=64", 4), ("int8", 8), ("none", 16)],
)
def test_bits_of_a_weight(scheme, bits):
    planned = cost.plan("1b", scheme=scheme)
    scales = 32 / 64 if "group" in scheme else 0.02  # an f32 for each 64 weights, or a row
    assert bits <= planned.bits_per_weight <= bits + scales
    assert planned.ternary_parameters == 973_078_528


# --- A decode step ---------------------------------------------------------------------------


def test_a_step_reads_every_weight_and_the_cache_in_use_once():
    planned = cost.plan(LLAMA, batch=4, context=40)  # of 48 slots
    step, resident = planned.step_bytes, planned.bytes
    for part in ("projections", "scales", "norms", "head"):
        assert step[part] == resident[part]
    assert step["cache"] == resident["cache"] * 40 // 48
    assert step["embedding"] == 4 * resident["embedding"] // LLAMA.vocab_size
    assert planned.bytes_per_step == sum(step.values())


def test_a_tied_head_is_read_and_stored_once():
    planned = cost.plan(BITNET)
    assert planned.bytes["head"] == 0
    assert planned.step_bytes["head"] == planned.bytes["embedding"]


def test_the_bound_is_bandwidth_over_bytes():
    planned = cost.plan("8b", batch=4, context=1000)
    assert planned.bound_tokens_per_s(20.0) == pytest.approx(4 * 20e9 / planned.bytes_per_step)
    half = planned.bytes_per_step - planned.step_bytes["cache"] / 2
    assert planned.bytes_per_step_at(500) == pytest.approx(half, abs=1)
    assert planned.bound_tokens_per_s(20.0, context=500) == pytest.approx(4 * 20e9 / half)
    assert planned.bytes_per_step_at(1000) == planned.bytes_per_step


# --- How it grows ----------------------------------------------------------------------------


def plan(**changes):
    return cost.plan(dataclasses.replace(BITNET, max_context=10**6, num_layers=1), **changes)


@hypothesis.settings(max_examples=6)
@hypothesis.given(batch=st.integers(1, 64), blocks=st.integers(1, 50))
def test_doubling(batch, blocks):
    context = 256 * blocks  # whole blocks of the cache, which is rounded up to them
    once = plan(batch=batch, context=context, prompt=16)
    rows = plan(batch=2 * batch, context=context, prompt=16)
    longer = plan(batch=batch, context=2 * context, prompt=16)
    for other in (rows, longer):
        # All but the counters of the cache: its length and each row's start.
        assert other.bytes["cache"] == pytest.approx(2 * once.bytes["cache"], abs=4 * batch + 4)
        assert other.weight_bytes == once.weight_bytes
    assert rows.bytes["activations"] == 2 * once.bytes["activations"]
    # Reading the weights is shared by the rows: twice the rows are faster, not twice as fast.
    assert 1 < rows.bound_tokens_per_s(1.0) / once.bound_tokens_per_s(1.0) < 2
    assert longer.bound_tokens_per_s(1.0) < once.bound_tokens_per_s(1.0)


@hypothesis.settings(max_examples=6)
@hypothesis.given(
    low=st.tuples(*[st.integers(1, 4000)] * 2), more=st.tuples(*[st.integers(0, 400)] * 2)
)
def test_more_rows_or_tokens_never_need_less(low, more):
    one = plan(batch=low[0], context=low[1])
    other = plan(batch=low[0] + more[0], context=low[1] + more[1])
    assert all(one.bytes[part] <= other.bytes[part] for part in PARTS)
    assert one.bytes_per_step <= other.bytes_per_step


def test_prompts_shorter_than_the_context_need_fewer_activations():
    whole, short = plan(context=2048), plan(context=2048, prompt=16)
    assert short.bytes["activations"] < whole.bytes["activations"]
    assert short.bytes | {"activations": 0} == whole.bytes | {"activations": 0}


def test_a_projection_that_is_one_call_needs_fewer_activations():
    composed, fused = plan(context=256), plan(context=256, fused=True)
    assert fused.bytes["activations"] < composed.bytes["activations"] / 2
    assert fused.bytes | {"activations": 0} == composed.bytes | {"activations": 0}
    # Floats, and inputs that stay floats, have no such call.
    for other in (dict(scheme="none"), dict(inputs="none")):
        config = dataclasses.replace(BITNET, **other)
        assert cost.plan(config, fused=True) == cost.plan(config)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(batch=0), "batch must be at least 1"),
        (dict(context=0), "context between 1 and"),
        (dict(context=10**6 + 1), "context between 1 and 1000000"),
        (dict(kv_dtype="int4"), "kv_dtype must be one of bf16, int8, f32"),
        (dict(embed_dtype="int2"), "embed_dtype must be one of"),
        (dict(embed_dtype="bf16", head_dtype="int8"), "ties head and embedding"),
        (dict(scheme="ternary"), "scheme: expected one of"),
    ],
)
def test_bad_arguments(changes, words):
    with pytest.raises(UsageError, match=words):
        plan(**changes)


# --- What fits -------------------------------------------------------------------------------


def test_fits_leaves_a_margin():
    need = cost.plan("1b").total_bytes
    assert cost.plan("1b", available_bytes=need + MARGIN_BYTES).fits
    assert not cost.plan("1b", available_bytes=need + MARGIN_BYTES - 1).fits
    assert cost.plan("405b", available_bytes=None).fits  # a device that does not tell


@pytest.mark.parametrize("gib", [1, 2, 4, 9.5, 18])
def test_as_many_layers_as_fit(gib):
    available = int(gib * 2**30)
    whole = cost.plan("70b", batch=4, context=2048, available_bytes=available)
    layers = whole.layers_that_fit

    def cut(layers):
        config = dataclasses.replace(whole.config, num_layers=layers)
        return cost.plan(config, batch=4, context=2048, available_bytes=available)

    assert layers < 80 and not whole.fits
    if layers:
        assert cut(layers).fits
    # The norms of a layer, 64 KiB, are not counted: at the very edge there is one to spare.
    assert not cut(layers + 2).fits


@pytest.mark.parametrize("gib", [1, 2, 4, 9.5])
def test_as_many_rows_as_fit(gib):
    available = int(gib * 2**30)
    many = cost.plan("1b", batch=512, context=2048, available_bytes=available)
    batch = many.batch_that_fits

    def rows(batch):
        return cost.plan("1b", batch=batch, context=2048, available_bytes=available)

    assert batch < 512 and not many.fits
    if batch:
        assert rows(batch).fits
    assert not rows(batch + 1).fits


def test_what_fits_already_is_left_as_it_is():
    fits = cost.plan("1b", batch=2, available_bytes=2**40)
    assert (fits.layers_that_fit, fits.batch_that_fits) == (16, 2)


@pytest.mark.parametrize(
    "family, gib, name",
    [
        ("llama", 1000, "405b"),
        ("llama", 30, "70b"),
        ("llama", 6, "13b"),
        ("llama", 3.8, "8b"),
        ("llama", 0.9, "tiny-llama"),
        ("bitnet", 30, "bitnet-7b"),
        ("bitnet", 1.2, "bitnet-700m"),
        ("llama", 0.6, None),
        ("bitnet", 0, None),
    ],
)
def test_the_largest_of_a_family_that_fits(family, gib, name):
    found = cost.largest_that_fits(
        family,
        lambda config: cost.plan(
            config, context=64, head_dtype="int8", available_bytes=int(gib * 2**30)
        ),
    )
    assert (found and found.config.name) == name


def test_a_model_that_cannot_do_the_workload_is_passed_over():
    def plan_of(config):  # 13b has 4096 positions
        return cost.plan(config, context=8000, available_bytes=int(12 * 2**30))

    assert cost.largest_that_fits("llama", plan_of).config.name == "8b"


def test_what_this_process_holds_is_available_to_it(monkeypatch):
    monkeypatch.setattr(measure, "memory_available_bytes", lambda device=None: 1000)
    monkeypatch.setattr(measure, "resident_bytes", lambda device=None: 300)
    assert cost.available_bytes() == 1300
    monkeypatch.setattr(measure, "memory_available_bytes", lambda device=None: None)
    assert cost.available_bytes() is None


# --- In words --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", configs.CONFIGS)
def test_lines_fit_the_screen_and_sum(name):
    planned = cost.plan(name, batch=3, available_bytes=2**50)
    lines = planned.lines(whole=planned.config.num_layers + 1)
    assert max(map(len, "\n".join(lines).splitlines())) <= 100
    text = " ".join(" ".join(lines).split())
    assert f"first {planned.config.num_layers} of {planned.config.num_layers + 1} layers" in text
    parts = re.search(r"bits (.*) = ([0-9.]+) (GiB|MiB) available", text)
    shown = [float(part.split()[1]) for part in parts[1].split(" + ")]
    assert sum(shown) == pytest.approx(float(parts[2]), abs=0.005 * len(PARTS) + 0.005)
    assert min(shown) > 0
    assert "available 1048576.00 GiB: fits" in text


def test_lines_tell_what_is_free():
    for available, words in (
        (None, "available unknown: fits"),
        (2**28, "available 0.25 GiB: DOES NOT FIT"),
    ):
        assert words in "\n".join(cost.plan("1b", available_bytes=available).lines())


def test_refusal_names_the_need_and_what_would_fit():
    line = cost.plan("70b", batch=2, available_bytes=6 * 2**30).refusal()
    for words in (
        "70b does not fit: it needs 1",
        "projections 15.94 GiB",
        "margin 0.25 GiB",
        "available 6.00 GiB",
        "--layers=",
        "(part of the model)",
        "--fit=auto",
    ):
        assert words in line
    assert "--batch" not in line and "\n" not in line  # one row less would not help
    rows = cost.plan("1b", batch=4000, context=2000, available_bytes=6 * 2**30).refusal("nothing")
    assert re.search(r"would fit: --batch=\d+, nothing", rows) and "--layers" not in rows


# --- The plan and the machine ----------------------------------------------------------------


def test_peak_memory_is_what_was_planned(tmp_path):
    """A process of its own: the peak is that of everything it ever held."""
    command = [
        sys.executable,
        "-m",
        "experiments.decode",
        "--config=1b",
        "--num_tokens=3",
        f"--output_dir={tmp_path}",
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    record = json.loads((tmp_path / "results.json").read_text())[-1]
    if "peak_memory_bytes" not in record["metrics"]:
        pytest.skip("this machine does not tell the peak")
    planned = record["metrics"]["planned_memory_bytes"]
    assert planned == pytest.approx(record["metrics"]["peak_memory_bytes"], rel=0.1)

"""Caches that begin filled, and models that were made before."""

import types

import numpy as np
import pytest

from ternax import decoding
from ternax.configs import get_config
from ternax.decoding import DecodeRun
from ternax.errors import UsageError
from ternax.kernels.packing import bits_to_float
from ternax.random_weights import random_model
from ternax.steps import Steps
from ternax.workload import Workload

CONFIG = get_config("tiny-bitnet")


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, embed_dtype="int8", head_dtype="int8")


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8", "f32"])
def test_a_cache_begins_filled_with_what_could_be_there(model, kv_dtype):
    work = Workload(batch=2, prompt_length=3, num_tokens=4, filled=20, kv_dtype=kv_dtype)
    cache = Steps(model, work).new_cache()
    assert int(cache.length) == 20 and cache.slots >= work.context == 27
    for stored in (cache.k, cache.v):
        values = np.asarray(stored if kv_dtype == "int8" else bits_to_float(stored), np.float64)
        assert np.isfinite(values).all() and len(np.unique(values)) > 100
        assert (values < 0).any() and (values > 0).any()
        if kv_dtype != "int8":
            assert np.abs(values).min() >= 0.5 and np.abs(values).max() < 2


def run(model=None, **changes):
    settings = dict(prompt_length=2, num_tokens=6, embed_dtype="int8", head_dtype="int8")
    job = DecodeRun(CONFIG, Workload(**settings | changes), model=model)
    return {record.phase: record for record in job.measure_all()}, np.concatenate(
        job.generated, axis=1
    )


def test_a_filled_context_is_read_as_one_that_was_prefilled(model):
    filled, _ = run(model, filled=40)
    read, _ = run(model, prompt_length=42)
    assert filled["decode"].context == read["decode"].context == 48
    for name in ("bytes_per_step", "planned_memory_bytes"):
        ours, theirs = (found["decode"].metrics[name] for found in (filled, read))
        # The plan of a longer prompt has more activations.
        assert ours == theirs if name == "bytes_per_step" else ours <= theirs
    assert "40 slots of the cache began filled" in filled["decode"].note
    assert filled["prefill"].metrics["prompt_tokens"] == 2


def test_a_model_that_was_made_before_says_the_same(model):
    given, tokens = run(model)
    made, others = run()
    np.testing.assert_array_equal(tokens, others)
    assert "create_s" in made["create"].metrics and not given["create"].samples


def test_a_split_cache_is_not_filled(monkeypatch):
    two = types.SimpleNamespace(mesh=types.SimpleNamespace(size=2))
    monkeypatch.setattr(decoding, "layout_for", lambda mesh, config: two)
    with pytest.raises(UsageError, match="begins filled is on one device: leave out --mesh"):
        DecodeRun(CONFIG, Workload(filled=4), mesh="tensor:2")

"""The lm_eval adapter: scores against numpy, windows, generation, and the wrapper itself."""

import dataclasses
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import ternax
from ternax import harness
from ternax.errors import UsageError


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(ternax.get_config("tiny-bitnet"), max_context=64)
    return ternax.load(config, packed=False)


def numpy_score(model, context: bytes, continuation: bytes) -> tuple[float, bool]:
    """By float64 log-softmax of one whole pass."""
    tokens = np.frombuffer(b"\0" + context + continuation, np.uint8).astype(np.int32)
    padded = np.zeros((1, 64), np.int32)  # the shape the model compiles once
    padded[0, : len(tokens) - 1] = tokens[:-1]
    logits = np.asarray(model(jnp.asarray(padded)), np.float64)[0, : len(tokens) - 1]
    logits -= logits.max(axis=-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    counted = np.arange(len(tokens) - 1)[len(context) :]
    targets = tokens[1:][len(context) :]
    return log_p[counted, targets].sum(), bool((logits[counted].argmax(-1) == targets).all())


@pytest.mark.parametrize("context, continuation", [("def f", "(x):"), ("", "añb"), ("a", "")])
def test_scores_are_numpys(model, context, continuation):
    found = harness.score(model, context, continuation)
    likelihood, greedy = numpy_score(model, context.encode(), continuation.encode())
    assert found[0] == pytest.approx(likelihood, abs=2e-2) and found[1] == greedy


def test_windows_cover_each_target_once_and_reach_back():
    tokens = np.arange(11)  # END and 0..9 of lm_eval's own example, one up
    found = [(w.tolist(), count) for w, count in harness.windows(tokens, 1, 4)]
    assert found == [([0, 1, 2, 3, 4], 4), ([4, 5, 6, 7, 8], 4), ([6, 7, 8, 9, 10], 2)]
    assert [(len(w), c) for w, c in harness.windows(tokens, 9, 4)] == [(5, 2)]
    assert list(harness.windows(tokens, 11, 4)) == []


def test_what_is_generated_is_greedy_and_ends_at_until(model):
    text = harness.continued(model, "def", max_new_tokens=8)
    raw = ternax.generate(model, harness._tokens("def")[None], max_new_tokens=8)[0, 4:]
    expected = bytes(raw[raw < 256].astype(np.uint8)).partition(b"\0")[0]
    assert text == expected.decode(errors="replace") and text
    assert harness.continued(model, "def", [text[1:3]], max_new_tokens=8) == text[
        : text.index(text[1:3])
    ]  # fmt: skip
    assert isinstance(harness.continued(model, "x" * 500, max_new_tokens=1000), str)


def test_the_wrapper_answers_lm_eval(model):
    pytest.importorskip("lm_eval.api.model", reason="lm_eval is not installed")
    from lm_eval.api.instance import Instance

    lm = harness.adapter(model)

    def ask(kind, *arguments):
        return [Instance(kind, {}, arguments, 0)]

    found = lm.loglikelihood(ask("loglikelihood", "ab", "cd"))
    assert found == [harness.score(model, "ab", "cd")]
    found = lm.loglikelihood_rolling(ask("loglikelihood_rolling", "abcd"))
    assert found == [harness.score(model, "", "abcd")[0]]
    wanted = {"until": "\n", "max_gen_toks": 8}
    found = lm.generate_until(ask("generate_until", "def", wanted))
    assert found == [harness.continued(model, "def", ["\n"], max_new_tokens=8)]


def test_what_cannot_be_adapted_is_refused(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UsageError, match="pip install lm_eval"):
        harness.adapter(model)

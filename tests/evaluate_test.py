"""Losses against numpy, what they amount to, and a model beside a reference."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import ternax
from ternax import evaluate, heldout
from ternax.errors import NumericCheckFailed, UsageError


@pytest.fixture(scope="module")
def cut():
    whole = heldout.windows(heldout.open_text(), 24)
    every = slice(None, None, len(whole.tokens) // 40)  # of all files
    return heldout.Windows(whole.tokens[every], whole.num_bytes[every], whole.files[every])


@pytest.fixture(scope="module")
def model():
    return ternax.load("tiny-bitnet", packed=False)


@pytest.fixture(scope="module")
def packed():
    """The floats of `model`, packed, with exact tables."""
    floats = ternax.load("tiny-bitnet", packed=False)
    return ternax.pack_model(floats, embed_dtype="f32", head_dtype="f32")


def numpy_log_softmax(model, tokens) -> np.ndarray:
    """f64 [n, T, V] of model(tokens)."""
    logits = np.asarray(model(jnp.asarray(tokens)), np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def numpy_losses(model, sequences) -> np.ndarray:
    log_p = numpy_log_softmax(model, sequences[:, :-1])
    rows, places = np.indices(sequences[:, 1:].shape)
    return -log_p[rows, places, sequences[:, 1:]]


# --- Losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["model", "packed"])
def test_losses_are_numpys(which, cut, request):
    model = request.getfixturevalue(which)
    sequences = cut.tokens[:8]
    found = evaluate.token_losses(model, sequences)
    assert found.shape == (8, 24) and found.dtype == np.float32
    np.testing.assert_allclose(found, numpy_losses(model, sequences), rtol=0, atol=2e-5)


@pytest.mark.parametrize("which", ["model", "packed"])
def test_a_padded_last_batch_changes_nothing(which, cut, request):
    model = request.getfixturevalue(which)
    seen = []
    found = evaluate.token_losses(model, cut.tokens[:13], batch=8, advance=seen.append)
    full = evaluate.token_losses(model, cut.tokens[:16], batch=8)
    assert found.shape == (13, 24) and seen == [8, 5]
    assert np.array_equal(found, full[:13])
    assert np.array_equal(evaluate.token_losses(model, cut.tokens[:2], batch=8), full[:2])


def test_a_uniform_model_needs_eight_bits_a_byte(cut):
    """A head of zeros over 256 tokens: every distribution is uniform."""
    config = ternax.ModelConfig(**{**vars(ternax.get_config("tiny-bitnet")), "vocab_size": 256})
    uniform = ternax.load(config, packed=False)
    uniform.embedding.weight.set_value(jnp.zeros_like(uniform.embedding.weight[...]))
    losses = evaluate.token_losses(uniform, cut.tokens)
    assert evaluate.bits_per_byte(losses, cut.num_bytes) == pytest.approx(8, abs=1e-6)
    found = evaluate.summary(losses, num_bytes=cut.num_bytes, files=cut.files)
    assert found.bits_per_byte.value == pytest.approx(8, abs=1e-6)
    assert found.bits_per_byte.low == pytest.approx(8, abs=1e-6)
    assert found.perplexity.value == pytest.approx(256, rel=1e-6)


# --- What they amount to ---------------------------------------------------------------------


def test_summary_is_the_ratio_of_sums():
    random = np.random.default_rng(0)
    losses = random.gamma(2, size=(30, 10)).astype(np.float32)
    sizes, files = random.integers(10, 40, 30), np.repeat(np.arange(10), 3)
    found = evaluate.summary(losses, num_bytes=sizes, files=files)
    bits = losses.sum(dtype=np.float64) / math.log(2)
    assert found.bits_per_byte.value == pytest.approx(bits / sizes.sum())
    assert found.bits_per_byte.value == pytest.approx(evaluate.bits_per_byte(losses, sizes))
    assert found.loss_nats.value == pytest.approx(losses.mean(dtype=np.float64))
    assert found.perplexity.low == pytest.approx(math.exp(found.loss_nats.low))
    assert found.bits_per_byte.low < found.bits_per_byte.value < found.bits_per_byte.high
    assert found.bits_per_byte.count == 10
    assert np.average(found.per_sequence, weights=sizes) == pytest.approx(bits / sizes.sum())


def test_groups_are_files_or_runs_of_neighbours():
    assert evaluate.groups(np.arange(9), 9).tolist() == list(range(9))
    runs = evaluate.groups(np.zeros(100, int), 100)
    assert np.array_equal(np.unique(runs), np.arange(evaluate.BLOCKS))
    assert (np.diff(runs) >= 0).all() and set(np.bincount(runs)) <= {4, 5}
    assert evaluate.groups(None, 5).tolist() == [0, 1, 2, 3, 4]


def test_a_loss_that_is_not_finite_is_named():
    losses = np.ones((3, 4), np.float32)
    losses[1, 2] = np.nan
    with pytest.raises(NumericCheckFailed, match="found nan at target 2 of sequence 1"):
        evaluate.summary(losses)


# --- Beside a reference ----------------------------------------------------------------------


@pytest.mark.parametrize("which", ["model", "packed"])
def test_a_model_is_its_own_equal(which, cut, request):
    model = request.getfixturevalue(which)
    found = evaluate.compare(model, model, cut.tokens[:10])
    assert found.kl_bits.value == 0 and found.top1_agreement.value == 1
    assert found.difference.value == found.difference.low == found.difference.high == 0
    assert found.logit_cosine == pytest.approx(1, abs=1e-6)


def test_comparison_is_numpys(model, cut):
    other = ternax.load("tiny-bitnet", packed=False, scheme="none")
    sequences = cut.tokens[:8]
    found = evaluate.compare(model, other, sequences)
    log_p, log_q = (numpy_log_softmax(m, sequences[:, :-1]) for m in (model, other))
    kl = (np.exp(log_q) * (log_q - log_p)).sum(axis=-1).mean() / math.log(2)
    assert found.kl_bits.value == pytest.approx(kl, rel=1e-4) and kl > 1e-3
    same = (log_p.argmax(axis=-1) == log_q.argmax(axis=-1)).mean()
    assert found.top1_agreement.value == pytest.approx(same) and 0 < same < 1
    a, b = (np.asarray(m(jnp.asarray(sequences[:, :-1])), np.float64) for m in (model, other))
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert found.logit_cosine == pytest.approx(cosine.mean(), abs=1e-6)
    bits = [evaluate.bits_per_byte(numpy_losses(m, sequences), 192) for m in (model, other)]
    assert found.difference.value == pytest.approx(bits[0] - bits[1], abs=1e-5)
    assert found.model.bits_per_byte.value == pytest.approx(bits[0], rel=1e-6)
    assert found.reference.bits_per_byte.value == pytest.approx(bits[1], rel=1e-6)


def test_packed_predicts_as_its_fake_quantized_floats_do(model, packed, cut):
    """Only float rounding lies between them; another model of the shape is far away."""
    found = evaluate.compare(packed, model, cut.tokens, num_bytes=cut.num_bytes, files=cut.files)
    ratio = found.model.perplexity.value / found.reference.perplexity.value
    assert ratio == pytest.approx(1, abs=1e-3)
    assert found.kl_bits.value < 1e-3 and found.top1_agreement.value > 0.98
    far = ternax.load("tiny-bitnet", packed=False, seed=1)
    other = evaluate.compare(far, model, cut.tokens)
    assert other.kl_bits.value > 0.1 and other.top1_agreement.value < 0.5


def test_the_paired_interval_is_the_narrower_one(packed, model, cut):
    """What both find hard drops out of their difference."""
    found = evaluate.compare(packed, model, cut.tokens, num_bytes=cut.num_bytes, files=cut.files)
    pair, alone = found.difference, found.model.bits_per_byte
    assert pair.low <= pair.value <= pair.high
    assert pair.high - pair.low < 0.1 * (alone.high - alone.low)


# --- Refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sequences, why",
    [
        (np.zeros((0, 5), np.int32), r"must be \[n, T \+ 1\]"),
        (np.zeros((5, 1), np.int32), r"must be \[n, T \+ 1\]"),
        (np.zeros(5, np.int32), r"must be \[n, T \+ 1\]"),
        (np.full((2, 5), 259, np.int32), r"expected tokens in \[0, 259\).*found 259 .. 259"),
        (np.full((2, 5), -1, np.int32), "found -1 .. -1"),
        (np.zeros((2, 258), np.int32), "expected at most 256 tokens.* found 257"),
    ],
)
def test_sequences_that_cannot_run(model, sequences, why):
    with pytest.raises(UsageError, match=why):
        evaluate.token_losses(model, sequences)


def test_a_reference_of_another_vocabulary(model, cut):
    other = ternax.load("stdlib-bitnet", packed=False)
    with pytest.raises(UsageError, match="vocabulary of 259, found 256 in stdlib-bitnet"):
        evaluate.compare(model, other, cut.tokens)

"""Points, products and what is predicted of them, against a second route through the model."""

import math

import jax
import numpy as np
import pytest

import ternax
from ternax import evaluate, heldout, robustness, taps
from ternax.errors import UsageError
from ternax.noise import make_noise

LENGTH = 32


@pytest.fixture(scope="module")
def clean():
    text = heldout.windows(heldout.open_text(), LENGTH)
    return robustness.look(ternax.load("stdlib-bitnet"), robustness.spread_windows(text, 12))


def test_the_clean_model_is_the_one_that_evaluate_sees(clean):
    found = evaluate.evaluate(clean.model, clean.text.tokens, num_bytes=clean.text.num_bytes)
    assert clean.bits_per_byte == pytest.approx(found.bits_per_byte.value, rel=1e-6)


def test_a_point_is_what_compare_finds(clean):
    noise, key = make_noise("bitflip,rate=0.01"), jax.random.key(3)
    found = robustness.point(clean, noise, key)
    noisy, counts = ternax.perturb(clean.model, noise, key, copy=True)
    both = evaluate.compare(noisy, clean.model, clean.text.tokens)
    assert found.changed == sum(counts.values()) > 0
    assert found.rises.mean() == pytest.approx(both.difference.value, abs=1e-5)
    assert found.kl_bits == pytest.approx(both.kl_bits.value, rel=1e-4)
    assert found.top1 == pytest.approx(both.top1_agreement.value, abs=1e-9)
    assert found.cosine == pytest.approx(both.logit_cosine, abs=1e-5)
    assert found.top1 < found.top5 <= 1


def test_no_noise_changes_nothing(clean):
    found = robustness.point(clean, make_noise("sign_flip,rate=0.0"), jax.random.key(0))
    assert (found.rises == 0).all() and found.changed == 0
    assert set(found.diverged) == {robustness.CONTINUED} and len(found.diverged) == 8
    assert (found.top1, found.top5) == (1, 1) and found.kl_bits == pytest.approx(0, abs=1e-6)


def test_greedy_decode_diverges_where_its_tokens_do(clean):
    noise, key = make_noise("bitflip,rate=0.01"), jax.random.key(3)
    noisy, _ = ternax.perturb(clean.model, noise, key, copy=True)
    found = robustness.point(clean, noise, key).diverged
    prompts = clean.text.tokens[:8, :LENGTH]
    both = [
        ternax.generate(m, prompts, max_new_tokens=64)[:, LENGTH:] for m in (clean.model, noisy)
    ]
    for row, count in enumerate(found):
        same = both[0][row] == both[1][row]
        assert same[:count].all() and (count == 64 or not same[count])
    assert min(found) < 64


def test_what_is_not_finite_is_found(clean):
    tokens = clean.text.tokens[:1, :-1]
    assert robustness.first_not_finite(clean.model, tokens) is None
    broken = ternax.load("stdlib-bitnet")
    scale = broken.layers.mlp.gate_up.scale
    scale.set_value(scale.get_value().at[1].set(np.inf))
    assert robustness.first_not_finite(broken, tokens) == "layers.1.mlp.down"


def test_taps_see_what_the_model_multiplies(clean):
    """The last layer, redone in numpy from its tapped inputs, gives the model's logits."""
    tokens = clean.text.tokens[:2, :-1]
    found = taps.projection_inputs(clean.model, tokens)
    assert set(found) == set(clean.codes)
    assert found["layers.0.attn.q"] is found["layers.0.attn.v"]
    # Inputs are int8 digits times a scale: at most 255 different values a token.
    rows = found["layers.2.mlp.down"]
    assert rows.shape == (2 * LENGTH, 256)
    assert max(len(np.unique(row)) for row in rows) <= 255
    scaled = rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-9) * 127
    np.testing.assert_allclose(scaled, np.round(scaled), atol=1e-3)


@pytest.mark.parametrize(
    "spec",
    [
        "trit_other,rate=0.1",
        "bitflip,rate=0.03",
        "gaussian,sigma=0.3",
        "pcm,size=2.0",
        "input_gaussian,sigma=0.05",
        "read_gaussian,sigma=0.3",
    ],
)
def test_the_plug_in_holds_on_real_layers(clean, spec):
    keys = [jax.random.key(i) for i in range(4)]
    for product in robustness.products(clean, make_noise(spec), keys):
        error = np.std(product.measured, ddof=1) / math.sqrt(len(keys))
        gap = abs(np.mean(product.measured) - product.plug_in)
        assert gap < 0.005 + 4 * error, product.name


def test_products_are_struck_as_the_model_is(clean):
    """A projection's noisy outputs, from the codes of the perturbed model itself."""
    noise, key = make_noise("stuck,rate=0.2,at=1"), jax.random.key(1)
    noisy, _ = ternax.perturb(clean.model, noise, key, copy=True)
    again = robustness.look(noisy, clean.text)
    for product in robustness.products(clean, noise, [key]):
        x = clean.inputs[product.name].astype(float)
        y, moved = x @ clean.codes[product.name], x @ again.codes[product.name]
        cosine = (y * moved).sum() / np.linalg.norm(y) / np.linalg.norm(moved)
        assert product.measured[0] == pytest.approx(cosine, abs=1e-9)


def test_spread_windows_take_from_everywhere():
    text = heldout.windows(heldout.open_text(), 256)
    some = robustness.spread_windows(text, 48)
    assert len(some.tokens) == 48 and len(np.unique(some.files)) > 15
    with pytest.raises(UsageError, match="expected 1 .. 665, what the text has, found 666"):
        robustness.spread_windows(text, 666)


def test_too_many_logits(monkeypatch, clean):
    monkeypatch.setattr(robustness, "_LOGIT_BYTES", 4 * LENGTH * 256 * 3)
    with pytest.raises(UsageError, match="12 have logits of more than 1 GiB; at most 3 fit"):
        robustness.look(clean.model, clean.text)


def test_a_model_that_says_nothing_agrees_in_nothing(clean):
    """All its logits are equal, and of those the first token's counts."""
    mute = ternax.load("stdlib-bitnet")
    mute.norm.weight.set_value(0 * mute.norm.weight.get_value())
    found, likeliest = robustness.contrast(clean, mute, 0), clean.logits.argmax(axis=-1)
    assert found.top1 == (likeliest == 0).mean() < 0.5
    assert found.top5 == (likeliest < robustness.TOP).mean()
    loss = clean.bits_per_byte + np.average(found.rises, weights=clean.text.num_bytes)
    assert loss == pytest.approx(8, rel=0.05)  # a token is a byte, or a file's end

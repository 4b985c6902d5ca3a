"""Layers gone through one by one, against the same model held whole."""

import jax
import numpy as np
import pytest

import ternax
from ternax import configs, untrained
from ternax.noise import make_noise
from ternax.random_weights import random_layer, random_table
from ternax.targets import targets


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-bitnet"])
def test_layers_and_tables_are_the_whole_models(name):
    config, whole = configs.get_config(name), ternax.load(name, seed=3)
    part = random_layer(config, 2, seed=3)
    names = [name for target in targets(part) for name in target.names()]
    assert "layers.2.mlp.down" in names and "layers.0.mlp.down" not in names
    for mine, theirs in zip(targets(part), targets(whole), strict=True):
        if "*" in mine.name:
            np.testing.assert_array_equal(mine.node.data[0], theirs.node.data[2])
            np.testing.assert_array_equal(mine.node.scale[0], theirs.node.scale[2])
    table = random_table(config, "embedding", seed=3)
    np.testing.assert_array_equal(table.data.get_value(), whole.embedding.data.get_value())


def test_a_stack_is_the_whole_model_perturbed():
    config, noise = configs.get_config("tiny-llama"), make_noise("trit_resample,rate=0.2")
    found = untrained.stack(config, noise, seed=5)
    shape = (untrained.BATCH, untrained.LENGTH)
    tokens = np.random.default_rng(5).integers(0, config.vocab_size, shape).astype(np.int32)
    model = ternax.load("tiny-llama", seed=5)
    clean = np.asarray(model(tokens), np.float64)
    noisy, counts = ternax.perturb(model, noise, jax.random.key(5))
    noisy = np.asarray(noisy(tokens), np.float64)
    lengths = np.linalg.norm(clean, axis=-1) * np.linalg.norm(noisy, axis=-1)
    cosine = ((clean * noisy).sum(-1) / lengths).mean()
    assert found.changed == sum(counts.values())
    assert found.logit_cosine == pytest.approx(cosine, abs=1e-4)
    assert found.top1 == pytest.approx((clean.argmax(-1) == noisy.argmax(-1)).mean(), abs=0.04)
    assert found.logit_cosine < 0.7  # three layers, and 0.8 of each product is left


@pytest.mark.parametrize("spec", ["trit_resample", "stuck", "bitflip"])
def test_one_layer_is_the_closed_form(spec):
    for rate in (0.1, 0.3):
        found = untrained.layer(
            configs.get_config("tiny-bitnet"), make_noise(f"{spec},rate={rate}")
        )
        assert len(found.cosines) == 7
        # 16 rows times a few hundred outputs: a projection spreads by 0.03.
        assert found.cosine == pytest.approx(found.closed_form, abs=0.02)


def test_what_is_stuck_at_zero_has_no_direction():
    found = untrained.layer(configs.get_config("tiny-bitnet"), make_noise("stuck,rate=1.0"))
    assert set(found.cosines.values()) == {0.0}

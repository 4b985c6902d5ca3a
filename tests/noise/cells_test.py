"""Stuck cells against pairs of cells written, struck and read in plain numpy."""

import jax
import numpy as np
import pytest

from ternax.errors import UsageError
from ternax.noise import make_noise
from ternax.noise.predict import has_moments

CODES = np.random.default_rng(0).choice([-1, 0, 1], size=(200, 300)).astype(np.int8)
TRITS = (-1, 0, 1)


def table(found):
    """Share of each new trit given the old one: [old + 1, new + 1]."""
    return np.array([[np.mean(found[old == CODES] == new) for new in TRITS] for old in TRITS])


def struck(rate, ones, zero_fix):
    """One draw, the memory's own way: bits, masks, a second look at zeros."""
    random = np.random.default_rng(1)
    cells = np.stack([CODES == 1, CODES == -1]).astype(int)
    stuck = random.random(cells.shape) < rate
    held = (random.random(cells.shape) < ones).astype(int)
    if zero_fix:
        both = np.where((CODES == 0) & (stuck & (held == 1)).any(axis=0), 1, cells)
        cells = np.where(CODES == 0, both, cells)
    cells = np.where(stuck, held, cells)
    return cells[0] - cells[1]


@pytest.mark.parametrize("ones, repair", [(0.5, "none"), (0.2, "none"), (0.8, "zero")])
def test_tables_are_those_of_cells(ones, repair):
    noise = make_noise(f"stuck_cells,rate=0.2,ones={ones},repair={repair}")
    found, changed = noise(jax.random.key(0), CODES)
    found = np.asarray(found)
    assert int(changed) == (found != CODES).sum()
    # 20,000 trits of each kind: five standard errors of a difference of shares are 0.025.
    np.testing.assert_allclose(table(found), table(struck(0.2, ones, repair == "zero")), atol=0.025)
    mean, variance = noise.moments(2 / 3)
    for trit in TRITS:
        sample = found[trit == CODES]
        assert sample.mean() == pytest.approx(mean[trit + 1], abs=0.02)
        assert sample.var() == pytest.approx(variance[trit + 1], abs=0.02)


def test_each_repair_leaves_less():
    errors = {}
    for repair in ("none", "zero", "sign"):
        noise = make_noise(f"stuck_cells,rate=0.1,repair={repair}")
        found = np.asarray(noise(jax.random.key(0), CODES)[0])
        errors[repair] = np.abs(found.astype(int) - CODES).sum(axis=0)
    assert errors["none"].sum() > 1.1 * errors["zero"].sum()
    assert (errors["sign"] <= errors["zero"]).all()
    assert errors["sign"].sum() < 0.95 * errors["zero"].sum()
    assert not has_moments(make_noise("stuck_cells,rate=0.1,repair=sign"))


def test_bad_options():
    with pytest.raises(UsageError, match="repair must be one of none, zero, sign"):
        make_noise("stuck_cells,rate=0.1,repair=all")
    with pytest.raises(UsageError, match=r"ones must lie in \[0, 1\], found 2"):
        make_noise("stuck_cells,rate=0.1,ones=2")

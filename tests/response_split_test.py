"""Gradients of a model on a mesh: those of one device, which they are computed on."""

from tests import split

_FORESEEN = """
import numpy as np
import ternax
from ternax import heldout, response, robustness
from ternax.noise import make_noise

text = robustness.spread_windows(heldout.windows(heldout.open_text(), 16), 2)
read = make_noise("read_gaussian,sigma=0.1")
found = []
for mesh in (None, "tensor:2"):
    clean = robustness.look(ternax.load("stdlib-bitnet", mesh=mesh), text)
    assert (clean.model.layout is None) == (mesh is None)
    found.append(response.measure(clean, [read]))
one, many = found
names = list(one.weights)
for name in names:
    assert np.allclose(many.weights[name].slopes, one.weights[name].slopes, rtol=1e-3), name
assert np.isclose(many.under(read, names).rise, one.under(read, names).rise, rtol=1e-3)
print("equal")
"""


def test_what_gradients_say_over_tensor():
    assert split.run(_FORESEEN, 2) == "equal\n"

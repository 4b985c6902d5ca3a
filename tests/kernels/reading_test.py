"""The sum that reads memory: numpy's, whatever the length, by both ways."""

import numpy as np
import pytest

from ternax.kernels import reading
from ternax.kernels.cpu import build


@pytest.fixture(params=["compiled", "numpy"])
def reader(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(build, "compiler", lambda: None)
    elif build.compiler() is None:
        pytest.skip("no C++ compiler here")
    found, method = reading.reader.__wrapped__()
    assert method == {"compiled": "sum of uint64", "numpy": "numpy sum of uint64"}[request.param]
    return found


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 31, 32, 33, 1000, 4097])
def test_sums_all_words(reader, count):
    words = np.random.default_rng(count).integers(1 << 64, size=count + 1, dtype=np.uint64)
    expected = sum(map(int, words[1:])) % (1 << 64)
    assert reader(words[1:]) == expected


def test_refuses_what_it_would_misread():
    read, method = reading.reader()
    if method == "sum of uint64":
        for wrong in (np.zeros(8, np.int64), np.zeros(8, np.uint64)[::2]):
            with pytest.raises(ValueError, match="expected contiguous uint64"):
                read(wrong)

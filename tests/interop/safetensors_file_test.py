"""The safetensors container against the safetensors package: what one writes, the other reads."""

import ml_dtypes
import numpy as np
import safetensors.numpy

from ternax.interop import safetensors_file
from ternax.interop.files import Plan

ARRAYS = {
    "model.a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "model.b": np.arange(4, dtype=np.uint8),
    "model.c": np.linspace(0, 1, 5).astype(ml_dtypes.bfloat16),
    "model.d": np.array([2.5], np.float16),
}


def test_reads_what_the_package_writes(tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / "m.safetensors", {"format": "pt"})
    file = safetensors_file.read(tmp_path / "m.safetensors")
    assert file.entries.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert file.entries[name].shape == array.shape
        assert file.read(name).tobytes() == array.tobytes()
    assert file.read("model.a", 4, 8).view(np.float32).tolist() == [1, 2]


def test_the_package_reads_what_is_written(tmp_path):
    kinds = dict(zip(ARRAYS, ("F32", "U8", "BF16", "F16"), strict=True))
    plans = [
        Plan(name, a.shape, kinds[name], a.nbytes, lambda a=a: [a.view(np.uint8)])
        for name, a in ARRAYS.items()
    ]
    with open(tmp_path / "m.safetensors", "wb") as out:
        safetensors_file.write(out, plans)
    found = safetensors.numpy.load_file(tmp_path / "m.safetensors")
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)

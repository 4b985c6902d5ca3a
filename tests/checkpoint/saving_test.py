"""`save`: plain per-layer arrays in few small files, there whole or not at all."""

import getpass
import json
import os
import socket

import jax.numpy as jnp
import numpy as np
import pytest

import ternax
from ternax import configs
from ternax.checkpoint import whole
from ternax.errors import OutputError, UsageError
from ternax.kernels.packing import unpack_numpy
from tests.checkpoint import stored


@pytest.fixture
def model():
    return ternax.load("tiny-bitnet", seed=1)


def test_leaves_are_per_layer_and_per_matrix(model, tmp_path):
    """Read by orbax alone: nobody meets a stack or a fused matrix."""
    ternax.save(model, tmp_path / "model")
    found = stored.read_weights(tmp_path / "model")
    linears = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"]
    norms = ["attn_norm", "attn.sub_norm", "mlp_norm", "mlp.sub_norm"]
    expected = {"embedding.codes", "embedding.scale", "norm.weight"}
    for i in range(3):
        expected |= {f"layers.{i}.{name}.{f}" for name in linears for f in ("codes", "scale")}
        expected |= {f"layers.{i}.{name}.weight" for name in norms}
    assert set(found) == expected
    up = np.asarray(model.layers.mlp.gate_up.packed.data)[2, :, 144:]
    np.testing.assert_array_equal(found["layers.2.mlp.up.codes"], up)
    assert set(np.unique(unpack_numpy(up, "trit2", 64))) == {-1, 0, 1}
    v = np.asarray(model.layers.attn.qkv.packed.data)[1, :, 64 + 32 :]
    np.testing.assert_array_equal(found["layers.1.attn.v.codes"], v)


def test_a_million_parameters_are_a_third_of_a_megabyte(tmp_path):
    """1,081,600 ternary and 65,536 int8: 0.33 MB in a dozen files."""
    config = configs.get_config("stdlib-bitnet")
    ternax.save(ternax.load(config), tmp_path / "model")
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 400_000
    assert len(files) <= 16


def test_files_name_no_machine_no_user_and_no_path(model, tmp_path):
    ternax.save(model, tmp_path / "model")
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    # Short words such as "root" may also stand in compressed bytes, so those are long here.
    secrets = [str(tmp_path), str(tmp_path.parent), os.getcwd(), os.path.expanduser("~") + "/"]
    secrets += [word for word in (socket.gethostname(), getpass.getuser()) if len(word) > 4]
    for path in files:
        data = path.read_bytes()
        assert [secret for secret in secrets if secret.encode() in data] == [], path
        assert b"/tmp" not in data and b"draft" not in data, path


def test_the_manifest_says_what_it_is(model, tmp_path):
    ternax.save(model, tmp_path / "model")
    content = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert (content["format"], content["version"], content["layout"]) == ("ternax model", 1, 1)
    assert content["config"]["name"] == "tiny-bitnet" and content["config"]["scheme"] == "absmean"
    assert (content["packed"], content["embed_dtype"]) == (True, "int8")
    assert content["leaves"]["layers.0.mlp.up.codes"]["shape"] == [1, 144, 16]


def test_a_model_is_replaced_by_a_whole_one(model, tmp_path, monkeypatch):
    path = tmp_path / "model"
    ternax.save(ternax.load("tiny-bitnet", seed=2), path)
    before = stored.bits(ternax.load(path))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(whole, "_put_in_place", full)
        with pytest.raises(OutputError, match="cannot be written: No space left on device"):
            ternax.save(model, path)
    assert stored.bits(ternax.load(path)) == before
    ternax.save(model, path)
    assert stored.bits(ternax.load(path)) == stored.bits(model) != before
    assert [p.name for p in tmp_path.iterdir()] == ["model"], "drafts are left"


def test_the_old_model_comes_back_when_the_new_one_cannot_take_its_place(
    model, tmp_path, monkeypatch
):
    path, replace = tmp_path / "model", os.replace
    ternax.save(model, path)

    def once(source, target):
        if "draft" in str(source):
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(OutputError, match="Permission denied"):
        ternax.save(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    ternax.load(path)


def test_other_things_are_not_overwritten(model, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("notes", "file", "file/below"):
        with pytest.raises(OutputError, match=name) as refused:
            ternax.save(model, tmp_path / name)
        assert "\n" not in str(refused.value)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    ternax.save(model, tmp_path / "empty")


def test_what_no_load_would_take_is_not_written(model, tmp_path):
    codes = model.layers.mlp.down.data
    codes.set_value(codes.get_value().at[1, 0, 2, 3].set(0b11))
    with pytest.raises(UsageError, match=r"layers.1.mlp.down.codes holds code 3"):
        ternax.save(model, tmp_path / "model")
    codes.set_value(codes.get_value().at[1, 0, 2, 3].set(0))
    model.norm.weight.set_value(jnp.full((64,), jnp.nan))
    with pytest.raises(UsageError, match=r"norm.weight holds a value that is not finite"):
        ternax.save(model, tmp_path / "model")
    model.norm.weight.set_value(jnp.ones((65,)))
    with pytest.raises(UsageError, match="not what its config tiny-bitnet makes"):
        ternax.save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []

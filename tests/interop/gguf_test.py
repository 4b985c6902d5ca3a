"""Models as GGUF files and back, held against the gguf package and byte against byte."""

import dataclasses

import gguf
import jax
import numpy as np
import pytest
from gguf import quants

import ternax
from ternax.errors import BadModelFile, OutputError, UsageError
from ternax.interop import gguf_file
from ternax.interop.gguf import GGUFModel
from ternax.interop.gguf_saving import architecture
from ternax.interop.loading import load
from ternax.interop.weights import Weights
from ternax.random_weights import random_model
from tests.checkpoint import stored
from tests.interop import models

TOKENS = np.arange(12, dtype=np.int32)[None] * 7
# Names that the two directions of llama.cpp's own conversion have for a matrix of each kind.
MATRICES = {"layers.1.attn.q": "blk.1.attn_q.weight", "layers.0.mlp.down": "blk.0.ffn_down.weight"}


@pytest.fixture(scope="module")
def made():
    """name -> a packed model. f32 tables, so that a file's are the model's."""
    return lambda name: models.packed(models.CONFIGS[name], embed_dtype="f32", head_dtype="f32")


@pytest.mark.parametrize("name", models.CONFIGS)
@pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0", "I2_S", "I2_S,i2_s=arm", "I2_S,i2_s=rows"])
def test_codes_scales_and_the_file_come_back(made, tmp_path, name, kind):
    model, path = made(name), tmp_path / f"{name}.gguf"
    ternax.save(model, path, f"gguf:{kind}")
    i2_s = kind.partition("i2_s=")[2] or "x86"
    back = ternax.load(path, embed_dtype="f32", head_dtype="f32", i2_s=i2_s)
    want = dataclasses.replace(model.config, source=back.config.source)
    assert back.config == want
    mine, theirs = Weights(model), Weights(back)
    for each in MATRICES:
        codes, scale = mine.codes(each)
        found, found_scale = theirs.codes(each)
        np.testing.assert_array_equal(found, codes)
        rounded = scale if "I2_S" in kind else scale.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(found_scale, rounded)
    again = tmp_path / "again" / path.name
    ternax.save(back, again, f"gguf:{kind}")
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", models.CONFIGS)
def test_the_gguf_package_sees_the_same_weights(made, tmp_path, name):
    """Dequantized by it; q and k in the order that llama.cpp's converter puts them in."""
    model, path = made(name), tmp_path / "m.gguf"
    ternax.save(model, path, "gguf:TQ2_0")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for ours, theirs in MATRICES.items():
        rows = Weights(model).floats(ours)
        if model.config.family == "llama" and ours.endswith("attn.q"):
            heads = model.config.num_heads
            rows = rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        tensor = found[theirs]
        np.testing.assert_allclose(
            quants.dequantize(tensor.data, tensor.tensor_type), rows, rtol=2**-11
        )


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_floats_of_ternary_weights(made, tmp_path, kind):
    """A bitnet file of floats holds a ternary matrix times its scale, and loads as one."""
    model = made("small-bitnet")
    ternax.save(model, tmp_path / "m.gguf", f"gguf:{kind}")
    back = ternax.load(tmp_path / "m.gguf", embed_dtype="f32", head_dtype="f32")
    assert back.config.scheme == "ls" and back.config.inputs == "int8"
    codes, scale = Weights(back).codes("layers.1.mlp.up")
    want, want_scale = Weights(model).codes("layers.1.mlp.up")
    np.testing.assert_array_equal(codes, want)
    np.testing.assert_allclose(scale, want_scale, rtol=2**-7)
    if kind == "F32":
        np.testing.assert_allclose(back(TOKENS), model(TOKENS), atol=1e-4)


@pytest.mark.parametrize("dtype, kind", [("int8", "Q8_0"), ("int4", "Q4_0"), ("bf16", "BF16")])
def test_tables_keep_their_codes(tmp_path, dtype, kind):
    model = models.packed(models.LLAMA, embed_dtype=dtype, head_dtype=dtype)
    ternax.save(model, tmp_path / "m.gguf", "gguf:TQ2_0")
    foreign = GGUFModel(tmp_path / "m.gguf")
    assert foreign.file.entries["token_embd.weight"].kind == kind
    np.testing.assert_allclose(
        foreign.floats("embedding"), Weights(model).floats("embedding"), rtol=2**-11
    )
    np.testing.assert_array_equal(
        foreign.floats("embedding", 3, 5), foreign.floats("embedding")[3:8]
    )


def test_a_plain_llama_under_any_scheme(tmp_path):
    """A float file: as it is, quantized on the way in with what that lost, or latent."""
    config = dataclasses.replace(models.LLAMA, scheme="none,dtype=f32", inputs="none")
    model = models.packed(config, embed_dtype="f32", head_dtype="f32")
    ternax.save(model, tmp_path / "m.gguf", "gguf:TQ2_0")
    foreign = GGUFModel(tmp_path / "m.gguf")
    assert foreign.config.scheme == "none" and not foreign.packed
    tables = dict(embed_dtype="f32", head_dtype="f32")
    same = load(foreign, scheme="none,dtype=f32", **tables)
    assert stored.bits(same) == stored.bits(model)
    errors = []
    ternary = load(foreign, scheme="absmean", inputs="int8", watch=errors.append, **tables)
    whole = models.packed(dataclasses.replace(models.LLAMA, scheme="absmean"), **tables)
    for one, other in zip(jax.tree.leaves(ternary), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)  # means summed in another order
    assert len(errors) == 14 and all(0.4 < error.relative_error < 0.6 for error in errors)
    latent = load(foreign, packed=False, scheme="absmean")
    np.testing.assert_array_equal(
        latent.layers.mlp.up.kernel[...], models.floats(models.LLAMA).layers.mlp.up.kernel[...]
    )


def test_blocks_of_their_own_scale_become_groups(tmp_path):
    config = dataclasses.replace(models.BITNET, scheme="absmean,granularity=group,group_size=256")
    model = models.packed(config, embed_dtype="f32", head_dtype="f32")
    ternax.save(model, tmp_path / "small-bitnet.gguf", "gguf:TQ2_0")
    back = ternax.load(tmp_path / "small-bitnet.gguf", embed_dtype="f32", head_dtype="f32")
    assert back.config.scheme == config.scheme
    np.testing.assert_allclose(back(TOKENS), model(TOKENS), atol=0.1)
    ternax.save(back, tmp_path / "b" / "small-bitnet.gguf", "gguf:TQ2_0")
    first, second = (tmp_path / p / "small-bitnet.gguf" for p in ("", "b"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    "changes, format, why",
    [
        (dict(scheme="ptqtp"), "gguf:TQ2_0", "two trit-planes"),
        (dict(intermediate_size=320), "gguf:TQ2_0", "TQ2_0 cannot hold: .* blocks of 256"),
    ],
)
def test_what_no_file_can_hold(tmp_path, changes, format, why):
    config = dataclasses.replace(models.LLAMA, num_layers=1, **changes)
    with pytest.raises(UsageError, match=why):
        ternax.save(random_model(config, embed_dtype="int8"), tmp_path / "m", format)
    assert list(tmp_path.iterdir()) == []


def test_a_scale_for_each_row_is_no_i2_s(tmp_path):
    with pytest.raises(UsageError, match="scales that differ"):
        ternax.save(models.packed(models.ROWS), tmp_path / "m", "gguf:I2_S")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "format, why",
    [
        ("gguf:Q4_K", "expected one of TQ1_0, TQ2_0"),
        ("ggml", "expected one of orbax, hf, gguf:TQ2_0"),
    ],
)
def test_formats_that_are_none(made, tmp_path, format, why):
    with pytest.raises(UsageError, match=why):
        ternax.save(made("small-llama"), tmp_path / "m", format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes, why",
    [
        (dict(activation="relu2"), "activation relu2 in a llama"),
        (dict(family="bitnet", head_dim=64), "a head of its own, in a bitnet"),
        (dict(family="bitnet", tie_embeddings=True), "heads that are not as wide"),
        (
            dict(family="bitnet", tie_embeddings=True, head_dim=64),
            "scaled rotary frequencies, in a bitnet",
        ),
    ],
)
def test_what_no_architecture_computes(changes, why):
    with pytest.raises(UsageError, match=why):
        architecture(dataclasses.replace(models.LLAMA, **changes))


def test_other_files_stay(made, tmp_path):
    (tmp_path / "mine.gguf").write_text("notes")
    with pytest.raises(OutputError, match="no saved model"):
        ternax.save(made("small-bitnet"), tmp_path / "mine.gguf", "gguf:TQ2_0")
    with pytest.raises(UsageError, match="expected a packed model"):
        ternax.save(models.floats(models.BITNET), tmp_path / "m.gguf", "gguf:TQ2_0")


def test_i2_s_needs_to_be_told_whose_it_is(made, tmp_path):
    ternax.save(made("small-relu2"), tmp_path / "m.gguf", "gguf:I2_S")
    with pytest.raises(UsageError, match="i2_s=x86, i2_s=arm or i2_s=rows, found None"):
        ternax.load(tmp_path / "m.gguf")
    assert gguf_file.read(tmp_path / "m.gguf")[0]["general.architecture"] == "bitnet-b1.58"


def test_trits_are_what_they_are(made, tmp_path):
    ternax.save(made("small-bitnet"), tmp_path / "m.gguf", "gguf:TQ2_0")
    with pytest.raises(UsageError, match="scheme=twn: .* stored as absmean"):
        ternax.load(tmp_path / "m.gguf", scheme="twn")
    with pytest.raises(UsageError, match="latent floats are gone"):
        ternax.load(tmp_path / "m.gguf", packed=False)
    assert ternax.load(tmp_path / "m.gguf", layers=1).config.num_layers == 1


@pytest.mark.parametrize(
    "edit, why",
    [
        ({"general.architecture": "gpt2"}, "'gpt2' is not read"),
        ({"llama.block_count": 3}, "blk.2.attn_q.weight: missing"),
        ({"llama.block_count": 1}, "blk.1.attn_q.weight: unknown"),
        ({"llama.block_count": 1 << 30}, "too few tensors"),
        ({"llama.attention.head_count": 3}, "multiple|expected"),
        ({"llama.attention.value_length": 64}, "expected 128, the width of a head"),
        ({"llama.feed_forward_length": 768}, "expected .768, 256., found .512, 256."),
        ({"llama.expert_count": 8}, "expert_count: a model with it is not read"),
        ({"llama.rope.scaling.type": "yarn"}, "only none and rope_freqs"),
        ({"llama.rope.freq_base": 0.5}, "rope_theta must exceed 1"),
        ({"llama.context_length": "long"}, "expected int, found 'long'"),
        ({"ternax.rope_scaling": [2.0, 1.0, 4.0, 32.0]}, "no llama3 scaling"),
    ],
)
def test_wrong_metadata_is_refused_by_name(made, tmp_path, edit, why):
    ternax.save(made("small-llama"), tmp_path / "m.gguf", "gguf:TQ2_0")
    metadata, file = gguf_file.read(tmp_path / "m.gguf")
    plans = [
        gguf_file.Plan(name, e.shape, e.kind, e.nbytes, lambda name=name: [file.read(name)])
        for name, e in file.entries.items()
    ]
    with open(tmp_path / "edited.gguf", "wb") as out:
        gguf_file.write(out, metadata | edit, plans)
    with pytest.raises(BadModelFile, match=why):
        ternax.load(tmp_path / "edited.gguf")

"""Greedy texts of llama.cpp on a file that ternax wrote, from a golden; `parity.py` asks it live.

The model in the box, under silu, since upstream's bitnet knows no relu2: another model than was
trained, and as good for this. Its int8 table is saved as f32, whose products both compute in f32.
"""

import json
import pathlib

import numpy as np

import ternax

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "goldens" / "llama_cpp_texts.json"


def test_twenty_prompts(tmp_path):
    ternax.save(ternax.load("stdlib-bitnet"), tmp_path / "hf", "hf")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(settings | {"hidden_act": "silu"}))
    ternax.save(ternax.load(tmp_path / "hf", embed_dtype="f32"), tmp_path / "m.gguf", "gguf:TQ2_0")
    model = ternax.load(tmp_path / "m.gguf", embed_dtype="f32")
    texts = json.loads(GOLDEN.read_text())["texts"]
    prompts = [list(prompt.encode()) for prompt in texts]
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    out = ternax.generate(
        model, tokens, lengths=lengths, max_new_tokens=48, stop=(0,), kv_dtype="f32"
    )
    found = [
        bytes(row[: length + 48].tolist()).rstrip(b"\0").decode("latin-1")
        for row, length in zip(out, lengths, strict=True)
    ]
    assert found == list(texts.values())

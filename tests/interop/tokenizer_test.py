"""Tokenizers: bytes, tokenizer.json, GGUF's vocabularies and back, templates."""

import json

import pytest
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers

from ternax.errors import BadModelFile, UsageError
from ternax.interop import gguf_vocabulary
from ternax.interop.foreign import ModelFileWarning
from ternax.interop.tokenizer import (
    ByteTokenizer,
    FileTokenizer,
    chat_prompt,
    from_directory,
    printable,
    to_directory,
)

TEXTS = ["def main(x):\n    return 12345", "Hé, naïve façade — 漢字 🙂!", "  two  spaces", ""]
GGML = "tokenizer.ggml."


def trained(split: str | None) -> tokenizers.Tokenizer:
    """A BPE over bytes with some merges, split as GPT-2 (None) or Llama 3 splits."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=split is not None))
    if split is None:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    inner.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS * 3, trainer)
    return inner


def sentencepiece() -> tokenizers.Tokenizer:
    """As transformers has Llama 2's: merges, a byte for what no token has."""
    base = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdeft"]
    merges = [("a", "b"), ("ab", "c"), ("d", "e"), ("de", "f"), ("▁", "abc"), ("f", "f")]
    words = base + ["".join(pair) for pair in merges]
    model = tokenizers.models.BPE(
        {word: i for i, word in enumerate(words)},
        merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    inner = tokenizers.Tokenizer(model)
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return inner


@pytest.mark.parametrize("text", TEXTS)
def test_bytes(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    piece = tokenizer.stream()
    assert "".join(piece(i) for i in [*tokenizer.encode(text), 258]) == text


@pytest.mark.parametrize("split", [None, gguf_vocabulary._LLAMA3], ids=["gpt2", "llama3"])
def test_a_bpe_travels_through_gguf(split):
    inner = trained(split)
    before = FileTokenizer(inner, bos=None, stop=(1,), template="{{ messages }}")
    pairs = gguf_vocabulary.write(before, 410)
    assert pairs[f"{GGML}model"] == "gpt2" and len(pairs[f"{GGML}tokens"]) == 410
    assert pairs[f"{GGML}pre"] == ("gpt-2" if split is None else "llama-bpe")
    after = gguf_vocabulary.read("m.gguf", pairs)
    assert (after.stop, after.template, after.bos) == ((1,), "{{ messages }}", None)
    for text in [*TEXTS, "<s>def main"]:
        assert after.encode(text) == before.encode(text)
        assert after.decode(after.encode(text)) == text
        piece = after.stream()
        assert "".join(piece(i) for i in after.encode(text)) == text


def test_a_sentencepiece_travels_through_gguf():
    before = FileTokenizer(sentencepiece(), bos=1, stop=(2,), template=None)
    pairs = gguf_vocabulary.write(before, before.size)
    assert pairs[f"{GGML}model"] == "llama" and pairs[f"{GGML}add_bos_token"] is True
    after = gguf_vocabulary.read("m.gguf", pairs)
    for text in ["abc def", "abcabc  deff", "é a", "tab\tbed"]:
        assert after.encode(text) == before.encode(text) == [1, *before.encode(text)[1:]]
        assert after.decode(after.encode(text)[1:]) == text


def test_bytes_travel_through_gguf():
    pairs = gguf_vocabulary.write(ByteTokenizer(259), 259)
    assert len(set(pairs[f"{GGML}tokens"])) == 259
    assert gguf_vocabulary.read("m.gguf", pairs) == ByteTokenizer(259)
    assert gguf_vocabulary.read("m.gguf", gguf_vocabulary.write(None, 9)) is None
    # The letters are the ones that the package's own decoder knows.
    letters = gguf_vocabulary.byte_letters()
    assert sorted(letters) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert decoders.ByteLevel().decode([letters[b] for b in "é\n ".encode()]) == "é\n "


def test_a_directory_comes_back(tmp_path):
    before = FileTokenizer(trained(None), bos=0, stop=(1,), template="{{ bos_token }}!")
    to_directory(before, tmp_path)
    after = from_directory(tmp_path)
    assert (after.bos, after.stop, after.template) == (0, (1,), "{{ bos_token }}!")
    assert after.encode("main(") == before.encode("main(")
    assert chat_prompt(after, []) == "<s>!"
    assert from_directory(tmp_path / "elsewhere") is None


def test_a_template_knows_what_begins_a_text(tmp_path):
    """Also where a post-processor puts it in front, as Llama 3's does, and once through GGUF."""
    inner = trained(gguf_vocabulary._LLAMA3)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    (tmp_path / "tokenizer.json").write_text(inner.to_str())
    words = {"bos_token": "<s>", "eos_token": "</s>", "eos_token_id": [0, 1]}
    template = "{{ bos_token }}x{{ eos_token }}"
    settings = json.dumps(words | {"chat_template": template})
    (tmp_path / "tokenizer_config.json").write_text(settings)
    one = from_directory(tmp_path)
    pairs = gguf_vocabulary.write(one, one.size)
    del pairs[f"{GGML}add_bos_token"]  # old files lack it, and llama.cpp adds it all the same
    for found in (one, gguf_vocabulary.read("m.gguf", pairs)):
        assert chat_prompt(found, []) == "<s>x</s>"
        ids = found.encode("a")
        assert ids[0] == 0 and ids[1:] == found.encode("a", special=False)


def test_a_vocabulary_that_does_not_say_how_it_splits():
    tokenizer = FileTokenizer(trained(None), bos=None, stop=(), template=None)
    pairs = gguf_vocabulary.write(tokenizer, tokenizer.size)
    del pairs[f"{GGML}pre"]
    with pytest.warns(ModelFileWarning, match="pre is missing: texts are split as GPT-2"):
        gguf_vocabulary.read("m.gguf", pairs)


def test_what_config_json_says_of_ends(tmp_path):
    to_directory(FileTokenizer(trained(None), bos=None, stop=(), template=None), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [0, 1], "bos_token_id": 0}))
    found = from_directory(tmp_path)
    assert found.stop == (0, 1)
    assert found.encode("a") == found.encode("a", special=False)
    (tmp_path / "chat_template.jinja").write_text("of a file")
    assert from_directory(tmp_path).template == "of a file"


@pytest.mark.parametrize(
    "change, why",
    [
        ({"tokens": 7}, "tokens: expected a list of texts"),
        ({"tokens": ["a", "a"]}, "a token is there twice"),
        ({"token_type": [1]}, "token_type: expected 259"),
        ({"merges": None}, "merges: expected a list of texts"),
        ({"merges": ["never there"]}, "merges"),
        ({"model": "bert"}, "'bert' is not read"),
        ({"pre": "tekken", "merges": ["a b"]}, "'tekken' is not read"),
        ({"model": "llama", "scores": [1.0]}, "scores: expected 259 numbers"),
    ],
)
def test_bad_vocabularies(change, why):
    pairs = gguf_vocabulary.write(ByteTokenizer(259), 259)
    pairs |= {GGML + key: value for key, value in change.items()}
    with pytest.raises(BadModelFile, match=why):
        gguf_vocabulary.read("m.gguf", pairs)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['role'] }",
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ 1 / 0 }}",
    ],
)
def test_templates_are_data(template):
    """What cannot be rendered, and what would reach out of the sandbox, is one error."""
    with pytest.raises(UsageError, match="chat template: "):
        chat_prompt(ByteTokenizer(template=template), [{"role": "user", "content": "x"}])


def test_a_terminal_is_not_steered():
    assert printable("a\x1b[2Jb\n\tc\r") == "a\ufffd[2Jb\n\tc\ufffd"

"""A GGUF file's vocabulary as a tokenizer, and back.

`tokenizer.ggml.model` is "gpt2" (BPE over bytes, with merges), "llama" (SentencePiece, with
scores) or "none". Sources: src/llama-vocab.cpp and conversion/base.py of llama.cpp.
"""

import json
import warnings
from typing import Any

from ternax.errors import BadModelFile, UsageError
from ternax.interop.foreign import ModelFileWarning
from ternax.interop.tokenizer import BYTES, ByteTokenizer, FileTokenizer, Tokenizer, _library

_GGML = "tokenizer.ggml."
_NORMAL, _CONTROL, _BYTE = 1, 3, 6
# How `tokenizer.ggml.pre` splits a text before merging; None is GPT-2's own way.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "gpt-2": None,
}
_SPACE = "\u2581"


def byte_letters() -> list[str]:
    """The letter that GPT-2's vocabulary has for each byte: printable ones for themselves."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = iter(range(BYTES, 2 * BYTES))
    return [chr(byte) if byte in kept else chr(next(other)) for byte in range(BYTES)]


def read(path, metadata: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of a file's metadata; None where it holds none. BadModelFile for a bad one."""
    model = metadata.get(f"{_GGML}model", "none")
    if model in ("none", "no_vocab"):
        return None
    tokens = _texts(path, metadata, "tokens")
    types = metadata.get(f"{_GGML}token_type", [_NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise BadModelFile(path, f"{_GGML}token_type", f"expected {len(tokens)} of them")
    bos, stop = _special(metadata, "bos", len(tokens)), _special(metadata, "eos", len(tokens))
    template = metadata.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else None
    if model == "gpt2":
        merges = _texts(path, metadata, "merges")
        if not merges and tokens[:BYTES] == byte_letters():
            return ByteTokenizer(len(tokens), () if stop is None else (stop,), template)
        pre = metadata.get(f"{_GGML}pre")
        if pre is None:
            pre = "gpt-2"
            warnings.warn(
                f"{path}: {_GGML}pre is missing: texts are split as GPT-2 splits them, which may "
                "not be how the model was trained",
                ModelFileWarning,
                stacklevel=2,
            )
        inner = _bpe(path, tokens, merges, pre)
        # As llama.cpp takes it where the file does not say: with Llama 3's way to split.
        add = metadata.get(f"{_GGML}add_bos_token", _SPLITS[pre] is not None) is True
    elif model == "llama":
        inner = _sentencepiece(path, tokens, metadata.get(f"{_GGML}scores"))
        add = metadata.get(f"{_GGML}add_bos_token", True) is True
    else:
        raise BadModelFile(path, f"{_GGML}model", f"{model!r} is not read; gpt2, llama, none are")
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    inner.add_special_tokens(special)
    return FileTokenizer(
        inner,
        bos=bos,
        stop=() if stop is None else (stop,),
        template=template,
        adds_bos=add,
    )


def _texts(path, metadata, key: str) -> list[str]:
    found = metadata.get(_GGML + key)
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise BadModelFile(path, _GGML + key, "expected a list of texts")
    if key == "tokens" and len(set(found)) != len(found):
        raise BadModelFile(path, _GGML + key, "a token is there twice")
    return found


def _special(metadata, name: str, size: int) -> int | None:
    found = metadata.get(f"{_GGML}{name}_token_id")
    return found if type(found) is int and 0 <= found < size else None


def _bpe(path, tokens, merges, pre):
    tokenizers = _library("tokenizers")
    if pre not in _SPLITS:
        raise BadModelFile(path, f"{_GGML}pre", f"{pre!r} is not read; {', '.join(_SPLITS)} are")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    split = _SPLITS[pre]
    try:
        inner = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                {token: i for i, token in enumerate(tokens)}, pairs, ignore_merges=split is not None
            )
        )
    except Exception as error:
        raise BadModelFile(path, f"{_GGML}merges", str(error)) from error
    pre_tokenizers, byte_level = tokenizers.pre_tokenizers, tokenizers.decoders.ByteLevel()
    inner.decoder = byte_level
    if split is None:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    return inner


def _sentencepiece(path, tokens, scores):
    """Merges in the order of their results' scores, which is what SentencePiece's BPE does."""
    tokenizers = _library("tokenizers")
    numbers = isinstance(scores, list) and len(scores) == len(tokens)
    if not numbers or not all(isinstance(score, float) for score in scores):
        raise BadModelFile(path, f"{_GGML}scores", f"expected {len(tokens)} numbers")
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [
        (-scores[i], ids[token[:at]], ids[token[at:]], token[:at], token[at:])
        for token, i in ids.items()
        for at in range(1, len(token))
        if token[:at] in ids and token[at:] in ids
    ]
    merges.sort()
    unknown = tokens[0] if tokens else None
    model = tokenizers.models.BPE(
        ids,
        [(left, right) for *_, left, right in merges],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    inner = tokenizers.Tokenizer(model)
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return inner


def write(tokenizer: Tokenizer | None, size: int) -> dict[str, Any]:
    """Key-value pairs for a model of `size` tokens; "none" without a tokenizer.

    Raises UsageError for a tokenizer that GGUF has no name for.
    """
    if tokenizer is None:
        return {f"{_GGML}model": "none"}
    if isinstance(tokenizer, ByteTokenizer):
        tokens = byte_letters() + [f"<|{i}|>" for i in range(BYTES, size)]
        found = _pairs("gpt2", tokens[:size], [_NORMAL] * BYTES + [_CONTROL] * (size - BYTES))
        found |= {f"{_GGML}pre": "gpt-2", f"{_GGML}merges": [], f"{_GGML}add_bos_token": False}
        # Else llama.cpp takes 11, GPT-2's; no prompt begins with it here.
        found[f"{_GGML}bos_token_id"] = tokenizer.stop[0] if tokenizer.stop else 0
    else:
        if not isinstance(tokenizer, FileTokenizer):
            raise UsageError(f"tokenizer: GGUF has no form of a {type(tokenizer).__name__}")
        found = _described(tokenizer, size)
        ids = tokenizer.encode("a")
        adds = ids != tokenizer.encode("a", special=False)
        found[f"{_GGML}add_bos_token"] = adds
        bos = ids[0] if adds else tokenizer.bos
        if bos is not None:
            found[f"{_GGML}bos_token_id"] = bos
    if tokenizer.stop:
        found[f"{_GGML}eos_token_id"] = tokenizer.stop[0]
    if tokenizer.template:
        found["tokenizer.chat_template"] = tokenizer.template
    return found


def _pairs(model, tokens, types) -> dict[str, Any]:
    return {f"{_GGML}model": model, f"{_GGML}tokens": tokens, f"{_GGML}token_type": types}


def _described(tokenizer: FileTokenizer, size: int) -> dict[str, Any]:
    described = json.loads(tokenizer.inner.to_str())
    model, pre = described["model"], described["pre_tokenizer"]
    words = tokenizer.inner.get_vocab(with_added_tokens=True)
    tokens = [f"<|unused {i}|>" for i in range(size)]
    types = [_CONTROL] * size
    special = {each["content"] for each in described["added_tokens"] if each["special"]}
    for word, i in words.items():
        if i >= size:
            raise UsageError(f"tokenizer: token {word!r} is {i} in a model of {size} tokens")
        byte = model.get("byte_fallback") and len(word) == 6 and word.startswith("<0x")
        tokens[i], types[i] = word, _CONTROL if word in special else _BYTE if byte else _NORMAL
    if model["type"] == "BPE" and model.get("byte_fallback"):
        scores = [-float(i) for i in range(size)]
        return _pairs("llama", tokens, types) | {f"{_GGML}scores": scores}
    found = next((name for name, split in _SPLITS.items() if _splits_so(pre, split)), None)
    if model["type"] != "BPE" or found is None:
        raise UsageError(
            f"tokenizer: GGUF has no name here for a {model['type']} that splits as this one does: "
            "save the model as hf"
        )
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    return _pairs("gpt2", tokens, types) | {f"{_GGML}pre": found, f"{_GGML}merges": merges}


def _splits_so(pre: dict | None, split: str | None) -> bool:
    if not pre:
        return False
    steps = pre.get("pretokenizers", [pre])
    if split is None:
        return len(steps) == 1 and steps[0]["type"] == "ByteLevel" and steps[0]["use_regex"]
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    return patterns == [split]

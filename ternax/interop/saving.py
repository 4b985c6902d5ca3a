"""`save`: a model in any format, whole or not at all."""

import pathlib

from ternax import processes
from ternax.checkpoint import manifest, saving
from ternax.checkpoint.whole import whole_directory, whole_file
from ternax.config import ModelConfig
from ternax.edit import is_packed
from ternax.errors import OutputError, UsageError
from ternax.gather import whole_model
from ternax.interop import gguf_file, gguf_saving, gguf_vocabulary, hf, hf_saving
from ternax.interop.gguf import I2_S
from ternax.interop.tokenizer import BYTES, ByteTokenizer, Tokenizer, to_directory
from ternax.interop.weights import Weights
from ternax.models import Decoder
from ternax.nn.read_noise import check_storable
from ternax.options import parse_options

FORMATS = ("orbax", "hf", "gguf:TQ2_0", "gguf:TQ1_0", "gguf:I2_S")
# A vocabulary of this size at most, and of no tokenizer, is taken for bytes and special tokens.
_BYTE_VOCABULARY = range(BYTES, 2 * BYTES)


def save(
    model: Decoder,
    path,
    format: str = "orbax",
    *,
    tokenizer: Tokenizer | None = None,
    trained_tokens: int | None = None,
) -> None:
    """Writes a model as `path`. What was there stays whole until the new one is.

    Args:
      format: "orbax", a directory that keeps everything to the bit; "hf", a Hugging Face
        directory ("hf,convention=bitlinear" for scales that divide); "gguf:KIND", a file in which
        ternary matrices are TQ2_0, TQ1_0, I2_S ("gguf:I2_S,i2_s=arm" for other processors), F16,
        BF16, F32 or Q8_0.
      tokenizer: stored with it; None for bytes where the vocabulary is one of bytes, else none.
      trained_tokens: what the model was trained on, which "orbax" alone keeps; None: unknown.

    A model on a mesh is saved by all processes of the run together: what is split is gathered on
    the host, and the first one writes.

    Raises:
      UsageError: a format that does not exist, or cannot hold this model; it says which can.
      OutputError: `path` is something else, or cannot be written.
    """
    check_storable(model)
    together = model.layout is not None
    model = whole_model(model)
    try:
        if not together or processes.is_first():
            _save(model, pathlib.Path(path), format, tokenizer, trained_tokens)
    finally:  # the others wait, also for one that could not write
        if together:
            processes.meet("saved")


def _save(
    model: Decoder,
    path: pathlib.Path,
    format: str,
    tokenizer: Tokenizer | None,
    trained_tokens: int | None,
) -> None:
    tokenizer = tokenizer or _of_bytes(model.config)
    packed = is_packed(model)
    name, kind, options = check(model.config, path, format, tokenizer=tokenizer, packed=packed)
    if name == "orbax":
        saving.save(
            model,
            path,
            trained_tokens=trained_tokens,
            beside=lambda draft: _store_tokenizer(tokenizer, draft),
        )
    elif name == "hf":
        with whole_directory(path, "the model") as draft:
            stop = tokenizer.stop if tokenizer else ()
            convention = options.get("convention", hf.CONVENTIONS[0])
            hf_saving.save(Weights(model), draft, convention=convention, stop=stop)
            _store_tokenizer(tokenizer, draft)
    else:
        vocabulary = gguf_vocabulary.write(tokenizer, model.config.vocab_size)
        with whole_file(path, "the model") as file:
            gguf_saving.save(Weights(model), file, kind, options.get("i2_s", I2_S[0]), vocabulary)


def check(
    config: ModelConfig,
    path,
    format: str,
    *,
    tokenizer: Tokenizer | None = None,
    packed: bool = True,
) -> tuple[str, str, dict[str, str]]:
    """Raises what `save` would, as far as no weights are needed, before any are made.

    packed: whether the weights will be packed, in the config's scheme.

    Returns the format in parts: its name, GGUF's kind or "", options.
    """
    path = pathlib.Path(path)
    name, _, kind = format.partition(",")[0].partition(":")
    if name == "orbax" and not kind:
        options = parse_options("format", format, ())
        same = manifest.is_saved_model(path)
    elif name == "hf" and not kind:
        options = parse_options("format", format, ("convention",))
        hf_saving.check(config, **options)
        if packed:
            hf_saving.check_forms(config)
        same = path.is_dir() and (path / hf.CONFIG).is_file()
    elif name == "gguf" and kind:
        options = parse_options("format", format, ("i2_s",))
        gguf_saving.check(config, kind, **options)
        if packed:
            gguf_saving.check_forms(config, kind, options.get("i2_s", I2_S[0]))
        gguf_vocabulary.write(tokenizer or _of_bytes(config), config.vocab_size)
        same = gguf_file.is_one(path)
    else:
        raise UsageError(f"format: expected one of {', '.join(FORMATS)}, found {format!r}")
    _check_place(path, same)
    return name, kind, options


def _of_bytes(config: ModelConfig) -> Tokenizer | None:
    return ByteTokenizer(config.vocab_size) if config.vocab_size in _BYTE_VOCABULARY else None


def _store_tokenizer(tokenizer: Tokenizer | None, directory: pathlib.Path) -> None:
    if tokenizer is not None:
        to_directory(tokenizer, directory)


def _check_place(path: pathlib.Path, same: bool) -> None:
    """Raises OutputError where something else would be replaced."""
    empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not same and not empty:
        raise OutputError(f"{path} is there and no saved model: choose another path")

"""What a path holds, told by what is in it, never by trying."""

import pathlib

from ternax.errors import BadModelFile
from ternax.interop import gguf_file, gguf_vocabulary, tokenizer
from ternax.interop.foreign import Foreign
from ternax.interop.gguf import GGUFModel
from ternax.interop.hf import CONFIG, HFModel

# What torch.save and pickle write; opening one runs what is in it.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def is_foreign(path) -> bool:
    """Whether `path` looks like a GGUF file or a Hugging Face directory, good or bad."""
    path = pathlib.Path(path)
    if path.is_dir():
        return (path / CONFIG).is_file()
    named = path.suffix in (".gguf", *_PICKLES, ".safetensors")
    return named or gguf_file.is_one(path)


def open_foreign(path, i2_s: str | None = None, name: str | None = None) -> Foreign:
    """The model at `path`, its header read and checked.

    Args:
      i2_s: of a GGUF file, see `GGUFModel`.
      name: what a directory's model is called; None: as the directory is.

    Raises:
      BadModelFile: it is not whole, or not of a kind that is read; a pickle, which is not opened.
      UsageError: a GGUF file with I2_S, without `i2_s`.
    """
    path = pathlib.Path(path)
    if path.suffix in _PICKLES:
        raise BadModelFile(
            path, "file", "a pickle can run code and is never opened: convert it to safetensors"
        )
    if path.suffix == ".safetensors":
        raise BadModelFile(path, "file", f"expected its directory, which holds {CONFIG} too")
    return HFModel(path, name) if path.is_dir() else GGUFModel(path, i2_s)


def tokenizer_of(model: Foreign) -> tokenizer.Tokenizer | None:
    """The tokenizer that is stored with a model; None where none is."""
    if isinstance(model, GGUFModel):
        return gguf_vocabulary.read(model.path, model.metadata)
    return tokenizer.from_directory(model.path)

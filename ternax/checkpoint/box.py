"""Where a model's weights come from: a file or directory the user names, the box, or chance.

The box holds the models that come with ternax, trained and packed: `box/<config name>`.
"""

import dataclasses
import os
import pathlib

from ternax.checkpoint import manifest
from ternax.checkpoint.manifest import Manifest
from ternax.config import ModelConfig
from ternax.configs import ALIASES, CONFIGS, get_config
from ternax.errors import BadModelFile, UsageError
from ternax.interop import foreign, hub
from ternax.interop.foreign import Foreign
from ternax.interop.hf import CONFIG
from ternax.interop.opening import is_foreign, open_foreign, tokenizer_of
from ternax.interop.tokenizer import BYTES, ByteTokenizer, Tokenizer, from_directory

BOX = pathlib.Path(__file__).resolve().parent.parent / "box"
WEIGHTS = ("auto", "random")


@dataclasses.dataclass(frozen=True)
class Source:
    """What a name stands for.

    Attributes:
      name: the config's name, or the directory as the user wrote it.
      config: the model.
      directory: where its weights are, a GGUF file among others; None: nowhere, they are drawn.
      stored: what is there: a manifest of ours, or another program's model, opened.
    """

    name: str
    config: ModelConfig
    directory: pathlib.Path | None = None
    stored: Manifest | Foreign | None = None

    @property
    def boxed(self) -> bool:
        """Whether the weights came with ternax."""
        return self.directory is not None and self.name in CONFIGS

    def check(self, **asked) -> None:
        """Raises what `Manifest.check` and `foreign.check` raise; all is well without weights."""
        if isinstance(self.stored, Manifest):
            self.stored.check(self.name, **asked)
        elif self.stored is not None:
            foreign.check(self.stored, self.name, **asked)

    @property
    def tables(self) -> tuple[str | None, str | None]:
        """How embedding and head are stored; None where that is free."""
        if isinstance(self.stored, Manifest) and self.stored.packed:
            return self.stored.embed_dtype, self.stored.head_dtype
        return None, None

    @property
    def trained_tokens(self) -> int | None:
        """What the weights were trained on, where their manifest tells."""
        return self.stored.trained_tokens if isinstance(self.stored, Manifest) else None

    def tokenizer(self) -> Tokenizer:
        """What is stored with the weights; else a token a byte.

        Raises UsageError where the vocabulary is too small even for that.
        """
        found = None
        if self.stored is not None and not isinstance(self.stored, Manifest):
            found = tokenizer_of(self.stored)
        elif self.directory is not None:
            found = from_directory(self.directory)
        if found is None:
            if self.config.vocab_size < BYTES:
                raise UsageError(
                    f"text needs a vocabulary of at least {BYTES}, one token a byte; "
                    f"{self.config.name} has {self.config.vocab_size} and no tokenizer"
                )
            return ByteTokenizer(self.config.vocab_size)
        if found.size > self.config.vocab_size:
            raise BadModelFile(
                self.name,
                "tokenizer",
                f"{found.size} tokens in a model of {self.config.vocab_size}",
            )
        return found

    @property
    def origin(self) -> str:
        """The weights in a few words, for screens and records."""
        if self.boxed:
            return f"trained weights, from ternax/box/{self.name}"
        return "random weights" if self.directory is None else f"weights from {self.name}"


def find(name: str, weights: str = "auto", i2_s: str | None = None) -> Source:
    """The model called `name`: a config of CONFIGS first, else a file, a directory, or one of the
    Hugging Face hub, "hf:org/name@revision", which is downloaded where the cache lacks it.

    Args:
      i2_s: of a GGUF file's I2_S, see `gguf.GGUFModel`.
      weights: "auto", those stored with the model if there are any; "random", none stored.

    Raises:
      UsageError: neither. BadModelFile: what is there is no whole model.
    """
    if weights not in WEIGHTS:
        raise UsageError(f"weights must be one of {', '.join(WEIGHTS)}, found {weights!r}")
    if name in CONFIGS or name in ALIASES:
        config = get_config(name)
        name, directory = config.name, BOX / config.name
        if weights == "random" or not manifest.is_saved_model(directory):
            return Source(name, config)
    elif hub.is_hub(name):
        opened = open_foreign(hub.fetch(name), name=hub.model_name(name))
        return _of_foreign(name, opened, weights)
    elif is_foreign(name) and not manifest.is_saved_model(name):
        return _of_foreign(name, open_foreign(name, i2_s), weights)
    elif os.sep in name or os.path.isdir(name):
        directory = pathlib.Path(name)
        if not manifest.is_saved_model(directory):
            raise BadModelFile(directory, *_none_there(directory))
    else:
        return Source(name, get_config(name))  # raises, naming the nearest
    stored = manifest.read(directory)
    if weights == "random":
        return Source(name, stored.config)
    return Source(name, stored.config, directory, stored)


def _none_there(path: pathlib.Path) -> tuple[str, str]:
    """(where, why) of a path that holds no model."""
    if path.is_dir():
        return manifest.NAME, f"missing, and so is the {CONFIG} of a Hugging Face directory"
    if path.exists():
        return "file", "expected a GGUF file, or a directory of a model, found another file"
    hub_name = path.parent.name and len(path.parts) == 2 and not path.is_absolute()
    other = f"; on the Hugging Face hub it would be {hub.PREFIX}{path}" if hub_name else ""
    return "file", f"nothing there: expected a GGUF file, or a directory of a model{other}"


def _of_foreign(name: str, opened: Foreign, weights: str) -> Source:
    if weights == "random":
        return Source(name, opened.config)
    return Source(name, opened.config, opened.path, opened)

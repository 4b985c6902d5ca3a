"""Where a model's weights come from: a directory the user names, the box, or chance.

The box holds the models that come with ternax, trained and packed: `box/<config name>`.
"""

import dataclasses
import os
import pathlib

from ternax.checkpoint import manifest
from ternax.checkpoint.manifest import Manifest
from ternax.config import ModelConfig
from ternax.configs import ALIASES, CONFIGS, get_config
from ternax.errors import UsageError

BOX = pathlib.Path(__file__).resolve().parent.parent / "box"
WEIGHTS = ("auto", "random")


@dataclasses.dataclass(frozen=True)
class Source:
    """What a name stands for.

    Attributes:
      name: the config's name, or the directory as the user wrote it.
      config: the model.
      directory: where its weights are; None: nowhere, they are drawn.
      stored: the manifest there.
    """

    name: str
    config: ModelConfig
    directory: pathlib.Path | None = None
    stored: Manifest | None = None

    @property
    def boxed(self) -> bool:
        """Whether the weights came with ternax."""
        return self.directory is not None and self.name in CONFIGS

    @property
    def origin(self) -> str:
        """The weights in a few words, for screens and records."""
        if self.boxed:
            return f"trained weights, from ternax/box/{self.name}"
        return "random weights" if self.directory is None else f"weights from {self.name}"


def find(name: str, weights: str = "auto") -> Source:
    """The model called `name`: a config of CONFIGS first, else a directory `save` wrote.

    Args:
      weights: "auto", those stored with the model if there are any; "random", none stored.

    Raises:
      UsageError: neither. BadModelFile: a directory without a whole manifest.
    """
    if weights not in WEIGHTS:
        raise UsageError(f"weights must be one of {', '.join(WEIGHTS)}, found {weights!r}")
    if name in CONFIGS or name in ALIASES:
        config = get_config(name)
        name, directory = config.name, BOX / config.name
        if weights == "random" or not manifest.is_saved_model(directory):
            return Source(name, config)
    elif os.sep in name or os.path.isdir(name):
        directory = pathlib.Path(name)
    else:
        return Source(name, get_config(name))  # raises, naming the nearest
    stored = manifest.read(directory)
    if weights == "random":
        return Source(name, stored.config)
    return Source(name, stored.config, directory, stored)

"""`manifest.json` of a saved model: what it is, and what each stored leaf must be.

Read before anything else, and without jax, so that a command line knows the model that a
directory holds. Its own hash tells a damaged manifest from another model.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from ternax.config import ModelConfig, config_from_dict
from ternax.errors import BadModelFile, UsageError

NAME = "manifest.json"
FORMAT = "ternax model"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Stored:
    """One stored leaf: `shape`, numpy `dtype` by name, `sha256` of its bytes, C order."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A saved model, without its arrays.

    Attributes:
      config: the model, its scheme included.
      packed: packed codes, or latent floats (f32).
      layout: `kernels.packing.LAYOUT_VERSION` of the codes.
      embed_dtype, head_dtype: how packed tables are stored; "f32" in a float model.
      leaves: name -> Stored, names as "layers.0.mlp.up.codes".
      trained_tokens: targets of all its training, repeats counted; None where nobody told.
    """

    config: ModelConfig
    packed: bool
    layout: int
    embed_dtype: str
    head_dtype: str
    leaves: dict[str, Stored]
    trained_tokens: int | None = None

    def text(self) -> str:
        """The file's content."""
        content = {"format": FORMAT, "version": VERSION} | dataclasses.asdict(self)
        if self.trained_tokens is None:
            del content["trained_tokens"]
        return json.dumps(content | {"sha256": _sha256(content)}, indent=1) + "\n"

    def check(
        self,
        path,
        *,
        scheme: str | None = None,
        inputs: str | None = None,
        embed_dtype: str | None = None,
        head_dtype: str | None = None,
    ) -> None:
        """Whether the model in directory `path` can be what is asked for; None asks nothing.

        Raises:
          UsageError: its weights are packed otherwise, or made for other inputs.
          BadModelFile: its scheme is "package.module:Class", which a file cannot ask for: it
            would say what is imported.
        """
        own = self.config.scheme
        if ":" in own and scheme != own:
            raise BadModelFile(
                path, NAME, f"its scheme is code of its own; if you trust it, ask for scheme={own}"
            )
        asked = {"inputs": (inputs, self.config.inputs)}
        if self.packed:
            asked |= {
                "scheme": (scheme, own),
                "embed_dtype": (embed_dtype, self.embed_dtype),
                "head_dtype": (head_dtype, self.head_dtype),
            }
        for name, (wanted, found) in asked.items():
            if wanted not in (None, found):
                raise UsageError(
                    f"{name}={wanted}: the weights in {path} are made with {found}; leave {name} "
                    "out, or take weights=random"
                )


def is_saved_model(path) -> bool:
    """Whether `path` is a directory that holds a manifest, whatever is in it."""
    return (pathlib.Path(path) / NAME).is_file()


def read(path) -> Manifest:
    """The manifest of the model in directory `path`. BadModelFile where none is whole."""
    path = pathlib.Path(path)
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing there"
        raise BadModelFile(path, NAME, f"expected a directory by ternax.save, found {found}")
    try:
        content = json.loads((path / NAME).read_bytes())
    except FileNotFoundError as error:
        raise BadModelFile(path, NAME, "missing: ternax.save writes one") from error
    except OSError as error:
        raise BadModelFile(path, NAME, f"cannot be read: {error.strerror}") from error
    except ValueError as error:  # of UTF-8 or of JSON
        raise BadModelFile(path, NAME, f"damaged, no JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BadModelFile(path, NAME, f"expected format {FORMAT!r}, found something else")
    if content.get("version") != VERSION:
        raise BadModelFile(
            path,
            NAME,
            f"expected version {VERSION}, found {content.get('version')!r}: written by "
            "another version of ternax",
        )
    if content.pop("sha256", None) != _sha256(content):
        raise BadModelFile(path, NAME, "damaged or edited: its sha256 is another")
    try:
        return _parsed(content)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise BadModelFile(path, NAME, f"a field is missing or unknown: {error}") from error
    except UsageError as error:
        raise BadModelFile(path, NAME, str(error)) from error


def _parsed(content: dict[str, Any]) -> Manifest:
    """The Manifest of checked JSON. TypeError and the like for other fields."""
    fields = {key: value for key, value in content.items() if key not in ("format", "version")}
    config = config_from_dict(fields["config"])
    leaves = {name: Stored(**leaf) for name, leaf in fields["leaves"].items()}
    leaves = {
        name: dataclasses.replace(leaf, shape=tuple(leaf.shape)) for name, leaf in leaves.items()
    }
    return Manifest(**(fields | {"config": config, "leaves": leaves}))


def _sha256(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

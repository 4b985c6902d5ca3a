"""`hf:org/name@revision`: a model of the Hugging Face hub, as the directory it is cached in.

huggingface_hub downloads, checks and caches; HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and a stored
login mean what they mean there. Asked for is what is read here, and nothing that could run.
"""

import pathlib
import re

from ternax.errors import BadModelFile, TernaxError, UsageError

PREFIX = "hf:"
FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
# Other programs' copies of the same weights.
_NOT = ("*/*", "consolidated*")
_SOURCE = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def is_hub(source) -> bool:
    """Whether `source` names a model of the hub, well or badly."""
    return str(source).startswith(PREFIX)


def model_name(source: str) -> str:
    """What records call it: "name" of "hf:org/name@revision"."""
    return source.partition("@")[0].rpartition("/")[2]


def fetch(source: str) -> pathlib.Path:
    """The directory of a snapshot, downloaded where the cache lacks some of it.

    Args:
      source: "hf:org/name", or "hf:org/name@revision": a branch, a tag or a commit.

    Raises:
      UsageError: the source is misspelt, unknown to the hub, or closed; huggingface_hub is missing.
      BadModelFile: the repository holds no model that is read here, or it cannot be had now.
    """
    matched = _SOURCE.fullmatch(source)
    if matched is None:
        raise UsageError(f"expected hf:org/name or hf:org/name@revision, found {source!r}")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise UsageError(
            f"{source} needs huggingface_hub: pip install 'ternax[hub]', or give a directory"
        ) from error
    name, revision = matched.groups()
    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=[*FILES], ignore_patterns=[*_NOT]
        )
    except Exception as error:
        raise _told(source, name, revision, error, errors) from error
    if not (pathlib.Path(found) / "config.json").is_file():
        raise BadModelFile(
            source, "config.json", "not in the repository: expected a model of safetensors"
        )
    return pathlib.Path(found)


def _told(source: str, name: str, revision: str | None, error: Exception, errors) -> TernaxError:
    """What huggingface_hub raised, which has no class in common, in one line."""
    if isinstance(error, errors.GatedRepoError):
        return UsageError(
            f"{source}: {name} wants its terms accepted: do so on its page, then log in"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UsageError(f"{source}: the hub knows no {name}, or only for those logged in")
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(f"{source}: {name} has no revision {revision}")
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{source}: {name} is no name of a repository")
    if isinstance(error, errors.LocalEntryNotFoundError):
        why = "the hub cannot be reached, and the cache does not hold all of it"
    else:
        first = (str(error).strip().splitlines() or [""])[0][:200]
        why = f"cannot be fetched: {type(error).__name__}: {first}"
    return BadModelFile(source, "hub", why)

"""Text to tokens and back: a byte each, or what a tokenizer.json or a GGUF file says.

Chat templates are jinja, run in its sandbox: they come with models, and a model is data.
"""

import codecs
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ternax.errors import BadModelFile, UsageError

BYTES = 256
# Ends a file of a training text, see `ternax.data.END`.
_END = 0
_MAX_BYTES = 1 << 27
# Without a template of its own a model gets the plainest there is.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Tokenizer(Protocol):
    """Attributes: `size`, ids are below it; `stop`, ids that end a text; `template`, of a chat."""

    @property
    def size(self) -> int: ...

    @property
    def stop(self) -> tuple[int, ...]: ...

    @property
    def template(self) -> str | None: ...

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text; special: with what the model expects in front of one."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; what is no UTF-8 becomes U+FFFD."""

    def stream(self) -> Callable[[int], str]:
        """A function from the next id to the text that it completes, perhaps none yet."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """A token a byte; ids from 256 on are no text."""

    size: int = BYTES
    stop: tuple[int, ...] = (_END,)
    template: str | None = None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        del special
        return list(text.encode(errors="surrogateescape"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < BYTES).decode(errors="replace")

    def stream(self) -> Callable[[int], str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda i: decoder.decode(bytes([i])) if i < BYTES else ""


class FileTokenizer:
    """A `tokenizers.Tokenizer` with its special ids.

    Attributes:
      inner: the tokenizer.
      bos: the id that begins a text, by which templates call it too; None where none does.
      adds_bos: whether it is put in front here; False where `inner` does it, or nobody.
    """

    def __init__(
        self,
        inner,
        *,
        bos: int | None,
        stop: tuple[int, ...],
        template: str | None,
        adds_bos: bool = True,
    ):
        self.inner, self.bos, self.stop, self.template = inner, bos, stop, template
        self.adds_bos = adds_bos and bos is not None
        self.size = inner.get_vocab_size()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        ids = self.inner.encode(text, add_special_tokens=special).ids
        return [self.bos, *ids] if special and self.adds_bos and self.bos is not None else ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(list(ids), skip_special_tokens=False)

    def stream(self) -> Callable[[int], str]:
        from tokenizers.decoders import DecodeStream

        state = DecodeStream(skip_special_tokens=False)
        return lambda i: state.step(self.inner, i) or ""


def printable(text: str) -> str:
    """Without what would steer a terminal: a model may write anything."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def chat_prompt(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> str:
    """The text that asks for the next answer. messages: {"role", "content"} each, in order.

    Raises UsageError: the template cannot be used, or refuses the messages.
    """
    jinja2 = _library("jinja2")
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(text):
        raise jinja2.TemplateError(text)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    words = {"bos_token": "", "eos_token": ""}
    if isinstance(tokenizer, FileTokenizer):
        ids = {"bos_token": tokenizer.bos, "eos_token": next(iter(tokenizer.stop), None)}
        words = {
            key: tokenizer.inner.id_to_token(i) or "" if i is not None else ""
            for key, i in ids.items()
        }
    try:
        template = environment.from_string(tokenizer.template or PLAIN_TEMPLATE)
        return template.render(messages=messages, add_generation_prompt=True, **words)
    except Exception as error:  # jinja's own, and whatever a template's expressions raise
        raise UsageError(f"chat template: {type(error).__name__}: {error}") from error


# --- tokenizer.json ------------------------------------------------------------------------


def from_directory(path) -> Tokenizer | None:
    """The tokenizer of a directory that holds a tokenizer.json; None where it holds none."""
    path = pathlib.Path(path)
    file = path / "tokenizer.json"
    if not file.is_file():
        return None
    tokenizers = _library("tokenizers")
    settings: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        settings |= _json(path / name)
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{file.stat().st_size} bytes")
        inner = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises Exception itself
        raise BadModelFile(path, "tokenizer.json", f"cannot be read: {error}") from error
    bos = _id(inner, settings.get("bos_token_id"), settings.get("bos_token"))
    ends = settings.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    # The one that templates call eos_token comes first.
    found = [_id(inner, None, settings.get("eos_token")), *(_id(inner, end, None) for end in ends)]
    stop = dict.fromkeys(end for end in found if end is not None)
    # What a post-processor puts in front, it puts there when special tokens are asked for.
    puts = inner.encode("a").ids[:1] == [bos]
    add = bos is not None and not puts and settings.get("add_bos_token", False) is True
    template = settings.get("chat_template")
    if (path / "chat_template.jinja").is_file():
        template = (path / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, list):
        named = {
            each.get("name"): each.get("template") for each in template if isinstance(each, dict)
        }
        template = named.get("default")
    return FileTokenizer(
        inner,
        bos=bos,
        stop=tuple(stop),
        template=template if isinstance(template, str) else None,
        adds_bos=add,
    )


def to_directory(tokenizer: Tokenizer, path) -> None:
    """Writes tokenizer.json and what goes with it into directory `path`; a byte tokenizer none."""
    if not isinstance(tokenizer, FileTokenizer):
        return
    path = pathlib.Path(path)
    (path / "tokenizer.json").write_text(tokenizer.inner.to_str(), encoding="utf-8")
    inner = tokenizer.inner
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if tokenizer.bos is not None:
        settings["bos_token"] = inner.id_to_token(tokenizer.bos)
    if tokenizer.adds_bos:
        settings["add_bos_token"] = True
    if tokenizer.stop:
        settings["eos_token"] = inner.id_to_token(tokenizer.stop[0])
    if tokenizer.template:
        settings["chat_template"] = tokenizer.template
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def _id(inner, number, token) -> int | None:
    if isinstance(token, dict):
        token = token.get("content")
    if isinstance(token, str):
        return inner.token_to_id(token)
    known = type(number) is int and inner.id_to_token(number) is not None
    return number if known else None


def _json(file: pathlib.Path) -> dict:
    try:
        found = json.loads(file.read_bytes()) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise BadModelFile(file.parent, file.name, f"cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


@functools.cache
def _library(name: str):
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"{name} is not installed: pip install ternax[models]") from error

"""Options behind a name, "int4,group_size=64", as flags and configs spell schemes and noises."""

import ast
import importlib
import inspect
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from ternax.errors import UsageError

T = TypeVar("T")


def named_class(kind: str, name: str, known: Mapping[str, type[T]], base: type[T]) -> type[T]:
    """The class called `name`: a key of `known`, or "package.module:Class".

    Raises:
      UsageError: neither, a module that cannot be imported, or no subclass of `base`.
    """
    if name in known:
        return known[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UsageError(
            f"{kind}: expected one of {', '.join(known)} or package.module:Class, found {name!r}"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the module raises when it runs
        raise UsageError(f"{kind}: cannot import {name!r}: {error}") from error
    if not (inspect.isclass(found) and issubclass(found, base)):
        public = f"{base.__module__.rpartition('.')[0]}.{base.__name__}"
        raise UsageError(f"{kind}: {name!r} must be a subclass of {public}, found {found!r}")
    return found


def parse_options(kind: str, spec: str, legal: Collection[str]) -> dict[str, Any]:
    """The options of "name,key=value,...": Python literals where they are some, else text.

    Args:
      kind: what is named, for the error: "scheme".
      legal: the keys there are.

    Raises:
      UsageError: a piece that is no key=value, or a key that is not legal.
    """
    name, *pairs = spec.split(",")
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or key not in legal:
            raise UsageError(
                f"{kind} {name!r}: expected key=value with key among "
                f"{', '.join(legal) or '(none)'}, found {pair!r}"
            )
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[key] = text
    return options

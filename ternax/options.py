"""Options behind a name, "int4,group_size=64", as flags and configs spell schemes and noises."""

import ast
from collections.abc import Collection
from typing import Any

from ternax.errors import UsageError


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

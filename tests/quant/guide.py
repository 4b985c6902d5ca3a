"""The code of docs/new_scheme.md, as a reader would copy it."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "new_scheme.md").read_text()


def blocks(kind: str) -> list[str]:
    """The fenced blocks whose opening line is ```kind, in order."""
    return re.findall(rf"^```{re.escape(kind)}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


(SCHEME_FILE,) = blocks("python my_scheme.py")

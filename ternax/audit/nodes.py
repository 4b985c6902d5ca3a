"""YAML that remembers where everything stands: line and column of each value.

What is not as expected raises BadModelFile with its place.
"""

import difflib
import pathlib
from collections.abc import Iterable, Iterator

import yaml

from ternax.errors import BadModelFile

# Lists and blocks in each other; a file of claims has five.
DEEPEST = 20
# (text, line, column), 1-based, of one value.
Leaf = tuple[str, int, int]


class Source:
    """A file that is read: composes YAML from a part of it and refuses with a place."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def refuse(self, line: int, column: int, why: str) -> BadModelFile:
        return BadModelFile(self.path, f"line {line}, column {column}", why)

    def compose(self, text: str, first_line: int) -> yaml.Node:
        try:
            self._refuse_tricks(text, first_line)
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            problem = getattr(error, "problem", None) or str(error)
            raise self.refuse(line + first_line, column, f"not YAML: {problem}") from error
        if node is None:
            raise self.refuse(1 + first_line, 1, "expected title, source and tables; found nothing")
        for mark in marks(node):
            mark.line += first_line
        return node

    def _refuse_tricks(self, text: str, first_line: int) -> None:
        """Anchors, which could refer to themselves or multiply, and nesting without end."""
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            place = event.start_mark.line + 1 + first_line, event.start_mark.column + 1
            if getattr(event, "anchor", None) is not None:
                why = f"no anchors or aliases: write {event.anchor!r} out, or under defaults"
                raise self.refuse(*place, why)
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise self.refuse(*place, f"lists and blocks more than {DEEPEST} deep")

    def mapping(self, node: yaml.Node, what: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Key -> (its node, the value's node)."""
        if not isinstance(node, yaml.MappingNode):
            line, column = place(node)
            raise self.refuse(line, column, f"{what}: expected `name: value` lines")
        found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            line, column = place(key)
            if not isinstance(key, yaml.ScalarNode):
                raise self.refuse(line, column, f"{what}: expected a name before the colon")
            if key.value in found:
                raise self.refuse(line, column, f"{what}: {key.value} is given twice")
            found[key.value] = (key, value)
        return found

    def leaf(self, node: yaml.Node, what: str) -> Leaf:
        line, column = place(node)
        if not isinstance(node, yaml.ScalarNode):
            raise self.refuse(line, column, f"{what}: expected one value, found a list or block")
        return node.value, line, column

    def leaves(self, node: yaml.Node, what: str) -> dict[str, Leaf]:
        return {
            name: self.leaf(value, f"{what}: {name}")
            for name, (_, value) in self.mapping(node, what).items()
        }

    def sequence(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            line, column = place(node)
            raise self.refuse(line, column, f"{what}: expected a list, one `- ` an entry")
        return node.value


def place(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def marks(node: yaml.Node) -> Iterator[yaml.Mark]:
    """Every start mark, once."""
    seen = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if id(node.start_mark) not in seen:
            seen.add(id(node.start_mark))
            yield node.start_mark
        if isinstance(node, yaml.MappingNode):
            stack += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            stack += node.value


def near(name: str, names: Iterable[str]) -> str:
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return f"nearest: {', '.join(close)}" if close else f"known: {', '.join(names)}"

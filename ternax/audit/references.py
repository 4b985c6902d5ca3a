"""How rows refer to each other: every name stands once, and no row waits for itself."""

import graphlib

from ternax.audit.arithmetic import references
from ternax.audit.fields import QUANTITIES
from ternax.audit.nodes import Leaf, Source, near


def check(source: Source, rows: list[dict[str, Leaf]]) -> None:
    """Refuses ids given twice, references to none, and circles, each with line and column."""
    named: dict[str, dict[str, Leaf]] = {}
    for row in rows:
        if "id" in row:
            name, line, column = row["id"]
            if name in named:
                first = named[name]["id"][1]
                raise source.refuse(line, column, f"id: {name!r} is that of line {first} already")
            named[name] = row
    graph: dict[str, list[str]] = {}
    for row in rows:
        text, line, column = row.get("of", ("", 0, 0))
        for name, field in references(text):
            if name not in named:
                close = near(name, named) if named else "no row has one"
                raise source.refuse(line, column, f"of: no row has the id {name!r}; {close}")
            if field not in QUANTITIES:
                close = near(field, QUANTITIES)
                raise source.refuse(line, column, f"of: no field is named {field!r}; {close}")
            if "id" in row:
                graph.setdefault(row["id"][0], []).append(name)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1][::-1]
        _, line, column = named[circle[0]]["of"]
        how = "itself" if len(circle) == 2 else f"itself: {' of '.join(circle)}"
        raise source.refuse(line, column, f"of: row {circle[0]!r} refers to {how}") from None

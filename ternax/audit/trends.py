"""Checks of a table as a whole: what falls as models grow, lines that are drawn on, identities."""

import dataclasses
from collections.abc import Iterator

from ternax.audit.claims import Claim, Table
from ternax.audit.findings import Finding
from ternax.audit.quantities import plain, words
from ternax.audit.subject import shape_of, tables_of

# A cosine as a function of the share p of noisy trits, for random matrices: y = W x with
# independent symmetric trits, two thirds of them not zero.
IDENTITIES = (
    ("1 - p: trits drawn anew", lambda p: 1 - p),
    ("1 - 1.5 p: trits changed for another", lambda p: max(0.0, 1 - 1.5 * p)),
    ("1 - 2 p: signs flipped", lambda p: 1 - 2 * p),
    ("(1 - p)^(1/2): trits set to zero", lambda p: max(0.0, 1 - p) ** 0.5),
)

Found = Iterator[tuple[Claim, Finding]]


# What a line over layers is drawn through, and its dimension; of a rate, its inverse.
HEIGHTS = {"latency": "seconds", "memory": "bytes", "tokens_per_s": "seconds"}
# A larger model in memory takes more than a smaller one when it has so many more parameters
# and the fall is so deep: caches of fewer heads and other workspaces explain what is less.
GROWN, FALLEN = 1.25, 0.9
# What must be alike for that.
ALIKE = ("devices", "batch", "context", "kv", "operands", "training")


def falling_memory(table: Table) -> Found:
    """A larger model of the same format, run alike, cannot take much less."""
    for field in ("memory", "size"):
        rows = [
            claim
            for claim in table.claims
            if field in claim.quantities and claim.model and "layers" not in claim.settings
        ]
        rows.sort(key=lambda claim: claim.model.parameters if claim.model else 0)
        for i, larger in enumerate(rows):
            for smaller in rows[:i]:
                assert larger.model and smaller.model
                one, two = smaller.quantities[field], larger.quantities[field]
                alike = (smaller.weights, smaller.tables, smaller.device) == (
                    larger.weights, larger.tables, larger.device
                )  # fmt: skip
                alike = alike and all(
                    smaller.settings.get(name) == larger.settings.get(name) for name in ALIKE
                )
                grown = larger.model.parameters > GROWN * smaller.model.parameters
                if alike and grown and two.high < FALLEN * one.low:
                    text = f"{two.text} for {larger.model.name} is less than {one.text} for "
                    text += f"{smaller.model.name}: not one way to measure"
                    yield larger, Finding("mislabelled", text)
                    break


def fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """(slope, intercept) of the least-squares line."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    return slope, mean_y - slope * mean_x


@dataclasses.dataclass(frozen=True)
class Line:
    """What rows of several depths measured, over their layers, and the claims drawn on from it.

    A rate's line is that of its inverse: the time of a token grows with the layers.
    """

    measured: list[Claim]
    further: list[Claim]
    slope: float
    intercept: float

    @classmethod
    def through(cls, table: Table, field: str) -> "Line | None":
        """None when fewer than two depths were measured."""
        having = [c for c in table.claims if "layers" in c.settings and field in c.quantities]
        measured = [c for c in having if c.settings.get("extrapolated") != "yes"]
        if len({c.count("layers") for c in measured}) < 2:
            return None
        points = [(float(c.count("layers")), _height(c, field)) for c in measured]
        return cls(measured, [c for c in having if c not in measured], *fit(points))

    def at(self, layers: int) -> float:
        return self.intercept + self.slope * layers


def _height(claim: Claim, field: str) -> float:
    nominal = claim.quantities[field].nominal
    return 1 / nominal if field == "tokens_per_s" else nominal


def slope_of_memory(table: Table) -> Found:
    """What each further layer takes, against a layer of the model that is named."""
    line = Line.through(table, "memory")
    for claim in line.measured if line else []:
        shape = shape_of(claim)
        if line is None or shape is None or claim.weights is None:
            continue
        layer = sum(claim.weights.nbytes(k, n) for _, k, n in shape.matrices)
        whole = claim.model.shape if claim.model else None
        said = f"{words(line.slope, 'bytes')} a layer; one of {whole and whole.name} in "
        said += f"{claim.weights.name} has "
        said += words(layer, "bytes")
        if line.slope < 0.9 * layer and whole:
            text = f"{said}, not so little: other layers were measured"
            if line.slope > 0:
                count = whole.num_layers * 8 * line.slope / claim.weights.bits_per_weight
                text = f"{said}, {plain(layer / line.slope)} times more: other layers were "
                text += f"measured, {whole.num_layers} of which have {words(count, 'number')} "
                text += "parameters"
            yield claim, Finding("impossible", text)
        else:
            yield claim, Finding("possible", said)


def lone_depth(table: Table) -> Found:
    """A claim drawn on from one depth: nothing says where the line goes."""
    depths = {
        claim.settings["layers"]
        for claim in table.claims
        if claim.settings.get("extrapolated") != "yes" and "layers" in claim.settings
    }
    for claim in table.claims:
        if claim.settings.get("extrapolated") == "yes" and len(depths) < 2:
            text = f"{len(depths)} other depth in this table: a line needs two rows with layers"
            yield claim, Finding("unverifiable", text)


def extrapolation(table: Table) -> Found:
    """A line over layers, drawn on: whether it gives what is claimed, and what it leaves out."""
    for field, dimension in HEIGHTS.items():
        line = Line.through(table, field)
        for claim in line.further if line else []:
            assert line is not None
            layers, claimed = claim.count("layers"), claim.quantities[field]
            value = line.at(layers)
            said = f"{len(line.measured)} rows give {words(line.slope, dimension)} a layer and "
            said += f"{words(line.intercept, dimension)} beside; {layers} layers: "
            said += words(value, dimension)
            if value <= 0:
                yield claim, Finding("mislabelled", f"{said}: no line to draw on")
                continue
            if field == "tokens_per_s":
                value = 1 / value
                said += f" a token, {words(value, 'tokens/s')}"
            shape = claim.model.shape if claim.model else None
            if not 0.9 * claimed.low <= value <= 1.1 * claimed.high:
                text = f"{said}, claimed {claimed.text}: not from these rows"
                yield claim, Finding("mislabelled", text)
            elif shape is None or claim.weights is None:
                yield claim, Finding("possible", said)
            else:
                head = shape.table_bytes(tables_of(claim))
                part = head / (head + shape.projection_bytes(claim.weights))
                text = f"{said}, as claimed; a line over layers leaves out the head, "
                text += f"{words(head, 'bytes')} or {100 * part:.0f} % of a step's reads, and the "
                text += "cache: it is of the layers alone"
                yield claim, Finding("mislabelled", text)


def similarity(table: Table) -> Found:
    """Similarities that random matrices have, whatever the model."""
    rows = [c for c in table.claims if {"similarity", "noise"} <= c.quantities.keys()]
    noisy = [c for c in rows if c.quantities["noise"].nominal > 0]
    for claim in rows:
        if claim.quantities["similarity"].low > 1:
            yield claim, Finding("impossible", "a cosine is at most 100 %")
        if claim.quantities["noise"].low > 1:
            yield claim, Finding("impossible", "a share of the weights is at most 100 %")
        if claim not in noisy:
            text = "without noise nothing changes: 100 %"
            whole = claim.quantities["similarity"].meets(1.0)
            yield claim, Finding("possible" if whole else "impossible", text)
    for name, law in IDENTITIES:
        hits = [
            c
            for c in noisy
            if abs(c.quantities["similarity"].nominal - law(c.quantities["noise"].nominal)) < 0.005
        ]
        if len(hits) >= 2 and 2 * len(hits) > len(noisy):
            for claim in hits:
                value = law(claim.quantities["noise"].nominal)
                text = f"{name} = {100 * value:.1f} %, an identity of random matrices: it says "
                text += "nothing of this model, its depth or its size"
                yield claim, Finding("mislabelled", text, "products of independent trits")
            noisy = [claim for claim in noisy if claim not in hits]
            break
    for claim in noisy:
        said, share = claim.quantities["similarity"], claim.quantities["noise"].nominal
        met = [name for name, law in IDENTITIES if said.meets(law(share))]
        text = "no closed form gives it: needs the model and text"
        if met:
            text = f"{met[0]} gives it too: a second row with another noise would tell"
        yield claim, Finding("unverifiable", text)


# Each with the fields of a row that it judges.
CHECKS = (
    (falling_memory, ("memory", "size")),
    (slope_of_memory, ("memory",)),
    (lone_depth, HEIGHTS),
    (extrapolation, HEIGHTS),
    (similarity, ("similarity", "noise")),
)

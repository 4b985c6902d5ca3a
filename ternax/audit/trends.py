"""Checks of a table as a whole: what falls as models grow, lines that are drawn on, identities."""

from collections.abc import Iterator

from ternax.audit.claims import Claim, Table
from ternax.audit.findings import Finding
from ternax.audit.quantities import plain, words
from ternax.audit.subject import shape_of, tables_of, whose
from ternax.formats import FORMATS

# A cosine as a function of the share p of noisy trits, for random matrices: y = W x with
# independent symmetric trits, two thirds of them not zero.
IDENTITIES = (
    ("1 - p: trits drawn anew", lambda p: 1 - p),
    ("1 - 2 p: signs flipped", lambda p: 1 - 2 * p),
    ("(1 - p)^(1/2): trits set to zero", lambda p: max(0.0, 1 - p) ** 0.5),
)

Found = Iterator[tuple[Claim, Finding]]


def falling_memory(table: Table) -> Found:
    """A larger model of the same format cannot take less."""
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
                alike = smaller.weights == larger.weights and smaller.device == larger.device
                grown = larger.model.parameters > 1.05 * smaller.model.parameters
                if alike and grown and two.high < one.low:
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


def _line(table: Table, field: str):
    """Measured rows with layers, the claims drawn on from them, and the line through them."""
    having = [c for c in table.claims if "layers" in c.settings and field in c.quantities]
    measured = [c for c in having if c.settings.get("extrapolated") != "yes"]
    further = [c for c in having if c.settings.get("extrapolated") == "yes"]
    layers = {c.count("layers") for c in measured}
    if len(layers) < 2:
        return [], [], (0.0, 0.0)
    points = [(float(c.count("layers")), c.quantities[field].nominal) for c in measured]
    return measured, further, fit(points)


def slope_of_memory(table: Table) -> Found:
    """What each further layer takes, against a layer of the model that is named."""
    measured, _, (slope, _) = _line(table, "memory")
    for claim in measured:
        shape = shape_of(claim)
        if shape is None or claim.weights is None:
            continue
        layer = sum(claim.weights.nbytes(k, n) for _, k, n in shape.matrices)
        said = f"{words(slope, 'bytes')} a layer; a layer of {whose(claim)} has "
        said += words(layer, "bytes")
        if slope < 0.9 * layer:
            text = f"{said}, {plain(layer / slope)} times more: other layers were measured"
            yield claim, Finding("impossible", text)
        else:
            yield claim, Finding("possible", said)


def extrapolation(table: Table) -> Found:
    """A line over layers, drawn on: whether it gives what is claimed, and what it leaves out."""
    for claim in table.claims:
        if claim.settings.get("extrapolated") == "yes":
            depths = {
                c.settings.get("layers")
                for c in table.claims
                if c.settings.get("extrapolated") != "yes" and "layers" in c.settings
            }
            if len(depths) < 2:
                text = f"{len(depths)} other depth in this table: a line needs two rows with layers"
                yield claim, Finding("unverifiable", text)
    for field, dimension in (("latency", "seconds"), ("memory", "bytes")):
        measured, further, (slope, intercept) = _line(table, field)
        for claim in further:
            layers, claimed = claim.count("layers"), claim.quantities[field]
            value = intercept + slope * layers
            said = f"{len(measured)} rows give {words(slope, dimension)} a layer and "
            said += f"{words(intercept, dimension)} beside; {layers} layers: "
            said += words(value, dimension)
            shape = claim.model.shape if claim.model else None
            if not 0.9 * claimed.low <= value <= 1.1 * claimed.high:
                text = f"{said}, claimed {claimed.text}: not from these rows"
                yield claim, Finding("mislabelled", text)
            elif shape is None or claim.weights is None:
                yield claim, Finding("possible", said)
            else:
                stored = claim.weights if claim.weights else FORMATS["fp16"]
                head = shape.table_bytes(tables_of(claim))
                part = head / (head + shape.projection_bytes(stored))
                text = f"{said}, as claimed; a line over layers leaves out the head, "
                text += f"{words(head, 'bytes')} or {100 * part:.0f} % of a step's reads, and the "
                text += "cache: it is the time of the layers alone"
                yield claim, Finding("mislabelled", text)


def similarity(table: Table) -> Found:
    """Similarities that random matrices have, whatever the model."""
    rows = [c for c in table.claims if {"similarity", "noise"} <= c.quantities.keys()]
    noisy = [c for c in rows if c.quantities["noise"].nominal > 0]
    for claim in rows:
        if claim.quantities["similarity"].low > 1:
            yield claim, Finding("impossible", "a cosine is at most 100 %")
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


CHECKS = (falling_memory, slope_of_memory, extrapolation, similarity)

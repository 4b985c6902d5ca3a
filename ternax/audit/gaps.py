"""What a row states that no check judged, and what judging it would need."""

from collections.abc import Callable, Iterator

from ternax.audit.claims import Claim
from ternax.audit.fields import QUANTITIES, SETTINGS_NEED
from ternax.audit.findings import Finding
from ternax.audit.subject import peak_of

# Settings that are claims themselves.
CLAIMS = (*SETTINGS_NEED, "released")


def unjudged(
    claim: Claim, judge: Callable[[Claim], list[Finding]], touched: set[str]
) -> Iterator[Finding]:
    """One finding that names every quantity and claim of a row that nothing was said about.

    judge: the findings of a row by itself; what they would be without a quantity tells whether
    it took part in any. touched: fields that a check of the whole table judged. What goes into
    another quantity that is judged is no claim of its own: a rate beside a price, say.
    """
    stated = {name: QUANTITIES[name].needs for name in claim.quantities}
    stated |= {name: SETTINGS_NEED.get(name, ()) for name in CLAIMS if name in claim.settings}
    lacks = {
        name: gone
        for name, needs in stated.items()
        if (gone := [n for n in needs if not _has(claim, n)])
    }
    used = {
        word
        for name, needs in stated.items()
        if name not in lacks
        for need in needs
        for word in need.split(" or ")
    }
    whole = judge(claim)
    said = [f"{name} needs {', '.join(gone)}" for name, gone in lacks.items() if name not in used]
    said += [
        f"{name}: {_why(claim, name)}"
        for name in stated
        if name not in lacks and name not in touched and judge(claim.without(name)) == whole
    ]
    if said:
        yield Finding("unverifiable", f"too little to judge: {'; '.join(said)}")
    elif not stated:
        yield Finding("unverifiable", "it states no quantity")


def _has(claim: Claim, need: str) -> bool:
    return any(n in claim.settings or n in claim.quantities for n in need.split(" or "))


def _why(claim: Claim, name: str) -> str:
    """What is missing for a quantity that has all the fields it needs."""
    device, phase = claim.device, claim.settings.get("phase")
    needs = QUANTITIES[name].needs if name in QUANTITIES else SETTINGS_NEED.get(name, ())
    if claim.model is not None and claim.model.shape is None and "model" in needs:
        return "a shape of the model is needed, not a count of parameters alone"
    if device is not None and "device" in needs:
        if name == "power":
            return f"no board power of {device.title} is known: watts is needed"
        if name == "price":
            return f"no price of {device.title} is known"
        if peak_of(claim, device) is None:
            return f"no {claim.settings['operands']} peak of {device.title} is known"
    if claim.settings.get("batch") == "best":
        return "batch as a number is needed"
    if phase is not None:
        return f"no check judges it with phase {phase}"
    return "no check judges it in such a row"

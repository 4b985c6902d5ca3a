"""Settings drawn from all that the page offers, as Python's and as the page's; comparison."""

import dataclasses
import math
import random

from ternax import page
from ternax.anatomy import Shape
from ternax.configs.hardware import DEVICES
from ternax.formats import FORMATS
from ternax.prediction import Setting, predict


def draw(count: int, seed: int = 0) -> list[dict]:
    """`count` settings as law.js takes them."""
    chance = random.Random(seed)
    drawn = []
    for _ in range(count):
        device = chance.choice(list(DEVICES))
        alone = DEVICES[device].fastest_link is None
        drawn.append(
            {
                "model": chance.choice(list(page.MODELS)),
                "weights": chance.choice(list(FORMATS)),
                "tables": chance.choice(page.CHOICES["tables"]),
                "kv": chance.choice(page.CHOICES["kv"]),
                "device": device,
                "devices": 1 if alone else chance.choice(page.CHOICES["devices"]),
                "batch": round(2 ** chance.uniform(0, 12)),
                "context": round(2 ** chance.uniform(0, 17)),
                "efficiency": chance.choice([1, 0.8, 0.5, round(chance.uniform(0.05, 1), 2)]),
            }
        )
    return drawn


def python_says(drawn: dict) -> dict:
    """The prediction of one such setting."""
    named = {
        "shape": Shape.of(page.MODELS[drawn["model"]]),
        "device": DEVICES[drawn["device"]],
    }
    rest = {name: value for name, value in drawn.items() if name not in ("model", "device")}
    return dataclasses.asdict(predict(Setting(**named, **rest)))


def differences(python: dict, page_says: dict) -> list[str]:
    """What differs by more than 1e-6 of itself; JSON has null for infinity."""
    found = (
        [f"fields {python.keys() ^ page_says.keys()}"] if python.keys() != page_says.keys() else []
    )
    for name in python.keys() & page_says.keys():
        ours, theirs = python[name], page_says[name]
        if isinstance(ours, float) and math.isinf(ours):
            ours = None
        same = (
            math.isclose(ours, theirs, rel_tol=1e-6, abs_tol=0)
            if type(ours) in (int, float) and type(theirs) in (int, float)
            else ours == theirs
        )
        # Past the critical point one of two nearly equal times is taken from the other.
        if name == "compute_s" and not same:
            same = abs(ours - theirs) <= 1e-9 * python["total_s"]
        if not same:
            found.append(f"{name}: {ours} {theirs}")
    return found

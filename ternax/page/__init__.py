"""The roofline page: one HTML file that needs no network, with the law in it as JavaScript.

`build` joins the parts beside this module (page.html, page.css, law.js, charts.js, page.js)
and the tables that Python computes with, so that the page and the experiments tell the same.
"""

import dataclasses
import json
import pathlib

from ternax import __version__
from ternax.anatomy import Shape
from ternax.configs import CONFIGS
from ternax.configs.hardware import DEVICES, WIDER, Device
from ternax.errors import UsageError
from ternax.formats import FORMATS

HERE = pathlib.Path(__file__).resolve().parent
# Models for tests decode faster than any device can be fed: nothing to learn from them.
MODELS = {
    name: config for name, config in CONFIGS.items() if not name.startswith(("tiny-", "stdlib-"))
}
# What the controls offer.
CHOICES: dict[str, tuple] = {
    "model": tuple(MODELS),
    "weights": tuple(FORMATS),
    "tables": ("fp16", "int8", "q6_k", "q4_0"),
    "kv": ("fp16", "int8", "fp8"),
    "device": tuple(DEVICES),
    "devices": (1, 2, 4, 8),
}
RANGES = {"batch": (1, 4096), "context": (1, 131072), "efficiency": (0.05, 1)}
START = {
    "model": "70b",
    "weights": "trit2",
    "tables": "fp16",
    "kv": "fp16",
    "device": "h100-sxm",
    "devices": 1,
    "batch": 1,
    "context": 2048,
    "efficiency": 1,
}


def tables() -> dict:
    """Models, devices and formats as plain values: all that law.js is given."""
    return {
        "models": {name: _model(name) for name in MODELS},
        "devices": {name: _device(device) for name, device in DEVICES.items()},
        "formats": {
            name: dataclasses.asdict(format) | {"bits_per_weight": format.bits_per_weight}
            for name, format in FORMATS.items()
        },
        "wider": WIDER,
    }


def _model(name: str) -> dict:
    config, shape = MODELS[name], Shape.of(MODELS[name])
    extra = {"parameters": shape.parameters, "max_context": config.max_context}
    return dataclasses.asdict(shape) | extra


def _device(device: Device) -> dict:
    link = device.fastest_link
    return dataclasses.asdict(device) | {
        "memory_bytes_at_most": device.memory_bytes_at_most,
        "link_gb_per_s": link.gb_per_s if link else None,
        "link": link.name if link else None,
        "link_joins": link.joins if link else None,
    }


def part(name: str) -> str:
    """The text of a file beside this module."""
    return (HERE / name).read_text(encoding="utf-8")


def build(**start) -> str:
    """The page's text.

    start: what its controls show first, fields of START. UsageError for what they do not offer.
    """
    for name, value in start.items():
        _check(name, value)
    data = {"tables": tables(), "start": START | start, "choices": CHOICES, "ranges": RANGES}
    made = f"Made by ternax {__version__} from its own tables of models, devices and formats"
    filled = {"data": json.dumps(data, separators=(",", ":")).replace("</", "<\\/"), "made": made}
    filled |= {"keys": ", ".join(START)}
    names = ("page.css", "law.js", "charts.js", "page.js")
    filled |= {name: part(name).rstrip("\n") for name in names}
    text = part("page.html")
    for name, content in filled.items():
        text = text.replace("{{" + name + "}}", content)
    return text


def _check(name: str, value) -> None:
    if name in CHOICES and value not in CHOICES[name]:
        known = ", ".join(map(str, CHOICES[name]))
        raise UsageError(f"the page's {name} must be one of {known}; found {value}")
    low, high = RANGES.get(name, (value, value))
    if not low <= value <= high:
        raise UsageError(f"the page's {name} goes from {low} to {high}, found {value}")

"""The roofline page: one HTML file that needs no network, with the law in it as JavaScript.

`build` joins the parts beside this module (page.html, page.css, law.js, charts.js, page.js)
and the tables that Python computes with, so that the page and the experiments tell the same.
"""

import dataclasses
import json
import pathlib

from ternax.anatomy import Shape
from ternax.configs import CONFIGS
from ternax.configs.hardware import DEVICES, WIDER, Device
from ternax.formats import FORMATS

HERE = pathlib.Path(__file__).resolve().parent
# Models for tests decode faster than any device can be fed: nothing to learn from them.
MODELS = {
    name: config for name, config in CONFIGS.items() if not name.startswith(("tiny-", "stdlib-"))
}
TABLE_FORMATS = ("fp16", "int8", "q6_k", "q4_0")
KV_FORMATS = ("fp16", "int8", "fp8")


def tables() -> dict:
    """Models, devices and formats as plain values: all that law.js is given."""
    return {
        "models": {name: _model(name) for name in MODELS},
        "devices": {name: _device(device) for name, device in DEVICES.items()},
        "formats": {
            name: dataclasses.asdict(format) | {"bits_per_weight": format.bits_per_weight}
            for name, format in FORMATS.items()
        },
        "table_formats": TABLE_FORMATS,
        "kv_formats": KV_FORMATS,
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
    }


def part(name: str) -> str:
    """The text of a file beside this module."""
    return (HERE / name).read_text(encoding="utf-8")

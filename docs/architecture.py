"""Draws architecture.svg: the layers of the house, and the way data goes through them.

    python docs/architecture.py

The layers are those that tests/structure_test.py holds every import to. Colours follow the
layer, in the flow too, and stand on white as on black: what lies outside a box is mid-grey.
"""

import colorsys
import html
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.structure_test import LAYERS, RANK  # noqa: E402

TARGET = ROOT / "docs" / "architecture.svg"
GREY = "#7d8590"
CHAR_PX, ROW_PX, BOX_PX, GAP_PX = 6.7, 26, 20, 6
HOUSE_PX, FLOW_X, FLOW_PX = 480, 540, 470

# The flow, from the top: rows of boxes side by side. (entry of LAYERS, what it does)
FLOW = (
    (("ternax.configs", "a name becomes a ModelConfig"),),
    (("ternax.models", "abstract Decoder: shapes alone"), ("ternax.cost", "plan: bytes, bound")),
    (
        ("ternax.random_weights", "random codes"),
        ("ternax.checkpoint", "saved leaves"),
        ("ternax.interop", "GGUF and HF"),
        ("ternax.train", "floats"),
    ),
    (("ternax.quant", "floats alone: a scheme makes codes and scales of them"),),
    (("ternax.edit", "Packed: 2 bits a weight, fused"), ("ternax.injection", "noise, in place")),
    (("ternax.nn", "Decoder of PackedLinear, PackedTable"),),
    (("ternax.engine", "prefill, decode on the device"), ("ternax.evaluate", "losses of a text")),
    (("ternax.kernels", "exact integer products, attention"),),
    (("ternax.decoding", "samples, beside a bound"), ("ternax.noise_study", "draws, strengths")),
    (("ternax.record", "Record: results.jsonl, then tables and plots"),),
)


def colour(entry: str) -> str:
    """Blue at the ground, over violet, to red at the roof; dark enough for white text."""
    hue = 0.55 + 0.45 * RANK[entry] / (len(LAYERS) - 1)
    red, green, blue = colorsys.hls_to_rgb(hue, 0.40, 0.50)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def short(entry: str) -> str:
    return entry.removeprefix("ternax.")


def text(x: float, y: float, words: str, fill: str, *, size=11, weight="normal", anchor="start"):
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" fill="{fill}" font-size="{size}" '
        f'font-weight="{weight}" text-anchor="{anchor}">{html.escape(words)}</text>'
    )


def box(x: float, y: float, width: float, height: float, entry: str) -> str:
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height}" rx="4" '
        f'fill="{colour(entry)}"/>'
    )


def lines_of(entries) -> list[list[str]]:
    """A layer's entries in lines that fit the house."""
    lines: list[list[str]] = [[]]
    used = 0.0
    for entry in entries:
        width = len(short(entry)) * CHAR_PX + 12 + GAP_PX
        if used + width > HOUSE_PX and lines[-1]:
            lines.append([])
            used = 0.0
        lines[-1].append(entry)
        used += width
    return lines


def house(top: float) -> tuple[list[str], float]:
    """The layers, the roof first, and where they end."""
    shapes, y = [], top
    for entries in reversed(LAYERS):
        for line in lines_of(entries):
            x = 10.0
            for entry in line:
                width = len(short(entry)) * CHAR_PX + 12
                shapes += [box(x, y, width, BOX_PX, entry)]
                shapes += [text(x + 6, y + 14, short(entry), "#fff")]
                x += width + GAP_PX
            y += ROW_PX
    return shapes, y


def flow(top: float, bottom: float) -> list[str]:
    """The way data goes, spread over the same height."""
    shapes, pitch, height = [], (bottom - top) / len(FLOW), 42
    for place, boxes in enumerate(FLOW):
        y = top + place * pitch
        width = (FLOW_PX - GAP_PX * (len(boxes) - 1)) / len(boxes)
        for column, (entry, words) in enumerate(boxes):
            x = FLOW_X + column * (width + GAP_PX)
            shapes += [
                box(x, y, width, height, entry),
                text(x + width / 2, y + 17, short(entry), "#fff", weight="bold", anchor="middle"),
                text(x + width / 2, y + 33, words, "#fff", anchor="middle"),
            ]
        if place < len(FLOW) - 1:
            x, start, end = FLOW_X + FLOW_PX / 2, y + height + 4, y + pitch - 4
            shapes.append(
                f'<path d="M{x:.0f} {start:.0f}V{end:.0f}m-4 -5l4 5l4 -5" fill="none" '
                f'stroke="{GREY}" stroke-width="1.5"/>'
            )
    return shapes


def picture() -> str:
    """The whole SVG."""
    top = 40.0
    layers, bottom = house(top)
    heads = [
        text(10, 22, "The house: each imports only from below", GREY, size=14, weight="bold"),
        text(FLOW_X, 22, "The way data goes", GREY, size=14, weight="bold"),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1020 {bottom:.0f}" '
            'font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace">',
            "<title>ternax: layers and the way data goes</title>",
            *heads,
            *layers,
            *flow(top, bottom - 6),
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    TARGET.write_text(picture())
    print(TARGET)

"""What a claim is about, as the law wants it: a load, a peak, a memory.

Whatever a claim leaves open is filled in its favour, and named among the assumptions.
"""

import dataclasses

from ternax.anatomy import Shape
from ternax.audit.claims import Claim
from ternax.audit.quantities import words
from ternax.configs.hardware import Device
from ternax.formats import FORMATS, Format
from ternax.roofline import Load

TERNARY = ("trit2", "i2_s", "tl2", "tq1_0", "tq2_0", "base3", "sherry")
# Operands below 8 bits need weights and activations made for them.
NARROW = ("int4", "fp4")
# Share of the bandwidth bound that ordinary programs reach (`experiments.validate`).
ORDINARY = 0.5


def shape_of(claim: Claim) -> Shape | None:
    """The model's shape; when fewer layers ran, those alone, without the tables."""
    shape = claim.model.shape if claim.model else None
    if shape is not None and claim.count("layers", shape.num_layers) < shape.num_layers:
        shape = dataclasses.replace(shape, num_layers=claim.count("layers"), vocab_size=0)
    return shape


def tables_of(claim: Claim) -> Format:
    """Embedding and head: as stated; else 16 bits beside ternary weights, as all released
    checkpoints have them, and the weights' own format otherwise."""
    if claim.tables is not None:
        return claim.tables
    assert claim.weights is not None
    return FORMATS["fp16"] if claim.weights.name in TERNARY else claim.weights


def load_of(claim: Claim) -> Load | None:
    """What a step reads and computes; of a bare parameter count, its weights alone.

    None for some layers of a bare count: nothing says how much of it they are.
    """
    if claim.model is None or claim.weights is None:
        return None
    shape = shape_of(claim)
    if shape is not None:
        table = tables_of(claim).name
        return shape.load(
            claim.weights.name, embedding=table, head=table, kv=claim.settings.get("kv", "fp16")
        )
    if "layers" in claim.settings:
        return None
    count = claim.model.active or claim.model.parameters
    nbytes = claim.weights.bits_per_weight / 8
    return Load(
        projection_bytes=count * nbytes,
        head_bytes=0.0,
        # Experts that no token chose are there and not read, as an embedding's other rows.
        embedding_bytes=(claim.model.parameters - count) * nbytes,
        embedding_row_bytes=0.0,
        kv_bytes_per_token=0.0,
        activation_bytes=0.0,
        projection_macs=count,
        head_macs=0.0,
        attention_macs_per_token=0.0,
        all_reduces=0,
        all_reduce_bytes=0.0,
        launches=0,
    )


def peak_of(claim: Claim, device: Device, default: str | None = None) -> tuple[float, str] | None:
    """(TFLOP/s, type): of the stated operands, else the fastest type that could serve.

    default: the type to take when none is stated. None when the device lacks a stated one.
    """
    peaks = device.peak_tflops
    operands = claim.settings.get("operands", default)
    if operands is not None:
        return (peaks[operands], operands) if operands in peaks else None
    own = claim.weights.operands if claim.weights else "int8"
    legal = [name for name in peaks if name not in NARROW or name == own]
    best = max(legal, key=lambda name: (peaks[name], name == own))
    return peaks[best], best


def whose(claim: Claim) -> str:
    """The model's name for a sentence: "70b in trit2 with tables in fp16"."""
    assert claim.model is not None and claim.weights is not None
    name, shape = f"{claim.model.name} in {claim.weights.name}", shape_of(claim)
    if claim.model.active is not None:
        active, whole = (words(n, "number") for n in (claim.model.active, claim.model.parameters))
        return f"{name} ({active} of {whole} parameters active)"
    if shape is None:
        return name
    if shape.vocab_size == 0:
        return f"{shape.num_layers} layers of {name}"
    return f"{name} with tables in {tables_of(claim).name}"


def readings(shape: Shape) -> list[tuple[str, Shape]]:
    """Other ways to count a model that documents are known to use."""
    out = []
    for kv, heads in (("as many kv heads as heads", shape.num_heads), ("", shape.num_kv_heads)):
        for mlp, matrices in (("an MLP without its gate", 2), ("", shape.mlp_matrices)):
            for tables, rows in (("no embedding and no head", 0), ("", shape.vocab_size)):
                changed = [change for change in (kv, mlp, tables) if change]
                other = dataclasses.replace(
                    shape, num_kv_heads=heads, mlp_matrices=matrices, vocab_size=rows
                )
                if changed and other.parameters != shape.parameters:
                    out.append((f"{shape.name} with {', '.join(changed)}", other))
    # The fewest changes first: the simplest slip is the likeliest.
    return sorted(out, key=lambda pair: pair[0].count(","))

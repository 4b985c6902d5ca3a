"""Checks of counts and bytes: parameters, sizes of files and memory, caches, what fits."""

import dataclasses
import math
from collections.abc import Iterator

from ternax.audit.claims import Claim
from ternax.audit.findings import Finding, at_least, equals, nearest
from ternax.audit.quantities import Quantity, plain, words
from ternax.audit.subject import load_of, peak_of, readings, shape_of, tables_of, whose
from ternax.configs.hardware import Device
from ternax.formats import FORMATS, TRIT_ENTROPY_BITS, Format, get_format
from ternax.roofline import decode_step, resident_bytes

# Bytes a parameter of a method of training: AdamW in mixed precision keeps 2 for weights, 2
# for gradients, 4 for a master copy, 8 for moments (arXiv:1910.02054); LoRA keeps the weights.
# Parameters of embedding and head of a model of which only a count is known: at most a third
# of it, and 262,144 rows of 8,192; and what other formats mixed in may add to its file.
MOST_TABLES = 2 * 262_144 * 8_192
MIXED = 1.1
TRAINING_BYTES = {"full": 16.0, "lora": 2.0, "qlora": 4.5 / 8}


def parameters(claim: Claim) -> Iterator[Finding]:
    """A parameter count against the shape's; other ways to count it make it mislabelled."""
    claimed, shape = claim.quantities.get("parameters"), shape_of(claim)
    if claimed is None or shape is None:
        return
    instead = [(float(other.parameters), name) for name, other in readings(shape)]
    how = (
        f"parameters of {shape.name}: {shape.num_layers} x {shape.layer_projection_parameters:,} "
        f"+ tables and norms"
    )
    # Names of models are cut as often as rounded: 32.76e9 is called 32B.
    cut = dataclasses.replace(claimed, high=2 * claimed.high - claimed.nominal)
    yield equals(cut, float(shape.parameters), how, instead=instead)


def _whole(shape, weights: Format, table: Format) -> float:
    load = shape.load(weights.name, embedding=table.name, head=table.name)
    return load.weight_bytes


def _instead(claim: Claim, claimed: Quantity) -> list[tuple[float, str]]:
    """Bytes of other readings: the projections alone and other counts; failing those, formats."""
    shape, weights = shape_of(claim), claim.weights
    assert shape is not None and weights is not None
    if shape.vocab_size == 0:
        return []
    counts = [(shape.projection_bytes(weights), "that of the projections alone")]
    counts += [
        (_whole(other, weights, tables_of(claim)), f"that of {name}")
        for name, other in readings(shape)
    ]
    if nearest(claimed, counts):
        return counts
    return [(_whole(shape, other, other), f"that of {name}") for name, other in FORMATS.items()]


def stored(claim: Claim) -> Iterator[Finding]:
    """`size`: a model's bytes must match its count; `memory`: it cannot be less."""
    weights, shape = claim.weights, shape_of(claim)
    size, memory = claim.quantities.get("size"), claim.quantities.get("memory")
    if weights is None or claim.model is None or (size is None and memory is None):
        return
    if shape is None:
        if "layers" in claim.settings:
            return
        floor = claim.model.parameters * weights.bits_per_weight / 8
        how = (
            f"{words(claim.model.parameters, 'number')} x {plain(weights.bits_per_weight)} bits / 8"
        )
        alike = "the tables are stored like the rest"
        if memory is not None:
            yield at_least(memory, floor, how, alike)
        if size is not None:
            count = claim.model.parameters
            tables = min(count / 3, MOST_TABLES)
            wider = max(0.0, 32 - weights.bits_per_weight) / 8 * tables
            formats = [
                (count * f.bits_per_weight / 8, f"that of {f.name}") for f in FORMATS.values()
            ]
            found = at_least(size, floor, how, alike)
            if found.verdict == "impossible" or size.low > MIXED * (floor + wider):
                assumes = f"tables up to fp32, {100 * (MIXED - 1):.0f} % for what is mixed in"
                most = MIXED * (floor + wider)
                found = equals(size, floor, how, high=most, instead=formats, assumes=assumes)
            yield found
        return
    if size is not None:
        given = [claim.tables] if claim.tables else [weights, FORMATS["fp16"], FORMATS["fp32"]]
        both = [_whole(shape, weights, table) for table in given]
        yield equals(
            size,
            0.99 * min(both),  # ggml and safetensors keep some tensors in other types
            f"{whose(claim)}: {words(shape.projection_parameters, 'number')} x "
            f"{plain(weights.bits_per_weight)} bits / 8 + tables",
            high=1.01 * max(both),
            instead=_instead(claim, size),
            assumes="" if claim.tables else f"tables anywhere from {weights.name} to fp32",
        )
    if memory is not None:
        table = min((weights, tables_of(claim)), key=lambda f: f.bits_per_weight)
        floor = _whole(shape, weights, table)
        part = f"{shape.num_layers} layers of {shape.name}" if not shape.vocab_size else shape.name
        found = at_least(memory, floor, f"{part} with all weights in {weights.name}")
        if found.verdict == "impossible":
            if other := nearest(memory, _instead(claim, memory)):
                found = Finding("mislabelled", f"{found.text}; it is {other}")
        yield found


def cache(claim: Claim) -> Iterator[Finding]:
    claimed, shape = claim.quantities.get("cache"), shape_of(claim)
    if claimed is None or shape is None or "context" not in claim.settings:
        return
    kv = claim.settings.get("kv", "fp16")
    tokens = claim.count("context") * claim.count("batch")
    one = shape.kv_bytes_per_token(kv)
    how = f"2 x {shape.num_layers} layers x {shape.num_kv_heads} x {shape.head_dim} in {kv}"
    yield equals(
        claimed,
        one * tokens,
        f"{how} = {words(one, 'bytes')} a token, x {tokens:,}",
        instead=[
            (one / 2 * tokens, f"that of {plain(get_format(kv).code_bits / 2)} bits, not {kv}")
        ],
    )


def tables_share(claim: Claim) -> Iterator[Finding]:
    """How much of what is stored embedding and head are."""
    claimed, shape = claim.quantities.get("tables_share"), shape_of(claim)
    if claimed is None or shape is None or claim.weights is None or not shape.vocab_size:
        return
    table = tables_of(claim)
    part = (1 if shape.tie_embeddings else 2) * shape.table_bytes(table)
    whole = _whole(shape, claim.weights, table)
    yield equals(
        claimed, part / whole, f"{words(part, 'bytes')} of tables / {words(whole, 'bytes')} in all"
    )


def bits(claim: Claim) -> Iterator[Finding]:
    """Stored bits a weight, or the entropy of a trit, which no byte-aligned format reaches."""
    claimed, weights = claim.quantities.get("bits"), claim.weights
    if claimed is None or weights is None:
        return
    instead = [(TRIT_ENTROPY_BITS, "log2(3), the information in a trit, which nothing stores")]
    instead += [(weights.code_bits, "that of the codes without their scales")]
    how = f"stored bits of a weight in {weights.name} ({weights.source})"
    found = weights.bits_per_weight
    shape = shape_of(claim)
    if shape is None:
        yield equals(claimed, found, how, instead=instead)
        return
    # With a model, bits of the whole file: tables may be stored otherwise.
    given = [claim.tables] if claim.tables else [weights, FORMATS["q6_k"], FORMATS["fp16"]]
    both = [8 * _whole(shape, weights, table) / shape.parameters for table in given]
    yield equals(
        claimed, min(found, *both), f"{how}, {shape.name} as a whole", high=max(both),
        instead=instead,
    )  # fmt: skip


def needed_bytes(claim: Claim) -> float | None:
    """Least bytes to run or train what a claim is about."""
    shape, weights = shape_of(claim), claim.weights
    if "training" in claim.settings and claim.model is not None:
        return claim.model.parameters * TRAINING_BYTES[claim.settings["training"]]
    if weights is None or claim.model is None:
        return None
    if shape is None:
        whole = claim.model.parameters * weights.bits_per_weight / 8
        return None if "layers" in claim.settings else whole
    load = shape.load(weights.name, embedding=tables_of(claim).name, head=tables_of(claim).name)
    rows = claim.count("batch") if "context" in claim.settings else 0
    return resident_bytes(load, batch=rows, context=claim.count("context"))


def fits(claim: Claim) -> Iterator[Finding]:
    """`fits: yes` or `no`; and a speed on a device that the weights do not fit."""
    need, device = needed_bytes(claim), claim.device
    if need is None or device is None:
        return
    count = claim.count("devices")
    room = count * device.memory_bytes_at_most
    said = f"needs {words(need, 'bytes')}, {count} x {device.title} has {plain(device.memory_gb)}"
    said += f" GB, read as 2**30 bytes each{_tokens_beside(claim, device)}"
    wanted = claim.settings.get("fits")
    over = Finding("impossible", f"{said}: {plain(need / room)} times too much")
    if wanted is None:
        if need > room and not claim.quantities.keys().isdisjoint(("tokens_per_s", "latency")):
            yield Finding("impossible", f"{over.text}; {_enough(claim, device, need)}")
    elif wanted == "yes" and need > room:
        method = claim.settings.get("training")
        for other, nbytes in TRAINING_BYTES.items():
            small = claim.model.parameters * nbytes if claim.model else room
            if method is not None and other != method and small <= room:
                text = f"{over.text} for {method} training; it must be {other}"
                yield Finding("mislabelled", f"{text} ({words(small, 'bytes')})")
                return
        yield over
    elif wanted == "no" and shape_of(claim) is None and "context" in claim.settings:
        said += ", without its cache, which is unknown: a shape of the model is needed"
        yield Finding("possible" if need > room else "unverifiable", said)
    elif wanted == "no" and need <= count * device.memory_gb * 1e9:
        left = words(count * device.memory_gb * 1e9 - need, "bytes")
        shape, text = shape_of(claim), f"{said}: {left} are left"
        for name in ("fp16", "fp32"):
            nbytes = _whole(shape, FORMATS[name], FORMATS[name]) if shape else 0.0
            if nbytes > room:
                text += f"; it is {name} ({words(nbytes, 'bytes')}) that does not fit"
                yield Finding("mislabelled", text)
                return
        yield Finding("impossible", text)
    else:
        yield Finding("possible", said)


def _tokens_beside(claim: Claim, device: Device) -> str:
    """How many tokens of cache fit beside the weights, in words; "" where that is unknown."""
    load, batch = load_of(claim), claim.count("batch")
    if load is None or not load.kv_bytes_per_token or "training" in claim.settings:
        return ""
    free = claim.count("devices") * device.memory_gb * 1e9 - load.weight_bytes
    tokens = int(free / load.kv_bytes_per_token)
    if tokens <= 0:
        return ""
    each = f", {tokens // batch:,} for each of {batch} sequences" if batch > 1 else ""
    return f"; {tokens:,} tokens of cache fit beside the weights{each}"


def _enough(claim: Claim, device: Device, need: float) -> str:
    """How many devices hold it, and how fast one sequence is on them at most."""
    load, count = load_of(claim), math.ceil(need / device.memory_bytes_at_most)
    peak = peak_of(claim, device)
    if load is None or peak is None:
        return f"{count} hold it"
    step = decode_step(load, device.bandwidth_gb_per_s, peak[0], devices=count)
    return f"{count} hold it, at most {words(step.tokens_per_s, 'tokens/s')} for one sequence"


CHECKS = (parameters, stored, cache, tables_share, bits, fits)

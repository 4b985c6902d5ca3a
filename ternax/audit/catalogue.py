"""Checks against what is known: datasheets, prices, formats, released checkpoints."""

import math
from collections.abc import Iterator

from ternax.audit.claims import Case, Claim
from ternax.audit.findings import Finding, at_most, equals
from ternax.audit.quantities import parse, plain
from ternax.configs.hardware import DEVICES, Device

# Public checkpoints with ternary weights: name, year, month, parameters. Sources: the model
# pages of 1bitLLM, SpectraSuite (TriLM), tiiuae (Falcon3-1.58bit), HF1BitLLM, microsoft.
RELEASED = (
    ("1bitLLM bitnet_b1_58-large", 2024, 3, 0.729e9),
    ("1bitLLM bitnet_b1_58-xl", 2024, 3, 1.3e9),
    ("1bitLLM bitnet_b1_58-3B", 2024, 3, 3.32e9),
    ("SpectraSuite TriLM 3.9B", 2024, 7, 3.99e9),
    ("HF1BitLLM Llama3-8B-1.58", 2024, 9, 8.03e9),
    ("tiiuae Falcon3-7B 1.58bit", 2024, 12, 7.46e9),
    ("tiiuae Falcon3-10B 1.58bit", 2024, 12, 10.31e9),
    ("microsoft bitnet-b1.58-2B-4T", 2025, 4, 2.41e9),
)


def datasheet(claim: Claim, case: Case) -> Iterator[Finding]:
    q, device = claim.quantities, claim.device
    if "largest_memory" in q:
        sold = [known for known in DEVICES.values() if 0 < known.year <= case.year]
        largest = max(
            (known for known in sold if known.name.split("-")[0] in _ACCELERATORS),
            key=lambda known: known.memory_gb,
        )
        how = f"largest accelerator sold by {case.year}: {largest.title}"
        high = largest.memory_bytes_at_most
        yield equals(q["largest_memory"], largest.memory_gb * 1e9, how, high=high)
    if device is None:
        return
    if "bandwidth" in q:
        how = f"{device.title} ({device.source})"
        yield equals(q["bandwidth"], device.bandwidth_gb_per_s * 1e9, how)
    if "device_memory" in q:
        # Error correction and drivers hide some: an L40S of 48 GB shows 46,068 MiB.
        how = f"{device.title}: {plain(device.memory_gb)} GB, of which a program sees 93 % or more"
        low, high = 0.93 * device.memory_gb * 1e9, device.memory_bytes_at_most
        yield equals(q["device_memory"], low, how, high=high)
    if "peak" in q:
        operands = claim.settings.get("operands", "fp16")
        if operands not in device.peak_tflops:
            yield Finding("unverifiable", f"no {operands} peak of {device.title} is known")
            return
        dense = device.peak_tflops[operands] * 1e12
        sparse = [(2 * dense, "the figure with 2:4 sparsity")]
        how = f"dense {operands} peak of {device.title}"
        yield equals(q["peak"], 0.99 * dense, how, high=1.01 * dense, instead=sparse)
    if "power" in q and device.watts:
        # Boards may be limited lower; at_most allows for what a meter adds.
        count = claim.count("devices")
        how = f"board power of {count} x {device.title} and a tenth"
        yield at_most(q["power"], 1.1 * count * device.watts, how)


# First words of catalogue names that are accelerators of a data centre.
_ACCELERATORS = ("a100", "h100", "h200", "b200", "l40s", "l4", "a10g", "rtx6000ada")


def order(claim: Claim, case: Case) -> Iterator[Finding]:
    """Which of two devices is faster, or gives more bandwidth for its price."""
    del case
    device, other = claim.device, claim.rival
    if device is None or other is None:
        return
    if "faster_than" in claim.settings:
        ratios = [("bandwidth", device.bandwidth_gb_per_s / other.bandwidth_gb_per_s)]
        ratios += [
            (operands, device.peak_tflops[operands] / other.peak_tflops[operands])
            for operands in ("fp16", "int8")
            if operands in device.peak_tflops and operands in other.peak_tflops
        ]
        said = ", ".join(f"{name} {plain(ratio)}" for name, ratio in ratios)
        text = f"{device.title} over {other.title}: {said}"
        possible = any(ratio >= 1 for _, ratio in ratios)
        yield Finding("possible" if possible else "impossible", text, "equal efficiency")
    if "cheaper_than" in claim.settings and "price" in claim.quantities:
        price = claim.quantities["price"]
        ours = device.bandwidth_gb_per_s / price.nominal
        theirs = _other_price(claim, other)
        if theirs is None:
            yield Finding("unverifiable", f"other_price is missing: an hour of {other.title}")
            return
        rival = other.bandwidth_gb_per_s / theirs
        text = f"{device.title}: {plain(device.bandwidth_gb_per_s)} GB/s / {price.text} = "
        text += f"{plain(ours)}; {other.title}: {plain(other.bandwidth_gb_per_s)} / "
        text += f"{plain(theirs)} = {plain(rival)} GB/s for a dollar an hour"
        verdict = "possible" if ours >= rival else "impossible"
        if ours < rival:
            text += f", {plain(rival / ours)} times more"
        yield Finding(verdict, text, "decoding is bound by bandwidth")


def _other_price(claim: Claim, other: Device) -> float | None:
    if "other_price" in claim.settings:
        return parse(claim.settings["other_price"]).nominal
    return other.usd_per_h


def released(claim: Claim, case: Case) -> Iterator[Finding]:
    """Whether ternary checkpoints (of the model's size, if there is one) were public."""
    wanted = claim.settings.get("released")
    if wanted is None:
        return
    there = [row for row in RELEASED if row[1] < case.year or row[1:3] <= (case.year, 1)]
    size = claim.model.parameters if claim.model else None
    if size is not None:
        there = [row for row in there if abs(row[3] / size - 1) < 0.05]
    names = ", ".join(f"{name} ({year}-{month:02d})" for name, year, month, _ in there)
    said = f"public before {case.year}: {names or 'none of this size'}"
    if wanted == "no":
        yield Finding("impossible" if there else "possible", said)
    else:
        text = said if there else f"{said}; it is a shape, not a checkpoint"
        yield Finding("possible" if there else "mislabelled", text)


def runs_on(claim: Claim, case: Case) -> Iterator[Finding]:
    del case
    where, weights = claim.settings.get("runs_on"), claim.weights
    if where is None or weights is None:
        return
    said = f"{weights.name} ({weights.source})"
    if where == "gpu" and weights.cpu_only:
        text = f"{said} is read by CPU kernels alone; a GPU runs another format"
        yield Finding("mislabelled", text)
    else:
        yield Finding("possible", said)


def speculation(claim: Claim, case: Case) -> Iterator[Finding]:
    """What a verification of drafted tokens reads."""
    del case
    read = claim.quantities.get("weights_read")
    if read is not None and claim.settings.get("phase") == "speculative":
        how = "a verification of all drafted tokens reads every weight once, for all it accepts"
        yield equals(read, 1.0, how)


def prices(claim: Claim, case: Case) -> Iterator[Finding]:
    """An hour's price beside the catalogue's: prices move, so it takes much to be another's."""
    del case
    price, device = claim.quantities.get("price"), claim.device
    if price is None or device is None or device.usd_per_h is None:
        return
    known = {"on demand": device.usd_per_h}
    if device.spot_usd_per_h is not None:
        known = {"spot": device.spot_usd_per_h} | known
    low, high = min(known.values()), max(known.values())
    count = claim.count("devices")
    # Of all of them, where that is nearer: a node's price or one device's.
    each = min(price.nominal, price.nominal / count, key=lambda usd: abs(math.log(usd / high)))
    several = f"{count} x " if count > 1 and each < price.nominal else ""
    said = f"{price.text} for an hour of {several}{device.title}; one is "
    said += ", ".join(f"${plain(usd)} {kind}" for kind, usd in known.items())
    said += f" ({device.price_source})"
    if each < low:
        said += f": {plain(100 - 100 * each / low, 2)} % below the lowest"
    elif each > high:
        said += f": {plain(each / high, 3)} times the highest"
    if low / PRICES_MOVE <= each <= high * PRICES_MOVE:
        yield Finding("possible", said)
    else:
        yield Finding("mislabelled", f"{said}; that is no hour of such a device")


# How far prices are from the catalogue's before they are no price of this device.
PRICES_MOVE = 4.0
CHECKS = (datasheet, order, released, runs_on, speculation, prices)

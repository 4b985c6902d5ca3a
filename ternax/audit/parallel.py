"""Checks of models split over devices: how many, what takes most, what they hand over."""

import math
from collections.abc import Iterator

from ternax import roofline
from ternax.audit.claims import Claim
from ternax.audit.findings import Finding, equals, factor
from ternax.audit.quantities import words
from ternax.audit.subject import ORDINARY, load_of, peak_of, shape_of, whose
from ternax.configs.hardware import Device

# Seconds of an all-reduce between kernels, whatever it carries: 10 to 20 us over PCIe.
COLLECTIVE_S = 20e-6


def devices_needed(claim: Claim) -> Iterator[Finding]:
    """How many devices a size or a rate needs."""
    load, device = load_of(claim), claim.device
    needed, rate = claim.quantities.get("devices_needed"), claim.quantities.get("tokens_per_s")
    if load is None or device is None or needed is None:
        return
    one = roofline.decode_step(load, device.bandwidth_gb_per_s, _peak(claim, device)).tokens_per_s
    fit = math.ceil(load.weight_bytes / device.memory_bytes_at_most)
    fast = 1 if rate is None else math.ceil(rate.low / one)
    said = f"{words(load.weight_bytes, 'bytes')} of weights fit {fit} x {device.title}"
    if rate is not None:
        said += f"; the bound of one is {words(one, 'tokens/s')} against {rate.text}"
    least = max(fit, fast)
    ordinary = math.ceil(load.weight_bytes / (device.memory_gb * 1e9))
    if rate is not None:
        most = rate.nominal if math.isinf(rate.high) else rate.high  # "12-15+"
        ordinary = max(ordinary, math.ceil(most / one / ORDINARY))
    if needed.high < least:
        far = factor(needed, least)
        yield Finding("impossible", f"{said}: {least} are needed, {needed.text} is {far}")
    elif needed.low > ordinary:
        text = f"{said}: {ordinary} will do at {100 * ORDINARY:.0f} % of the bound"
        yield Finding("mislabelled", text)
    else:
        yield Finding("possible", said)


def bottleneck(claim: Claim) -> Iterator[Finding]:
    """What takes most of a step of decoding, or of a prompt."""
    load, device, claimed = load_of(claim), claim.device, claim.settings.get("bottleneck")
    if load is None or device is None or claimed is None or shape_of(claim) is None:
        return  # of a bare count only the weights are known
    link = device.pcie or device.fastest_link
    rate, wait = (link.gb_per_s if link else math.inf), COLLECTIVE_S
    batch, count = claim.count("batch"), claim.count("devices")
    if claim.settings.get("phase") == "prefill":
        tokens = claim.count("context")
        sent = batch * tokens * load.all_reduce_bytes
        least = roofline.prefill_s(
            load, device.bandwidth_gb_per_s, _peak(claim, device),
            tokens=tokens, batch=batch, devices=count,
        )  # fmt: skip
        reading = roofline.read_s(load.read_bytes, device.bandwidth_gb_per_s * count)
        times = {
            "weights": least if least <= reading else 0.0,
            "compute": least if least > reading else 0.0,
            "collectives": load.all_reduces * roofline.all_reduce_s(sent, count, rate, wait),
        }
        what = f"a prompt of {tokens:,} tokens"
    else:
        sent = batch * load.all_reduce_bytes
        step = roofline.decode_step(
            load, device.bandwidth_gb_per_s, _peak(claim, device),
            batch=batch, context=claim.count("context", 0), devices=count,
            link_gb_per_s=rate, collective_latency_s=wait,
        )  # fmt: skip
        parts = ("weights", "kv", "head", "collectives", "compute")
        times = {part: getattr(step, f"{part}_s") for part in parts}
        what = "a step"
    shares = {part: seconds / sum(times.values()) for part, seconds in times.items()}
    said = ", ".join(f"{part} {100 * share:.0f} %" for part, share in shares.items() if share)
    right = max(shares, key=lambda part: shares[part])
    text = f"{what} of {whose(claim)}: {said}; most: {right}"
    if count > 1 and sent:
        payload = words(load.all_reduces * sent, "bytes")
        text += f"; {load.all_reduces} all-reduces of {words(sent, 'bytes')} sum up {payload}"
    assumes = f"each all-reduce waits {wait * 1e6:.0f} us" + (f" over {link.name}" if link else "")
    yield Finding("possible" if claimed == right else "mislabelled", text, assumes)


def hand_overs(claim: Claim) -> Iterator[Finding]:
    """How often a step of layers that devices hold one after another leaves a device."""
    claimed = claim.quantities.get("hand_overs")
    if claimed is None or claim.model is None or claim.model.shape is None:
        return
    shape, count = claim.model.shape, claim.count("devices")
    reduces = 2 * shape.num_layers
    yield equals(
        claimed,
        float(count - 1),
        f"{words(2.0 * shape.hidden_size, 'bytes')} a token handed over by layers that {count} "
        f"devices hold one after another (split across them, each layer sums twice: {reduces} "
        "times)",
        instead=[
            (float(reduces), "that of tensor parallelism"),
            (float(shape.num_layers), "the number of layers, not of hand-overs"),
        ],
    )


def _peak(claim: Claim, device: Device) -> float:
    found = peak_of(claim, device)
    return found[0] if found else max(device.peak_tflops.values())


CHECKS = (devices_needed, bottleneck, hand_overs)

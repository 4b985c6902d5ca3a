"""Checks of what a datasheet and a count give by one division: times, shares, intensities."""

import math
from collections.abc import Iterator

from ternax import roofline
from ternax.audit.claims import Claim
from ternax.audit.findings import Finding, equals
from ternax.audit.quantities import plain, words
from ternax.audit.subject import load_of, peak_of


def intensities(claim: Claim) -> Iterator[Finding]:
    """Where both limits of a device meet, and how far below decoding is, of any model."""
    device, q = claim.device, claim.quantities
    found = peak_of(claim, device, "fp16") if device else None
    if device is None or found is None:
        return
    peak, bandwidth = found[0], device.bandwidth_gb_per_s
    meeting = roofline.critical_intensity(bandwidth, peak)
    knee = f"{plain(peak)} TFLOP/s of {found[1]} / {plain(bandwidth)} GB/s"
    if "critical_intensity" in q:
        yield equals(q["critical_intensity"], meeting, knee)
    if "intensity_gap" in q and claim.weights is not None:
        own = 16 / claim.weights.bits_per_weight
        yield equals(
            q["intensity_gap"],
            meeting / own,
            f"{knee}, over 2 x 8 / {plain(claim.weights.bits_per_weight)} operations a byte, "
            "of any model",
            assumes=f"{claim.weights.name} is read, {found[1]} is multiplied",
        )


def a_token(claim: Claim) -> Iterator[Finding]:
    """Operations and times of one token: computing alone, and reading alone."""
    load, device, q = load_of(claim), claim.device, claim.quantities
    if load is None:
        return
    macs = load.projection_macs + load.head_macs
    if "operations" in q:
        yield equals(q["operations"], 2 * macs, f"2 x {words(macs, 'number')} multiply-adds")
    found = peak_of(claim, device, "fp16") if device else None
    if device is None or found is None:
        return
    peak, bandwidth = found[0], device.bandwidth_gb_per_s
    computing = roofline.compute_s(macs, peak)
    reading = roofline.read_s(load.read_bytes, bandwidth)
    if "compute_time" in q:
        work = f"2 x {words(macs, 'number')} / {plain(peak)} TFLOP/s"
        twice = [(2 * computing, "that of half the peak")]
        yield equals(q["compute_time"], computing, work, instead=twice)
    if "read_time" in q:
        how = f"{words(load.read_bytes, 'bytes')} / {plain(bandwidth)} GB/s"
        yield equals(q["read_time"], reading, how)
    if "compute_only_tokens_per_s" in q:
        how = f"{plain(peak)} TFLOP/s / (2 x {words(macs, 'number')})"
        yield equals(q["compute_only_tokens_per_s"], 1 / computing, how)
    if "idle" in q:
        how = f"1 - {words(computing, 'seconds')} / {words(reading, 'seconds')}"
        yield equals(q["idle"], 1 - computing / max(computing, reading), how)


def cache_beside(claim: Claim) -> Iterator[Finding]:
    """The share of a step's reads that a law of weights alone leaves out."""
    load, share = load_of(claim), claim.quantities.get("left_out")
    if load is None or share is None or "context" not in claim.settings:
        return
    cache = claim.count("batch") * claim.count("context", 0) * load.kv_bytes_per_token
    how = f"the cache of {claim.count('context', 0):,} tokens, {words(cache, 'bytes')}, over "
    how += f"the step's {words(cache + load.read_bytes, 'bytes')}"
    empty = [(0.0, "the law of an empty cache")]
    yield equals(share, cache / (cache + load.read_bytes), how, instead=empty)


def critical_batch(claim: Claim) -> Iterator[Finding]:
    """The batch from which the matrix unit leads: with the head, or the projections alone."""
    load, device = load_of(claim), claim.device
    claimed = claim.quantities.get("critical_batch")
    found = peak_of(claim, device) if device else None
    if claimed is None or load is None or device is None or found is None:
        return
    peak, bandwidth = found[0], device.bandwidth_gb_per_s
    rows = roofline.critical_batch(load, bandwidth, peak, context=claim.count("context", 0))
    how = f"{words(load.read_bytes, 'bytes')} / {plain(bandwidth)} GB/s over the time of one row "
    how += f"at {plain(peak)} TFLOP/s of {found[1]}"
    if math.isinf(rows):
        text = f"{how}: none, each row's cache takes longer to read than the row to compute"
        yield Finding("impossible", text)
        return
    alone = roofline.read_s(load.projection_bytes, bandwidth)
    alone /= roofline.compute_s(load.projection_macs, peak)
    yield equals(claimed, rows, how, instead=[(alone, "that of the projections alone")])


CHECKS = (intensities, a_token, cache_beside, critical_batch)

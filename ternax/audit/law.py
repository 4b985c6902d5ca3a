"""Checks of what a datasheet and a count give by one division: times, shares, intensities."""

import dataclasses
import math
from collections.abc import Iterator

from ternax import roofline
from ternax.audit.claims import Claim
from ternax.audit.findings import Finding, equals, nearest, shown
from ternax.audit.quantities import Quantity, plain, words
from ternax.audit.subject import load_of, peak_of, shape_of

# How far datasheet figures cut to three digits move what is computed from them.
ROUNDED = 0.005


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
        bits, codes = claim.weights.bits_per_weight, claim.weights.code_bits
        found_gap = _by_convention(
            q["intensity_gap"],
            meeting * bits / 16,
            f"{knee}, over 2 x 8 / {plain(bits)} operations a byte, of any model",
            [(meeting * codes / 16, f"that of {plain(codes)} bits, codes without their scales")],
        )
        assumes = f"{claim.weights.name} is read, {found[1]} is multiplied"
        yield dataclasses.replace(found_gap, assumes=assumes)


def _by_convention(
    claimed: Quantity,
    value: float,
    how: str,
    others: list[tuple[float, str]],
    instead: list[tuple[float, str]] | None = None,
) -> Finding:
    """A quantity that is counted in several ways, all of them usual: right from one to the other.

    others: (value, what it is) by the other conventions; the finding says which was met.
    """
    found = equals(claimed, value, how, instead=instead or ())
    ends = [value, *(other for other, _ in others)]
    inside = claimed.meets((1 - ROUNDED) * min(ends), (1 + ROUNDED) * max(ends))
    if found.verdict == "possible" or not inside:
        return found
    what = nearest(claimed, others) or _closest(claimed, others)
    return Finding("possible", f"{how} = {shown(claimed, value)}; {claimed.text} is {what}")


def _closest(claimed: Quantity, others: list[tuple[float, str]]) -> str:
    """The convention next to a quantity, where digits cut on the way kept it from being met."""
    value, what = min(others, key=lambda pair: claimed.distance(pair[0]))
    return f"next to {what} ({shown(claimed, value)})"


def a_token(claim: Claim) -> Iterator[Finding]:
    """Operations and times of one token: computing alone, and reading alone.

    Documents count the projections alone, or 2 N of all N parameters; both are let pass.
    """
    load, device, q = load_of(claim), claim.device, claim.quantities
    if load is None:
        return
    macs, shape = load.projection_macs + load.head_macs, shape_of(claim)
    counts = [(load.projection_macs, load.projection_bytes, "that of the projections alone")]
    if shape is not None:
        counts += [(float(shape.parameters), load.weight_bytes, "that of all parameters")]
    if "operations" in q:
        how = f"2 x {words(macs, 'number')} multiply-adds"
        yield _by_convention(q["operations"], 2 * macs, how, [(2 * n, w) for n, _, w in counts])
    found = peak_of(claim, device, "fp16") if device else None
    if device is None or found is None:
        return
    peak, bandwidth = found[0], device.bandwidth_gb_per_s
    computing = roofline.compute_s(macs, peak)
    reading = roofline.read_s(load.read_bytes, bandwidth)
    if "compute_time" in q:
        work = f"2 x {words(macs, 'number')} / {plain(peak)} TFLOP/s"
        twice = [(2 * computing, "that of half the peak")]
        others = [(roofline.compute_s(n, peak), what) for n, _, what in counts]
        yield _by_convention(q["compute_time"], computing, work, others, twice)
    if "read_time" in q:
        how = f"{words(load.read_bytes, 'bytes')} / {plain(bandwidth)} GB/s"
        others = [(roofline.read_s(nbytes, bandwidth), what) for _, nbytes, what in counts]
        yield _by_convention(q["read_time"], reading, how, others)
    if "compute_only_tokens_per_s" in q:
        how = f"{plain(peak)} TFLOP/s / (2 x {words(macs, 'number')})"
        others = [(1 / roofline.compute_s(n, peak), what) for n, _, what in counts]
        yield _by_convention(q["compute_only_tokens_per_s"], 1 / computing, how, others)
    if "idle" in q:
        how = f"1 - {words(computing, 'seconds')} / {words(reading, 'seconds')}"
        yield equals(q["idle"], 1 - computing / max(computing, reading), how)


def cache_beside(claim: Claim) -> Iterator[Finding]:
    """The share of a step's reads that a law of weights alone leaves out."""
    load, share = load_of(claim), claim.quantities.get("left_out")
    if load is None or share is None or "context" not in claim.settings:
        return
    if not load.kv_bytes_per_token:
        return  # of a bare count the cache is unknown, not empty
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
    if "context" in claim.settings and not load.kv_bytes_per_token:
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

"""Checks of speeds and times against the two limits of a device, memory and matrix unit."""

import math
from collections.abc import Iterator

from ternax import roofline
from ternax.audit.claims import Claim
from ternax.audit.findings import Finding, at_least, at_most, equals
from ternax.audit.quantities import Quantity, plain, words
from ternax.audit.subject import load_of, peak_of, whose
from ternax.roofline import Load

# Seconds of an all-reduce between kernels, whatever it carries: 10 to 20 us over PCIe.
COLLECTIVE_S = 20e-6
# Tokens a second that a reader follows.
READING_TOKENS_PER_S = 10.0
# Share of the bandwidth bound that ordinary programs reach (`experiments.validate`).
ORDINARY = 0.5


def _bound(claim: Claim, load: Load, peak: float, batch: float) -> roofline.Step:
    assert claim.device is not None
    return roofline.decode_step(
        load,
        claim.device.bandwidth_gb_per_s,
        peak,
        batch=batch,
        context=claim.count("context", 0),
        devices=claim.count("devices"),
    )


def _read(claim: Claim, load: Load, batch: float) -> str:
    """The reading of a step in words."""
    assert claim.device is not None
    count = claim.count("devices")
    nbytes = load.read_bytes + batch * claim.count("context", 0) * load.kv_bytes_per_token
    bandwidth = plain(claim.device.bandwidth_gb_per_s)
    rows = "one sequence" if batch == 1 else f"{plain(batch)} sequences"
    return (
        f"a step of {rows} through {whose(claim)} reads {words(nbytes, 'bytes')} at "
        f"{f'{count} x ' if count > 1 else ''}{bandwidth} GB/s"
    )


def tokens_per_s(claim: Claim) -> Iterator[Finding]:
    """A rate against the matrix peak at any batch, then against bandwidth at its own."""
    rate, load, device = claim.quantities.get("tokens_per_s"), load_of(claim), claim.device
    if rate is None or load is None or device is None:
        return
    found = peak_of(claim, device)
    if found is None:
        operands = claim.settings["operands"]
        yield Finding("unverifiable", f"no {operands} peak of {device.title} is known")
        return
    peak, operands = found
    phase, batch = claim.settings.get("phase"), claim.settings.get("batch")
    cap = peak * 1e12 * claim.count("devices") / (2 * load.projection_macs)
    used = 2 * load.projection_macs * rate.nominal / 1e12
    matrix = (
        f"at any batch, {plain(peak * claim.count('devices'))} TFLOP/s of {operands} / (2 x "
        f"{words(load.projection_macs, 'number')})"
    )
    assumes = f"projections alone, every operation at the dense {operands} peak"
    if rate.low > cap:
        text = at_most(rate, cap, matrix, assumes).text
        one = _bound(claim, load, peak, 1).tokens_per_s
        yield Finding(
            "impossible",
            f"{text}: that takes {plain(used)} TFLOP/s; one sequence has at most "
            f"{words(one, 'tokens/s')}",
            assumes,
        )
    elif phase in ("prefill", "kernel", "speculative"):
        yield at_most(rate, cap, matrix, assumes)
    else:
        rows = float(batch or 1)
        step = _bound(claim, load, peak, rows)
        result = at_most(rate, step.tokens_per_s, _read(claim, load, rows))
        if result.verdict == "impossible" and batch is None:
            needed = math.ceil(rate.low * step.memory_s)
            part = min(1.0, rate.nominal / cap)
            result = Finding(
                "mislabelled",
                f"{result.text}; it must be {needed} sequences or more in one step, or a prompt, "
                f"which the matrix unit allows ({100 * part:.0f} % of its peak)",
                "batch 1, since none is given",
            )
        yield result
        share = claim.quantities.get("share_of_bound")
        if share is not None:
            reached = rate.nominal / step.tokens_per_s
            how = f"{rate.text} / {words(step.tokens_per_s, 'tokens/s')}"
            headroom = Finding("mislabelled", f"{how} = {100 * reached:.0f} %, not {share.text}")
            yield equals(share, reached, how) if share.meets(reached) else headroom


def latency(claim: Claim) -> Iterator[Finding]:
    """A time against its bound, and times the rate: tokens in flight."""
    time, load, device = claim.quantities.get("latency"), load_of(claim), claim.device
    rate, phase = claim.quantities.get("tokens_per_s"), claim.settings.get("phase")
    batch = claim.settings.get("batch")
    if time is not None and rate is not None:
        low, high = rate.low * time.low, rate.high * time.high
        said = f"{rate.text} x {time.text} = {plain(rate.nominal * time.nominal)} tokens in flight"
        middle = rate.nominal * time.nominal
        flight = Quantity(low, high, "number", f"{plain(middle)} tokens", middle)
        if batch is not None and phase not in ("prefill", "speculative"):
            yield equals(flight, float(batch), f"{said}; the batch")
        elif phase == "decode" and not flight.meets(1.0):
            text = f"{said}: a batch or a prompt of so many tokens, not one sequence's decode"
            yield Finding("mislabelled", text, "batch 1, since none is given")
        else:
            yield Finding("possible", said)
    if time is None or load is None or device is None or phase not in ("decode", "prefill"):
        return
    found = peak_of(claim, device)
    if found is None:
        return
    if phase == "prefill":
        tokens = claim.count("context", 1)
        least = roofline.prefill_s(
            load,
            device.bandwidth_gb_per_s,
            found[0],
            tokens=tokens,
            batch=claim.count("batch"),
            devices=claim.count("devices"),
        )
        yield at_least(time, least, f"a prompt of {tokens} tokens through {whose(claim)}")
    else:
        step = _bound(claim, load, found[0], claim.count("batch"))
        yield at_least(time, step.total_s, _read(claim, load, claim.count("batch")))


def kernel_time(claim: Claim) -> Iterator[Finding]:
    time, device, weights = claim.quantities.get("kernel_time"), claim.device, claim.weights
    shaped = "rows" in claim.settings and "columns" in claim.settings
    if time is None or device is None or weights is None or not shaped:
        return
    rows, columns = claim.count("rows"), claim.count("columns")
    nbytes = weights.nbytes(columns, rows)
    floor = roofline.read_s(nbytes, device.bandwidth_gb_per_s)
    how = f"{words(nbytes, 'bytes')} at {plain(device.bandwidth_gb_per_s)} GB/s"
    yield at_least(time, floor, how, "the matrix comes from memory, not from a cache")


def batch_gain(claim: Claim) -> Iterator[Finding]:
    gain, load, device = claim.quantities.get("batch_gain"), load_of(claim), claim.device
    if gain is None or "batch" not in claim.settings:
        return
    rows = claim.count("batch")
    if load is None or device is None:
        yield at_most(gain, float(rows), f"{rows} rows that read the weights once")
        return
    peak = peak_of(claim, device)
    one, many = (_bound(claim, load, peak[0] if peak else 1.0, n) for n in (1, rows))
    how = f"the bound at batch {rows} over that at 1"
    yield at_most(gain, many.tokens_per_s / one.tokens_per_s, how)


def parts_of_the_law(claim: Claim) -> Iterator[Finding]:
    """Times, shares and intensities that follow from a datasheet by one division."""
    load, device, q = load_of(claim), claim.device, claim.quantities
    if claim.weights is not None and load is not None and "operations" in q:
        macs = load.projection_macs + load.head_macs
        yield equals(q["operations"], 2 * macs, f"2 x {words(macs, 'number')} multiply-adds")
    if device is None:
        return
    found = peak_of(claim, device, "fp16")
    if found is None:
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
    if load is None:
        return
    macs = load.projection_macs + load.head_macs
    computing = roofline.compute_s(macs, peak)
    reading = roofline.read_s(load.read_bytes, bandwidth)
    work = f"2 x {words(macs, 'number')} / {plain(peak)} TFLOP/s"
    if "compute_time" in q:
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
    if "left_out" in q and "context" in claim.settings:
        cache = claim.count("batch") * claim.count("context", 0) * load.kv_bytes_per_token
        share = cache / (cache + load.read_bytes)
        how = f"the cache of {claim.count('context', 0):,} tokens, {words(cache, 'bytes')}, over "
        how += f"the step's {words(cache + load.read_bytes, 'bytes')}"
        empty = [(0.0, "the law of an empty cache")]
        yield equals(q["left_out"], share, how, instead=empty)


def several_devices(claim: Claim) -> Iterator[Finding]:
    """How many devices a rate or a size needs, and what takes most of their step."""
    load, device = load_of(claim), claim.device
    if load is None or device is None:
        return
    found = peak_of(claim, device)
    peak = found[0] if found else max(device.peak_tflops.values())
    needed, rate = claim.quantities.get("devices_needed"), claim.quantities.get("tokens_per_s")
    if needed is not None:
        fit = math.ceil(load.weight_bytes / device.memory_bytes_at_most)
        one = roofline.decode_step(load, device.bandwidth_gb_per_s, peak).tokens_per_s
        fast = 1 if rate is None else math.ceil(rate.low / one)
        said = f"{words(load.weight_bytes, 'bytes')} of weights fit {fit} x {device.title}"
        if rate is not None:
            said += f"; the bound of one is {words(one, 'tokens/s')} against {rate.text}"
        least = max(fit, fast)
        ordinary = fit if rate is None else max(fit, math.ceil(rate.high / one / ORDINARY))
        if needed.high < least:
            more = plain(least / needed.nominal)
            yield Finding("impossible", f"{said}: {least} are needed, {more} times more")
        elif needed.low > ordinary:
            text = f"{said}: {ordinary} will do at {100 * ORDINARY:.0f} % of the bound"
            yield Finding("mislabelled", text)
        else:
            yield Finding("possible", said)
    claimed = claim.settings.get("bottleneck")
    if claimed is not None:
        link = device.pcie or device.fastest_link
        step = roofline.decode_step(
            load,
            device.bandwidth_gb_per_s,
            peak,
            batch=claim.count("batch"),
            context=claim.count("context", 0),
            devices=claim.count("devices"),
            link_gb_per_s=link.gb_per_s if link else math.inf,
            collective_latency_s=COLLECTIVE_S,
        )
        parts = ("weights", "kv", "head", "collectives", "compute")
        shares = {part: getattr(step, f"{part}_s") / step.total_s for part in parts}
        said = ", ".join(f"{part} {100 * share:.0f} %" for part, share in shares.items() if share)
        assumes = f"each all-reduce takes {COLLECTIVE_S * 1e6:.0f} us"
        assumes += f" over {link.name}" if link else ""
        right = max(shares, key=lambda part: shares[part])
        verdict = "possible" if claimed == right else "mislabelled"
        yield Finding(verdict, f"a step of {whose(claim)}: {said}; most: {right}", assumes)


def interactive(claim: Claim) -> Iterator[Finding]:
    """Whether one user is served at reading speed: refuted by a bound, or by half of one."""
    wanted, load, device = claim.settings.get("interactive"), load_of(claim), claim.device
    if wanted is None or load is None or device is None:
        return
    found = peak_of(claim, device)
    rate = _bound(claim, load, found[0] if found else 1.0, 1).tokens_per_s
    said = f"{_read(claim, load, 1)}: at most {words(rate, 'tokens/s')} for one user"
    said += f"; reading takes {READING_TOKENS_PER_S:.0f}"
    if wanted == "yes" and rate < READING_TOKENS_PER_S:
        yield Finding("impossible", f"{said}, {plain(READING_TOKENS_PER_S / rate)} times more")
    elif wanted == "no" and rate * ORDINARY > READING_TOKENS_PER_S:
        text = f"{said}: one user is served, at {100 * ORDINARY:.0f} % of the bound too"
        yield Finding("mislabelled", text)
    else:
        yield Finding("possible", said)


CHECKS = (
    tokens_per_s,
    latency,
    kernel_time,
    batch_gain,
    parts_of_the_law,
    several_devices,
    interactive,
)

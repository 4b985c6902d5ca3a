"""Checks of speeds and times against the two limits of a device, memory and matrix unit."""

import math
from collections.abc import Iterator

from ternax import roofline
from ternax.audit.claims import Claim
from ternax.audit.findings import Finding, at_least, at_most, equals
from ternax.audit.quantities import Quantity, plain, words
from ternax.audit.subject import NARROW, ORDINARY, load_of, peak_of, whose
from ternax.roofline import Load

# How far a rate times a time is from the rows of a step when each is a mean of its own.
APART = 0.02
# Tokens a second that a reader follows.
READING_TOKENS_PER_S = 10.0


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
        text += f": that takes {plain(used)} TFLOP/s; one sequence has at most "
        text += words(one, "tokens/s")
        faster = [
            (other, f"{name}, {plain(other)} TFLOP/s")
            for name, other in device.peak_tflops.items()
            if name not in NARROW and rate.low * peak <= cap * other
        ]
        if faster:
            text += f"; it must be {min(faster)[1]}"
        yield Finding("mislabelled" if faster else "impossible", text, assumes)
    elif phase in ("prefill", "kernel", "speculative"):
        yield at_most(rate, cap, matrix, assumes)
        yield from _use_of_the_matrix_unit(claim, load, rate)
    elif batch == "best":
        yield _at_best(claim, load, rate, peak) or at_most(rate, cap, matrix, assumes)
    else:
        rows = float(batch or 1)
        step = _bound(claim, load, peak, rows)
        several = claim.model is not None and claim.model.active is not None and rows > 1
        experts = "all sequences choose the same experts" if several else ""
        result = at_most(rate, step.tokens_per_s, _read(claim, load, rows), experts)
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
            yield _share(share, reached, reached, how)


def _share(claimed: Quantity, low: float, high: float, how: str) -> Finding:
    """A share of a bound: one that is not the number's own is another number's."""
    if claimed.meets(low, high):
        return equals(claimed, low, how, high=high)
    return Finding("mislabelled", f"{how} = {100 * low:.0f} %, not {claimed.text}")


def _use_of_the_matrix_unit(claim: Claim, load: Load, rate: Quantity) -> Iterator[Finding]:
    """`share_of_bound` of a prompt: its operations over the peak of the type its weights are in.

    Papers count the projections alone, or all parameters, embedding included.
    """
    share, device, weights = claim.quantities.get("share_of_bound"), claim.device, claim.weights
    if share is None or device is None or weights is None:
        return
    own = peak_of(claim, device, weights.operands) or peak_of(claim, device)
    if own is None:
        return
    peak, operands = own
    macs = [load.projection_macs, load.projection_macs + 2 * load.head_macs]
    low, high = (
        roofline.compute_s(count * end, peak * claim.count("devices"))
        for count, end in zip(macs, (rate.low, rate.high), strict=True)
    )
    how = f"2 x {words(macs[0], 'number')} to {words(macs[1], 'number')} x {rate.text} / "
    how += f"{plain(peak * claim.count('devices'))} TFLOP/s of {operands}"
    yield _share(share, low, high, how)


def _at_best(claim: Claim, load: Load, rate: Quantity, peak: float) -> Finding | None:
    """A rate against the bound of as many sequences as fit; None where no context is stated."""
    assert claim.device is not None
    context = claim.count("context", 0)
    if not context * load.kv_bytes_per_token:
        return None
    room = claim.count("devices") * claim.device.memory_bytes_at_most
    rows = roofline.batch_that_fits(load, room, context=context)
    if rows == 0:
        return Finding("impossible", f"no sequence of {context:,} tokens fits beside the weights")
    how = f"{_read(claim, load, rows)}, and no more fit"
    return at_most(rate, _bound(claim, load, peak, rows).tokens_per_s, how)


def latency(claim: Claim) -> Iterator[Finding]:
    """A time against its bound, and times the rate: tokens in flight."""
    time, load, device = claim.quantities.get("latency"), load_of(claim), claim.device
    rate, phase = claim.quantities.get("tokens_per_s"), claim.settings.get("phase")
    batch = claim.settings.get("batch")
    # Of a kernel or a verification the product says nothing that could be wrong.
    if time is not None and rate is not None and phase not in ("kernel", "speculative"):
        low, high = rate.low * time.low * (1 - APART), rate.high * time.high * (1 + APART)
        said = f"{rate.text} x {time.text} = {plain(rate.nominal * time.nominal)} tokens in flight"
        middle = rate.nominal * time.nominal
        flight = Quantity(low, high, "number", f"{plain(middle)} tokens", middle)
        if batch == "best":
            yield Finding("possible", said)
        elif batch is not None and phase != "prefill":
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
    if claim.settings["batch"] == "best":
        yield Finding("unverifiable", "batch_gain needs batch as a number")
        return
    rows = claim.count("batch")
    if load is None or device is None:
        yield at_most(gain, float(rows), f"{rows} rows that read the weights once")
        return
    peak = peak_of(claim, device)
    one, many = (_bound(claim, load, peak[0] if peak else 1.0, n) for n in (1, rows))
    how = f"the bound at batch {rows} over that at 1"
    yield at_most(gain, many.tokens_per_s / one.tokens_per_s, how)


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


CHECKS = (tokens_per_s, latency, kernel_time, batch_gain, interactive)

"""The law of decoding: seconds of a step from bytes, operations and a device's two limits.

Every function takes and returns plain numbers (SI: seconds, bytes, operations; bandwidths in
1e9 bytes/s and peaks in 1e12 operations/s, as datasheets have them), so that the law can be
read, tested and written again in another language. A multiply-add is two operations.

A step reads all its weights once, whatever the batch, and each sequence's cache; it computes
while it reads, so only what takes longer than the reading adds to it. Launches and
collectives add in full. An efficiency of 1 and no fixed costs give a bound: no program on
that device is faster. Source of the model: Williams, Waterman, Patterson, "Roofline" (2009).
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Load:
    """What a decode step of one token a row moves and computes; a model stored in one way.

    Attributes:
      projection_bytes: all layers' matrices with scales and norms: read once a step.
      head_bytes: the table that makes logits (a tied embedding): read once a step.
      embedding_bytes: resident besides that; a row of it is `embedding_row_bytes`.
      kv_bytes_per_token: of the cache, all layers, for each token of each row.
      activation_bytes: written and read again between kernels, for each row.
      projection_macs, head_macs: multiply-adds for each row.
      attention_macs_per_token: for each row and each token in its cache.
      all_reduces: of a step when each layer is split over devices, each of
        `all_reduce_bytes` a row.
      launches: kernels of a step that nothing fuses.
      idle_bytes: resident weights that this step does not read: experts no row chose.
    """

    projection_bytes: float
    head_bytes: float
    embedding_bytes: float
    embedding_row_bytes: float
    kv_bytes_per_token: float
    activation_bytes: float
    projection_macs: float
    head_macs: float
    attention_macs_per_token: float
    all_reduces: int
    all_reduce_bytes: float
    launches: int
    idle_bytes: float = 0.0

    @property
    def weight_bytes(self) -> float:
        """Resident bytes of the whole model."""
        return self.projection_bytes + self.head_bytes + self.embedding_bytes + self.idle_bytes

    @property
    def read_bytes(self) -> float:
        """What every step reads, at any batch and context."""
        return self.projection_bytes + self.head_bytes


@dataclasses.dataclass(frozen=True)
class Step:
    """Seconds of one step by part; they sum to `total_s`.

    Attributes:
      weights_s, kv_s, head_s, activations_s: reading them.
      compute_s: what computing takes beyond the reading: 0 while memory is the limit.
      collectives_s, launches_s: between devices, and starting kernels.
      rows: tokens the step makes.
    """

    weights_s: float
    kv_s: float
    head_s: float
    activations_s: float
    compute_s: float
    collectives_s: float
    launches_s: float
    rows: float

    @property
    def memory_s(self) -> float:
        return self.weights_s + self.kv_s + self.head_s + self.activations_s

    @property
    def total_s(self) -> float:
        return self.memory_s + self.compute_s + self.collectives_s + self.launches_s

    @property
    def tokens_per_s(self) -> float:
        """Of all rows together."""
        return self.rows / self.total_s

    @property
    def limit(self) -> str:
        """The part that takes most: "compute" when the matrix unit decides, else a part's name."""
        if self.compute_s > 0 and self.compute_s + self.memory_s > self.total_s / 2:
            return "compute"
        parts = ("weights", "kv", "head", "activations", "collectives", "launches")
        return max(parts, key=lambda part: getattr(self, f"{part}_s"))


def read_s(nbytes: float, bandwidth_gb_per_s: float) -> float:
    return nbytes / (bandwidth_gb_per_s * 1e9)


def compute_s(macs: float, peak_tflops: float) -> float:
    return 2 * macs / (peak_tflops * 1e12)


def all_reduce_s(nbytes: float, devices: int, link_gb_per_s: float, latency_s: float) -> float:
    """A ring: each device sends 2 (n - 1) / n of the bytes. 0 on one device."""
    if devices == 1:
        return 0.0
    return latency_s + 2 * (devices - 1) / devices * nbytes / (link_gb_per_s * 1e9)


def step_macs(load: Load, *, batch: float = 1, context: float = 0, positions: float = 1) -> float:
    """Multiply-adds of one step; `positions` as in `decode_step`."""
    a_token = load.projection_macs + load.head_macs + context * load.attention_macs_per_token
    return batch * positions * a_token


def step_bytes(load: Load, *, batch: float = 1, context: float = 0, positions: float = 1) -> float:
    """Bytes that one step reads, activations left to the caches."""
    a_row = context * load.kv_bytes_per_token + positions * load.embedding_row_bytes
    return load.read_bytes + batch * a_row


def intensity(load: Load, *, batch: float = 1, context: float = 0) -> float:
    """Operations of a step for each byte it reads: where it stands under the roof."""
    at = {"batch": batch, "context": context}
    return 2 * step_macs(load, **at) / step_bytes(load, **at)


def decode_step(
    load: Load,
    bandwidth_gb_per_s: float,
    peak_tflops: float,
    *,
    batch: float = 1,
    context: float = 0,
    positions: float = 1,
    devices: int = 1,
    efficiency: float = 1.0,
    compute_efficiency: float = 1.0,
    activations: bool = False,
    link_gb_per_s: float = math.inf,
    collective_latency_s: float = 0.0,
    launch_s: float = 0.0,
) -> Step:
    """One decode step of `batch` rows that hold `context` tokens each.

    Args:
      positions: of each row computed at once: a draft and one more while it is verified, which
        read the weights and the row's cache as one token does.
      efficiency, compute_efficiency: shares of bandwidth and peak that are reached; 1: a bound.
      devices: tensor-parallel; each holds and reads its share.
      activations: count them as read from memory; caches hold them in practice.
      link_gb_per_s, collective_latency_s: of an all-reduce, one direction.
      launch_s: of one kernel launch; 0 when a step is one recorded graph.
    """
    bandwidth = bandwidth_gb_per_s * efficiency * devices
    macs = step_macs(load, batch=batch, context=context, positions=positions)
    weights = read_s(load.projection_bytes, bandwidth)
    head = read_s(load.head_bytes, bandwidth)
    kv = read_s(batch * context * load.kv_bytes_per_token, bandwidth)
    a_token = load.embedding_row_bytes + activations * load.activation_bytes
    moved = batch * positions * a_token
    other = read_s(moved, bandwidth)
    computing = compute_s(macs, peak_tflops * compute_efficiency * devices)
    sent = batch * positions * load.all_reduce_bytes
    one = all_reduce_s(sent, devices, link_gb_per_s, collective_latency_s)
    return Step(
        weights_s=weights,
        kv_s=kv,
        head_s=head,
        activations_s=other,
        compute_s=max(0.0, computing - (weights + head + kv + other)),
        collectives_s=load.all_reduces * one,
        launches_s=load.launches * launch_s,
        rows=batch,
    )


def prefill_s(
    load: Load,
    bandwidth_gb_per_s: float,
    peak_tflops: float,
    *,
    tokens: float,
    batch: float = 1,
    devices: int = 1,
) -> float:
    """At least this long to read prompts of `tokens` tokens: the larger of both limits.

    Only a prompt's last token needs logits, and attention is causal, half of a square.
    """
    macs = batch * (tokens * load.projection_macs + load.head_macs)
    macs += batch * tokens * tokens / 2 * load.attention_macs_per_token
    nbytes = load.read_bytes + batch * tokens * load.kv_bytes_per_token
    return max(read_s(nbytes, bandwidth_gb_per_s * devices), compute_s(macs, peak_tflops * devices))


def critical_batch(
    load: Load, bandwidth_gb_per_s: float, peak_tflops: float, *, context: float = 0
) -> float:
    """Rows at which computing takes as long as reading; infinite where reading always leads.

    Each row brings its own cache, so a long context has no such batch.
    """
    macs = load.projection_macs + load.head_macs + context * load.attention_macs_per_token
    read_a_row = context * load.kv_bytes_per_token + load.embedding_row_bytes
    a_row = compute_s(macs, peak_tflops) - read_s(read_a_row, bandwidth_gb_per_s)
    return read_s(load.read_bytes, bandwidth_gb_per_s) / a_row if a_row > 0 else math.inf


def critical_intensity(bandwidth_gb_per_s: float, peak_tflops: float) -> float:
    """Operations a byte at which both limits meet."""
    return peak_tflops * 1e3 / bandwidth_gb_per_s


def tokens_a_round(acceptance: float, drafted: int) -> float:
    """Tokens that one verified draft yields on average (arXiv:2211.17192, equation 1).

    acceptance: chance, the same for each drafted token, that it is kept; 1: all are.
    """
    if acceptance == 1:
        return drafted + 1.0
    return (1 - acceptance ** (drafted + 1)) / (1 - acceptance)


def speculative_tokens_per_s(
    verify: Step, draft: Step, *, drafted: int, acceptance: float
) -> float:
    """Of all rows, when a smaller model drafts.

    verify: the large model's step of `drafted + 1` positions; draft: one of the small model.
    """
    return (
        verify.rows
        * tokens_a_round(acceptance, drafted)
        / (verify.total_s + drafted * draft.total_s)
    )


def resident_bytes(load: Load, *, batch: float = 1, context: float = 0) -> float:
    return load.weight_bytes + batch * context * load.kv_bytes_per_token


def batch_that_fits(load: Load, memory_bytes: float, *, context: float) -> int:
    """Rows of `context` tokens that fit beside the weights; 0 when the weights do not."""
    free = memory_bytes - load.weight_bytes
    return max(0, math.floor(free / (context * load.kv_bytes_per_token)))


def joules_per_token(watts: float, tokens_per_s: float) -> float:
    return watts / tokens_per_s


def usd_per_million_tokens(usd_per_h: float, tokens_per_s: float) -> float:
    return usd_per_h / (3600 * tokens_per_s) * 1e6

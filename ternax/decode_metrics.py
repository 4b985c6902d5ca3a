"""What a decode run's samples say, as the metrics of its Records."""

from collections.abc import Sequence

from ternax import measure
from ternax.cost import Plan


def of_plan(plan: Plan, bandwidth_gb_per_s: float | None) -> dict[str, float]:
    """What is known before anything is allocated.

    bandwidth_gb_per_s: a device's share of what memory was read at; None: not measured.
    """
    metrics: dict[str, float] = dict(
        planned_memory_bytes=plan.total_bytes,
        weight_bytes=plan.weight_bytes,
        cache_bytes=plan.bytes["cache"],
        bytes_per_step=plan.bytes_per_step,
        parameters=plan.parameters,
        ternary_parameters=plan.ternary_parameters,
        bits_per_weight=plan.bits_per_weight,
    )
    if plan.available_bytes is not None:
        metrics["available_memory_bytes"] = plan.available_bytes
    if bandwidth_gb_per_s is not None:
        metrics["bound_tokens_per_s"] = plan.bound_tokens_per_s(bandwidth_gb_per_s)
    return metrics


def of_create(plan: Plan, seconds: float) -> dict[str, float]:
    nbytes = plan.weight_bytes
    return dict(create_s=seconds, weight_bytes=nbytes, gb_per_s=nbytes / seconds / 1e9)


def of_prefill(samples_s: Sequence[float], batch: int, prompt_tokens: int) -> dict[str, float]:
    seconds = measure.percentile(samples_s, 50)
    return dict(ttft_ms=1e3 * seconds, prefill_tokens_per_s=batch * prompt_tokens / seconds)


def of_decode(
    plan: Plan,
    samples_s: Sequence[float],
    bandwidths_gb_per_s: Sequence[float],
    context: float,
    sharing: int = 1,
) -> dict[str, float]:
    """A step beside its bound.

    Args:
      plan: of the run.
      samples_s: steps, in seconds.
      bandwidths_gb_per_s: of the memory, before and after them.
      context: what a row holds in the middle of them.
      sharing: devices that share that memory.
    """
    seconds = measure.percentile(samples_s, 50)
    bandwidth = measure.percentile(bandwidths_gb_per_s, 50)
    bound = plan.bound_tokens_per_s(bandwidth / sharing, context)
    return dict(
        tokens_per_s=plan.batch / seconds,
        bound_tokens_per_s=bound,
        share_of_bound=plan.batch / seconds / bound,
        bytes_per_step=plan.bytes_per_step_at(context),
        read_bandwidth_gb_per_s=bandwidth,
        tpot_ms_p50=1e3 * seconds,
        tpot_ms_p99=1e3 * measure.percentile(samples_s, 99),
    )

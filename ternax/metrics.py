"""What each number of a `Record` means, and its unit. docs/records.md says more."""

from typing import NamedTuple


class Metric(NamedTuple):
    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    # Speed. "Step" is one decode step of the whole batch.
    "tokens_per_s": Metric("tokens/s", "tokens of all sequences together, at the median step"),
    "bound_tokens_per_s": Metric("tokens/s", "the same if a step only read its bytes once"),
    "share_of_bound": Metric("fraction", "tokens_per_s / bound_tokens_per_s"),
    "bytes_per_step": Metric("bytes", "weights, cache and tables that one step must read"),
    "read_bandwidth_gb_per_s": Metric("1e9 bytes/s", "memory read rate measured in the same run"),
    "ttft_ms": Metric("ms", "time to first token: prefill and the first sampled token"),
    "tpot_ms_p50": Metric("ms", "time per output token, median"),
    "tpot_ms_p99": Metric("ms", "time per output token, 99th percentile"),
    "prefill_tokens_per_s": Metric("tokens/s", "prompt tokens of all sequences over prefill time"),
    "prompt_tokens": Metric("tokens", "length of the longest prompt"),
    "generated_tokens": Metric("tokens", "tokens generated for each sequence"),
    "create_s": Metric("s", "making or loading the packed weights"),
    "compile_s": Metric("s", "tracing and compiling, apart from any timed step"),
    "gflops_per_s": Metric("1e9 FLOP/s", "two operations for each multiply-add"),
    "gb_per_s": Metric("1e9 bytes/s", "bytes that had to move, over the time it took"),
    # Beside another program: the samples of such a record are the ratios, a round each.
    "round": Metric("count", "which round of an interleaved comparison, from 1"),
    "speed_ratio": Metric("", "our tokens/s over the peer's in the same round, median"),
    "speed_ratio_low": Metric("", "lower end of the median's 95 % interval"),
    "speed_ratio_high": Metric("", "upper end of the median's 95 % interval"),
    # The line through steps of several sizes: t = fixed_ms + bytes / streaming rate.
    "fixed_ms": Metric("ms", "time of a step that does not grow with its bytes"),
    "fixed_error_ms": Metric("ms", "standard error of fixed_ms"),
    "streaming_gb_per_s": Metric("1e9 bytes/s", "bytes a step reads over the time they add"),
    "worst_residual_share": Metric("fraction", "largest distance of a step from the line"),
    # Loading a stored model, beside reading its files in the same round.
    "file_bytes": Metric("bytes", "the files of a stored model"),
    "file_read_s": Metric("s", "one read of these files from the page cache, median"),
    "load_read_ratio": Metric("", "time of a load over that read of the same round, median"),
    "load_read_ratio_low": Metric("", "lower end of the median's 95 % interval"),
    "load_read_ratio_high": Metric("", "upper end of the median's 95 % interval"),
    # Memory.
    "load_memory_bytes": Metric("bytes", "most that a load held beyond what was resident before"),
    "peak_memory_bytes": Metric("bytes", "most memory resident up to the end of this phase"),
    "planned_memory_bytes": Metric("bytes", "what the plan said before anything was allocated"),
    "devices": Metric("count", "devices of the mesh that ran it; absent where there is none"),
    "available_memory_bytes": Metric("bytes", "free for this process before it began"),
    "weight_bytes": Metric("bytes", "packed projections, scales, norms, embedding and head"),
    "cache_bytes": Metric("bytes", "keys and values of all layers and sequences"),
    # Energy: absent where the machine does not tell.
    "joules": Metric("J", "energy over the timed steps"),
    "joules_per_token": Metric("J/token", "energy over the timed steps by tokens generated"),
    "watts": Metric("W", "mean power over the timed steps"),
    # The model.
    "parameters": Metric("count", "all parameters"),
    "ternary_parameters": Metric("count", "parameters of the projections the scheme packs"),
    "bits_per_weight": Metric("bits", "stored bits of one projection weight, scales included"),
    "nonzero_share": Metric("fraction", "codes that are not zero"),
    # Training.
    "steps": Metric("count", "updates of the parameters"),
    "trained_tokens": Metric("tokens", "targets of all updates together, repeats counted"),
    "train_tokens_per_s": Metric("tokens/s", "targets over the time of their updates, median"),
    "matrix_gflops_per_s": Metric("1e9 FLOP/s", "a large product's rate, measured in the same run"),
    "share_of_matrix_rate": Metric("fraction", "the updates' products over that rate"),
    "step_time_ratio": Metric("", "time of an update over the floats' of the same round, median"),
    "step_time_ratio_low": Metric("", "lower end of the median's 95 % interval"),
    "step_time_ratio_high": Metric("", "upper end of the median's 95 % interval"),
    "kills": Metric("count", "runs killed with SIGKILL at a random moment and then resumed"),
    "identical_count": Metric("count", "of them ended as the run that was not, to the bit"),
    # Over training seeds.
    "seeds": Metric("count", "models trained alike, each from another seed"),
    "seed_bits_per_byte": Metric("bits/byte", "mean of the seeds' bits_per_byte"),
    "seed_bits_per_byte_low": Metric("bits/byte", "lower end of its 95 % interval over seeds"),
    "seed_bits_per_byte_high": Metric("bits/byte", "upper end of that interval"),
    "gap_bits_per_byte": Metric("bits/byte", "less the float model's of the same seed, mean"),
    "gap_bits_per_byte_low": Metric("bits/byte", "lower end of its 95 % interval over seeds"),
    "gap_bits_per_byte_high": Metric("bits/byte", "upper end of that interval"),
    # Quality.
    "loss_nats": Metric("nats/token", "mean cross-entropy"),
    "perplexity": Metric("", "exp(loss_nats)"),
    "perplexity_low": Metric("", "lower end of its 95 % interval over the text"),
    "perplexity_high": Metric("", "upper end of that interval"),
    "bits_per_byte": Metric("bits/byte", "bits of all targets over the bytes they stand for"),
    "bits_per_byte_low": Metric("bits/byte", "lower end of its 95 % interval over the text"),
    "bits_per_byte_high": Metric("bits/byte", "upper end of that interval"),
    "bits_per_byte_difference": Metric("bits/byte", "bits_per_byte less the reference's, paired"),
    "bits_per_byte_difference_low": Metric("bits/byte", "lower end of its 95 % interval"),
    "bits_per_byte_difference_high": Metric("bits/byte", "upper end of that interval"),
    "kl_bits": Metric("bits/token", "mean divergence from the reference's distribution"),
    "kl_bits_low": Metric("bits/token", "lower end of its 95 % interval over the text"),
    "kl_bits_high": Metric("bits/token", "upper end of that interval"),
    "logit_cosine": Metric("", "mean cosine between a token's logits and the reference's"),
    "sequences": Metric("count", "sequences evaluated"),
    "scored_tokens": Metric("tokens", "targets of all sequences"),
    "scored_bytes": Metric("bytes", "bytes of text that these targets stand for"),
    "text_groups": Metric("count", "files or runs of sequences drawn together for the intervals"),
    "kl_nats": Metric("nats/token", "mean divergence from the clean model's distribution"),
    "top1_agreement": Metric("fraction", "positions whose likeliest token is the clean model's"),
    "top1_agreement_low": Metric("fraction", "lower end of its 95 % interval over the text"),
    "top1_agreement_high": Metric("fraction", "upper end of that interval"),
    "max_abs_error": Metric("", "largest difference from the reference result"),
    "relative_error": Metric("fraction", "norm of a weight's change over the weight's own"),
    "output_snr_db": Metric("dB", "power of a projection's outputs over that of their change"),
    # Predictions held against rates that others measured, or we did before.
    "reference_tokens_per_s": Metric("tokens/s", "measured or published rate of the same thing"),
    "prediction_error": Metric("fraction", "predicted over reference rate, less 1"),
    # Where a predicted step stands under the roofline, and what it costs.
    "intensity": Metric("op/byte", "operations of a step by the bytes it reads"),
    "critical_intensity": Metric("op/byte", "where the device's two limits meet"),
    "usd_per_million_tokens": Metric("USD", "at the catalogue's price of the devices"),
    # Noise. A strength is in the noise's own unit: a rate, or a deviation over the scale.
    "changed_count": Metric("count", "values the noise changed"),
    "noise_strength": Metric("", "strength of the noise: its rate, sigma, size, cut or step"),
    "noise_draws": Metric("count", "draws of the noise behind a mean"),
    "bits_per_byte_rise": Metric(
        "bits/byte", "bits_per_byte less the clean model's, mean of draws"
    ),
    "bits_per_byte_rise_low": Metric("bits/byte", "lower end of its 95 % interval over draws"),
    "bits_per_byte_rise_high": Metric("bits/byte", "upper end of that interval"),
    "bits_per_byte_rise_text_low": Metric("bits/byte", "lower end of its interval over the text"),
    "bits_per_byte_rise_text_high": Metric("bits/byte", "upper end of that interval"),
    "top5_agreement": Metric("fraction", "the clean model's likeliest token is among five"),
    "product_cosine": Metric("", "clean and noisy outputs of a projection, mean of projections"),
    "product_cosine_closed_form": Metric("", "the same for weights and inputs without a mean"),
    "product_cosine_error": Metric("", "most that a projection's plug-in is off, mean of draws"),
    "sensitivity": Metric("bits/byte", "rise for error power as large as a projection's outputs"),
    "tolerated_005": Metric("", "strength that costs 0.05 bits/byte, geometric mean of draws"),
    "tolerated_005_low": Metric("", "lower end of its 95 % interval over draws"),
    "tolerated_005_high": Metric("", "upper end of that interval"),
    "tolerated_020": Metric("", "strength that costs 0.2 bits/byte, geometric mean of draws"),
    "tolerated_020_low": Metric("", "lower end of its 95 % interval over draws"),
    "tolerated_020_high": Metric("", "upper end of that interval"),
}

"""Steps `decode-*`, `batches-*` and `prefill-*`: whole models of random ternary weights.

`ternax.decoding` measures each point; the model is made once for all points of a step. Long
contexts begin filled, so that nobody waits for their prefill.
"""

import dataclasses
import functools
import gc
import time
from collections.abc import Sequence

from ternax import measure
from ternax.configs import get_config
from ternax.decoding import DecodeRun
from ternax.errors import TernaxError
from ternax.gpu.made import EXPERIMENT, Step
from ternax.record import Record
from ternax.workload import Workload, first_device

# Enough that energy counters move; the first comes from prefill, the second warms up.
_TOKENS, _PROMPT = 258, 1
_TINY_TOKENS, _TINY_CONTEXT = 6, 64


def at_context(context: int, batch: int = 1, kv_dtype: str = "bf16") -> Workload:
    """Decoding whose middle step reads `context` slots."""
    filled = context - _PROMPT - _TOKENS // 2
    return Workload(
        batch=batch, prompt_length=_PROMPT, num_tokens=_TOKENS, filled=filled, kv_dtype=kv_dtype
    )


def ending_at(context: int, batch: int = 1, kv_dtype: str = "bf16") -> Workload:
    """Decoding up to `context` slots."""
    return dataclasses.replace(
        at_context(context, batch, kv_dtype), filled=context - _PROMPT - _TOKENS
    )


def prefill(tokens: int) -> Workload:
    return Workload(prompt_length=tokens, num_tokens=3)


SINGLE = (at_context(1024), ending_at(8192))
SMALL = (at_context(1024),)
BATCHES = tuple(at_context(1024, batch, "int8") for batch in (64, 16, 4))
PREFILL = (prefill(2048), prefill(512))


def tiny(workload: Workload) -> Workload:
    """The same on a scale at which nothing is found out."""
    length = min(workload.prompt_length, _TINY_CONTEXT)
    filled = min(workload.filled, _TINY_CONTEXT)
    tokens = min(workload.num_tokens, _TINY_TOKENS)
    return dataclasses.replace(
        workload,
        batch=min(workload.batch, 4),
        prompt_length=length,
        num_tokens=tokens,
        filled=filled,
    )


def run(step: Step, name: str, points: Sequence[Workload]) -> None:
    """Records of `experiments.decode` for each point, as of this experiment."""
    from ternax.random_weights import random_model

    config = get_config("tiny-bitnet" if step.rehearse else name)
    start = time.perf_counter()
    model = random_model(config, embed_dtype="int8", head_dtype="int8")
    seconds = time.perf_counter() - start
    metrics = {"create_s": seconds}
    peak = measure.peak_resident_bytes(first_device())
    if peak is not None:
        metrics["peak_memory_bytes"] = peak
    step.keep(
        "create",
        metrics,
        "random weights, packed from birth, compiling included",
        samples=[seconds],
        config=config.name,
        scheme=config.scheme,
        inputs=config.inputs,
        layers=config.num_layers,
    )
    last = 0.0
    for workload in map(tiny, points) if step.rehearse else points:
        label = f"{config.name}, batch {workload.batch}, context {workload.context}"
        if step.left_s < last:
            step.say(f"{label}: no time left")
            continue
        start = time.monotonic()
        try:
            phases = ("compile", "decode" if workload.filled else "prefill")
            job = DecodeRun(config, workload, flags_text=step.flags, model=model)
            job.measure_all(watch=functools.partial(_keep, step, phases))
            del job
        except TernaxError as error:
            step.say(f"{label}: {error}")
        except Exception as error:  # what the compiler or the driver says
            said = (str(error).strip() or "it said nothing").splitlines()[0][:200]
            step.say(f"{label}: FAILED: {type(error).__name__}: {said}")
        gc.collect()  # the cache of this point, before the next one's
        last = time.monotonic() - start


def _keep(step: Step, phases: Sequence[str], record: Record) -> None:
    if record.phase in phases:
        note = "; ".join(part for part in (record.note, step.note) if part)
        step.keep_record(dataclasses.replace(record, experiment=EXPERIMENT, note=note))

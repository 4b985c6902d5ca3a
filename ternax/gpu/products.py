"""Steps `kernels-*`: every kernel at a model's shapes, beside what multiplies other weights.

A kernel runs alone, many times in one program over a ring of weights larger than the L2
(`kernels.ring`); contenders take turns, sample by sample. A line through the times of the
shapes tells what a call costs apart from its bytes.
"""

import concurrent.futures
import statistics
import time
from collections.abc import Sequence

from ternax import estimate
from ternax.gpu import contenders
from ternax.gpu.contenders import Contender, Shape
from ternax.gpu.facts import throttled
from ternax.gpu.made import Step
from ternax.kernels import ring, shapes

BATCHES = (1, 16, 8, 4, 64)
_ROUNDS = 7
_COMPILERS = 8
# A tiny ring where nothing is to be found out.
_TINY_RING_BYTES = 1 << 16


def run(step: Step, model: str, names: Sequence[str], batches: Sequence[int] = BATCHES) -> None:
    """A Record a contender, shape and batch, then one a contender and batch: its line.

    names: of `contenders.CONTENDERS`; those that cannot run here say why, once.
    """
    ring_bytes = _TINY_RING_BYTES if step.rehearse else ring.RING_BYTES
    runs: list[Contender] = []
    for name in names:
        contender = contenders.CONTENDERS[name](ring_bytes)
        why = contender.why_not()
        if why:
            step.say(f"{model}: without {name}: {why}")
        else:
            runs.append(contender)
    parts = {name: Shape(name, *shape) for name, shape in shapes.products(model).items()}
    last = 0.0
    for batch in batches:
        if step.left_s < last:
            step.say(f"{model}: no time left for batch {batch}")
            continue
        start = time.monotonic()
        _batch(step, model, runs, list(parts.values()), batch)
        last = time.monotonic() - start


def _batch(step: Step, model: str, runs: list[Contender], parts: list[Shape], batch: int) -> None:
    timed = prepared(step, runs, parts, batch)
    found: dict[str, list[tuple[int, float]]] = {}
    for shape in parts:
        lanes = {c.name: (c, timed[c.name, shape]) for c in runs if (c.name, shape) in timed}
        samples = sampled(step, shape, batch, {name: lane for name, (_, lane) in lanes.items()})
        for name, taken in samples.items():
            contender, lane = lanes[name]
            nbytes = contender.weight_bytes(shape)
            _keep(step, contender, shape, batch, taken, lane.calls)
            if not shape.name.endswith(":head"):
                found.setdefault(name, []).append((nbytes, statistics.median(taken)))
    for name, points in found.items():  # the head is another kernel, and weighs too much
        _keep_line(step, model, name, batch, points)


def prepared(
    step: Step, runs: Sequence[Contender], parts: Sequence[Shape], batch: int
) -> dict[tuple[str, Shape], ring.Timed]:
    """What can be timed, compiled and warm. What cannot says why and is left out."""
    found: dict[tuple[str, Shape], ring.Timed] = {}
    waiting = {}
    with concurrent.futures.ThreadPoolExecutor(_COMPILERS) as pool:
        for contender in runs:
            for shape in filter(contender.takes, parts) if contender.compiled else ():
                try:
                    program = contender.timed(shape, batch)
                    assert isinstance(program, ring.Program)
                    waiting[contender.name, shape] = pool.submit(program.lower().compile)
                except Exception as error:
                    _say_failed(step, contender.name, shape, batch, error)
        for key, future in waiting.items():
            try:
                found[key] = future.result()
            except Exception as error:
                _say_failed(step, *key, batch, error)
    # Not while XLA compiles: its autotuner allocates, which ends a capture of a CUDA graph.
    for contender in runs:
        for shape in () if contender.compiled else filter(contender.takes, parts):
            try:
                found[contender.name, shape] = contender.timed(shape, batch)
            except Exception as error:
                _say_failed(step, contender.name, shape, batch, error)
    for key, timed in list(found.items()):
        try:
            timed.run(1)
        except Exception as error:
            del found[key]
            _say_failed(step, *key, batch, error)
    return found


def _say_failed(step: Step, name: str, shape: Shape, batch: int, error: Exception) -> None:
    said = (str(error).strip() or "it said nothing").splitlines()[0][:200]
    step.say(f"{shape.name} x {batch}: {name} failed: {type(error).__name__}: {said}")


def sampled(
    step: Step, shape: Shape, batch: int, lanes: dict[str, ring.Timed]
) -> dict[str, list[float]]:
    """Seconds of a call, round by round: forwards, then backwards. What fails is left out."""
    taken: dict[str, list[float]] = {name: [] for name in lanes}
    names = list(lanes)
    for number in range(_ROUNDS):
        for name in names if number % 2 else names[::-1]:
            if name not in taken:
                continue
            try:
                taken[name].append(ring.sample_s(lanes[name]))
            except Exception as error:
                del taken[name]
                _say_failed(step, name, shape, batch, error)
    for name, samples in list(taken.items()):
        try:
            ring.median_s(samples)
        except ValueError as error:
            del taken[name]
            _say_failed(step, name, shape, batch, error)
    return taken


def _keep(step: Step, contender: Contender, shape: Shape, batch: int, taken, calls: int) -> None:
    seconds, nbytes = statistics.median(taken), contender.weight_bytes(shape)
    metrics = {
        "gb_per_s": nbytes / seconds / 1e9,
        "gflops_per_s": 2 * batch * shape.k * shape.n / seconds / 1e9,
        "weight_bytes": nbytes,
        "call_us": 1e6 * seconds,
    }
    if step.read_gb_per_s:
        metrics["read_bandwidth_gb_per_s"] = step.read_gb_per_s
        metrics["share_of_read"] = nbytes / seconds / 1e9 / step.read_gb_per_s
    reason = throttled()
    step.keep(
        "kernel",
        metrics,
        f"K {shape.k}, N {shape.n}; {calls} calls a program over "
        f"{contender.layers(shape)} matrices{f'; throttled: {reason}' if reason else ''}"
        f"{contender.note(shape, batch)}",
        samples=taken,
        config=shape.name,
        inputs=contender.inputs,
        backend=contender.name,
        layers=contender.layers(shape),
        batch=batch,
    )


def _keep_line(step: Step, model: str, name: str, batch: int, points) -> None:
    """t = fixed + bytes / rate through the shapes of a model."""
    if len({nbytes for nbytes, _ in points}) < 2:
        return
    line = estimate.line([nbytes for nbytes, _ in points], [seconds for _, seconds in points])
    metrics = {"fixed_us": 1e6 * line.fixed, "worst_residual_share": line.worst_share}
    if line.slope > 0:
        metrics["streaming_gb_per_s"] = 1e-9 / line.slope
    step.keep(
        "kernel",
        metrics,
        f"a line through {len(points)} shapes: time of a call over the bytes of its weights",
        samples=[seconds for _, seconds in points],
        config=model,
        backend=name,
        batch=batch,
    )

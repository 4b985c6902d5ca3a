"""Step `tune`: settings of the decode kernel at the shapes of 70b, 8b and 2b4t."""

import concurrent.futures
import pathlib
import statistics

import jax.numpy as jnp

from ternax.gpu.contenders import Backend, Shape, kernel_alone
from ternax.gpu.made import Step
from ternax.kernels import ring, shapes, target, tuning
from ternax.kernels.pallas import decode
from ternax.provenance import environment

MODELS = ("70b", "8b", "2b4t")
_ROUNDS = 5


def run(step: Step) -> None:
    """A Record a shape and number of rows; `tuned/<device>.json` grows with each."""
    mosaic = Backend(ring.RING_BYTES, "mosaic")
    why = mosaic.why_not()
    if why:
        step.say(f"tune: {why}")
        return
    device = target.current()
    for model in MODELS:
        for name, size in shapes.products(model).items():
            if name.endswith(":head"):
                continue
            for rows in tuning.ROWS:
                if step.left_s < 0:
                    step.say(f"tune: no time left for {name}, {rows} rows and what follows")
                    return
                _shape(step, mosaic, Shape(name, *size), rows, device)


def _shape(step: Step, mosaic: Backend, shape: Shape, rows: int, device: target.Target) -> None:
    x = jnp.asarray(ring.host_rows(rows, shape.k))
    w, repeats = mosaic.weights(shape), mosaic.repeats(shape)
    first = decode.heuristic(device.core_count)
    tried = tuning.space(device.core_count, rows)
    settings = [first, *(config for config in tried if config != first)]
    programs = [kernel_alone(w, x, config, repeats) for config in settings]
    timed: list[tuple[dict[str, int], ring.Timed]] = []
    with concurrent.futures.ThreadPoolExecutor(len(programs)) as pool:
        compiled = [pool.submit(program.lower().compile) for program in programs]
        for config, future in zip(settings, compiled, strict=True):
            try:
                program = future.result()
                program.run(1)
            except Exception as error:  # a setting that this device does not take
                said = (str(error).strip() or "it said nothing").splitlines()[0][:120]
                step.say(f"tune: {shape.name}, {config}: {type(error).__name__}: {said}")
            else:
                timed.append((config, program))
    taken: list[list[float]] = [[] for _ in timed]
    for number in range(_ROUNDS):
        order = range(len(timed))
        for i in order if number % 2 else reversed(order):
            taken[i].append(ring.sample_s(timed[i][1]))
    found = [(config, s) for (config, _), s in zip(timed, taken, strict=True) if min(s) > 0]
    if not found:
        step.say(f"tune: {shape.name}, {rows} rows: no setting could be timed")
        return
    entry = tuning.entry((shape.k, shape.n), rows, found)
    about = environment()
    path = tuning.write(
        pathlib.Path(step.folder) / "tuned", device.kind, [entry], about.versions, about.commit
    )
    best = next(samples for config, samples in found if config == entry["config"])
    settled = ", ".join(f"{name} {value}" for name, value in entry["config"].items())
    metrics = {"call_us": entry["median_us"], "weight_bytes": mosaic.weight_bytes(shape)}
    metrics["gb_per_s"] = metrics["weight_bytes"] / entry["median_us"] / 1e3
    before = [1e6 * statistics.median(samples) for config, samples in found if config == first]
    heuristic = f"the heuristic's took {before[0]:.4g} us" if before else "not the heuristic's"
    step.keep(
        "kernel",
        metrics,
        f"tuned for {rows} rows: {settled}; {len(found)} settings tried, {heuristic}; {path.name}",
        samples=best,
        config=shape.name,
        inputs="int8",
        backend="mosaic",
        layers=mosaic.layers(shape),
        batch=rows,
    )

"""Step `tune`: settings of the chain and of the decode kernel for 70b, 8b and 2b4t."""

import concurrent.futures
import pathlib
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ternax.configs import get_config
from ternax.gpu import chains
from ternax.gpu.contenders import Backend, Shape, kernel_alone
from ternax.gpu.made import Step
from ternax.kernels import ring, shapes, target, tuning
from ternax.kernels.pallas import backend, chain, decode
from ternax.provenance import environment

MODELS = ("70b", "8b", "2b4t")
_ROUNDS = 5


class Search(NamedTuple):
    """What is tuned.

    Attributes:
      kernel: "chain" or "decode".
      config: for its record: "70b:o".
      shape: (K, N) that its settings go by.
      rows: of tuning.ROWS.
      nbytes: of a call's weights.
      first: the heuristic's settings.
      program: settings -> what is timed.
      once: settings -> one product, to be compared.
      error: over the largest value, that two settings may differ by.
    """

    kernel: str
    config: str
    shape: tuple[int, int]
    rows: int
    nbytes: int
    first: dict[str, int]
    program: Callable[[dict[str, int]], ring.Program]
    once: Callable[[dict[str, int]], jax.Array]
    error: float = 0.0


def run(step: Step) -> None:
    """A Record a kernel, shape and number of rows; `tuned/<device>.json` grows with each."""
    why = Backend(ring.RING_BYTES, "mosaic").why_not()
    if why:
        step.say(f"tune: {why}")
        return
    for search in searches():
        if step.left_s < 0:
            step.say(f"tune: no time left for {search.config}, {search.rows} rows, and the rest")
            return
        _tune(step, search)


def searches() -> Iterator[Search]:
    """Model by model: the chain, which steps of up to 16 rows run, then the decode kernel."""
    cores = target.current().core_count
    for name in MODELS:
        links = chains.links_of(get_config(name))
        fit = [rows for rows in tuning.ROWS if chain.why_not(links, rows, cores) is None]
        made = chains.weights_of(links) if fit else []
        for rows in fit:
            yield _of_chain(name, links, made, rows)
        del made
        mosaic = Backend(ring.RING_BYTES, "mosaic")
        for part, size in shapes.products(name).items():
            for rows in tuning.ROWS if not part.endswith(":head") else ():
                yield _of_decode(mosaic, Shape(part, *size), rows, cores)


def _of_chain(name: str, links, made, rows: int) -> Search:
    widest = max((link.shape for link in links), key=lambda shape: shape[0] * shape[1])

    real = 1 if rows == 8 else rows  # of what is padded to 8, one row is asked for most

    def program(config):
        return chains.program(links, real, tuple(config.items()), made)

    def once(config):
        return chains.once(links, real, tuple(config.items()), made)[0][:real]

    first = dict(backend.chain_heuristic([link.shape for link in links], rows))
    first["alone"] = int(first["alone"] and chain.enters_alone(links, real, links[0].shape[1]))
    nbytes, config = chains.bytes_of(links), f"{name}:chain"
    return Search("chain", config, widest, rows, nbytes, first, program, once, chains.ERROR)


def _of_decode(mosaic: Backend, shape: Shape, rows: int, cores: int) -> Search:
    x = jnp.asarray(ring.host_rows(rows, shape.k))
    w, repeats = mosaic.weights(shape), mosaic.repeats(shape)

    def program(config):
        return kernel_alone(w, x, config, repeats)

    def once(config):
        return decode.accumulate(x, w.data, w.shape, jnp.int32(1), config)

    nbytes, first = mosaic.weight_bytes(shape), decode.heuristic(cores)
    return Search("decode", shape.name, w.shape, rows, nbytes, first, program, once)


def _tune(step: Step, search: Search) -> None:
    device = target.current()
    cores = device.core_count
    chained = search.kernel == "chain"
    tried = tuning.chain_space(search.first) if chained else tuning.space(cores, search.rows)
    settings = [search.first, *(config for config in tried if config != search.first)]
    found = _timed(step, search, settings)
    if not found:
        step.say(f"tune: {search.config}, {search.rows} rows: no setting could be timed")
        return
    entry = tuning.entry(search.kernel, search.shape, search.rows, found)
    off = _difference(search.once(entry["config"]), search.once(search.first))
    if not off <= search.error:
        step.say(f"tune: {search.config}, {entry['config']} WRONG: off by {off:.3g}, not kept")
        return
    about = environment()
    folder = pathlib.Path(step.folder) / "tuned"
    path = tuning.write(folder, device.kind, [entry], about.versions, about.commit)
    before = [1e6 * statistics.median(s) for config, s in found if config == search.first]
    heuristic = f"the heuristic's took {before[0]:.4g} us" if before else "not the heuristic's"
    settled = ", ".join(f"{name} {value}" for name, value in entry["config"].items())
    step.say(
        f"{search.config}, {search.rows} rows: {settled}: {entry['median_us']} us; {heuristic}"
    )
    step.keep(
        "kernel",
        {
            "call_us": entry["median_us"],
            "gb_per_s": search.nbytes / entry["median_us"] / 1e3,
            "weight_bytes": search.nbytes,
        },
        f"tuned for {search.rows} rows: {settled}; {len(found)} settings tried, {heuristic}; "
        f"{path.name}",
        samples=next(samples for config, samples in found if config == entry["config"]),
        config=search.config,
        inputs="int8",
        backend="mosaic",
        batch=search.rows,
    )


def _difference(found: jax.Array, expected: jax.Array) -> float:
    """The largest, over the largest value; not a number if either has one that is none."""
    found, expected = (jnp.asarray(array, jnp.float32) for array in (found, expected))
    return float(jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected)))


def _timed(step: Step, search: Search, settings: list[dict[str, int]]):
    """[(settings, seconds of each sample)] of those that this device takes, in turn."""
    timed: list[tuple[dict[str, int], ring.Program]] = []

    def say(config, error):
        said = (str(error).strip() or "it said nothing").splitlines()[0][:120]
        step.say(f"tune: {search.config}, {config}: {type(error).__name__}: {said}")

    with concurrent.futures.ThreadPoolExecutor(len(settings)) as pool:
        waiting = []
        for config in settings:
            try:
                waiting.append((config, pool.submit(search.program(config).lower().compile)))
            except Exception as error:
                say(config, error)
        for config, future in waiting:
            try:
                program = future.result()
                program.run(1)
            except Exception as error:
                say(config, error)
            else:
                timed.append((config, program))
    taken: list[list[float]] = [[] for _ in timed]
    for number in range(_ROUNDS):
        order = range(len(timed))
        for i in order if number % 2 else reversed(order):
            taken[i].append(ring.sample_s(timed[i][1]))
    return [(config, s) for (config, _), s in zip(timed, taken, strict=True) if min(s) > 0]

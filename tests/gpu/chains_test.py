"""What a chain is held against, held against the chain itself as the interpreter runs it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ternax.gpu import chains, goals, screen
from ternax.gpu import made as made_step
from ternax.kernels import bench, ring
from ternax.kernels.packing import FORMATS, Packed
from ternax.kernels.pallas import backend, chain, tiles

if jax.__version_info__ < backend.MIN_JAX:
    pytest.skip("this jax has no interpreter of Mosaic GPU", allow_module_level=True)

LINKS = (
    chain.Link((96, 64), "input", False, 0.0),
    chain.Link((64, 320), "residual", True, 1e-5),
    chain.Link((160, 64), "silu", False, 0.0),
    chain.Link((64, 128), "residual", True, 1e-5),
)


def made(link):
    k_size, n = link.shape
    data = jnp.zeros((2, 1, n, FORMATS["trit2"].row_bytes(k_size)), jnp.uint8)
    w = Packed(bench.fill(data, "trit2"), jnp.ones((2, 1, 1, 1)), shape=link.shape)
    scale = jnp.abs(ring.random_bits((2, n), jnp.bfloat16).astype(jnp.float32)) / k_size**0.5
    norm = jnp.ones((2, k_size)) if link.normed else None
    return tiles.repack(w), scale, norm


def test_its_steps_are_the_chain():
    rows, weights = 2, [made(link) for link in LINKS]
    stream, given = chains._inputs(LINKS, rows)
    one = jnp.int32(1)
    arrays = [chain.Weights(w.data, scale, norm, one, one) for w, scale, norm in weights]
    config = {**chain.heuristic(1), "stages": 4, "ahead": 3}
    found, after = jax.jit(
        lambda stream, given: chain.run(LINKS, arrays, stream, given, rows, config, interpret=True)
    )(stream, given)
    expected, expected_after = chains.in_steps(LINKS, weights, 1, stream[:rows], given[:rows])
    for ours, theirs in ((found, expected), (after, expected_after)):
        off = np.max(np.abs(ours[:rows] - theirs)) / np.max(np.abs(theirs))
        assert off <= chains.ERROR
    # Of gate and up, rows whose codes are lost are seen.
    w, *rest = weights[1]
    lost = dataclasses.replace(w, data=w.data.at[1, 0, 0, :512].set(0))
    other, _ = chains.in_steps(
        LINKS, [weights[0], (lost, *rest), *weights[2:]], 1, stream[:rows], given[:rows]
    )
    assert np.max(np.abs(other - expected)) / np.max(np.abs(expected)) > chains.ERROR


def test_cycles_are_turned_into_time_by_each_processors_own_clock():
    cycles = np.array([[0xFFFFFF00, 0x100, 0x500], [7, 7 + 1024, 7 + 3072]])
    ns = np.array([[10, 266, 778], [0xFFFFFFF0, 0x1F0, 0x5F0]])
    marks = np.stack([cycles, ns], axis=-1).astype(np.uint32).view(np.int32)
    assert chains.intervals_us(marks) == pytest.approx(np.array([[0.256, 0.512], [0.512, 1.024]]))


def test_each_part_of_a_launch_has_a_mark():
    names = chain.mark_names(LINKS)
    assert len(names) == len(set(names)) == 3 + 4 * len(LINKS)
    assert names[0] == "begun" and names[-1] == "left" and names[4] == "0 multiplied"


def test_where_the_time_goes_is_told_and_shown():
    """Its record has no rate, so that nothing takes it for a kernel's."""
    names = chain.mark_names(LINKS)[1:]
    taken = np.arange(3 * len(names), dtype=float).reshape(3, -1)
    records = []
    step = made_step.Step(100, records.append, print)
    note = chains.marks_note(names, taken)
    assert "0 met 18.00 (36.00), 0 known 19.00 (37.00)" in note
    record = step.keep("kernel", {}, note, samples=[1.0], unit="us", config="70b:chain", batch=1)
    shown = screen.said(record)
    assert shown[0].startswith("70b:chain x 1") and max(map(len, shown)) <= screen.WIDTH
    assert set(shown) <= set(screen.table(records))
    exact = step.keep("kernel", {"relative_error": 0.0}, "exactness, 1 rows: as its steps")
    before = [goal.find([exact]) for goal in goals.GOALS]
    assert [goal.find([exact, record]) for goal in goals.GOALS] == before

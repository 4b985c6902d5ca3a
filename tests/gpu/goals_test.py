"""What a day found, on the screen and beside its goals; the day here is made up."""

import dataclasses

import pytest

from ternax.gpu import goals, screen
from ternax.record import Record


def make(**changes) -> Record:
    fields = dict(
        experiment="gpu_day",
        config="70b",
        scheme="absmean",
        inputs="int8",
        backend="mosaic",
        device="NVIDIA H200",
        layers=80,
        batch=1,
        context=0,
        phase="kernel",
        kind="measured",
    )
    return Record(**(fields | changes))


def kernel(shape, batch, backend, us, gb_per_s, **changes):
    return make(
        config=shape,
        batch=batch,
        backend=backend,
        samples=[1e-6 * us] * 3,
        sample_unit="s",
        metrics={"call_us": us, "gb_per_s": gb_per_s},
        **({"note": "K 8192, N 1"} | changes),
    )


def decode(config, batch, context, tokens_per_s, **changes):
    return make(
        config=config,
        batch=batch,
        context=context,
        phase="decode",
        samples=[0.005],
        sample_unit="s/token",
        metrics={
            "tokens_per_s": tokens_per_s,
            "tpot_ms_p50": 5.0,
            "share_of_bound": 0.8,
            "read_bandwidth_gb_per_s": 4000.0,
            "joules_per_token": 2.5,
            "watts": 500.0,
        },
        **changes,
    )


def read(note, rate, name="read_bandwidth_gb_per_s"):
    return make(
        phase="device",
        config="",
        samples=[rate],
        sample_unit="GB/s",
        metrics={name: rate},
        note=note,
    )


@pytest.fixture
def day():
    found = [
        make(phase="device", config="", metrics={"watts": 99.5}, note="NVIDIA H200, driver 580"),
        read("read 1024 MiB, XLA max, in one program", 4000.0),
        read("read 16384 MiB, torch sum, in one program", 4400.0),
        read("copy 1024 MiB, XLA copy, in one program", 4500.0, "copy_bandwidth_gb_per_s"),
        make(config="70b:o", metrics={"max_abs_error": 0}, note="exactness, 1 rows: exact"),
    ]
    times = {"qkv": 6.0, "o": 5.0, "gate_up": 30.0, "down": 15.0}
    for batch in (1, 8, 16, 64):
        for part, us in times.items():
            shape, mb = f"70b:{part}", {"qkv": 21, "o": 16.8, "gate_up": 117.4, "down": 58.7}[part]
            us = us * (1 + batch / 160)
            found.append(kernel(shape, batch, "mosaic", us, mb / us * 1e3))
            for other, times_as_long in (("XLA bf16", 7.2), ("torch int8", 3.5)):
                found.append(kernel(shape, batch, other, us * times_as_long, 4000.0))
    found += [
        kernel("70b:o", 1, "mosaic", 9.0, 1866.0, note="K 8192, N 1; CUDA graphs off"),
        make(
            batch=1,
            metrics={"fixed_us": 1.5, "streaming_gb_per_s": 4200.0, "worst_residual_share": 0.02},
            samples=[1e-6],
            sample_unit="s",
            note="a line",
        ),
        decode("70b", 1, 1153, 195.0),
        decode("70b", 1, 8192, 150.0),
        decode("70b", 16, 1153, 1000.0),
        decode("70b", 1, 1153, 120.0, note="CUDA graphs off"),
        decode("bitnet-2b4t", 1, 1153, 1800.0),
        make(
            phase="prefill",
            context=2051,
            samples=[0.2],
            sample_unit="s",
            metrics={"prefill_tokens_per_s": 9000.0, "ttft_ms": 200.0, "prompt_tokens": 2048},
        ),
    ]
    return found


def by_name(day):
    return {goal.what: (goal, goal.find(day)) for goal in goals.GOALS}


def test_goals_are_found_and_judged(day):
    found = by_name(day)

    def judged(start):
        [(goal, value)] = [pair for what, pair in found.items() if what.startswith(start)]
        return value, None if value is None else goal.reached(value)

    assert goals.best_read(day) == 4400
    share, word = judged("70b gate_up")
    assert share == pytest.approx(117.4 / (30 * 161 / 160) * 1e3 / 4400) and word == "at least"
    assert judged("70b's products at batch 8") == (pytest.approx(168 / 161), "moonshot")
    assert judged("XLA's bf16 over ours") == (pytest.approx(7.2), "goal")
    assert judged("70b, batch 1, context 1k") == (195, "goal")  # and not those without graphs
    assert judged("70b, batch 1, context 8k") == (150, "at least")
    assert judged("70b, batch 16") == (1000, "below")
    assert judged("70b, batch 64") == (None, None)
    assert judged("70b, prefill of 2048") == (9000, "goal")
    assert judged("2b4t") == (pytest.approx(0.8 * 4000 / 4400), "goal")


def test_the_screen_fits_and_holds_it_all(day):
    lines = screen.table(day)
    assert max(map(len, lines)) <= screen.WIDTH
    text = "\n".join(lines)
    assert "exactness: 1 checks, 0 failed" in text and "best read 4,400 GB/s" in text
    assert [line.split() for line in lines if line.startswith("  70b:down ")][0] == [
        *("70b:down", "1", "15.1", "3,890", "88", "%", "109", "7.20x", "52.8", "3.50x")
    ]
    assert "models, CUDA graphs off" in text and "kernels alone, CUDA graphs off" in text
    assert sum("not measured" in line for line in lines) == 2
    assert screen.table([]) == ["nothing was found"]


def test_what_is_wrong_is_shown_and_counted(day):
    bad = make(config="70b:o", note="exactness, 1 rows: WRONG in 3 sums")
    assert goals.wrong([*day, bad]) == [bad]
    assert "exactness: 2 checks, 1 failed" in screen.table([*day, bad])


def test_a_record_is_a_line_as_it_comes(day):
    lines = [line for record in day for line in screen.said(record)]
    assert "70b:qkv x 1, mosaic: 6.04 us, 3,480 GB/s" in lines
    assert "70b, prefill of 2048 x 1: 9,000 tokens/s" in lines
    assert any(line.startswith("70b, batch 1, context 1153: 195 tokens/s") for line in lines)
    assert all(len(line) <= screen.WIDTH for line in lines)


def test_an_unfinished_decode_is_no_figure(day):
    cut = [dataclasses.replace(r, incomplete=True) if r.phase == "decode" else r for r in day]
    assert by_name(cut)["70b, batch 1, context 1k, tokens/s"][1] is None

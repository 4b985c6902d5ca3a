"""A model's programs as a compiler for H200s sees them: bytes and exchanges as planned."""

import os
import re
import subprocess
import sys

import pytest

from ternax import ahead, collectives, launches
from ternax.errors import UsageError
from ternax.experiments import plan
from ternax.kernels import aot
from ternax.record import read_records
from tests import split


def test_a_decode_step_compiles_for_four_h200():
    if reason := aot.why_not():
        pytest.skip(reason)
    # A process of its own: jax takes up its CUDA plugin only before it first looks at devices.
    command = [sys.executable, "-m", "experiments.aot", "--config=70b", "--layers=2"]
    done = subprocess.run(
        command, cwd=split.ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""}
    )
    assert done.returncode == 0, done.stderr  # 5 where exchanges are not those planned
    compiled, planned = (
        int(re.findall(rf"{word}\s+([\d,]+) bytes", done.stdout)[0].replace(",", ""))
        for word in ("compiled", "planned")
    )
    # Beside weights and cache a step takes a token, a flag and a key a row, and a count.
    assert compiled - planned == 4 + 1 + 8 + 4


@pytest.mark.skipif(bool(aot.why_not()), reason=aot.why_not() or "")
def test_a_step_of_one_h200_is_three_kernels_a_layer_and_fits():
    """70b whole, 8,192 tokens: what runs, and what the compiler plans, in bytes."""
    words = ["--config=70b", "--mesh=tensor:1", "--context=8192"]
    command = [sys.executable, "-m", "experiments.aot", *words]
    done = subprocess.run(
        command, cwd=split.ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""}
    )
    assert done.returncode == 0, done.stderr
    # Attention's two and the chain; the rest are copies and sums of a loop counter.
    assert float(re.findall(r"a layer\s+([\d.]+) launches", done.stdout)[0]) <= 6
    held = int(re.findall(r"compiled\s+([\d,]+) bytes", done.stdout)[0].replace(",", ""))
    amount, unit = re.findall(r"of a step ([\d.]+) (\w+)", done.stdout)[0]
    assert held + float(amount) * {"MiB": 2**20, "GiB": 2**30}[unit] < 30e9


def test_launches_are_counted_in_the_loop_over_layers():
    name = 'metadata={op_name="jit(decode)/while/body/while/body/'
    text = f"""HloModule jit_decode

%fused_add (param: s32[]) -> s32[] {{
  ROOT %add.1 = s32[] add(%param, %param), {name}add"}}
}}

%region_1 (arg: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {{
  %arg = (s32[], f32[4,8]) parameter(0)
  %one = s32[] get-tuple-element(%arg), index=0
  %copy.1 = s32[1] copy(%one)
  %loop_add_fusion = s32[] fusion(%one), kind=kLoop, calls=%fused_add, {name}add"}}
  %mpmd_map.1 = (f32[4,8], f32[4,8]) custom-call(%one), {name}jit(_run)/ternax_chain/mpmd_map"}}
  %mpmd_map.2 = (f32[4,8], f32[4,8]) custom-call(%one), {name}jit(_run)/ternax_chain/mpmd_map"}}
  ROOT %tuple.1 = (s32[], f32[4,8]) tuple(%one, %one)
}}

ENTRY %main (p: s32[]) -> s32[] {{
  ROOT %p = s32[] parameter(0)
}}
"""
    assert launches.a_layer(text) == 2  # a copy, a fusion and two chains, for two layers
    assert launches.a_layer(text.replace("ternax_chain", "ternax_decode")) == 4
    assert launches.a_layer("ENTRY %main (p: s32[]) -> s32[] {\n}\n") is None


@pytest.mark.skipif(bool(aot.why_not()), reason=aot.why_not() or "")
@pytest.mark.parametrize("devices", [1, 4])
def test_a_plan_takes_the_compilers_word(devices, tmp_path):
    """Arguments as planned, temporaries and collectives in the record: one GPU, and a split."""
    words = ["--config=1b", "--device=h200", f"--devices={devices}", "--context=256", "--compile"]
    command = [sys.executable, "-m", "experiments.plan", *words, f"--output_dir={tmp_path}"]
    done = subprocess.run(
        command, cwd=split.ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""}
    )
    assert done.returncode == 0, done.stderr
    m = read_records(tmp_path / "results.jsonl")[0].metrics
    # Norms and the cache's counters are copied, not split: 1/500 of what a device of four holds.
    held = m["device_memory_bytes"] - m["activations_bytes"]
    assert m["compiled_argument_bytes"] == pytest.approx(held, rel=3e-3)
    assert m["activations_bytes"] == max(m["compiled_prefill_bytes"], m["compiled_decode_bytes"])
    # Of each layer two sums and two maxima; the embedded rows, and the gathered logits.
    assert m["collectives"] == (0 if devices == 1 else 4 * 16 + 2)
    assert ("no collectives" in done.stdout) == (devices == 1)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--device=l40s"], "--device must be one of h100-sxm, h200-sxm, found l40s"),
        (["--scheme=nvfp4"], "--scheme must be one of trit2"),
        (["--tables=q6_k"], "--tables must be one of fp16"),
        (["--kv=fp8"], "--kv must be one of fp16"),
        (["--config=mistral-24b"], "--compile compiles one model"),
        (["--batch=1,2"], "--compile compiles one model"),
        (["--objective=cost"], "--compile compiles one model"),
    ],
)
def test_what_cannot_be_compiled(flags, says, tmp_path, capsys):
    assert plan.main([*flags, "--compile", f"--output_dir={tmp_path}"]) == 2
    assert says in capsys.readouterr().err


def test_a_machine_without_the_compiler_says_what_it_needs(tmp_path, capsys):
    with pytest.raises(UsageError, match="device must be one of .*h200.*, found 'l40s'"):
        ahead.mesh_of("l40s", {"tensor": 1})
    if reason := aot.why_not():
        assert plan.main(["--config=1b", "--compile", f"--output_dir={tmp_path}"]) == 2
        err = " ".join(capsys.readouterr().err.split())
        assert f"error: cannot compile ahead of time here: {reason}" in err


def test_exchanges_of_a_gpu_program():
    """As XLA:GPU writes them: some are started and awaited, some are not."""
    body = 'metadata={op_name="jit(decode)/while/body/while/body/psum"}'
    text = "\n".join(
        [
            f"  %a = f32[1,1]{{1,0}} all-reduce(%x), channel_id=1, {body}",
            f"  %b = ((s32[1,8192]{{1,0}}), s32[1,8192]{{1,0}}) all-reduce-start(%y), {body}",
            f"  %c = s32[1,8192]{{1,0}} all-reduce-done(%b), {body}",
            '  %d = f32[96]{0} all-gather(%z), metadata={op_name="jit(decode)/while/body/x"}',
        ]
    )
    assert collectives.of_program(text, 3) == [
        collectives.Collective("all-reduce", 32768, 3),
        collectives.Collective("all-gather", 384, 1),
        collectives.Collective("all-reduce", 4, 3),
    ]


def test_exchanges_outside_the_loops_count_once():
    text = """
      %a = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}
      %b = (f32[4], f32[8]) all-gather-start(%y), dimensions={0}
      %c = f32[8] all-gather-done(%b)
      %d = f32[8] add(%a, %c), metadata={op_name="all-reduce"}
    """
    found = collectives.of_program(text, layers=3)
    assert [(one.kind, one.nbytes, one.times) for one in found] == [
        ("all-gather", 32, 1),
        ("all-reduce", 32, 1),
    ]

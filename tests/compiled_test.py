"""The compiler's bytes against the plan's, where there is one; what is refused anywhere."""

import json
import subprocess
import sys

import pytest

from ternax.collectives import of_program
from ternax.compiled import compile_model
from ternax.configs import get_config
from ternax.errors import UsageError
from ternax.experiments import plan
from ternax.kernels import aot
from ternax.record import read_records

GIVEN = dict(weights="trit2", tables="fp16", kv="fp16", batch=1, context=64, prompt=16)


@pytest.mark.parametrize(
    "device, changes, says",
    [
        ("l40s", {}, "--device must be one of h100-sxm, h200-sxm, found l40s"),
        ("h100-sxm", {"weights": "nvfp4"}, "--scheme must be one of trit2"),
        ("h100-sxm", {"tables": "q6_k"}, "--tables must be one of fp16"),
        ("h100-sxm", {"kv": "fp8"}, "--kv must be one of fp16"),
    ],
)
def test_what_cannot_be_compiled(device, changes, says):
    with pytest.raises(UsageError, match=says):
        compile_model(get_config("tiny-llama"), device, **GIVEN | changes)


@pytest.mark.parametrize(
    "flags", [["--config=mistral-24b"], ["--devices=2"], ["--batch=1,2"], ["--objective=cost"]]
)
def test_it_is_of_one_program(flags, tmp_path, capsys):
    assert plan.main([*flags, "--compile", f"--output_dir={tmp_path}"]) == 2
    assert "--compile compiles one model" in capsys.readouterr().err


@pytest.mark.skipif(not aot.why_not(), reason="everything is here")
def test_a_machine_without_the_compiler_says_what_it_needs(tmp_path, capsys):
    assert plan.main(["--config=1b", "--compile", f"--output_dir={tmp_path}"]) == 2
    assert f"error: --compile: {aot.why_not()}" in " ".join(capsys.readouterr().err.split())


def test_collectives_are_counted_in_a_programs_text():
    text = """
      %a = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}
      %b = (f32[4], f32[8]) all-gather-start(%y), dimensions={0}
      %c = f32[8] all-gather-done(%b)
      %d = f32[8] add(%a, %c), metadata={op_name="all-reduce"}
    """
    found = of_program(text, layers=3)
    assert [(one.kind, one.nbytes, one.times) for one in found] == [
        ("all-gather", 32, 1),
        ("all-reduce", 32, 1),
    ]


@pytest.mark.skipif(bool(aot.why_not()), reason=aot.why_not() or "")
def test_the_compiler_agrees_with_the_plan(tmp_path):
    """In a process of its own: the compiler must be asked for before jax sees its devices."""
    words = ["--config=1b", "--device=h200", "--context=256", "--compile"]
    command = [sys.executable, "-m", "ternax.experiments.plan", *words]
    done = subprocess.run(
        [*command, f"--output_dir={tmp_path}"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "compiled arguments" in done.stdout
    m = read_records(tmp_path / "results.jsonl")[0].metrics
    planned = m["device_memory_bytes"] - m["activations_bytes"]
    assert m["compiled_argument_bytes"] == pytest.approx(planned, rel=1e-3)
    assert m["activations_bytes"] == max(m["compiled_prefill_bytes"], m["compiled_decode_bytes"])
    assert m["collectives"] == 0 and json.loads((tmp_path / "results.json").read_text())

"""What a user can get wrong: one line, the right exit code, nothing allocated, nothing written."""

import subprocess
import sys

import pytest

from ternax import cost, measure
from ternax.experiments import decode
from ternax.kernels import backends

USAGE, NO_ROOM, BAD_FILE, NO_OUTPUT = 2, 3, 4, 6

ROWS = [
    # command line, exit code, words of the one line
    # Names.
    ("--config=71b", USAGE, "no model is named '71b'; nearest: 1b, 70b"),
    ("--config=70B", USAGE, "no model is named '70B'; nearest"),
    ("--config=", USAGE, "no model is named ''"),
    ("--config.hiden_size=64", USAGE, "--config.hiden_size: no such field; nearest: hidden_size"),
    ("--hidden_size=64", USAGE, "it is a field of the model: --config.hidden_size"),
    ("--bacth=2", USAGE, "--bacth: no such flag; nearest: --batch"),
    ("70b", USAGE, "unexpected argument '70b'"),
    ("--scheme=ternery", USAGE, "scheme: expected one of absmean, twn"),
    ("--scheme=", USAGE, "scheme: expected one of absmean, twn"),
    ("--scheme=no.such.module:Class", USAGE, "scheme: cannot import 'no.such.module:Class'"),
    ("--scheme=ternax.quant:NoClass", USAGE, "scheme: cannot import 'ternax.quant:NoClass'"),
    ("--scheme=os:path", USAGE, "must be a subclass of ternax.quant.Scheme"),
    ("--scheme=absmean,size=3", USAGE, "expected key=value with key among granularity"),
    ("--scheme=absmean,granularity=column", USAGE, "granularity must be one of tensor, row, group"),
    ("--scheme=int4,group_size=wide", USAGE, "group_size must be int, found 'wide'"),
    ("--scheme=int4,group_size=24", USAGE, "group_size must be a multiple of 16 that divides"),
    ("--scheme=int4,group_size=96", USAGE, "that divides K = 2048, found 96"),
    ("--scheme=twn --config.scheme=sign", USAGE, "--scheme and --config.scheme must agree"),
    ("--backend=tpu9", USAGE, "--backend: no backend is named 'tpu9'; there are: "),
    ("--backend=", USAGE, "--backend: no backend is named ''"),
    ("--plan_only --backend=tpu9", USAGE, "--backend: no backend is named 'tpu9'"),
    ("--inputs=int4", USAGE, "--inputs must be one of int8, none, found 'int4'"),
    ("--kv_dtype=int2", USAGE, "--kv_dtype must be one of bf16, int8, f32, found 'int2'"),
    ("--embed_dtype=fp8", USAGE, "--embed_dtype must be one of f32, bf16, int8, int4"),
    ("--fit=perhaps", USAGE, "--fit must be one of refuse, auto, found 'perhaps'"),
    # Types.
    ("--batch=two", USAGE, "--batch must be an integer, found 'two'"),
    ("--batch=1.5", USAGE, "--batch must be an integer, found '1.5'"),
    ("--batch", USAGE, "--batch needs a value"),
    ("--num_tokens=", USAGE, "--num_tokens must be an integer, found ''"),
    ("--config.num_layers=many", USAGE, "--config.num_layers must be an integer, found 'many'"),
    ("--config.norm_eps=small", USAGE, "--config.norm_eps must be a finite number, found 'small'"),
    ("--config.tie_embeddings=maybe", USAGE, "must be true or false, found 'maybe'"),
    ("--plan_only=perhaps", USAGE, "--plan_only must be true or false"),
    # Numbers out of range.
    ("--layers=0", USAGE, "--layers must be at least 1, found 0"),
    ("--layers=-1", USAGE, "--layers must be at least 1, found -1"),
    ("--layers=17", USAGE, "--layers must be at most 16, the layers of 1b, found 17"),
    ("--config.num_layers=0", USAGE, "config.num_layers must be at least 1, found 0"),
    ("--batch=0", USAGE, "--batch must be at least 1, found 0"),
    ("--batch=-4", USAGE, "--batch must be at least 1, found -4"),
    ("--prompt_length=0", USAGE, "--prompt_length must be at least 1, found 0"),
    ("--prompt_length=-5", USAGE, "--prompt_length must be at least 1, found -5"),
    ("--num_tokens=2", USAGE, "--num_tokens must be at least 3, found 2"),
    ("--num_tokens=131072", USAGE, "1b's context of 131072 tokens, found 16 + 131072"),
    ("--config=2b4t --prompt_length=4090", USAGE, "context of 4096 tokens, found 4090 + 16"),
    ("--config=tiny-llama --num_tokens=241", USAGE, "context of 256 tokens, found 16 + 241"),
    (f"--config=tiny-llama --prompt={'x' * 241}", USAGE, "context of 256 tokens, found 241 + 16"),
    ("--seed=-1", USAGE, "--seed must be at least 0"),
    ("--seed=4294967296", USAGE, "--seed must be at most 4294967295"),
    ("--threads=0", USAGE, "--threads must be at least 1"),
    ("--threads=100000", USAGE, "--threads must be at most"),
    # What does not go together.
    ("--config.num_heads=5", USAGE, "must be a multiple of config.num_kv_heads, found 5 and 8"),
    ("--config.num_kv_heads=3", USAGE, "a multiple of config.num_kv_heads, found 32 and 3"),
    ("--config.head_dim=7", USAGE, "config.head_dim must be even"),
    ("--head_dtype=bf16", USAGE, "expected equal embed_dtype and head_dtype, found int8 and bf16"),
    ("--prompt=", USAGE, "--prompt must hold at least one character"),
    ("--prompt=hello --prompt_length=9", USAGE, "--prompt_length is for random prompts"),
    ("--prompt=hello --config.vocab_size=200", USAGE, "a vocabulary of at least 256"),
    # What does not fit into the 2 GiB that this machine is made to have.
    ("--config=70b", NO_ROOM, "70b does not fit: it needs 18."),
    ("--config=70b --plan_only --fit=auto --batch=100000", NO_ROOM, "no other model of its family"),
    ("--config=8b --prompt_length=100000", NO_ROOM, "available 2.00 GiB; would fit: --fit=auto"),
    ("--config=1b --batch=100000", NO_ROOM, "would fit: --batch="),
    ("--config=1b --config.hidden_size=1000000", NO_ROOM, "1b(hidden_size=1000000) does not fit"),
    ("--config=1b --batch=1000000000000", NO_ROOM, "1b does not fit"),
    ("--config=1b --scheme=none", NO_ROOM, "projections 1.81 GiB"),
    # Where nothing can be written, or what is there is no result.
    ("--output_dir=file", NO_OUTPUT, "output directory file cannot be used: "),
    ("--output_dir=file/below", NO_OUTPUT, "output directory file/below cannot be used: "),
    ("--output_dir=/proc/nowhere/below", NO_OUTPUT, "cannot be used: "),
    ("--output_dir=taken", NO_OUTPUT, "output directory taken cannot be used: results.jsonl is"),
    ("--profile_dir=file/below", NO_OUTPUT, "--profile_dir: file/below cannot be used: "),
    ("--output_dir=strange", BAD_FILE, "strange/results.jsonl: line 1: not a record"),
]


class Touched(AssertionError):
    """Something was allocated or measured."""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A directory of its own, 2 GiB of memory, and an alarm on whatever costs time or memory."""

    def alarm(*args, **kwargs):
        raise Touched

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ternax.random_weights.random_model", alarm)
    monkeypatch.setattr("ternax.nn.cache.init_cache", alarm)
    monkeypatch.setattr(measure, "read_bandwidth", alarm)
    monkeypatch.setattr(measure, "limit_threads", lambda threads: None)
    monkeypatch.setattr(cost, "available_bytes", lambda device=None: 2 << 30)
    (tmp_path / "file").write_text("I was here first\n")
    (tmp_path / "taken" / "results.jsonl").mkdir(parents=True)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "results.jsonl").write_text("no record\n")
    return tmp_path


def contents(directory):
    return {
        path.relative_to(directory): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


@pytest.mark.parametrize("line, code, words", ROWS, ids=[row[0][:60] for row in ROWS])
def test_bad_input(line, code, words, machine, capsys):
    before = contents(machine)
    assert decode.main(line.split()) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert words in err and "Traceback" not in err
    assert contents(machine) == before


def test_the_alarm_is_set(machine):
    """Else the rows above would prove nothing: a good command line sets it off."""
    assert decode.main(["--config=tiny-llama", "--output_dir=new"]) == 1
    with pytest.raises(Touched):
        decode.run(decode.COMMAND.parse(["--config=tiny-llama"]).config, decode.Workload())


def test_a_backend_that_this_machine_lacks(machine, monkeypatch, capsys):
    lacking = backends.Backend("hopper", lambda platform, x, w: "it needs a Hopper GPU", None, None)
    monkeypatch.setitem(backends.BACKENDS, "hopper", lacking)
    assert decode.main(["--backend=hopper"]) == USAGE
    assert capsys.readouterr() == (
        "",
        "error: --backend: backend 'hopper' cannot run here: it needs a Hopper GPU\n",
    )


def test_a_jax_without_devices(machine, monkeypatch, capsys):
    def devices():
        raise RuntimeError("Unable to initialize backend 'cuda':\nno such thing")

    monkeypatch.setattr("jax.devices", devices)
    assert decode.main([]) == USAGE
    assert capsys.readouterr() == (
        "",
        "error: JAX finds no device: Unable to initialize backend 'cuda': no such thing\n",
    )


def test_debug_shows_where(machine, capsys):
    assert decode.main(["--config=71b", "--debug"]) == USAGE
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "\nerror: config: no model is named" in err


def test_as_a_program(machine):
    """The exit code and the streams, as a shell sees them."""
    child = subprocess.run(
        [sys.executable, "-m", "ternax.experiments.decode", "--config=71b"],
        cwd=decode.__file__.rpartition("/experiments/")[0],
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert child.returncode == USAGE and child.stdout == ""
    assert child.stderr.startswith("error: ") and child.stderr.count("\n") == 1

"""The shared command line: what is parsed, what is refused, and how errors end."""

import dataclasses
import errno
import os
import pathlib
import subprocess
import sys

import pytest

from ternax import configs, errors
from ternax.experiments import config_flag, flags

ROOT = pathlib.Path(__file__).resolve().parents[2]


def own_flags(define):
    define.section("Probe")
    define.integer("batch", 1, "sequences together", lower=1)
    define.number("temperature", 0.0, "of sampling", lower=0.0)
    define.string("prompt", None, "text to continue")
    define.choice("fit", "refuse", ("refuse", "auto"), "when it does not fit")
    define.boolean("plan_only", "stop after the plan")


COMMAND = flags.Command(
    name="probe",
    summary="Answers nothing; " + "it is long-winded about it " * 8,
    groups=(flags.model_flags, own_flags, flags.run_flags),
    examples=(
        ("--config=70b", "the large one"),
        ("--config=70b --layers=4", "less of it"),
        ("--config.num_layers=4", "another model"),
    ),
)
PLAIN = flags.Command(name="plain", summary="Knows no model.", groups=(flags.run_flags,))


def parse(*argv):
    return COMMAND.parse(argv)


# --- Legal command lines -----------------------------------------------------------------


def test_defaults():
    args = parse()
    assert args.config == configs.get_config("1b")
    assert (args.layers, args.scheme, args.inputs) == (16, "absmean", "int8")
    assert (args.batch, args.fit, args.plan_only, args.output_dir) == (1, "refuse", False, None)
    assert args.given == frozenset() and args.command_line == ""


@pytest.mark.parametrize(
    "line, base, changes",
    [
        ("--config=70b", "70b", {}),
        ("--config 70b", "70b", {}),
        ("-config=70b", "70b", {}),
        ("--config=2b4t", "bitnet-2b4t", {}),
        ("--config=1b --config=70b", "70b", {}),
        ("--config=70b --config.hidden_size=1024", "70b", {"hidden_size": 1024}),
        ("--config.hidden_size=1024 --config=70b", "70b", {"hidden_size": 1024}),
        ("--config.hidden_size 1024 --config 70b", "70b", {"hidden_size": 1024}),
        ("--config=70b --config.num_layers=4 --config.num_layers=5", "70b", {"num_layers": 5}),
        ("--config.num_layers=4", "1b", {"num_layers": 4}),
        ("--config=70b --config.tie_embeddings", "70b", {"tie_embeddings": True}),
        ("--config=70b --config.tie_embeddings=true", "70b", {"tie_embeddings": True}),
        ("--noconfig.tie_embeddings --config=1b", "1b", {"tie_embeddings": False}),
        ("--config=70b --config.norm_eps=1e-6", "70b", {"norm_eps": 1e-6}),
        ("--config=70b --config.rope_theta=10000", "70b", {"rope_theta": 10000.0}),
        ("--config=70b --config.activation=relu2", "70b", {"activation": "relu2"}),
        # Only legal together: the model is checked when all of it is known.
        (
            "--config=70b --config.num_kv_heads=3 --config.num_heads=6",
            "70b",
            {"num_kv_heads": 3, "num_heads": 6},
        ),
        ("--config=70b --config.num_layers=80", "70b", {}),  # what it was: the same model
    ],
)
def test_config_in_any_order(line, base, changes):
    config = parse(*line.split()).config
    for field, value in changes.items():
        assert type(getattr(config, field)) is type(value)
    expected = dataclasses.replace(configs.get_config(base), **changes)
    if changes:
        words = ",".join(f"{field}={value}" for field, value in changes.items())
        expected = dataclasses.replace(expected, name=f"{base}({words})")
    assert config == expected


def test_nested_override():
    args = parse("--config.rope_scaling.factor=4", "--config=70b")
    assert args.config.rope_scaling.factor == 4.0
    assert args.config.rope_scaling.original_context == 8192
    assert args.config.name == "70b(rope_scaling.factor=4.0)"
    assert configs.get_config("70b").rope_scaling.factor == 8.0  # the named model stays


def test_scheme_and_inputs_keep_the_name():
    for argv in (
        ["--scheme=int4,group_size=64", "--inputs=none"],
        ["--config.scheme=int4,group_size=64", "--config.inputs=none"],
        [
            "--config.scheme=int4,group_size=64",
            "--scheme=int4,group_size=64",
            "--config.inputs=none",
        ],
    ):
        args = parse("--config=tiny-llama", *argv)
        assert (args.config.name, args.config.scheme, args.config.inputs) == (
            "tiny-llama",
            "int4,group_size=64",
            "none",
        )
        assert (args.scheme, args.inputs) == ("int4,group_size=64", "none")


def test_layers_measure_a_part_and_num_layers_make_another_model():
    assert parse("--config=70b", "--layers=10").layers == 10
    assert parse("--config=70b", "--layers=10").config.num_layers == 80
    assert parse("--config=70b", "--config.num_layers=10").layers == 10


def test_own_flags_values_and_what_was_given():
    args = parse(
        "--batch",
        "4",
        "--prompt",
        "-5 degrees",
        "--plan_only",
        "--temperature=.5",
        "--nodebug",
        "--config.num_layers=2",
    )
    assert (args.batch, args.prompt, args.plan_only, args.temperature) == (
        4,
        "-5 degrees",
        True,
        0.5,
    )
    assert args.given == {
        "batch",
        "prompt",
        "plan_only",
        "temperature",
        "debug",
        "config.num_layers",
    }
    assert "'-5 degrees'" in args.command_line


def test_a_flag_as_value_is_not_taken_for_a_flag():
    assert parse("--prompt=--config=70b").config.name == "1b"


def test_each_parse_starts_anew():
    parse("--config=70b", "--batch=4", "--config.num_layers=2")
    args = parse()
    assert (args.config.name, args.batch) == ("1b", 1)


# --- Bad command lines -------------------------------------------------------------------

BAD = [
    # argv, words the line must hold
    (["--config=71b"], "no model is named '71b'; nearest: 1b, 70b"),
    (["--config=70B"], "nearest"),
    (["--config="], "no model is named ''"),
    (["--config"], "--config needs a value"),
    (["--config", "--batch=2"], "--config needs a value"),
    (["--config.hiden_size=3"], "--config.hiden_size: no such field; nearest: hidden_size"),
    (["--config.qqqqq=3"], "no such field"),
    (["--config.=3"], "no such field"),
    (["--config.hidden_size"], "--config.hidden_size needs a value"),
    (["--config.hidden_size=wide"], "must be an integer, found 'wide'"),
    (["--config.hidden_size=1e3"], "must be an integer, found '1e3'"),
    (["--config.hidden_size=0"], "config.hidden_size must be at least 1, found 0"),
    (["--config.hidden_size.x=1"], "single value and has no fields"),
    (["--config.norm_eps=nan"], "must be a finite number, found 'nan'"),
    (["--config.rope_theta=inf"], "must be a finite number, found 'inf'"),
    (["--config.rope_theta=1e999"], "must be a finite number"),
    (["--config.tie_embeddings=maybe"], "must be true or false, found 'maybe'"),
    (["--noconfig.tie_embeddings=true"], "takes no value"),
    (["--config.family=gpt"], "config.family must be one of llama, bitnet"),
    (["--config.activation=gelu"], "config.activation must be one of silu, relu2"),
    (["--config.num_heads=5"], "must be a multiple of config.num_kv_heads, found 5 and 8"),
    (["--config.head_dim=7"], "config.head_dim must be even"),
    (["--config.name=mine"], "--config.name cannot be changed"),
    (["--config.rope_scaling=3"], "is set by its fields: --config.rope_scaling.factor"),
    (["--config.rope_scaling.factr=3"], "nearest: rope_scaling.factor"),
    (["--config=13b", "--config.rope_scaling.factor=3"], "rope_scaling is None in 13b"),
    (["--config=13b", "--config.rope_scaling=3"], "cannot be set"),
    (["--config.rope_scaling.low_freq_factor=9"], "must lie between 0 and high_freq_factor"),
    (["--hidden_size=3"], "it is a field of the model: --config.hidden_size"),
    (["--btch=3"], "--btch: no such flag; nearest: --batch"),
    (["--zqzq"], "--zqzq: no such flag; --help shows all"),
    (["--nobatch"], "no such flag"),
    (["--flagfile=/etc/passwd"], "no such flag"),
    (["--undefok=btch", "--btch=1"], "no such flag"),
    (["--batch=0"], "--batch must be at least 1, found 0"),
    (["--batch=-3"], "--batch must be at least 1, found -3"),
    (["--batch=two"], "--batch must be an integer, found 'two'"),
    (["--batch=1.5"], "--batch must be an integer, found '1.5'"),
    (["--batch="], "--batch must be an integer, found ''"),
    (["--batch"], "--batch needs a value"),
    (["--temperature=-1"], "--temperature must be at least 0.0, found -1"),
    (["--temperature=nan"], "--temperature must be a finite number"),
    (["--temperature=hot"], "--temperature must be a finite number, found 'hot'"),
    (["--fit=perhaps"], "--fit must be one of refuse, auto, found 'perhaps'"),
    (["--inputs=int4"], "--inputs must be one of int8, none, found 'int4'"),
    (["--plan_only=perhaps"], "--plan_only must be true or false"),
    (["--noplan_only=1"], "takes no value"),
    (["--layers=0"], "--layers must be at least 1, found 0"),
    (["--layers=17"], "--layers must be at most 16, the layers of 1b, found 17"),
    (["--config.num_layers=4", "--layers=5"], "at most 4, the layers of 1b(num_layers=4)"),
    (["--seed=-1"], "--seed must be at least 0"),
    (["--seed=4294967296"], "--seed must be at most 4294967295"),
    (["--threads=0"], "--threads must be at least 1"),
    (["--threads=100000"], "--threads must be at most"),
    (["--scheme=twn", "--config.scheme=sign"], "--scheme and --config.scheme must agree"),
    (["70b"], "unexpected argument '70b'"),
    (["--", "--batch=2"], "unexpected argument '--'"),
    (["-"], "unexpected argument '-'"),
    (["--=3"], "unexpected argument"),
    (["--plan_only", "false"], "unexpected argument 'false'"),
]


@pytest.mark.parametrize("argv, words", BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(argv, words, capsys):
    ran = []
    assert COMMAND.run(ran.append, argv) == 2
    out, err = capsys.readouterr()
    assert ran == [] and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert "Traceback" not in err


def test_a_command_without_a_model_knows_no_config(capsys):
    assert PLAIN.run(print, ["--config=70b"]) == 2
    assert "--config: no such flag" in capsys.readouterr().err
    assert not hasattr(PLAIN.parse([]), "config")


# --- Pages -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["-h"],
        ["--nonsense", "--help"],
        ["--list_configs"],
        *(["--print_config", f"--config={name}"] for name in configs.CONFIGS),
    ],
    ids=" ".join,
)
def test_pages_fit_and_exit_0(argv, capsys):
    assert COMMAND.run(pytest.fail, argv) == 0
    out, err = capsys.readouterr()
    assert err == "" and max(map(len, out.splitlines())) <= config_flag.WIDTH


def test_help_shows_every_flag_its_default_and_the_examples():
    page = COMMAND.help()
    for words in (
        "--config=NAME",
        "[1b]",
        "--batch=N",
        "[1]",
        "--seed=N",
        "[0]",
        "--plan_only",
        "--fit=refuse|auto",
        "[refuse]",
        "--output_dir=DIR",
        "experiments.probe --config=70b",
    ):
        assert words in page
    assert "--config" not in PLAIN.help()


def test_list_configs_names_all_and_counts_when_it_can():
    table = config_flag.config_table()
    assert all(name in table for name in [*configs.CONFIGS, *configs.ALIASES])
    assert "parameters" not in table
    assert "7 B" in config_flag.config_table(lambda config: 7_000_000_000)


def test_print_config_explains_each_field(capsys):
    COMMAND.run(pytest.fail, ["--config=70b", "--config.num_layers=4", "--print_config"])
    out = capsys.readouterr().out
    assert "num_layers = 4" in out and "L, number of blocks." in out
    assert "rope_scaling.factor = 8.0" in out and "name = 70b(num_layers=4)" in out


def test_version(capsys):
    assert COMMAND.run(pytest.fail, ["--version"]) == 0
    assert "ternax 0." in capsys.readouterr().out


# --- How a run ends ----------------------------------------------------------------------


class XlaRuntimeError(RuntimeError):
    pass


ENDINGS = [
    (None, 0, ""),
    (errors.UsageError("a flag"), 2, "a flag"),
    (errors.BackendUnavailable("no such kernel"), 2, "no such kernel"),
    (errors.DoesNotFit("needs 20 GiB"), 3, "needs 20 GiB"),
    (errors.BadModelFile("m.gguf", "tensor 3", "short"), 4, "m.gguf: tensor 3: short"),
    (errors.NumericCheckFailed("off by one"), 5, "off by one"),
    (errors.OutputError("two\nlines"), 6, "two lines"),
    (errors.Interrupted("saved"), 130, "saved"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (MemoryError("Unable to allocate 9 GiB"), 3, "out of memory: Unable to allocate 9 GiB"),
    (MemoryError(), 3, "out of memory"),
    (
        XlaRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore\nlines"),
        3,
        "RESOURCE_EXHAUSTED",
    ),
    (OSError(errno.ENOSPC, "No space left on device", "results"), 6, "results: No space left"),
    (OSError(errno.EROFS, "Read-only file system"), 6, "Read-only file system"),
    (ValueError("a bug\nof ours"), 1, "unexpected ValueError: a bug (--debug shows where)"),
]


@pytest.mark.parametrize("error, code, words", ENDINGS, ids=[repr(e) for e, _, _ in ENDINGS])
def test_endings(error, code, words, capsys):
    def body(args):
        if error:
            raise error

    assert COMMAND.run(body, []) == code
    err = capsys.readouterr().err
    if error is None:
        assert err == ""
        return
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    if not isinstance(error, KeyboardInterrupt):
        assert COMMAND.run(body, ["--debug"]) == code
        assert "Traceback" in capsys.readouterr().err


def test_a_body_may_choose_its_exit_code():
    assert COMMAND.run(lambda args: 75, []) == 75


SCRIPT = """
import sys
from ternax.experiments import flags
command = flags.Command("probe", "", groups=(flags.run_flags,))
def body(args):
    for _ in range(int(sys.argv[1])):
        print("a line of output")
sys.exit(command.run(body, []))
"""


# As users run it: output is held back until there is a block of it.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def test_a_reader_that_leaves_is_no_error():
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "100000"],
        cwd=ROOT,
        env=BUFFERED,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    child.stdout.readline()
    child.stdout.close()
    err = child.stderr.read()
    assert (child.wait(), err) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("lines", ["1", "100000"])  # found at the end, and underway
def test_a_full_disk_under_stdout(lines):
    with open("/dev/full", "w") as full:
        child = subprocess.run(
            [sys.executable, "-c", SCRIPT, lines],
            cwd=ROOT,
            env=BUFFERED,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert child.returncode == 6
    assert child.stderr == "error: cannot write: No space left on device\n"


def test_importing_is_cheap():
    code = (
        "import sys; from ternax import measure, record; from ternax.experiments import flags; "
        "print(sorted({'jax', 'flax', 'numpy'} & set(sys.modules)))"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert child.stdout.strip() == "[]"

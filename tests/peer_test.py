"""llama-bench as three forks print it, and every way in which a peer may fail."""

import json
import pathlib
import shlex
import sys
import time

import pytest

from ternax.errors import PeerFailed, UsageError
from ternax.peer import Peer, parse, parse_peer

GOLDENS = pathlib.Path(__file__).parent / "goldens"
ASKED = dict(n_prompt=128, n_gen=16, n_threads=2, samples=3)


@pytest.mark.parametrize(
    "fork, model, nbytes, parameters",
    [
        ("llama_cpp", "bitnet ?B TQ2_0 - 2.06 bpw ternary", 887910400, 2412820480),
        ("ik_llama_cpp", "bitnet-b1.58 2B IQ2_BN - 2.00 bpw Bitnet", None, 2741155840),
        ("bitnet_cpp", "bitnet-b1.58 2B I2_S - 2 bpw ternary", 1061454400, 2741155840),
    ],
)
def test_forks_are_read(fork, model, nbytes, parameters):
    printed = (GOLDENS / f"llama_bench_{fork}.json").read_text()
    prefill, decode = json.loads(printed)
    found = parse(fork, printed, **ASKED)
    assert (found.model, found.parameters) == (model, parameters)
    assert found.model_bytes == (nbytes or prefill["model_size"])
    assert found.build == prefill["build_commit"]
    # The forks' own rates, from the same samples.
    assert [128 / s for s in found.prefill_s] == pytest.approx(prefill["samples_ts"], rel=1e-4)
    assert [1 / s for s in found.decode_s] == pytest.approx(decode["samples_ts"], rel=1e-4)


def printed_tests(**changed) -> list[dict]:
    """What a peer prints for 4 prompt and 2 new tokens; `prefill__x=1` changes x of one test."""
    common = dict(model_type="m", model_size=10, model_n_params=20, build_commit="abc", n_threads=1)
    prefill = dict(common, n_prompt=4, n_gen=0, samples_ns=[8e9])
    decode = dict(common, n_prompt=0, n_gen=2, samples_ns=[1e9])
    for name, value in changed.items():
        phase, _, field = name.partition("__")
        {"prefill": prefill, "decode": decode}[phase][field] = value
    return [prefill, decode]


def read(printed: str):
    return parse("p", printed, n_prompt=4, n_gen=2, n_threads=1, samples=1)


def test_lines_round_the_list_and_its_order_do_not_matter():
    found = read(f"[INFO] loading [1]\n[1, 2]\n{json.dumps(printed_tests()[::-1])}\n[done]\n")
    assert (found.prefill_s, found.decode_s) == ((8.0,), (0.5,))


@pytest.mark.parametrize(
    "printed, why",
    [
        ("", "no list of tests"),
        ("\0\ufffd [{}]", "no list of tests"),
        ("[]", "no list of tests"),
        ("[" * 100_000, "peer p: expected"),
        ("[{}]", "KeyError: 'n_gen'"),
        (json.dumps(printed_tests()[:1]), "KeyError: 'n_gen'"),
        (json.dumps(printed_tests() + printed_tests()), "two tests with n_prompt = 4"),
        (json.dumps(printed_tests(decode__n_prompt=4)), "asked for n_prompt = 0, found 4"),
        (json.dumps(printed_tests(decode__n_gen=3)), "asked for n_gen = 2, found 3"),
        (json.dumps(printed_tests(prefill__n_threads=8)), "asked for n_threads = 1, found 8"),
        (json.dumps(printed_tests(prefill__samples_ns=[])), "asked for 1 samples, found 0"),
        (json.dumps(printed_tests(prefill__samples_ns=[0])), "samples of"),
        (json.dumps(printed_tests(prefill__samples_ns=[float("nan")])), "samples of"),
        (json.dumps(printed_tests(prefill__samples_ns=[10**400])), "OverflowError"),
        (json.dumps(printed_tests(prefill__samples_ns="fast")), "ValueError"),
        (json.dumps(printed_tests(prefill__model_size=None)), "TypeError"),
    ],
)
def test_what_was_not_asked_for_is_refused(printed, why):
    with pytest.raises(PeerFailed) as error:
        read(printed)
    assert why in str(error.value) and len(str(error.value)) < 600


# --- Processes -------------------------------------------------------------------------------


def measured(code: str, **changed):
    peer = Peer("p", (sys.executable, "-c", code))
    return peer.measure(**dict(prompt_length=4, num_tokens=2, threads=1, repetitions=1) | changed)


def test_a_peer_is_told_what_to_do():
    code = (
        f"import sys; print(sys.argv[1:], file=sys.stderr); print({json.dumps(printed_tests())!r})"
    )
    assert measured(code).decode_s == (0.5,)
    with pytest.raises(PeerFailed) as error:
        measured("import sys; sys.exit(' '.join(sys.argv[1:]))")
    assert str(error.value).endswith("ended with 1; the last it said: -t 1 -p 4 -n 2 -r 1 -o json")


@pytest.mark.parametrize(
    "code, why",
    [
        ("import sys; sys.exit(3)", "peer p ended with 3; the last it said: nothing"),
        ("import os; os.kill(os.getpid(), 9)", "peer p was ended by SIGKILL"),
        ("import os; os.write(1, bytes(range(256)))", "no list of tests"),
        ("print(input())", "EOFError"),  # nothing on stdin, so nothing waits for it
    ],
)
def test_a_peer_that_fails_is_named(code, why):
    with pytest.raises(PeerFailed, match=why):
        measured(code)


def test_a_peer_that_hangs_is_ended_with_what_it_started():
    start = time.monotonic()
    with pytest.raises(PeerFailed, match="peer p ran longer than 0.5 s; a larger --timeout_s"):
        measured("import os; os.system('sleep 60')", timeout_s=0.5)
    assert time.monotonic() - start < 10


def test_a_program_that_is_gone():
    with pytest.raises(PeerFailed, match="no/such/program: No such file"):
        Peer("p", ("no/such/program",)).measure(
            prompt_length=1, num_tokens=1, threads=1, repetitions=1
        )


# --- The flag --------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "a model.gguf"
    path.touch()
    return shlex.quote(str(path))


def test_name_and_command(model):
    peer = parse_peer(f" mine =nice {sys.executable} -m {model} -fa=1")
    assert peer.name == "mine"
    assert peer.command == ("nice", sys.executable, "-m", shlex.split(model)[0], "-fa=1")


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "must be NAME=COMMAND"),
        ("only", "must be NAME=COMMAND"),
        ("=true -m x", "must be NAME=COMMAND"),
        ("a=", "must be NAME=COMMAND"),
        ("a='true -m x", "No closing quotation"),
        (f"{'n' * 33}=true -m x", "at most 32 printable characters"),
        ("a\nb=true -m x", "at most 32 printable characters"),
        ("a=no-such-program -m x", "no-such-program is no program"),
        ("a=true", "must name one model"),
        ("a=true -m", "must name one model"),
        ("a=true -m x -m y", "must name one model .* found 2"),
        ("a=true -m x -t 2 -r 3", "-r, -t follow from --prompt_length"),
        ("a=true -m no/such.gguf", "no/such.gguf is no file"),
    ],
)
def test_a_flag_that_cannot_be_meant_is_refused(text, why):
    with pytest.raises(UsageError, match=why):
        parse_peer(text)

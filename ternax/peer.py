"""Other programs in the same measurement: llama-bench of llama.cpp and of its forks.

A peer is a command line: the path of a llama-bench and its options, the model among
them. It is run as a process of its own, and what it prints as JSON is read back.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence

from ternax.errors import PeerFailed, UsageError

# What `Peer.measure` sets itself.
_OWN_OPTIONS = {"-t", "--threads", "-p", "--n-prompt", "-n", "--n-gen", "-pg", "-o", "--output"}
_OWN_OPTIONS |= {"-r", "--repetitions"}
_LONGEST_NAME = 32


@dataclasses.dataclass(frozen=True)
class PeerSpeed:
    """What one run of a peer measured.

    Attributes:
      prefill_s: seconds to read the prompt, one a repetition.
      decode_s: seconds a token, one a repetition.
      model: the model's type and quantization, in the peer's words.
      model_bytes: size of all its tensors, as the peer counts it.
      parameters: all its parameters, as the peer counts them.
      build: the peer's commit.
    """

    prefill_s: tuple[float, ...]
    decode_s: tuple[float, ...]
    model: str
    model_bytes: int
    parameters: int
    build: str


@dataclasses.dataclass(frozen=True)
class Peer:
    """A named llama-bench with its options.

    Attributes:
      name: how tables call it.
      command: program and options; `-t -p -n -r -o` are added by `measure`.
    """

    name: str
    command: tuple[str, ...]

    def measure(
        self,
        *,
        prompt_length: int,
        num_tokens: int,
        threads: int,
        repetitions: int,
        timeout_s: float | None = None,
    ) -> PeerSpeed:
        """Runs it once. It warms itself up and measures prefill and decode apart.

        Args:
          prompt_length: tokens of the prefill.
          num_tokens: tokens decoded, from an empty context unless its options say else.
          threads: that the peer may use.
          repetitions: samples of each.
          timeout_s: after so long it is ended; None waits.

        Raises:
          PeerFailed: with the last line that it wrote to stderr.
        """
        options = dict(t=threads, p=prompt_length, n=num_tokens, r=repetitions, o="json")
        words = [word for name, value in options.items() for word in (f"-{name}", str(value))]
        done = run_program(f"peer {self.name}", [*self.command, *words], timeout_s)
        if done.returncode:
            raise PeerFailed(f"peer {self.name} {how_it_ended(done)}")
        return parse(
            self.name,
            done.stdout,
            n_prompt=prompt_length,
            n_gen=num_tokens,
            n_threads=threads,
            samples=repetitions,
        )


def run_program(
    who: str, command: Sequence[str], timeout_s: float | None
) -> subprocess.CompletedProcess[str]:
    """Runs it to its end, with nothing on stdin.

    It leads a process group of its own, so that Ctrl-C and the timeout end it together with
    what it started.

    Raises:
      PeerFailed: it does not start, or takes longer than `timeout_s`.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,
        )
    except OSError as error:
        raise PeerFailed(f"{who}: {command[0]}: {error.strerror}") from error
    with process:
        try:
            printed, said = process.communicate(timeout=timeout_s)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise PeerFailed(
                    f"{who} ran longer than {timeout_s:g} s; a larger --timeout_s waits for it"
                ) from error
            raise
    return subprocess.CompletedProcess(command, process.returncode, printed, said)


def how_it_ended(done: subprocess.CompletedProcess[str]) -> str:
    """Of a program that failed: its exit code or signal, and its last line on stderr."""
    code = done.returncode
    try:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    except ValueError:
        how = f"was ended by signal {-code}"
    said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
    return f"{how}; the last it said: {said[-1].strip()[:300]}"


def parse(name: str, printed: str, *, samples: int, **asked: int) -> PeerSpeed:
    """Reads what `llama-bench -o json` prints: a list with one object a test.

    Seconds come from `samples_ns`, the time of a whole test. Lines round the list, which
    some forks print to stdout, are passed over.

    Args:
      name: the peer's, for errors.
      printed: its stdout.
      samples: how many of each phase were asked for.
      **asked: `n_prompt`, `n_gen` and `n_threads`, as they must come back.

    Raises:
      PeerFailed: it is not what was asked for.
    """
    try:
        tests = _list_in(printed)
        found: dict[str, tuple[float, ...]] = {}
        for test in tests:
            phase = "n_gen" if test["n_gen"] else "n_prompt"
            other = "n_prompt" if test["n_gen"] else "n_gen"
            if phase in found:
                raise ValueError(f"two tests with {phase} = {test[phase]}")
            expected = {phase: asked[phase], other: 0, "n_threads": asked["n_threads"]}
            for key, value in expected.items():
                if test[key] != value:
                    raise ValueError(f"asked for {key} = {value}, found {test[key]!r}")
            tokens = test["n_gen"] or 1
            found[phase] = tuple(float(ns) / 1e9 / tokens for ns in test["samples_ns"])
            if len(found[phase]) != samples:
                raise ValueError(f"asked for {samples} samples, found {len(found[phase])}")
            if not all(math.isfinite(s) and s > 0 for s in found[phase]):
                raise ValueError(f"samples of {found[phase]} s")
        return PeerSpeed(
            prefill_s=found["n_prompt"],
            decode_s=found["n_gen"],
            model=str(tests[0]["model_type"]),
            model_bytes=int(tests[0]["model_size"]),
            parameters=int(tests[0]["model_n_params"]),
            build=str(tests[0]["build_commit"]),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise PeerFailed(
            f"peer {name}: expected a prefill and a decode test, as llama-bench -o json prints "
            f"them, found {printed[:80]!r} ({type(error).__name__}: {error})"
        ) from error


def _list_in(printed: str) -> list[dict]:
    """The JSON list that begins a line of the text."""
    for start in re.finditer(r"^\[", printed, re.MULTILINE):
        try:
            tests, _ = json.JSONDecoder().raw_decode(printed, start.start())
        except ValueError:
            continue
        if tests and all(isinstance(test, dict) for test in tests):
            return tests
    raise ValueError("no list of tests in it")


def parse_peer(text: str) -> Peer:
    """NAME=COMMAND, checked as far as that goes without running it. UsageError else."""
    name, _, command = text.partition("=")
    name = name.strip()
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--peer {name}: {error} in {command!r}") from error
    if not name or not words:
        raise UsageError(
            "--peer must be NAME=COMMAND, as in 'llama.cpp=/path/llama-bench -m model.gguf', "
            f"found {text!r}"
        )
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise UsageError(
            f"--peer: a name has at most {_LONGEST_NAME} printable characters, found {name!r}"
        )
    if shutil.which(words[0]) is None:
        raise UsageError(f"--peer {name}: {words[0]} is no program that can be run")
    models = [after for word, after in itertools.pairwise(words) if word in ("-m", "--model")]
    if len(models) != 1:
        raise UsageError(
            f"--peer {name}: its command must name one model (-m model.gguf), found {len(models)}"
        )
    if taken := _OWN_OPTIONS.intersection(words):
        raise UsageError(
            f"--peer {name}: {', '.join(sorted(taken))} follow from --prompt_length, --num_tokens, "
            "--threads and --repetitions; leave them out"
        )
    if not os.path.isfile(models[0]):
        raise UsageError(f"--peer {name}: {models[0]} is no file")
    return Peer(name, tuple(words))

"""Our decode and other programs, measured in turn, and the ratios between them.

Every round measures the memory's read rate, then each program once, each in a process of
its own and in another order than the round before; so what the machine does meanwhile
meets all alike, and a ratio never leaves its round.
"""

import collections
import dataclasses
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

from ternax import estimate, measure
from ternax.errors import DoesNotFit, Interrupted, PeerFailed, UsageError
from ternax.peer import Peer, how_it_ended, run_program
from ternax.record import Record, Store, read_records

# The phases compared, and the metric that tells the speed of each.
SPEED = {"prefill": "prefill_tokens_per_s", "decode": "tokens_per_s"}


@dataclasses.dataclass(frozen=True)
class Contest:
    """What is compared.

    Attributes:
      config: the model's name, for the peers' records.
      decode_words: arguments of `experiments.decode` that say what we run.
      peers: the other programs; none may be called as one of our backends.
      prompt_length: tokens of the prefill.
      num_tokens: tokens decoded and timed.
      rounds: how often each program is measured.
      repetitions: samples a peer takes of each phase in one round.
      threads: for every program.
      timeout_s: how long one run of a program may take; None for any time.
      flags_text: what was asked for, for the records.
    """

    config: str
    decode_words: tuple[str, ...]
    peers: tuple[Peer, ...]
    prompt_length: int
    num_tokens: int
    rounds: int
    repetitions: int
    threads: int
    timeout_s: float | None = None
    flags_text: str = ""

    def __post_init__(self):
        from ternax.kernels.backends import BACKENDS

        names = [peer.name for peer in self.peers]
        if len(set(names)) < len(names) or set(names) & {"ternax", *BACKENDS}:
            raise UsageError(
                f"--peer: names must differ from each other and from ternax, "
                f"{', '.join(BACKENDS)}, found {', '.join(names)}"
            )


def check(contest: Contest) -> None:
    """Plans our run, in a process: raises what it would raise, before any peer has run.

    Raises:
      UsageError, DoesNotFit: as `experiments.decode --plan_only` says.
      PeerFailed: it ended in another way.
    """
    command = [sys.executable, "-m", "ternax.experiments.decode", *_words(contest), "--plan_only"]
    _raise_what_it_said("our plan", run_program("our plan", command, contest.timeout_s))


def _raise_what_it_said(who: str, done: subprocess.CompletedProcess[str]) -> None:
    """Nothing for a decode that ended well; else the error that its last line is of."""
    if not done.returncode:
        return
    said = (done.stderr.strip().splitlines() or ["error: it said nothing"])[-1]
    if said.startswith("error: "):
        for kind in (UsageError, DoesNotFit):
            if done.returncode == kind.exit_code:
                raise kind(said.removeprefix("error: "))
    raise PeerFailed(f"{who} {how_it_ended(done)}")


def run(contest: Contest, store: Store, watch=lambda record: None) -> list[Record]:
    """Measures the rounds that `store` does not hold yet, then the ratios over all it holds.

    Args:
      contest: what to measure.
      store: takes the Records of a round when the round is whole.
      watch: called with each new Record, as soon as it is known.

    Returns:
      The ratio records, one for each peer and phase.

    Raises:
      PeerFailed, Interrupted: with the whole rounds kept; both say how many.
    """
    rounds = whole_rounds(store.records, contest)
    for number in range(1, contest.rounds + 1):
        if number in rounds:
            continue
        try:
            found = _round(contest, number, watch)
            for record in found:
                store.append(record)
        except (PeerFailed, KeyboardInterrupt) as error:
            kept = (
                f"{len(rounds)} of {contest.rounds} rounds are kept in {store.directory}; the same "
                "command with that --output_dir goes on from there"
            )
            if isinstance(error, PeerFailed):
                raise PeerFailed(f"{error}; {kept}") from error
            raise Interrupted(f"interrupted in round {number}; {kept}") from error
        rounds[number] = found
    ratios = []
    held = {(r.phase, r.backend): r for r in store.records if "speed_ratio" in r.metrics}
    for record in _ratios(contest, list(rounds.values())):
        # Again only where rounds have come since; the last of a name is the one that counts.
        before = held.get((record.phase, record.backend))
        if before is None or before.samples != record.samples:
            store.append(record)
            watch(record)
            before = record
        ratios.append(before)
    return ratios


def whole_rounds(records: Sequence[Record], contest: Contest) -> dict[int, list[Record]]:
    """The records of earlier rounds by number; of those cut short while written, nothing."""
    expected = (1 + len(contest.peers)) * len(SPEED)
    rounds = collections.defaultdict(list)
    for record in records:
        if "round" in record.metrics:
            rounds[int(record.metrics["round"])].append(record)
    # A round cut short is measured again, behind what there was of it.
    last = {number: found[-expected:] for number, found in sorted(rounds.items())}
    return {
        number: found
        for number, found in last.items()
        if len({(r.phase, r.backend) for r in found}) == expected
    }


def _round(contest: Contest, number: int, watch) -> list[Record]:
    """Each program once, forwards in odd rounds and backwards in even ones."""
    programs: list[Peer | None] = [None, *contest.peers]  # None is ours
    found: list[Record] = []
    before = _bandwidth(contest)
    for peer in programs if number % 2 else programs[::-1]:
        records = _ours(contest) if peer is None else _theirs(contest, peer)
        after = _bandwidth(contest)
        for record in records:
            metrics = record.metrics | {"round": number}
            if record.device == _host(contest):
                rate = statistics.median([before, after])
                if "bound_tokens_per_s" in metrics:
                    # The bound that this rate sets, measured right beside the run.
                    metrics["bound_tokens_per_s"] *= rate / metrics["read_bandwidth_gb_per_s"]
                metrics["read_bandwidth_gb_per_s"] = rate
            if "bound_tokens_per_s" in metrics:
                metrics["share_of_bound"] = metrics["tokens_per_s"] / metrics["bound_tokens_per_s"]
            found.append(dataclasses.replace(record, metrics=metrics))
            watch(found[-1])
        before = after
    return found


def _host(contest: Contest) -> str:
    """What `measure.device_name` says in a process that `--threads` limits."""
    return f"{measure.cpu_model()}, {contest.threads} threads"


def _bandwidth(contest: Contest) -> float:
    return measure.read_bandwidth(threads=contest.threads, seconds=0.3).median


def _words(contest: Contest) -> list[str]:
    return [
        *contest.decode_words,
        f"--prompt_length={contest.prompt_length}",
        # The first new token comes from prefill, the second warms up.
        f"--num_tokens={contest.num_tokens + 2}",
        f"--threads={contest.threads}",
    ]


def decode_apart(words: Sequence[str], timeout_s: float | None = None) -> list[Record]:
    """The Records of `experiments.decode` with these arguments, run in a process of its own.

    Raises:
      UsageError, DoesNotFit: as it says.
      PeerFailed: it ended in another way, or took longer than `timeout_s`.
    """
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "ternax.experiments.decode", *words]
        done = run_program("our decode", [*command, f"--output_dir={directory}"], timeout_s)
        _raise_what_it_said("our decode", done)
        return read_records(pathlib.Path(directory) / "results.jsonl")


def plan_apart(words: Sequence[str]) -> Record:
    """The plan's Record of such a decode, whether it fits or not."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "ternax.experiments.decode", *words, "--plan_only"]
        done = run_program("our plan", [*command, f"--output_dir={directory}"], None)
        path = pathlib.Path(directory) / "results.jsonl"
        records = read_records(path) if path.exists() else []
        if not records:
            _raise_what_it_said("our plan", done)
            raise PeerFailed("our plan wrote no record")
        return records[0]


def _ours(contest: Contest) -> list[Record]:
    """One run of `experiments.decode` as the contest asks for it."""
    records = decode_apart(_words(contest), contest.timeout_s)
    parameters = next(r.metrics["parameters"] for r in records if r.phase == "plan")
    found = []
    for record in records:
        if record.phase in SPEED:
            metrics = record.metrics | {"parameters": parameters}
            if record.phase == "decode":
                # As a peer takes it: the mean, over device loops that are alike but for the last.
                metrics["tokens_per_s"] = record.batch / statistics.fmean(record.samples)
            found.append(
                dataclasses.replace(
                    record, experiment="compare", metrics=metrics, flags=contest.flags_text
                )
            )
    return found


def _theirs(contest: Contest, peer: Peer) -> list[Record]:
    speed = peer.measure(
        prompt_length=contest.prompt_length,
        num_tokens=contest.num_tokens,
        threads=contest.threads,
        repetitions=contest.repetitions,
        timeout_s=contest.timeout_s,
    )
    prompt, generated = contest.prompt_length, contest.num_tokens
    phases = {
        "prefill": (speed.prefill_s, "s", prompt, {"prompt_tokens": prompt}),
        "decode": (speed.decode_s, "s/token", 1, {"generated_tokens": generated}),
    }
    return [
        Record(
            experiment="compare",
            config=contest.config,
            scheme=speed.model,
            inputs="",
            backend=peer.name,
            device=_host(contest),
            layers=0,
            batch=1,
            context=max(count.values()),
            phase=phase,
            kind="measured",
            samples=samples,
            sample_unit=unit,
            metrics={
                SPEED[phase]: tokens / statistics.median(samples),
                "parameters": speed.parameters,
                **count,
            },
            flags=contest.flags_text,
            note=f"{' '.join(peer.command)}; build {speed.build}; "
            f"{speed.model_bytes / 1e9:.3f} GB of tensors by its own count",
        )
        for phase, (samples, unit, tokens, count) in phases.items()
    ]


def _ratios(contest: Contest, rounds: list[list[Record]]) -> Iterator[Record]:
    """Our speed over each peer's, round by round, as one Record a peer and phase."""
    for phase, metric in SPEED.items():
        of = {
            peer.name: [_of(found, phase, peer.name) for found in rounds] for peer in contest.peers
        }
        ours = [
            next(r for r in found if r.phase == phase and r.backend not in of) for found in rounds
        ]
        for name, theirs in of.items():
            pairs = zip(ours, theirs, strict=True)
            ratios = [a.metrics[metric] / b.metrics[metric] for a, b in pairs]
            middle = estimate.median(ratios)
            few = middle.low is None
            said = "too few for a 95 % interval" if few else "95 % interval by order statistics"
            yield dataclasses.replace(
                ours[-1],
                backend=f"{ours[-1].backend} / {name}",
                samples=tuple(ratios),
                sample_unit="ratio",
                metrics=estimate.named("speed_ratio", middle),
                note=f"{phase}, {ours[-1].scheme} over {theirs[-1].scheme}, "
                f"{len(ratios)} rounds, {said}",
            )


def _of(found: list[Record], phase: str, backend: str) -> Record:
    return next(r for r in found if r.phase == phase and r.backend == backend)

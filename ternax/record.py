"""`Record`: one number with everything needed to believe it, and the file it lives in.

A `Store` appends records to `results.jsonl`, one synced line each, so that what
was measured survives whatever happens next. `results.json`, `results.csv` and
`report.md` are derived from that file at the end. `ternax.metrics` says what each number
means; `ternax.table` prints records.
"""

import csv
import dataclasses
import datetime
import difflib
import fcntl
import io
import json
import math
import numbers
import operator
import os
import pathlib
import re
import secrets
from collections.abc import Callable
from typing import BinaryIO

from ternax import processes
from ternax.errors import BadModelFile, OutputError, UsageError
from ternax.metrics import METRICS
from ternax.provenance import environment
from ternax.table import report

SCHEMA = 1
PHASES = (
    "create",
    "compile",
    "prefill",
    "decode",
    "kernel",
    "evaluate",
    "card",
    "train",
    "plan",
    "convert",
    "noise",
    "serve",
    "device",
)
KINDS = ("measured", "extrapolated", "predicted")


def utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclasses.dataclass(frozen=True)
class Record:
    """One phase of one run. Equal records serialize to equal lines.

    Attributes:
      experiment: which question, e.g. "decode".
      config: the model's name, with what was changed: "70b(num_layers=4)".
      scheme: how the weights are quantized.
      inputs: how the activations are quantized.
      backend: the kernel backend that ran.
      device: the processor or accelerator, in words.
      layers: layers that ran (0 where the phase has none); batch and context likewise.
      batch: sequences together.
      context: cache slots of one sequence.
      phase: one of PHASES.
      kind: one of KINDS. Extrapolated numbers start from measured ones, predicted ones do not.
      samples: every sample taken, in `sample_unit`; empty when nothing was timed.
      sample_unit: unit of one sample, e.g. "s/token".
      metrics: name in METRICS -> number; a quantity that is unknown is absent.
      seed: root of every random draw.
      flags: the command line.
      incomplete: the run was stopped before all samples were taken.
      note: anything a reader must know, in one sentence.
      versions: of python, jax, jaxlib, flax, numpy and ternax.
      commit: git commit with "-dirty" when files differ from it, a build stamp, or "unknown".
      source_sha256: hash of all sources, see `environment`.
      time_utc: when the record was made, ISO 8601.
      schema: version of this layout.
    """

    experiment: str
    config: str
    scheme: str
    inputs: str
    backend: str
    device: str
    layers: int
    batch: int
    context: int
    phase: str
    kind: str
    samples: tuple[float, ...] = ()
    sample_unit: str = ""
    metrics: dict[str, float | int] = dataclasses.field(default_factory=dict)
    seed: int = 0
    flags: str = ""
    incomplete: bool = False
    note: str = ""
    versions: str = dataclasses.field(default_factory=lambda: environment().versions)
    commit: str = dataclasses.field(default_factory=lambda: environment().commit)
    source_sha256: str = dataclasses.field(default_factory=lambda: environment().source_sha256)
    time_utc: str = dataclasses.field(default_factory=utc_now)
    schema: int = SCHEMA

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is str and not isinstance(value, str):
                raise UsageError(f"record.{field.name} must be a string, found {value!r}")
            if field.type is int:
                object.__setattr__(self, field.name, _count(field.name, value))
        if not isinstance(self.incomplete, bool):
            raise UsageError(f"record.incomplete must be true or false, found {self.incomplete!r}")
        for name, legal in (("phase", PHASES), ("kind", KINDS)):
            if getattr(self, name) not in legal:
                raise UsageError(
                    f"record.{name} must be one of {', '.join(legal)}, "
                    f"found {getattr(self, name)!r}"
                )
        if self.schema != SCHEMA:
            raise UsageError(f"record.schema must be {SCHEMA}, found {self.schema}")
        if not isinstance(self.samples, (list, tuple)):
            raise UsageError(f"record.samples must be a list of numbers, found {self.samples!r}")
        samples = tuple(float(_finite("samples", sample)) for sample in self.samples)
        if samples and not self.sample_unit:
            raise UsageError("record.sample_unit must name the unit of the samples, found ''")
        object.__setattr__(self, "samples", samples)
        if not isinstance(self.metrics, dict):
            raise UsageError(f"record.metrics must map names to numbers, found {self.metrics!r}")
        for name in self.metrics:
            if name not in METRICS:
                near = difflib.get_close_matches(str(name), METRICS, n=3, cutoff=0.0)
                raise UsageError(f"record.metrics has no {name!r}; nearest: {', '.join(near)}")
        metrics = {
            name: _finite(f"metrics[{name}]", self.metrics[name])
            for name in METRICS
            if name in self.metrics
        }
        object.__setattr__(self, "metrics", metrics)

    def to_dict(self) -> dict:
        """Plain values, ready for JSON; flat but for `samples` and `metrics`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"samples": list(self.samples), "metrics": dict(self.metrics)}

    @classmethod
    def from_dict(cls, values: dict) -> "Record":
        """Inverse of `to_dict`. Nothing is filled in: a missing or unknown key is refused."""
        if not isinstance(values, dict):
            raise UsageError(f"a record must be an object, found {type(values).__name__}")
        legal = {field.name for field in dataclasses.fields(cls)}
        if values.get("schema", SCHEMA) != SCHEMA:
            raise UsageError(f"record.schema must be {SCHEMA}, found {values['schema']!r}")
        for word, names in (("unknown", values.keys() - legal), ("missing", legal - values.keys())):
            if names:
                raise UsageError(f"record: {word} field {', '.join(sorted(map(str, names)))}")
        return cls(**values)


def _count(name: str, value) -> int:
    try:
        count = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = -1
    if count < 0:
        raise UsageError(f"record.{name} must be an integer from 0 up, found {value!r}")
    return count


def _finite(name: str, value) -> float | int:
    """`value` as a plain int or float; numpy scalars are taken, NaN and infinity are not."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise UsageError(f"record.{name} must be a finite number, found {value!r}")


def read_records(path) -> list[Record]:
    """The records of a `results.jsonl`. A torn last line is left out; a bad one is refused."""
    lines = pathlib.Path(path).read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(Record.from_dict(json.loads(line)))
        except (ValueError, UsageError) as error:
            raise BadModelFile(path, f"line {number}", f"not a record: {error}") from error
    return records


def run_directory(root, experiment: str, config: str, backend: str) -> pathlib.Path:
    """A new path `root/experiment/config-backend-UTC-hash8`; nothing is made there yet."""

    def safe(word):
        return re.sub(r"[^A-Za-z0-9._=]+", "-", word).strip("-.")[:80] or "none"

    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    name = f"{safe(config)}-{safe(backend)}-{now}-{secrets.token_hex(4)}"
    return pathlib.Path(root) / safe(experiment) / name


def open_store(output_dir, experiment: str, config: str, backend: str) -> "Store":
    """The store of `--output_dir`, or of a new directory under `runs/` linked as `latest`.

    Of several processes the first alone writes.
    """
    if processes.current().index:
        return Unwritten(output_dir or "runs")
    if output_dir:
        return Store(output_dir)
    store = Store(run_directory("runs", experiment, config, backend))
    link = store.directory.parent / "latest"
    fresh = link.with_name(f".latest-{os.getpid()}")
    try:  # a convenience: a file system without symbolic links loses nothing else
        fresh.symlink_to(store.directory.name)
        os.replace(fresh, link)
    except OSError:
        fresh.unlink(missing_ok=True)
    return store


class Store:
    """A directory of results. `append` makes a record durable, `finish` derives the rest.

    As a context manager it is one run's own, and finishes on the way out, also after an error,
    so that the derived files always tell what was measured.

    Attributes:
      shown: what report.md shows instead of tables of records, from them all; None: tables.

    Raises:
      UsageError: another run has it: two would mix their records.
    """

    shown: Callable[[list[Record]], list[str] | None] | None = None

    def __init__(self, directory):
        self.directory = pathlib.Path(directory)
        self.path = self.directory / "results.jsonl"
        self.records: list[Record] = []
        self._held: BinaryIO | None = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not self.path.is_file():
                raise OSError(None, "results.jsonl is not a regular file")
            with open(self.path, "a+b") as file:
                self._lock(file)
                _drop_torn_line(file)
            self.records = read_records(self.path)
        except OSError as error:
            raise OutputError(
                f"output directory {self.directory} cannot be used: "
                f"{error.strerror or error}; choose another --output_dir"
            ) from error

    def __enter__(self):
        self._held = open(self.path, "ab")  # noqa: SIM115  (held as long as the run lasts)
        try:
            self._lock(self._held)
        except UsageError:
            self._held.close()
            raise
        self.records = read_records(self.path)
        return self

    def __exit__(self, kind, error, traceback):
        try:
            self.finish()
        except OutputError:
            if error is None:  # never hide what went wrong first
                raise
        finally:
            if self._held is not None:
                self._held.close()

    def _lock(self, file: BinaryIO) -> None:
        """This run's until the file is closed or the process ends, by SIGKILL too."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another run is going on in {self.directory}: wait for it, or give another "
                "--output_dir"
            ) from error
        except OSError:
            pass  # a file system without locks loses nothing else

    def append(self, record: Record) -> None:
        """Writes one line and syncs it. On failure earlier lines stay as they were."""
        line = (json.dumps(record.to_dict(), allow_nan=False) + "\n").encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                start = file.seek(0, os.SEEK_END)
                try:
                    while line:
                        line = line[file.write(line) :]
                    os.fsync(file.fileno())
                except BaseException:  # Ctrl-C too: half a line would spoil the next
                    os.ftruncate(file.fileno(), start)
                    raise
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written: {error.strerror or error}; the "
                f"{len(self.records)} records before this one are kept"
            ) from error
        self.records.append(record)

    def finish(self) -> None:
        """Writes results.json, results.csv and report.md, each whole or not at all."""
        lines = [json.dumps(record.to_dict(), allow_nan=False) for record in self.records]
        self._replace("results.json", "[\n" + ",\n".join(lines) + "\n]\n")
        self._replace("results.csv", records_csv(self.records))
        shown = self.shown(self.records) if self.shown and self.records else None
        self._replace("report.md", report(self.records, shown))

    def _replace(self, name: str, text: str) -> None:
        target, draft = self.directory / name, self.directory / f".{name}.{os.getpid()}"
        try:
            try:
                with open(draft, "wb") as file:
                    file.write(text.encode("utf-8", "backslashreplace"))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(draft, target)
            except BaseException:
                draft.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise OutputError(
                f"{target} cannot be written: {error.strerror or error}; "
                f"{self.path} holds every record"
            ) from error


class Unwritten(Store):
    """Records of a process that leaves the writing to another one."""

    def __init__(self, directory):
        self.directory = pathlib.Path(directory)
        self.records = []

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        pass

    def append(self, record: Record) -> None:
        self.records.append(record)

    def finish(self) -> None:
        pass


def _drop_torn_line(file) -> None:
    """Cuts what follows the last newline: a line whose write was interrupted."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    whole = file.read().rfind(b"\n") + 1
    if whole != size:
        file.truncate(whole)


def records_csv(records: list[Record]) -> str:
    """One row a record; samples in one cell, separated by spaces; a column per metric used."""
    used = [name for name in METRICS if any(name in record.metrics for record in records)]
    plain = [f.name for f in dataclasses.fields(Record) if f.name not in ("samples", "metrics")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*plain, "samples", *used])
    for record in records:
        writer.writerow(
            [
                *(getattr(record, name) for name in plain),
                " ".join(map(repr, record.samples)),
                *(record.metrics.get(name, "") for name in used),
            ]
        )
    return text.getvalue()

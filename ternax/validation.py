"""Predicted decode rates against measured ones: the law, and one efficiency for each device.

A device's efficiency is the median share of the bound that its rows reach. A row is predicted
by the *other* rows of its device, or, when it has none beside it, by all rows of other
devices: no number takes part in its own prediction.
"""

import dataclasses
import json
import pathlib
import re
import statistics

from ternax import configs, roofline
from ternax.anatomy import Shape
from ternax.audit import read
from ternax.audit.subject import load_of, peak_of
from ternax.errors import BadModelFile, UsageError
from ternax.record import Record
from ternax.roofline import Load

# Backends whose rates tell what a machine can do; the reference is right, not fast.
KERNELS = ("cpu", "mosaic")


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured rate.

    Attributes:
      source: where it was published, or the file of our own record.
      device: what shares an efficiency: a device of the catalogue, or a folder of records.
      model, weights: what was decoded, in words.
      layers, batch, context: of the run.
      tokens_per_s: as measured.
      bound_tokens_per_s: of the law at efficiency 1.
      operations: of one token; `intensity`, operations of a step by the bytes it reads.
      kind: "published", or "our own" for records.
    """

    source: str
    device: str
    model: str
    weights: str
    layers: int
    batch: int
    context: int
    tokens_per_s: float
    bound_tokens_per_s: float
    operations: float
    intensity: float
    kind: str = "published"

    @property
    def efficiency(self) -> float:
        return self.tokens_per_s / self.bound_tokens_per_s


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A row, the efficiency the others give it, and how far that is off."""

    row: Row
    efficiency: float

    @property
    def tokens_per_s(self) -> float:
        return self.efficiency * self.row.bound_tokens_per_s

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.tokens_per_s / self.row.tokens_per_s - 1


def published(path: str | pathlib.Path) -> list[Row]:
    """The rows of a file of claims, each a decode rate of one sequence.

    Raises BadModelFile, with the line: a row too bare, of a prompt or of several sequences.
    """
    rows = []
    for table in read(path).tables:
        for claim in table.claims:
            load, device = load_of(claim), claim.device
            rate, model = claim.quantities.get("tokens_per_s"), claim.model
            if load is None or device is None or rate is None or model is None:
                needs = "a row needs model, weights, device and tokens_per_s"
                raise BadModelFile(path, claim.place, needs)
            for name, legal in (("phase", "decode"), ("batch", "1")):
                if (found := claim.settings.get(name, legal)) != legal:
                    why = f"{name}: expected {legal}, found {found}: one sequence's decode"
                    raise BadModelFile(path, claim.place, f"{why} is predicted here")
            batch, context = claim.count("batch"), claim.count("context", 0)
            peak = peak_of(claim, device)
            bound = roofline.decode_step(
                load,
                device.bandwidth_gb_per_s,
                peak[0] if peak else max(device.peak_tflops.values()),
                batch=batch,
                context=context,
                devices=claim.count("devices"),
            )
            rows.append(
                Row(
                    source=claim.says,
                    device=device.name,
                    model=model.name,
                    weights=claim.weights.name if claim.weights else "",
                    layers=model.shape.num_layers if model.shape else 0,
                    batch=batch,
                    context=context,
                    tokens_per_s=rate.nominal,
                    bound_tokens_per_s=bound.tokens_per_s,
                    operations=2 * roofline.step_macs(load, context=context),
                    intensity=roofline.intensity(load, batch=batch, context=context),
                )
            )
    return rows


def own(folder: str | pathlib.Path) -> list[Row]:
    """Our own decode records in a folder, and in a folder a machine below it, that tell the
    bandwidth beside them.

    A line that is no JSON object is refused with file and line (BadModelFile). Bytes come from
    the model's shape, not from the record; only the bandwidth is the record's, since a shared
    machine's moves. One row for each config, depth, context, tables and cache of a file: its
    rounds' median.
    """
    folder = pathlib.Path(folder)
    found: dict[tuple, list[Row]] = {}
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*/*.jsonl")]):
        for record in _decodes(path):
            name, count = record.config.partition("(")[0], record.layers
            try:
                shape = Shape.of(configs.get_config(name))
            except UsageError:
                continue  # a model of somebody's own
            table = _flag(record, "embed_dtype", "int8")
            kv = _flag(record, "kv_dtype", "bf16")
            shape = dataclasses.replace(shape, num_layers=count)
            load = shape.load("trit2", embedding=table, head=table, kv=kv)
            row = _own_row(record, load, path.relative_to(folder), path.parent.name, name)
            found.setdefault((path, name, count, record.context, table, kv), []).append(row)
    return [_median(rows) for rows in found.values()]


def _flag(record: Record, name: str, default: str) -> str:
    """What a flag of the command that made a record said."""
    found = re.search(rf"--{name}=(\w+)", record.flags)
    return found[1] if found else default


def _decodes(path: pathlib.Path) -> list[Record]:
    """Measured decode records of ours in a file that may hold other lines too."""
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise ValueError(f"expected an object, found {type(values).__name__}")
            if values.get("phase") != "decode" or values.get("backend") not in KERNELS:
                continue
            record = Record.from_dict(values)
        except (ValueError, UsageError) as error:
            raise BadModelFile(path, f"line {number}", f"not a record: {error}") from error
        if record.kind == "measured" and {"tokens_per_s", "read_bandwidth_gb_per_s"} <= (
            record.metrics.keys()
        ):
            records.append(record)
    return records


def _own_row(record: Record, load: Load, file: pathlib.Path, machine: str, model: str) -> Row:
    # What the cache holds halfway through the new tokens.
    held = record.context - record.metrics.get("generated_tokens", 0) / 2
    bound = roofline.decode_step(
        load,
        record.metrics["read_bandwidth_gb_per_s"],
        1e3,  # a decode step of one row is far from any matrix limit
        batch=record.batch,
        context=held,
    )
    return Row(
        source=str(file),
        device=machine,
        model=model,
        weights="trit2",
        layers=record.layers,
        batch=record.batch,
        context=record.context,
        tokens_per_s=record.metrics["tokens_per_s"],
        bound_tokens_per_s=bound.tokens_per_s,
        operations=2 * roofline.step_macs(load, context=held),
        intensity=roofline.intensity(load, batch=record.batch, context=held),
        kind="our own",
    )


def _median(rows: list[Row]) -> Row:
    """The row whose efficiency is the median of its rounds."""
    return sorted(rows, key=lambda row: row.efficiency)[len(rows) // 2]


def predict(rows: list[Row]) -> list[Prediction]:
    """Each row by the others. UsageError for fewer than two rows."""
    if len(rows) < 2:
        raise UsageError(f"expected at least two rows to predict one by another, found {len(rows)}")
    out = []
    for row in rows:
        others = [other for other in rows if other is not row]
        same = [other for other in others if other.device == row.device]
        efficiency = statistics.median(other.efficiency for other in same or others)
        out.append(Prediction(row, efficiency))
    return out


def efficiencies(rows: list[Row]) -> dict[str, float]:
    """Device -> the median share of its bound that its rows reach."""
    devices = dict.fromkeys(row.device for row in rows)
    return {
        device: statistics.median(row.efficiency for row in rows if row.device == device)
        for device in devices
    }


def median_error(predictions: list[Prediction]) -> float:
    """Median of the errors' sizes."""
    return statistics.median(abs(prediction.error) for prediction in predictions)

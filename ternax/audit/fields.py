"""The columns of a claim: what each field means, and the unit of a bare number.

Quantities are what is judged; settings say what they are claimed of. `docs/audit.md` shows
both lists with examples.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Field:
    """A quantity a claim may state.

    Attributes:
      unit: of a bare number; None: it must be written.
      needs: fields, in words "one or other", without which no check judges it.
    """

    dimensions: tuple[str, ...]
    unit: str | None
    meaning: str
    needs: tuple[str, ...]


def _field(meaning: str, *dimensions: str, needs: str, unit: str | None = None) -> Field:
    return Field(dimensions, unit, meaning, tuple(filter(None, needs.split(", "))))


QUANTITIES: dict[str, Field] = {
    "parameters": _field("parameters of the model", "number", unit="", needs="model"),
    "size": _field(
        "bytes of the stored model, neither more nor less", "bytes", needs="model, weights"
    ),
    "memory": _field(
        "bytes in use while it runs: the model at least", "bytes", needs="model, weights"
    ),
    "cache": _field(
        "bytes of the KV cache at `context` and `batch`", "bytes", needs="model, context"
    ),
    "bits": _field("stored bits of one weight", "bits", unit="bits", needs="weights"),
    "tokens_per_s": _field(
        "tokens a second of all rows", "tokens/s", unit="tok/s", needs="model, device, weights"
    ),
    "share_of_bound": _field(
        "`tokens_per_s` over its bound; of a prompt, over the matrix peak",
        "number",
        unit="%",
        needs="tokens_per_s, model, device, weights",
    ),
    "latency": _field(
        "time of one step, or of one forward pass", "seconds", needs="model, device, weights, phase"
    ),
    "kernel_time": _field(
        "time of one product of a `rows` x `columns` matrix",
        "seconds",
        needs="device, weights, rows, columns",
    ),
    "batch_gain": _field(
        "tokens/s at `batch` over those at batch 1", "number", unit="x", needs="batch"
    ),
    "compute_time": _field(
        "time of one token's operations alone", "seconds", needs="model, device, weights"
    ),
    "read_time": _field(
        "time of reading one step's weights alone", "seconds", needs="model, device, weights"
    ),
    "compute_only_tokens_per_s": _field(
        "peak over one token's operations", "tokens/s", needs="model, device, weights"
    ),
    "operations": _field("operations of one token", "operations", needs="model, weights"),
    "idle": _field(
        "share of a step in which the matrix unit waits",
        "number",
        unit="%",
        needs="model, device, weights",
    ),
    "intensity_gap": _field(
        "critical intensity over that of a decode step", "number", unit="x", needs="device, weights"
    ),
    "critical_intensity": _field(
        "operations a byte where both limits meet", "operations/byte", unit="FLOP/B", needs="device"
    ),
    "critical_batch": _field(
        "sequences at which computing a step takes as long as reading it",
        "number",
        unit="",
        needs="model, device, weights",
    ),
    "tables_share": _field(
        "share of the stored bytes that embedding and head take",
        "number",
        unit="%",
        needs="model, weights",
    ),
    "left_out": _field(
        "share of a step's bytes besides the weights",
        "number",
        unit="%",
        needs="context, model, device, weights",
    ),
    "bandwidth": _field("memory bandwidth of the device", "bytes/s", needs="device"),
    "device_memory": _field("memory of the device", "bytes", needs="device"),
    "largest_memory": _field(
        "largest memory of any one device on the case's date", "bytes", needs=""
    ),
    "peak": _field("matrix peak of the device for `operands`", "operations/s", needs="device"),
    "devices_needed": _field(
        "devices that the rest of the row needs", "number", unit="", needs="model, device, weights"
    ),
    "hand_overs": _field(
        "times a step hands activations to another device", "number", unit="", needs="model"
    ),
    "weights_read": _field(
        "share of the weights one verification reads, `phase: speculative`",
        "number",
        unit="%",
        needs="phase",
    ),
    "power": _field("power while it runs", "watts", unit="W", needs="device"),
    "tokens_per_joule": _field(
        "tokens of one joule", "tokens/joule", "tokens/watt", needs="power, tokens_per_s"
    ),
    "joules_per_token": _field("energy of one token", "joules/token", needs="power, tokens_per_s"),
    "price": _field("price of an hour", "dollars/hour", needs="device"),
    "tokens_per_hour": _field(
        "tokens in an hour", "number", "tokens/hour", unit="", needs="tokens_per_s"
    ),
    "cost": _field(
        "price of tokens", "dollars/token", needs="price, tokens_per_s or tokens_per_hour"
    ),
    "similarity": _field(
        "cosine of clean and noisy outputs at `noise`", "number", unit="%", needs="noise"
    ),
    "noise": _field(
        "share of the weights that noise replaced", "number", unit="%", needs="similarity"
    ),
    "result": _field("what the arithmetic in `of` gives", "*", unit="", needs="of"),
}

# name -> what it says. Each is a word, a name or a count.
SETTINGS: dict[str, str] = {
    "id": "a name for this row, by which `of` refers to it",
    "says": "the words of the source",
    "model": "a named config, or a name under `models`",
    "device": "a name in the catalogue, or under `devices`",
    "devices": "how many of them share the model",
    "weights": "format of the projections: fp16, int4, nvfp4, trit2, i2_s, ...",
    "tables": "format of embedding and head; else fp16 beside ternary weights, or as the weights",
    "kv": "format of the KV cache",
    "operands": "type the matrix unit multiplies: fp32, fp16, fp8, int8, ...",
    "phase": "decode, prefill, kernel, or speculative",
    "batch": "sequences decoded together; best: as many as fit, or as the matrix unit can use",
    "context": "tokens of each sequence",
    "layers": "layers that ran, when not all",
    "rows": "outputs of a kernel's matrix",
    "columns": "inputs of a kernel's matrix",
    "training": "full (AdamW), lora or qlora: what `fits` is about",
    "fits": "yes or no: whether it fits the device's memory",
    "extrapolated": "yes: from the other rows of its table, by their layers",
    "bottleneck": "part of a step claimed to take most: weights, kv, head, collectives, compute",
    "interactive": "yes or no: whether one user is served at reading speed",
    "cheaper_than": "a device that this one is claimed to beat in bandwidth for money",
    "other_price": "the price of an hour of that device",
    "faster_than": "a device claimed to be slower",
    "released": "yes or no: whether public checkpoints of this kind exist",
    "runs_on": "cpu or gpu: where the format is said to run",
    "of": "arithmetic: numbers with units, row.field, and ' + - * / ' between spaces",
}
# What a setting that is itself a claim needs.
SETTINGS_NEED = {
    "fits": ("model", "weights or training", "device"),
    "bottleneck": ("model", "weights", "device"),
    "interactive": ("model", "weights", "device"),
    "faster_than": ("device",),
    "cheaper_than": ("device", "price"),
    "runs_on": ("weights",),
    "of": ("result",),
}
WORDS = {
    "fits": ("yes", "no"),
    "interactive": ("yes", "no"),
    "released": ("yes", "no"),
    "extrapolated": ("yes", "no"),
    "phase": ("decode", "prefill", "kernel", "speculative"),
    "training": ("full", "lora", "qlora"),
    "bottleneck": ("weights", "kv", "head", "collectives", "compute"),
    "runs_on": ("cpu", "gpu"),
}
# What stands in a cell where a source gives no number.
NOTHING = ("", "-", "–", "—", "N/A", "n/a")
# Quantities that may be zero or less; of any other that is no claim but a slip.
MAY_BE_ZERO = (
    "result", "noise", "similarity", "idle", "left_out", "weights_read", "hand_overs",
    "share_of_bound", "tables_share",
)  # fmt: skip
# Of those, the ones that may be less than zero.
MAY_BE_NEGATIVE = ("result", "similarity")
COUNTS = ("devices", "batch", "context", "layers", "rows", "columns")

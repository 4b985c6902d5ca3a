"""Where a model would run: memory by part, a step by part, money and energy of every layout.

A layout is `replicas` copies of a model, each split over `setting.devices` devices by tensor
parallelism. All of it is predicted: bytes and limits from the catalogue, one efficiency from
rates that were measured, and what `Terms` name.
"""

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence

from ternax import roofline
from ternax.anatomy import Shape
from ternax.configs.hardware import Device
from ternax.errors import DoesNotFit, UsageError
from ternax.prediction import Setting
from ternax.roofline import Load, Step
from ternax.validation import Row

OBJECTIVES = ("cost", "price", "latency", "throughput")
# What a ranking tries: devices that share a layer, and rows decoded together.
TENSOR = (1, 2, 4, 8)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Prompt tokens that a server reads at once: what its activations are sized for.
PREFILL_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class Terms:
    """What a plan assumes beside the catalogue.

    Attributes:
      memory_share: of a device's memory that the program may fill: the rest is the driver's,
        the runtime's and fragments. 0.9 is what vLLM takes by default.
      all_reduce_s: what an all-reduce of a few kilobytes takes whatever its size: 10 to 20
        microseconds over NVLink are usual. Assumed, not measured here.
      launch_s: of one kernel; 0: the step is one recorded graph.
      usd_per_h: price of one device's hour in place of the catalogue's.
    """

    memory_share: float = 0.9
    all_reduce_s: float = 10e-6
    launch_s: float = 0.0
    usd_per_h: float | None = None

    def __post_init__(self):
        if not 0 < self.memory_share <= 1:
            raise UsageError(
                f"memory_share must be above 0 and at most 1, found {self.memory_share:g}"
            )
        for field in ("all_reduce_s", "launch_s", "usd_per_h"):
            if (getattr(self, field) or 0) < 0:
                raise UsageError(f"{field} must be at least 0, found {getattr(self, field):g}")


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """The share of its limits that a device is expected to reach, and who says so."""

    share: float
    source: str


def calibrated(device: Device, rows: Sequence[Row], where: str = "") -> Efficiency:
    """The median share of the bound that measured rates of this device reach. Where none is its
    own, that of all published ones: like the catalogue's, their bounds are datasheets', while our
    own are of a bandwidth read beside. At most 1: memory that changed its speed may tell more.

    where: the folder of the rows, if they are from one. UsageError without any row.
    """
    own = [row for row in rows if row.device == device.name]
    chosen = own or [row for row in rows if row.kind == "published"] or list(rows)
    if not chosen:
        raise UsageError("no measured rate to calibrate by; give --efficiency")
    share = min(1.0, statistics.median(row.efficiency for row in chosen))
    count = f"{len(chosen)} rates" if len(chosen) > 1 else "one rate"
    kinds = [kind for kind in ("published", "our own") if any(r.kind == kind for r in chosen)]
    place = f"in {where}" if where else f"{' and '.join(kinds)}"
    on = device.name if own else ", ".join(dict.fromkeys(row.device for row in chosen))
    return Efficiency(share, f"median of {count}, {place}, on {on}")


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to run it.

    Attributes:
      setting: a replica: model, formats, device, tensor-parallel devices, rows, context and
        the efficiency expected.
      replicas: data-parallel; each decodes `setting.batch` rows.
      terms: the rest of what is assumed.
      activation_bytes: temporaries of one device, where a compiler has said; None: estimated.
    """

    setting: Setting
    replicas: int = 1
    terms: Terms = Terms()
    activation_bytes: float | None = None

    @property
    def devices(self) -> int:
        """Of all replicas."""
        return self.replicas * self.setting.devices

    @property
    def rows(self) -> int:
        """Sequences of all replicas."""
        return self.replicas * self.setting.batch

    @functools.cached_property
    def load(self) -> Load:
        """Of a replica. Devices beyond the heads of the cache hold copies of it."""
        load, tensor = self.setting.load, self.setting.devices
        copies = tensor / min(tensor, self.setting.shape.num_kv_heads)
        return dataclasses.replace(load, kv_bytes_per_token=load.kv_bytes_per_token * copies)

    @functools.cached_property
    def bytes(self) -> dict[str, float]:
        """Part -> bytes on one device."""
        at, load, tensor = self.setting, self.load, self.setting.devices
        activations = self.activation_bytes
        if activations is None:
            prompt = min(at.context, PREFILL_TOKENS)
            widest = at.shape.activation_bytes(1, prompt, at.context)
            logits = 3 * 4 * (at.batch - 1) * at.shape.vocab_size
            activations = (widest + logits) / tensor
        return {
            "projections": (load.projection_bytes + load.idle_bytes) / tensor,
            "head": load.head_bytes / tensor,
            "embedding": load.embedding_bytes / tensor,
            "cache": at.batch * at.context * load.kv_bytes_per_token / tensor,
            "activations": activations,
        }

    @property
    def resident_bytes(self) -> float:
        """On one device."""
        return sum(self.bytes.values())

    @property
    def memory_bytes(self) -> float:
        """What one device lends to the program."""
        return self.setting.device.memory_bytes_at_most * self.terms.memory_share

    @property
    def fits(self) -> bool:
        return self.resident_bytes <= self.memory_bytes

    @functools.cached_property
    def step(self) -> Step:
        """A replica's step as it is expected."""
        return self._step(self.setting.efficiency, self.terms.all_reduce_s, self.terms.launch_s)

    @functools.cached_property
    def bound(self) -> Step:
        """The same at both limits, without latencies: no program is faster."""
        return self._step(1.0, 0.0, 0.0)

    def _step(self, efficiency: float, all_reduce_s: float, launch_s: float) -> Step:
        at = self.setting
        link = at.device.link_between(at.devices)
        return roofline.decode_step(
            self.load,
            at.device.bandwidth_gb_per_s,
            at.peak_tflops,
            batch=at.batch,
            context=at.context,
            devices=at.devices,
            efficiency=efficiency,
            compute_efficiency=efficiency,
            link_gb_per_s=link.gb_per_s if link else math.inf,
            collective_latency_s=all_reduce_s,
            launch_s=launch_s,
        )

    @property
    def tokens_per_s(self) -> float:
        """Of all replicas together."""
        return self.replicas * self.step.tokens_per_s

    @property
    def tokens_per_s_each(self) -> float:
        """Of one sequence."""
        return 1 / self.step.total_s

    @property
    def ttft_s(self) -> float:
        """To read one prompt of the whole context, nothing else running, and draw a token."""
        at = self.setting
        share = at.efficiency
        return roofline.prefill_s(
            self.load,
            at.device.bandwidth_gb_per_s * share,
            at.peak_tflops * share,
            tokens=at.context,
            devices=at.devices,
        )

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: operations of a step over what the peaks allow in its time."""
        at = self.setting
        done = 2 * roofline.step_macs(self.load, batch=at.batch, context=at.context)
        return done / (self.step.total_s * at.devices * at.peak_tflops * 1e12)

    @property
    def mbu(self) -> float:
        """Model bandwidth utilization: bytes of a step over what memory moves in its time."""
        at = self.setting
        read = roofline.step_bytes(self.load, batch=at.batch, context=at.context)
        return read / (self.step.total_s * at.devices * at.device.bandwidth_gb_per_s * 1e9)

    @property
    def usd_per_h(self) -> float | None:
        """Of all devices; None where no price is known."""
        one = self.terms.usd_per_h
        one = self.setting.device.usd_per_h if one is None else one
        return None if one is None else one * self.devices

    @property
    def usd_per_million_tokens(self) -> float | None:
        if self.usd_per_h is None:
            return None
        return roofline.usd_per_million_tokens(self.usd_per_h, self.tokens_per_s)

    @property
    def joules_per_token(self) -> float:
        """At full rated power: an upper end, since decoding leaves the matrix units idle."""
        watts = self.devices * self.setting.device.watts
        return roofline.joules_per_token(watts, self.tokens_per_s)

    def for_demand(self, tokens_per_s: float) -> "Layout":
        """As many replicas as make so many tokens/s together."""
        count = math.ceil(tokens_per_s / self.step.tokens_per_s)
        return dataclasses.replace(self, replicas=count)


def layouts(
    shape: Shape,
    devices: Sequence[Device],
    *,
    schemes: Sequence[str],
    tables: str,
    kv: str,
    counts: Sequence[int],
    tensor: Sequence[int] | None,
    batches: Sequence[int],
    context: int,
    efficiency: dict[str, Efficiency],
    terms: Terms,
) -> Iterator[Layout]:
    """Every combination that can be: counts of devices in replicas of `tensor` devices each
    (None: of all of a count). Devices without a link stay alone."""
    for scheme, device, count, batch in itertools.product(schemes, devices, counts, batches):
        for split in tensor or (count,):
            if count % split or (split > 1 and device.fastest_link is None):
                continue
            setting = Setting(
                shape=shape,
                device=device,
                weights=scheme,
                tables=tables,
                kv=kv,
                devices=split,
                batch=batch,
                context=context,
                efficiency=efficiency[device.name].share,
            )
            yield Layout(setting, count // split, terms)


def rank(
    found: Sequence[Layout], objective: str, slo_ms: float | None = None, top: int = 12
) -> list[Layout]:
    """The best layouts first, each device, count of devices and scheme once.

    Args:
      found: what there is to choose from.
      objective: "cost", USD for a million tokens; "price", USD an hour; "latency", a sequence's
        time per token; "throughput", tokens/s of all.
      slo_ms: the longest time per output token that serves.
      top: how many.

    Raises:
      DoesNotFit: nothing fits, or nothing is as fast as that: then with the best there is.
    """
    fitting = [one for one in found if one.fits]
    if not fitting:
        least = min(found, key=lambda one: one.resident_bytes, default=None)
        said = f"; the least is {_gib(least)}" if least else ""
        raise DoesNotFit(f"no layout fits{said}; more devices or fewer bits a weight need less")
    quick = [one for one in fitting if slo_ms is None or 1e3 * one.step.total_s <= slo_ms]
    if not quick:
        best = min(fitting, key=lambda one: one.step.total_s)
        raise DoesNotFit(
            f"no layout decodes a token in {slo_ms:g} ms: the best possible is "
            f"{1e3 * best.step.total_s:.3g} ms, {name(best)}"
        )
    if objective in ("cost", "price"):
        quick = [one for one in quick if one.usd_per_million_tokens is not None]
        if not quick:
            raise UsageError("no price is known of what is fast enough; give --usd_per_hour")
    best_of: dict[tuple, Layout] = {}
    for one in sorted(quick, key=lambda one: _order(one, objective)):
        at = one.setting
        # More copies at the same price for a token are no other choice.
        count = None if objective in ("cost", "price") else one.devices
        key = (at.device.name, at.weights, count)
        best_of.setdefault(key, one)
    return list(best_of.values())[:top]


def _order(one: Layout, objective: str) -> tuple:
    price = math.inf if one.usd_per_h is None else one.usd_per_h
    value = {
        "cost": price / one.tokens_per_s,
        "price": price,
        "latency": one.step.total_s,
        "throughput": -one.tokens_per_s,
    }[objective]
    return value, price, -one.tokens_per_s, one.setting.device.name, one.devices, one.setting.batch


def name(one: Layout) -> str:
    """A layout in words: "2 x (4 x h100-sxm), trit2, batch 8": two copies, each split over four;
    "2 x h100-sxm" is one copy over two, "2 x (1 x h100-sxm)" two of one each."""
    at = one.setting
    device = f"{at.devices} x {at.device.name}" if at.devices > 1 else at.device.name
    if one.replicas > 1:
        device = f"{one.replicas} x ({at.devices} x {at.device.name})"
    return f"{device}, {at.weights}, batch {at.batch}"


def _gib(one: Layout) -> str:
    return (
        f"{one.resident_bytes / 2**30:.1f} GiB a device of {one.memory_bytes / 2**30:.1f} "
        f"({name(one)})"
    )


def bandwidth_needed_gb_per_s(one: Layout, tokens_per_s: float) -> float:
    """What one device would have to read so that each sequence makes so many tokens/s, at the
    layout's efficiency and no other limit."""
    at = one.setting
    read = roofline.step_bytes(one.load, batch=at.batch, context=at.context)
    return read * tokens_per_s / at.efficiency / 1e9

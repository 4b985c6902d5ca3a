"""One setting of model, formats, device, batch and context, and all the law says of it.

What a page or a table shows comes from here. Everything is predicted, nothing measured;
with an efficiency of 1 the rate is a bound.
"""

import dataclasses
import math

from ternax import roofline
from ternax.anatomy import Shape
from ternax.configs.hardware import Device
from ternax.errors import UsageError
from ternax.formats import get_format
from ternax.roofline import Load, Step


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is decoded, and on what.

    Attributes:
      shape: of the model.
      device: of the catalogue; `devices` of them split each layer.
      weights, tables, kv: formats of the projections, of embedding and head, of the cache.
      batch: rows decoded together.
      context: tokens that each row holds.
      efficiency: share of bandwidth and of peak that is reached; 1: a bound.
    """

    shape: Shape
    device: Device
    weights: str = "trit2"
    tables: str = "fp16"
    kv: str = "fp16"
    devices: int = 1
    batch: int = 1
    context: int = 2048
    efficiency: float = 1.0

    def __post_init__(self):
        for field in ("devices", "batch", "context"):
            if getattr(self, field) < 1:
                raise UsageError(f"{field} must be at least 1, found {getattr(self, field)}")
        if not 0 < self.efficiency <= 1:
            raise UsageError(f"efficiency must be above 0 and at most 1, found {self.efficiency:g}")
        if self.devices > 1 and self.device.fastest_link is None:
            raise UsageError(f"{self.device.name} has no link to another: devices must be 1")

    @property
    def load(self) -> Load:
        tables = self.tables
        return self.shape.load(
            self.weights, embedding=tables, head=tables, kv=self.kv, rows=self.batch
        )

    @property
    def operands(self) -> str:
        """What the weights are multiplied as on this device."""
        return self.device.operands(get_format(self.weights).operands)

    @property
    def peak_tflops(self) -> float:
        """Of one device."""
        return self.device.peak_tflops[self.operands]

    def step(self, load: Load | None = None, positions: int = 1) -> Step:
        """One decode step; `load` replaces this model's."""
        link = self.device.link_between(self.devices)
        return roofline.decode_step(
            self.load if load is None else load,
            self.device.bandwidth_gb_per_s,
            self.peak_tflops,
            batch=self.batch,
            context=self.context,
            positions=positions,
            devices=self.devices,
            efficiency=self.efficiency,
            compute_efficiency=self.efficiency,
            link_gb_per_s=link.gb_per_s if link else math.inf,
        )


@dataclasses.dataclass(frozen=True)
class Predicted:
    """The answers. Bytes, energy and money are of all devices together.

    Attributes:
      weights_s, head_s, kv_s, activations_s, compute_s, collectives_s: of a step; they sum to
        `total_s`. `activations_s` is the embedding's rows: the rest stays in caches.
      tokens_per_s: of all rows; `tokens_per_s_each` of one.
      limit: the part of the step that takes most.
      operands, peak_tflops: what multiplies, and one device's dense peak of it.
      step_bytes, step_operations: of a step; `intensity` is operations by bytes.
      critical_intensity: where both limits of the device meet.
      critical_batch: rows that reach it; infinite where none do.
      attained_tflops: operations over the whole step.
      weight_bytes, cache_bytes, resident_bytes: what lies in memory.
      memory_bytes: what there is at most; `batch_that_fits` rows of this context do.
      prefill_s: at least this long for a prompt of `context` tokens, one row.
      joules_per_token: at the devices' full rated power.
      usd_per_million_tokens: at the catalogue's price, or None where it has none.
    """

    weights_s: float
    head_s: float
    kv_s: float
    activations_s: float
    compute_s: float
    collectives_s: float
    total_s: float
    tokens_per_s: float
    tokens_per_s_each: float
    limit: str
    operands: str
    peak_tflops: float
    step_bytes: float
    step_operations: float
    intensity: float
    critical_intensity: float
    critical_batch: float
    attained_tflops: float
    weight_bytes: float
    cache_bytes: float
    resident_bytes: float
    memory_bytes: float
    batch_that_fits: int
    fits: bool
    prefill_s: float
    joules_per_token: float
    usd_per_million_tokens: float | None


def predict(setting: Setting) -> Predicted:
    """All of it for one setting."""
    load, step, device = setting.load, setting.step(), setting.device
    batch, context, devices = setting.batch, setting.context, setting.devices
    bandwidth, peak = device.bandwidth_gb_per_s, setting.peak_tflops
    operations = 2 * roofline.step_macs(load, batch=batch, context=context)
    memory = devices * device.memory_bytes_at_most
    resident = roofline.resident_bytes(load, batch=batch, context=context)
    price = device.usd_per_h
    return Predicted(
        weights_s=step.weights_s,
        head_s=step.head_s,
        kv_s=step.kv_s,
        activations_s=step.activations_s,
        compute_s=step.compute_s,
        collectives_s=step.collectives_s,
        total_s=step.total_s,
        tokens_per_s=step.tokens_per_s,
        tokens_per_s_each=step.tokens_per_s / batch,
        limit=step.limit,
        operands=setting.operands,
        peak_tflops=peak,
        step_bytes=roofline.step_bytes(load, batch=batch, context=context),
        step_operations=operations,
        intensity=roofline.intensity(load, batch=batch, context=context),
        critical_intensity=roofline.critical_intensity(bandwidth, peak),
        critical_batch=roofline.critical_batch(load, bandwidth, peak, context=context),
        attained_tflops=operations / step.total_s / 1e12,
        weight_bytes=load.weight_bytes,
        cache_bytes=resident - load.weight_bytes,
        resident_bytes=resident,
        memory_bytes=memory,
        batch_that_fits=roofline.batch_that_fits(load, memory, context=context),
        fits=resident <= memory,
        prefill_s=roofline.prefill_s(
            load,
            bandwidth * setting.efficiency,
            peak * setting.efficiency,
            tokens=context,
            devices=devices,
        ),
        joules_per_token=roofline.joules_per_token(devices * device.watts, step.tokens_per_s),
        usd_per_million_tokens=None
        if price is None
        else roofline.usd_per_million_tokens(devices * price, step.tokens_per_s),
    )

"""What would make decoding faster: one change each to a setting, and what the law says of it.

Four levers move a step: how weights are stored, how many of them are active, the device, the
batch. Speculation buys positions instead of rows. All predicted, nothing measured.
"""

import dataclasses

from ternax import roofline
from ternax.anatomy import Shape
from ternax.configs.hardware import DEVICES
from ternax.errors import UsageError
from ternax.formats import get_format
from ternax.prediction import Setting
from ternax.roofline import Load

FORMATS = ("fp16", "int8", "int4", "trit2", "sherry")
ACTIVE_SHARES = (0.5, 0.25, 0.125)
BATCHES = (4, 16, 64, 256)
DEVICE_NAMES = ("l40s", "rtx4090", "h100-sxm", "h200-sxm", "b200")


@dataclasses.dataclass(frozen=True)
class Lever:
    """One change.

    Attributes:
      kind: which lever: "as set", "quantization", "active", "device", "batch", "speculation".
      change: what was changed, in words.
      setting: with the change, where it is one of the setting's own.
      tokens_per_s: of all rows.
      resident_bytes: of all models held, with their caches.
    """

    kind: str
    change: str
    setting: Setting
    tokens_per_s: float
    resident_bytes: float

    @property
    def fits(self) -> bool:
        device = self.setting.device
        return self.resident_bytes <= self.setting.devices * device.memory_bytes_at_most


@dataclasses.dataclass(frozen=True)
class Speculation:
    """A smaller model that drafts: `drafted` tokens a round, each kept with chance `acceptance`."""

    shape: Shape
    drafted: int = 4
    acceptance: float = 0.7

    def __post_init__(self):
        if self.drafted < 1 or not 0 <= self.acceptance <= 1:
            raise UsageError(
                "expected at least 1 drafted token and an acceptance from 0 to 1, found "
                f"{self.drafted} and {self.acceptance:g}"
            )


def resident_bytes(setting: Setting) -> float:
    return roofline.resident_bytes(setting.load, batch=setting.batch, context=setting.context)


def active_load(setting: Setting, share: float) -> Load:
    """A step's load if the MLPs were experts of which each token uses `share`.

    Rows choose alike and independently, so B of them read 1 - (1 - share)^B of the experts.
    All experts stay resident: `weight_bytes` of this load is not the model's.
    """
    shape, load = setting.shape, setting.load
    stored = get_format(setting.weights)
    experts = [(k, n) for name, k, n in shape.matrices if name.startswith("mlp.")]
    expert_bytes = shape.num_layers * sum(stored.nbytes(k, n) for k, n in experts)
    expert_macs = shape.num_layers * sum(k * n for k, n in experts)
    untouched = (1 - share) ** setting.batch
    return dataclasses.replace(
        load,
        projection_bytes=load.projection_bytes - untouched * expert_bytes,
        projection_macs=load.projection_macs - (1 - share) * expert_macs,
    )


def levers(setting: Setting, speculation: Speculation | None = None) -> list[Lever]:
    """The setting as it is, then one change each; changes that change nothing are left out."""
    changed: list[tuple[str, str, Setting]] = [("as set", "", setting)]

    def change(kind: str, words: str, **fields) -> None:
        other = dataclasses.replace(setting, **fields)
        if other != setting:
            changed.append((kind, words, other))

    for name in FORMATS:
        change("quantization", f"weights in {name}", weights=name)
    for name in DEVICE_NAMES:
        change("device", f"on {name}", device=DEVICES[name])
    if setting.device.fastest_link is not None:
        change("device", f"{2 * setting.devices} devices", devices=2 * setting.devices)
    for batch in BATCHES:
        change("batch", f"batch {batch}", batch=batch)
    found = [
        Lever(kind, words, other, other.step().tokens_per_s, resident_bytes(other))
        for kind, words, other in changed
    ]
    for share in ACTIVE_SHARES:
        rate = setting.step(active_load(setting, share)).tokens_per_s
        words = f"1/{1 / share:g} of the MLP active"
        found.append(Lever("active", words, setting, rate, resident_bytes(setting)))
    if speculation is not None:
        found.append(_speculate(setting, speculation))
    order = ("as set", "quantization", "active", "device", "batch", "speculation")
    return sorted(found, key=lambda lever: order.index(lever.kind))


def _speculate(setting: Setting, speculation: Speculation) -> Lever:
    small = dataclasses.replace(setting, shape=speculation.shape)
    rate = roofline.speculative_tokens_per_s(
        setting.step(positions=speculation.drafted + 1),
        small.step(),
        drafted=speculation.drafted,
        acceptance=speculation.acceptance,
    )
    words = (
        f"{speculation.shape.name} drafts {speculation.drafted}, "
        f"{100 * speculation.acceptance:g} % kept"
    )
    both = resident_bytes(setting) + resident_bytes(small)
    return Lever("speculation", words, setting, rate, both)

"""`--mesh=auto`: the splits that are possible, what bounds each, and which one is taken.

The law is the planner's: the bytes that `cost.plan` counts on a device over its bandwidth, or
operations over its peak where those take longer, and behind it the exchanges that
`collectives.planned` foretells, each with the latency that plans assume. All of it is predicted.
"""

import dataclasses
import itertools
import math

import jax

from ternax import collectives, cost, measure, mesh, roofline
from ternax.config import ModelConfig
from ternax.configs.hardware import DEVICES, Device, get_device
from ternax.errors import UsageError
from ternax.planner import Terms
from ternax.sharding import layout_of, why_not
from ternax.table import binary, rate, row

# What drivers call devices -> the catalogue's names.
KINDS = {
    "NVIDIA A100-SXM4-40GB": "a100-40-sxm",
    "NVIDIA A100-SXM4-80GB": "a100-80-sxm",
    "NVIDIA A100 80GB PCIe": "a100-80-pcie",
    "NVIDIA H100 80GB HBM3": "h100-sxm",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H200": "h200-sxm",
    "NVIDIA B200": "b200",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
    "NVIDIA A10G": "a10g",
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
}
# Any processor: they are compared by what they share, not by how fast it is.
PROCESSOR = "x86-server"
# Slower splits that a screen names.
_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Machine:
    """What runs: equal devices of the catalogue.

    Attributes:
      device: each of them.
      count: how many there are.
      shared: they are parts of one processor, which share its memory and its cores.
      available_bytes: of each, or of all together where they are shared; None: not known.
    """

    device: Device
    count: int
    shared: bool = False
    available_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Option:
    """One split.

    Attributes:
      sizes: as of `mesh.parse`.
      plan: of one of its devices; None where the model cannot be split so.
      tokens_per_s: at most, of all rows; 0 without a plan.
      why: what speaks against it; "" where nothing does.
    """

    sizes: dict[str, int]
    plan: cost.Plan | None = None
    tokens_per_s: float = 0.0
    why: str = ""

    def __str__(self) -> str:
        return mesh.describe(self.sizes)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was weighed. `best` is the fastest that fits; of equals, that of fewest devices."""

    machine: Machine
    options: tuple[Option, ...]
    best: Option

    @property
    def sizes(self) -> dict[str, int]:
        return self.best.sizes

    def lines(self) -> list[str]:
        """Two rows for a screen: what was taken beside what else runs, and what cannot be."""
        device, shared, best = self.machine.device, self.machine.shared, self.best
        against: dict[str, list[str]] = {}
        for option in self.options:
            if option.why and option is not best:
                against.setdefault(option.why, []).append(str(option))
        others = [o for o in self.options if not o.why and o is not best]
        others.sort(key=lambda option: -option.tokens_per_s)
        found = f"auto: {best} of {self.machine.count}"
        if best.why:
            found += f", which {best.why}: the least of all"
        elif not shared:
            found += f", {rate(best.tokens_per_s)} tokens/s at most"
        if others:
            # Of a processor only what devices share is known, not how fast it is.
            unit = best.tokens_per_s if shared else 1
            compared = [f"{o} {rate(o.tokens_per_s / unit)}" for o in others[:_SHOWN]]
            found += f"; {'at its rate, 1, ' * shared}{', '.join(compared)}"
        found += f" and {len(others) - _SHOWN} slower" if len(others) > _SHOWN else ""
        link = device.fastest_link
        law = f"{1e6 * Terms().all_reduce_s:.0f} us an exchange"
        if shared:
            law += ", and one memory that all read"
        else:
            law += f" over {link.name}" if link else ""
            law += f", {device.bandwidth_gb_per_s:,.0f} GB/s of {device.name}"
        no = [f"not {', '.join(names)}: {why}" for why, names in against.items()]
        return [row("mesh", found), row("", "; ".join([f"predicted with {law}", *no]))]


def machine(count: int) -> Machine:
    """`count` of the devices that jax finds. UsageError for a kind the catalogue does not have."""
    device = jax.devices()[0]
    shared = measure.on_host(device)
    name = PROCESSOR if shared else KINDS.get(device.device_kind)
    if name is None:
        raise UsageError(
            f"--mesh=auto: no bandwidth and link are known of {device.device_kind}; name the "
            f"mesh, such as tensor:{count}"
        )
    return Machine(DEVICES[name], count, shared, cost.available_bytes(device))


def of_catalogue(name: str, count: int) -> Machine:
    """`count` devices of the catalogue that need not be there."""
    device = get_device(name)
    return Machine(device, count, False, int(device.memory_bytes_at_most * Terms().memory_share))


def choose(
    config: ModelConfig,
    machine: Machine,
    *,
    all_devices: bool = False,
    positions: int = 1,
    **work,
) -> Choice:
    """Weighs every split of a packed model over the machine's devices, or some of them.

    Args:
      all_devices: none may be left idle: each is another process's.
      positions: tokens of each row computed at once; 1: a decode step.
      work: batch, context, prompt, kv_dtype, embed_dtype, head_dtype, as for `cost.plan`.

    Raises:
      UsageError: a model that no split over these devices is possible of.
    """
    ways = [n for n in range(1, machine.count + 1) if machine.count % n == 0]
    options = []
    # A text that is read at once has no cache to split, and rows go over data.
    stretches = ways if positions == 1 and work.get("batch", 1) == 1 else [1]
    for data, sequence, tensor in itertools.product(ways, stretches, ways):
        used = data * sequence * tensor
        if machine.count % used or all_devices and used < machine.count:
            continue
        sizes = dict.fromkeys(mesh.AXES, 1) | {"data": data, "sequence": sequence, "tensor": tensor}
        options.append(_weighed(config, machine, sizes, positions, work))
    options.sort(key=lambda option: math.prod(option.sizes.values()))
    possible = [option for option in options if option.plan is not None]
    if not possible:
        said = "; ".join(f"{option}: {option.why}" for option in options)
        raise UsageError(f"--mesh=auto: {config.name} does not split over {machine.count}: {said}")
    running = [option for option in possible if not option.why]
    if running:
        # What rounds apart is equal, and of equals the first has the fewest devices.
        best = max(running, key=lambda option: float(f"{option.tokens_per_s:.6g}"))
    else:
        best = min(possible, key=lambda option: option.plan.total_bytes if option.plan else 0)
    return Choice(machine, tuple(options), best)


def _weighed(config, machine: Machine, sizes, positions: int, work) -> Option:
    batch, data = work.get("batch", 1), sizes["data"]
    if batch % data:
        return Option(sizes, why=f"a batch of {batch}")
    if reason := why_not(config, sizes["tensor"]):
        return Option(sizes, why=reason)
    layout = layout_of(mesh.abstract_mesh(sizes), config)
    used = layout.mesh.size
    sharing = used if machine.shared else 1
    free = machine.available_bytes
    try:
        plan = cost.plan(
            config,
            layout=layout if used > 1 else None,
            available_bytes=None if free is None else free // sharing,
            **work,
        )
    except UsageError as error:
        return Option(sizes, why=str(error).removeprefix(f"mesh {layout}: "))
    why = "" if plan.fits else f"needs {binary(plan.total_bytes)} a device"
    seconds = _seconds(machine, layout, plan, positions)
    return Option(sizes, plan, batch * positions / seconds, why)


def _seconds(machine: Machine, layout, plan: cost.Plan, positions: int) -> float:
    """Of one step. The plan's bytes are one device's; its operations are shared by all."""
    device, used = machine.device, layout.mesh.size
    sharing = used if machine.shared else 1
    operands = "int8" if layout.config.inputs == "int8" else "fp16"
    load = plan.load
    step = roofline.decode_step(
        dataclasses.replace(
            load,
            projection_macs=load.projection_macs / used,
            head_macs=load.head_macs / used,
            attention_macs_per_token=load.attention_macs_per_token / used,
        ),
        device.bandwidth_gb_per_s / sharing,
        device.peak_tflops[device.operands(operands)] / sharing,
        batch=plan.batch,
        context=plan.context,
        positions=positions,
    )
    link = device.link_between(used)
    moved, waited = collectives.seconds(
        collectives.planned(layout, plan.batch * positions),
        layout.tensor * layout.sequence,
        link.gb_per_s if link else math.inf,
        Terms().all_reduce_s,
    )
    return step.total_s + moved + waited

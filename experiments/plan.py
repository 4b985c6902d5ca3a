"""Where should this model run, what will it need there, and what will a token cost?

    python -m experiments.plan --config=70b --scheme=int4 --objective=cost

Memory by part, the layout (copies of the model, each split over devices), the expected rate
beside its bound, a step by part, money and energy; without an objective for the layouts asked
for, with one the best of the catalogue. All predicted: `ternax.planner` has the law, and the
efficiency comes from rates that were measured.
"""

import dataclasses
import pathlib
import sys

from ternax import mesh as meshes
from ternax import plan_table, planner, validation
from ternax.configs.hardware import DEVICES, Device, get_device
from ternax.errors import UsageError
from ternax.experiments import config_flag, flags
from ternax.experiments.keeping import (
    PUBLISHED,
    RESULTS,
    format_flags,
    formats,
    keep,
    output_flags,
)
from ternax.formats import get_format
from ternax.planner import OBJECTIVES, Efficiency, Layout, Terms
from ternax.record import Record
from ternax.shapes import get_shape
from ternax.table import row


def plan_flags(define):
    define.section("What runs")
    define.string("config", "70b", "models, or shapes that are planned alone", form="NAME,...")
    define.string("scheme", "trit2", "formats of the projections", form="NAME,...")
    format_flags(define)
    define.integer("context", 4096, "tokens each sequence holds", lower=1)
    define.section("Where")
    define.string(
        "device",
        None,
        "devices of the catalogue, or all",
        form="NAME,...",
        default_text="h100-sxm; with an objective all",
    )
    define.string("devices", None, "how many", form="N,...", default_text="1; ranked 1,2,4,8")
    define.string(
        "tensor",
        None,
        "of them that split each layer; the rest are copies",
        form="N,...",
        default_text="all; ranked 1,2,4,8",
    )
    define.string(
        "batch",
        None,
        "sequences of one copy together",
        form="N,...",
        default_text="1; with an objective 1 to 256",
    )
    define.section("Choice")
    define.choice(
        "objective", None, OBJECTIVES, "rank by $ a token, $ an hour, time a token, tokens/s"
    )
    define.number("slo_ms", None, "longest time per output token that serves")
    define.number("target_tokens_per_s", None, "the same as a rate of each sequence")
    define.number("demand_tokens_per_s", None, "of all sequences: takes as many copies as needed")
    define.integer("top", 12, "layouts to show", lower=1)
    define.boolean("compile", "memory and collectives by the compiler for an h100 or h200")
    define.section("Assumptions")
    define.number(
        "efficiency",
        None,
        "share of both limits that is reached",
        default_text="from measured rates",
    )
    define.string(
        "calibrate",
        None,
        "measured records that tell it: a folder a device, or one run's",
        form="DIR",
        default_text="results/, published rates",
    )
    define.number("usd_per_hour", None, "of one device", lower=0, default_text="the catalogue's")
    define.number("memory_share", Terms.memory_share, "of a device that a program may fill")
    define.number("all_reduce_us", 1e6 * Terms.all_reduce_s, "latency of one", lower=0)
    define.number("launch_us", 0.0, "of a kernel; 0: one recorded graph", lower=0)


def devices_of(text: str | None, ranked: bool) -> list[Device]:
    if text == "all" or (text is None and ranked):
        return list(DEVICES.values())
    return [get_device(name.strip()) for name in (text or "h100-sxm").split(",")]


def slo_of(args) -> float | None:
    """The longest time per output token in ms, from either flag."""
    if args.slo_ms is not None and args.target_tokens_per_s is not None:
        raise UsageError("--slo_ms and --target_tokens_per_s say the same: give one of them")
    for flag in ("slo_ms", "target_tokens_per_s", "demand_tokens_per_s"):
        value = getattr(args, flag)
        if value is not None and value <= 0:
            raise UsageError(f"--{flag} must be above 0, found {value:g}")
    if args.target_tokens_per_s is not None:
        return 1e3 / args.target_tokens_per_s
    return args.slo_ms


def run(
    found: list[Layout],
    efficiency: dict[str, Efficiency],
    target_tokens_per_s: float | None = None,
    flags_text: str = "",
    compiled=None,
) -> list[Record]:
    """A `predicted` Record for each layout, in their order.

    compiled: what a compiler said of the first (`ahead.Compiled`), or None.
    """
    records = [_record(one, efficiency, target_tokens_per_s, flags_text) for one in found]
    if compiled is not None:
        told = {
            "compiled_argument_bytes": compiled.argument_bytes,
            "compiled_prefill_bytes": compiled.prefill_bytes,
            "compiled_decode_bytes": compiled.decode_bytes,
            "collectives": sum(one.times for one in compiled.found),
        }
        first = records[0]
        records[0] = dataclasses.replace(first, metrics=first.metrics | told)
    return records


def _record(one: Layout, efficiency, target, flags_text: str) -> Record:
    at, bound = one.setting, one.replicas * one.bound.tokens_per_s
    parts = {"cache" if part == "kv" else part: size for part, size in one.bytes.items()}
    metrics: dict[str, float] = {
        "tokens_per_s": one.tokens_per_s,
        "bound_tokens_per_s": bound,
        "share_of_bound": one.tokens_per_s / bound,
        "tpot_ms_p50": 1e3 * one.step.total_s,
        "ttft_ms": 1e3 * one.ttft_s,
        "replicas": one.replicas,
        "tensor_devices": at.devices,
        "parameters": at.shape.parameters,
        "bits_per_weight": get_format(at.weights).bits_per_weight,
        "device_memory_bytes": round(one.resident_bytes),
        "available_memory_bytes": round(one.memory_bytes),
        **{f"{part}_bytes": round(size) for part, size in parts.items()},
        "efficiency_share": at.efficiency,
        **{f"{part}_ms": 1e3 * getattr(one.step, f"{part}_s") for part in plan_table.PARTS},
        "mfu_share": one.mfu,
        "mbu_share": one.mbu,
        "joules_per_token": one.joules_per_token,
    }
    if one.usd_per_h is not None and one.usd_per_million_tokens is not None:
        metrics["usd_per_h"] = one.usd_per_h
        metrics["usd_per_million_tokens"] = one.usd_per_million_tokens
    if target is not None:
        metrics["needed_gb_per_s"] = planner.bandwidth_needed_gb_per_s(one, target)
    note = f"{planner.name(one)}: {'fits' if one.fits else 'does not fit'}; efficiency: "
    note += efficiency[at.device.name].source
    if one.usd_per_h is not None:
        note += f"; price: {plan_table.price_source(one)}"
    return Record(
        experiment="plan",
        config=at.shape.name,
        scheme=at.weights,
        inputs=at.operands,
        backend="",
        device=f"{one.devices} x {at.device.name}" if one.devices > 1 else at.device.name,
        layers=at.shape.num_layers,
        batch=one.rows,
        context=at.context,
        phase="plan",
        kind="predicted",
        metrics=metrics,
        flags=flags_text,
        note=note,
    )


# Names of a plan, and what they are called where a model runs.
COMPILED = {
    "device": {"h100-sxm": "h100", "h200-sxm": "h200"},
    "scheme": {"trit2": "absmean,granularity=row", "int8": "int8", "int4": "int4", "fp16": "none"},
    "tables": {"fp16": "bf16", "fp32": "f32", "int8": "int8", "int4": "int4"},
    "kv": {"fp16": "bf16", "fp32": "f32", "int8": "int8"},
}


def compile_first(found: list[Layout]):
    """What the compiler for that GPU says of the only layout, and the layout with it."""
    from ternax import ahead, configs
    from ternax.config import with_scheme
    from ternax.workload import Workload

    one, at = found[0], found[0].setting
    if len(found) > 1 or at.shape.name not in configs.CONFIGS:
        raise UsageError(
            "--compile compiles one model of --list_configs in one layout: one --config, "
            "--scheme, --device, --devices and --batch, without an objective"
        )
    named = dict(device=at.device.name, scheme=at.weights, tables=at.tables, kv=at.kv)
    for flag, name in named.items():
        if name not in COMPILED[flag]:
            legal = ", ".join(COMPILED[flag])
            raise UsageError(f"--compile: --{flag} must be one of {legal}, found {name}")
        named[flag] = COMPILED[flag][name]
    prompt = min(at.context, planner.PREFILL_TOKENS)
    workload = Workload(
        batch=at.batch,
        prompt_length=prompt,
        num_tokens=at.context - prompt,
        kv_dtype=named["kv"],
        embed_dtype=named["tables"],
        head_dtype=named["tables"],
    )
    # A copy is compiled once, however many there are.
    mesh = ahead.mesh_of(named["device"], meshes.parse(f"tensor:{at.devices}"))
    config = with_scheme(configs.get_config(at.shape.name), named["scheme"])
    told = ahead.compile_for(named["device"], mesh, config, workload)
    return told, dataclasses.replace(one, activation_bytes=float(told.temporary_bytes))


def efficiencies(
    devices: list[Device], given: float | None, folder: str | None = None
) -> dict[str, Efficiency]:
    """Device -> the share of its limits to expect: as given, or from measured rates.

    folder: records that replace what ships. UsageError where it holds none that tell a share.
    """
    if given is not None:
        if folder is not None:
            raise UsageError("--efficiency and --calibrate say the same: give one of them")
        return {device.name: Efficiency(given, "--efficiency") for device in devices}
    if folder is not None:
        rows = validation.own(folder) if pathlib.Path(folder).is_dir() else []
        if not rows:
            raise UsageError(
                f"--calibrate={folder}: expected records of decoding (*.jsonl) that tell the "
                "bandwidth beside, found none"
            )
        return {device.name: planner.calibrated(device, rows, folder) for device in devices}
    rows = validation.published(PUBLISHED) + (validation.own(RESULTS) if RESULTS.is_dir() else [])
    return {device.name: planner.calibrated(device, rows) for device in devices}


def plan(args) -> None:
    """The command: lay out, rank if asked to, print, keep, draw."""
    slo_ms = slo_of(args)
    # What is fast enough is chosen among by its price, unless another wish is stated.
    objective = args.objective or ("price" if slo_ms is not None else None)
    shapes = []
    for word in args.config.split(","):
        shape, longest = get_shape(word.strip())
        if args.context > longest:
            raise UsageError(
                f"--context must be at most {longest}, what {shape.name} was made for, "
                f"found {args.context}"
            )
        shapes.append(shape)
    if len(shapes) > 1 and objective:
        raise UsageError(f"layouts of one --config are ranked, found {args.config}")
    devices = devices_of(args.device, ranked=objective is not None)
    terms = Terms(
        args.memory_share, args.all_reduce_us / 1e6, args.launch_us / 1e6, args.usd_per_hour
    )
    lacking = [d.name for d in devices if d.usd_per_h is None and terms.usd_per_h is None]
    if objective in ("cost", "price") and lacking and args.device not in (None, "all"):
        raise UsageError(f"no price of {', '.join(lacking)} is known; give --usd_per_hour")
    counts = config_flag.counts("devices", args.devices, planner.TENSOR if objective else (1,))
    if args.devices and max(counts) > 1 and args.device not in (None, "all"):
        lonely = [device.name for device in devices if device.fastest_link is None]
        if lonely and args.tensor != "1":
            raise UsageError(f"{lonely[0]} has no link to another: --tensor=1 makes copies")
    efficiency = efficiencies(devices, args.efficiency, args.calibrate)
    found = [
        one
        for shape in shapes
        for one in planner.layouts(
            shape,
            devices,
            schemes=[get_format(word.strip()).name for word in args.scheme.split(",")],
            **formats(args),
            counts=counts,
            tensor=config_flag.counts("tensor", args.tensor, planner.TENSOR)
            if args.tensor or objective
            else None,
            batches=config_flag.counts(
                "batch", args.batch, planner.BATCHES if args.objective else (1,)
            ),
            context=args.context,
            efficiency=efficiency,
            terms=terms,
        )
    ]
    if not found:
        raise UsageError("--tensor must divide --devices, found none that does")
    if args.demand_tokens_per_s is not None:
        single = [one for one in found if one.replicas == 1]
        found = [one.for_demand(args.demand_tokens_per_s) for one in single]
    shown = planner.rank(found, objective, slo_ms, args.top) if objective else found[: args.top]
    compiled = None
    if args.compile:
        compiled, shown[0] = compile_first(shown)
    lines = plan_table.detail(shown[0], efficiency)
    if compiled is not None:
        lines.append(row("compiled", plan_table.compiled_line(shown[0], compiled)))
    if args.target_tokens_per_s is not None:
        lines.append(row("needs", plan_table.needed(shown[0], args.target_tokens_per_s)))
    if len(shapes) == 1 and len({one.setting.weights for one in shown}) > 1:
        lines.append(row("weights", plan_table.weights(shown)))
    if len(shown) > 1:
        lines += ["", *plan_table.comparison(shown)]
        if objective:
            left_out = f", left out without a price: {', '.join(lacking)}" if lacking else ""
            lines.append(f"  of {len(found)} layouts, by {objective}{left_out}")
        elif len(found) > len(shown):
            lines.append(f"  {len(found) - len(shown)} more: --top={len(found)}")
    print("\n".join(lines))
    target = args.target_tokens_per_s
    records = run(shown, efficiency, target, args.command_line, compiled)
    names = ("plan", "-".join(shape.name for shape in shapes), objective or "layouts")
    print(keep(args, records, names, lambda picture: plan_table.draw(shown, picture)))


COMMAND = flags.Command(
    name="plan",
    summary="Plans a model on devices of the catalogue: memory, layout, rate, cost; ranks them.",
    groups=(plan_flags, output_flags),
    examples=(
        ("--config=70b --scheme=trit2,int4,fp16 --device=l40s,h100", "six layouts side by side"),
        ("--config=70b --scheme=int4 --objective=cost --slo_ms=50", "the cheapest fast enough"),
        ("--config=70b --scheme=nvfp4 --target_tokens_per_s=15", "what reaches 15 tokens/s?"),
        ("--config=deepseek-v3 --scheme=fp8 --objective=throughput", "by its active parameters"),
    ),
)


def main(argv=None) -> int:
    return COMMAND.run(plan, argv)


if __name__ == "__main__":
    sys.exit(main())

"""What would each GPU of a node hold and say? Prefill and the decode step, compiled without them.

    python -m experiments.aot --config=405b --mesh=tensor:8 --device=h200

Bytes are of the compiler's own plan; exchanges are counted in the compiled program and held
against those foretold. It needs jax's CUDA plugin, and no GPU; nothing is timed.
"""

import sys

from ternax.config import first_layers
from ternax.errors import NumericCheckFailed
from ternax.experiments import flags
from ternax.table import binary, row


def aot_flags(define):
    define.section("Ahead of time")
    define.string(
        "mesh",
        "tensor:4",
        "devices along data and tensor; tensor:1: one; auto:4: the best split of four, and why",
        form="AXIS:N,...|auto:N",
    )
    define.string("device", "h200", "the GPU, as in kernels.aot", form="NAME")
    define.integer("batch", 1, "sequences decoded together", lower=1)
    define.integer("context", 4096, "tokens of each, prompt and new", lower=4)
    define.boolean("debug", "show the traceback of an error")


def aot(args) -> None:
    """The command: compile, and hold bytes and exchanges against the plan."""
    from ternax import ahead, cost, mesh, mesh_choice
    from ternax.sharding import layout_for
    from ternax.workload import Workload

    config = first_layers(args.config, args.layers)
    if counted := mesh.of_auto(args.mesh):
        machine = mesh_choice.of_catalogue(args.device, counted)
        choice = mesh_choice.choose(config, machine, batch=args.batch, context=args.context)
        print(*choice.lines(), sep="\n", flush=True)
        sizes = choice.sizes
    else:
        sizes = mesh.parse(args.mesh)
    place = ahead.mesh_of(args.device, sizes)
    workload = Workload(batch=args.batch, prompt_length=args.context - 3, num_tokens=3)
    layout = layout_for(place, config)
    found = ahead.compile_for(args.device, place, config, workload)
    plan = cost.plan(config, batch=args.batch, context=args.context, layout=layout)
    planned = plan.weight_bytes + plan.bytes["cache"]
    where = f"{layout or 'one device'}, each an {args.device}"
    print(row("aot", f"{config.name} on {where}, batch {args.batch}"))
    print(row("compiled", f"{found.argument_bytes:,} bytes of arguments on a device"))
    print(row("planned", f"{planned:,} bytes of weights and cache"))
    whole, step = binary(found.prefill_bytes), binary(found.decode_bytes)
    print(row("besides", f"temporaries of prefill {whole}, of a step {step}"))
    if found.launches is not None:
        print(row("a layer", f"{found.launches:.4g} launches"))
    for one in found.found:
        print(row("a step", f"{one.times:4} x {one.kind} of {one.nbytes:,} bytes"))
    if found.found != found.planned:
        raise NumericCheckFailed(f"exchanges are not those planned: {found.planned}")


COMMAND = flags.Command(
    name="aot",
    summary="Compiles prefill and the decode step, split or whole, for GPUs that are not there.",
    groups=(flags.model_flags, aot_flags),
    examples=(
        ("--config=70b --mesh=tensor:4", "70b over four H200"),
        ("--config=405b --mesh=tensor:8 --device=h100", "405b over eight H100"),
    ),
    default_config="70b",
)


def main(argv=None) -> int:
    return COMMAND.run(aot, argv)


if __name__ == "__main__":
    sys.exit(main())

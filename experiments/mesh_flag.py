"""--mesh and the processes of a run: the same flags for every experiment."""

import math
import os
import shlex
import sys

from ternax import mesh, processes, watchdog
from ternax.config import ModelConfig
from ternax.errors import UsageError
from ternax.provenance import environment
from ternax.table import row

# Flags of a run of several processes; the last tells them apart.
OF_PROCESSES = ("coordinator", "processes", "heartbeat_s", "join_s", "step_timeout_s", "process")


def mesh_flags(define) -> None:
    """Becomes `args.mesh` and more; experiments take `mesh_of(args)`."""
    define.section("Devices")
    define.string(
        "mesh",
        None,
        "devices along data (the batch), tensor (every matrix, the cache), sequence (long caches) "
        "and, in training, fsdp (batch and weights): data:2,tensor:4; on a processor they share "
        "its cores and memory; auto takes the split of least predicted time and says why, auto:4 "
        "of four devices",
        form="AXIS:N,...|auto",
        default_text="one device",
    )
    define.string(
        "coordinator",
        None,
        "where the first of several processes listens; experiments.launch starts them on one "
        "machine, and SLURM is found by itself",
        form="HOST:PORT",
    )
    define.integer("processes", None, "how many processes the run has", lower=1)
    define.integer("process", None, "which of them this is, from 0", lower=0)
    define.integer(
        "heartbeat_s",
        processes.HEARTBEAT_S,
        "seconds after which a silent process is given up",
        lower=1,
    )
    define.integer(
        "join_s", processes.JOIN_S, "seconds that processes wait for one another to come", lower=1
    )
    define.integer(
        "step_timeout_s", 600, "seconds after which a step of several processes hangs", lower=1
    )


def mesh_of(args, config: ModelConfig | None = None, **work):
    """The mesh that --mesh asks for, or None; before jax first looks at its devices.

    Joins the other processes first, if there are any; all but the first are silent from then
    on. With --plan_only the devices need not be there.

    config, work: the packed model that runs and what it does, as for `mesh_choice.choose`, for
    --mesh=auto, which prints what it weighed; None where there is nothing to choose by.
    """
    counted = None if args.mesh is None else mesh.of_auto(args.mesh)
    if counted is not None and config is None:
        raise UsageError("--mesh=auto weighs packed models at work: name a mesh, such as fsdp:2")
    sizes = None if args.mesh is None or counted is not None else mesh.parse(args.mesh)
    if sizes and sizes["sequence"] > 1 and (config is None or work.get("positions", 1) > 1):
        raise UsageError(f"--mesh={args.mesh}: sequence splits a KV cache, and here is none")
    plan_only = getattr(args, "plan_only", False)
    if sizes and plan_only:
        return mesh.abstract_mesh(sizes)
    member = processes.find(args.coordinator, args.processes, args.process, os.environ)
    if member is None and args.mesh is None:
        return None
    if args.mesh is None:
        raise UsageError("--processes are of a mesh, found no --mesh: name one, such as data:2")
    parts = 1 if member is None else member.count
    count = math.prod(sizes.values()) if sizes else counted or parts
    if count % parts:
        raise UsageError(f"--mesh={args.mesh} has {count} devices, not to be shared by {parts}")
    if not plan_only:
        mesh.share_processor(count // parts)
        if member is not None:
            _join(args, member)
    if sizes is not None:
        return mesh.make_mesh(sizes)
    import jax

    from ternax import mesh_choice

    assert config is not None  # else auto was refused
    there = jax.device_count() * (parts if plan_only else 1)  # plans are made before any joins
    machine = mesh_choice.machine(counted or there)
    choice = mesh_choice.choose(config, machine, all_devices=parts > 1, **work)
    print(*choice.lines(), sep="\n", flush=True)
    if plan_only:
        return mesh.abstract_mesh(choice.sizes)
    # Free memory is each process's own: what the first one chose is the choice of all.
    taken = dict(
        zip(mesh.AXES, processes.of_first([choice.sizes[a] for a in mesh.AXES]), strict=True)
    )
    return mesh.make_mesh(taken, jax.devices()[: math.prod(taken.values())])


def _join(args, member: processes.Member) -> None:
    processes.join(member, says(args.command_line), args.heartbeat_s, args.join_s)
    watchdog.arm(args.step_timeout_s, f"process {member.index}")
    if member.index:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)


def says(command_line: str) -> str:
    """What all processes of a run must agree on, a line each."""
    words = [
        word
        for word in shlex.split(command_line)
        if not word.lstrip("-").startswith(f"{OF_PROCESSES[-1]}=")
    ]
    found = environment()
    return "\n".join([*words, found.versions, found.source_sha256])


def table(layout, workload) -> list[str]:
    """What each tensor becomes on a device; nothing without a layout."""
    if layout is None:
        return []
    import jax
    from flax import nnx

    from ternax.nn.cache import init_cache
    from ternax.random_weights import abstract_part
    from ternax.sharding import CACHE, lines

    part, specs = abstract_part(
        layout, embed_dtype=workload.embed_dtype, head_dtype=workload.head_dtype
    )
    rows = workload.batch // layout.batch
    context = layout.local_context(workload.context)
    cache = jax.eval_shape(
        lambda: init_cache(layout.local_config, rows, context, workload.kv_dtype)
    )
    tree = {"": nnx.state(part), "cache": {"k": cache.k, "v": cache.v}}
    specs |= dict.fromkeys(("cache.k", "cache.v"), layout.partition(CACHE))
    found = list(lines(layout, tree, specs))
    if layout.kv_copies > 1:
        heads, copies = layout.config.num_kv_heads, layout.kv_copies
        found.append(f"{heads} kv heads over {layout.tensor}: each on {copies}, counted in whole")
    if layout.across and not layout.vocab_across:
        vocab = layout.config.vocab_size
        found.append(f"a vocabulary of {vocab:,} does not divide by {layout.tensor}: tables whole")
    return [row("mesh", f"{layout}: {layout.mesh.size} devices"), *(row("", x) for x in found)]

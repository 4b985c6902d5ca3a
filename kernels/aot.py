"""Compiles the GPU kernels for a GPU that is not there, and tells what the compiler made.

    python -m ternax.kernels.aot --device=h200 --shapes=70b --rows=1,16

One JSON line a kernel, shape and number of rows: registers, spills, shared memory and the
instructions of the main loop for each weight. It runs on any CPU, with jax's CUDA plugin as
the compiler and NVIDIA's ptxas and nvdisasm. Nothing is timed, so nothing here is a speed.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from . import sass, target
from .packing import CANONICAL, FORMATS, Packed
from .pallas import backend, tiles
from .shapes import SHAPES, products

# XLA's GpuTargetConfigProto. It withholds CUDA graphs from a target whose versions are absent.
_PROTO = """
gpu_device_info {{
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: 1.98
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
runtime_version {{ major: 13 minor: 0 patch: 0 }}
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
device_description_str: "{kind}"
"""
# NVIDIA's data sheets of the SXM modules; L2 of GH100 as both have it.
_H200 = dict(cores=132, bandwidth=4_800_000_000_000, l2=60 << 20, memory=141_000_000_000)
_H100 = dict(cores=132, bandwidth=3_350_000_000_000, l2=50 << 20, memory=80_000_000_000)


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU to compile for: what kernels ask of it, and what XLA does."""

    target: target.Target
    proto: str


def _device(kind: str, numbers: dict[str, int]) -> Device:
    cores = numbers["cores"]
    return Device(
        target.Target("gpu", kind, "9.0", cores, present=False), _PROTO.format(kind=kind, **numbers)
    )


DEVICES = {
    "h200": _device("NVIDIA H200", _H200),
    "h100": _device("NVIDIA H100 80GB HBM3", _H100),
}

# Of one pass of the head kernel.
_MAX_HEAD_ROWS = 96
# Of a stack that is compiled for: enough that a copy of a layer would show.
_LAYERS = 4


class UsageError(ValueError):
    """A name or number that cannot be used, or a tool that is not here; exit code 2."""


def why_not() -> str | None:
    """None where GPU kernels can be compiled and read here; else what is missing, in one line."""
    if jax.__version_info__ < backend.MIN_JAX:
        return f"it needs jax 0.11.2 or later (Python 3.12), found {jax.__version__}"
    pip = f"pip install --no-deps jax-cuda13-plugin=={jax.__version__}"
    try:
        found = importlib.metadata.version("jax-cuda13-plugin")
    except importlib.metadata.PackageNotFoundError:
        return f"it needs jax's CUDA plugin: {pip} jax-cuda13-pjrt=={jax.__version__}"
    if found != jax.__version__:
        return f"jax is {jax.__version__}, its CUDA plugin {found}: {pip}"
    for tool, package in (("ptxas", "nvidia-cuda-nvcc"), ("nvdisasm", "nvidia-cuda-nvdisasm")):
        if _tool(tool) is None:
            return f"it needs {tool}, in PATH or from pip install {package}"
    return None


def _tool(name: str) -> str | None:
    """Path of one of NVIDIA's tools: in PATH, or in a wheel beside jax."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *_wheels()]))


def _wheels() -> list[str]:
    spec = importlib.util.find_spec("nvidia")
    return [f"{path}/cu13/bin" for path in (spec.submodule_search_locations or [])] if spec else []


@functools.cache
def devices(name: str, count: int = 1) -> list:
    """As many of DEVICES[name] as one machine would have, to compile for.

    To be asked for before jax first looks at its devices: later it takes up no plugin.
    """
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    jax.config.update("jax_platforms", "cpu")
    topology = topologies.get_topology_desc(
        name, "cuda", target_config=DEVICES[name].proto, topology=f"1x{count}x1"
    )
    return topology.devices


def compile_for(
    name: str, function, *arguments, donate: tuple[int, ...] = ()
) -> jax.stages.Compiled:
    """`jit(function)` for DEVICES[name]; arguments are arrays or their shapes, in pytrees, those
    at `donate` given away."""
    where = SingleDeviceSharding(devices(name)[0])
    there = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), arguments
    )
    with target.compiling_for(DEVICES[name].target):
        jitted = jax.jit(function, donate_argnums=donate)
        return jitted.trace(*there).lower(lowering_platforms=("cuda",)).compile()


@contextlib.contextmanager
def dumped_kernels():
    """Yields a folder in which Mosaic GPU leaves what it compiles within: PTX and resources.

    A kernel that this process compiled before is not compiled again, and leaves nothing. On
    stderr Mosaic says that it found no nvdisasm for itself; `inspect` has its own.
    """
    before = os.environ.get("MOSAIC_GPU_DUMP_TO")
    cached = jax.config.jax_enable_compilation_cache
    with tempfile.TemporaryDirectory(prefix="ternax-aot-") as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        jax.config.update("jax_enable_compilation_cache", False)
        try:
            yield pathlib.Path(folder)
        finally:
            jax.config.update("jax_enable_compilation_cache", cached)
            os.environ.pop("MOSAIC_GPU_DUMP_TO")
            if before is not None:
                os.environ["MOSAIC_GPU_DUMP_TO"] = before


def inspect(folder: pathlib.Path) -> dict:
    """What ptxas makes of the one kernel dumped in `folder`."""
    [(kernel, found)] = kernels(folder).items()
    loop = sass.main_loop(disassembled(folder, kernel))
    return {
        **found,
        "issued_per_weight": round(loop.issued_per_weight, 4),
        "alu_per_weight": round(loop.alu_per_weight, 4),
        "loop": loop.instructions,
    }


def kernels(folder: pathlib.Path) -> dict[str, dict[str, int]]:
    """Registers, spills and shared memory of each kernel dumped in `folder`, by its name."""
    found = {}
    for ptx in sorted(folder.glob("*.ptx")):
        [resources] = folder.glob(f"{ptx.stem}.resources.txt")
        shared = re.findall(r"smem_scratch_bytes=(\d+)", resources.read_text())[0]
        arch = re.findall(r"\.target (\w+)", ptx.read_text())[0]
        made = _run("ptxas", "-v", f"-arch={arch}", str(ptx), "-o", str(ptx.with_suffix(".cubin")))
        found[ptx.stem] = {**sass.resources(made), "shared_bytes": int(shared)}
    return found


def disassembled(folder: pathlib.Path, kernel: str) -> str:
    """nvdisasm's text of one of `kernels(folder)`."""
    return _run("nvdisasm", "-c", str(folder / f"{kernel}.cubin"))


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_tool(tool) or tool, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"{tool} failed: {(done.stderr or done.stdout).strip().splitlines()[0]}")
    return done.stdout + done.stderr


def report(device: str, name: str, k_size: int, n: int, rows: int) -> dict:
    """The record of a shape's kernel on one layer of a stack, for `rows` rows of activations."""
    w = _stack(name, k_size, n)
    with target.compiling_for(DEVICES[device].target):
        config = backend.heuristic(jax.ShapeDtypeStruct((rows, k_size), jnp.int8), w)
    whole = config.get("rows", 8)  # kernels pad rows to as many, so that some have the same
    found = _compiled(device, w, -(-rows // whole) * whole, tuple(config.items()))
    return {
        "kind": "compiled",
        "kernel": "head" if _is_head(name) else "matrix" if "strip" in config else "decode",
        "device": DEVICES[device].target.kind,
        "shape": name,
        "k": k_size,
        "n": n,
        "rows": rows,
        **found,
        "jax": jax.__version__,
        "ptxas": _run("ptxas", "--version").strip().splitlines()[-1],
    }


def _is_head(name: str) -> bool:
    return name.endswith(":head")


def _stack(name: str, k_size: int, n: int) -> Packed:
    """Shapes of a stack of weights: tiles of trits, or the canonical int8 of a head."""
    size, format, layout = tiles.data_shape((k_size, n)), "trit2", tiles.LAYOUT
    if _is_head(name):
        size, format, layout = (n, FORMATS["int8"].row_bytes(k_size)), "int8", CANONICAL

    def make():
        data, scale = jnp.zeros((_LAYERS, 1, *size), jnp.uint8), jnp.ones((_LAYERS, 1, 1, 1))
        return Packed(data, scale, None, format, layout, (k_size, n))

    return jax.eval_shape(make)


@functools.cache
def _compiled(device: str, w: Packed, rows: int, config: tuple[tuple[str, int], ...]) -> dict:
    """What is compiled for int8 activations with scales, as models multiply them."""
    with dumped_kernels() as folder:
        compiled = compile_for(
            device,
            lambda x, x_scale, w, layer: backend.run(x[None], x_scale, w, layer, dict(config)),
            jax.ShapeDtypeStruct((rows, w.shape[0]), jnp.int8),
            jax.ShapeDtypeStruct((rows, 1), jnp.float32),
            w,
            jax.ShapeDtypeStruct((), jnp.int32),
        )
        found = inspect(folder)
    memory = compiled.memory_analysis()
    if memory is None:
        raise UsageError("the compiler plans no memory: jax and its CUDA plugin do not match")
    return {
        "config": dict(config),
        **found,
        "layer_bytes": math.prod(w.data.shape) // _LAYERS,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def find_shapes(names: str) -> list[tuple[str, int, int]]:
    """(name, K, N) of "70b" (all of a model) or "70b:down", behind commas."""
    found = []
    for name in names.split(","):
        known = products(name)
        if not known:
            raise UsageError(
                f"--shapes: expected one of {', '.join(SHAPES)}, alone or as model:part with part "
                f"among {', '.join(SHAPES['70b'])}; found {name!r}"
            )
        found += [(each, *shape) for each, shape in known.items()]
    return found


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def main(argv=None) -> int:
    parser = _Parser(prog="python -m ternax.kernels.aot", allow_abbrev=False)
    flag = functools.partial(parser.add_argument, metavar="...")
    flag("--device", default="h200", help=f"of {', '.join(DEVICES)} [h200]")
    flag("--shapes", default="70b", help="a model or model:part, behind commas [70b]")
    flag(
        "--rows",
        default="1,16",
        help="rows of activations, with heads up to 96 [1,16]",
    )
    try:
        args = parser.parse_args(argv)
        if args.device not in DEVICES:
            raise UsageError(
                f"--device: expected one of {', '.join(DEVICES)}, found {args.device!r}"
            )
        shapes, rows = find_shapes(args.shapes), args.rows.split(",")
        heads = any(_is_head(name) for name, _, _ in shapes)
        most = _MAX_HEAD_ROWS if heads else sys.maxsize
        if not all(text.isdecimal() and 1 <= int(text) <= most for text in rows):
            limit = f"from 1 to {most}, with heads" if heads else "of at least 1"
            raise UsageError(f"--rows: expected integers {limit}, found {args.rows!r}")
        if reason := why_not():
            raise UsageError(f"cannot compile ahead of time here: {reason}")
        for shape in shapes:
            for count in rows:
                print(json.dumps(report(args.device, *shape, int(count))), flush=True)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

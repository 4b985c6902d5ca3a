"""What is this machine, what can run on it, and what stands in the way?

    python -m experiments.doctor

One screen. It works where an installation is broken: what cannot be found out says
why, and clashing versions come with the pip line that mends them.
"""

import dataclasses
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap

from ternax import measure
from ternax.configs import CONFIGS
from ternax.experiments import flags
from ternax.table import binary, rate, row

CONTEXT = 512
# A quarter of what decode reads, since making the buffer takes longer than reading it.
_BANDWIDTH_S, _BANDWIDTH_BYTES = 0.5, 1 << 28

# The floors of setup.cfg; a test holds them equal.
FLOORS = {
    "jax": "0.10.2",
    "jaxlib": "0.10.2",
    "flax": "0.12.8",
    "numpy": "",
    "optax": "",
    "orbax-checkpoint": "0.12",
    "absl-py": "",
    "ml_collections": "",
    "pyyaml": "",
    "rich": "",
}
_CUDA = tuple(f"jax-cuda{n}-{part}" for n in (13, 12) for part in ("plugin", "pjrt"))


@dataclasses.dataclass(frozen=True)
class Clash:
    """Two versions that do not go together, and the command that mends it."""

    found: str
    mend: str


@dataclasses.dataclass(frozen=True)
class Checkup:
    """What was found. None stands for what the machine does not tell.

    Attributes:
      system: operating system and architecture.
      python: version and the interpreter's path.
      processor: its name; `threads` of it may be used.
      threads: processors this process may run on.
      instruction_sets: extensions that kernels care about.
      compiler: version and path of the C++ compiler, or None.
      devices: JAX devices in words; empty when JAX does not work.
      trouble: why JAX or the models cannot be used, in one line, or "".
      backends: kernel backend -> None if it can run, else why not.
      memory_total_bytes, memory_available_bytes: of the first device.
      bandwidth: at which that memory is read.
      versions: package -> version, or None where it is absent.
      clashes: what does not go together.
      plans: every named config at batch 1 and CONTEXT tokens, or as many as it takes.
    """

    system: str
    python: str
    processor: str
    threads: int
    instruction_sets: tuple[str, ...]
    compiler: str | None
    devices: tuple[str, ...]
    trouble: str
    backends: dict[str, str | None]
    memory_total_bytes: int | None
    memory_available_bytes: int | None
    bandwidth: measure.Bandwidth
    versions: dict[str, str | None]
    clashes: tuple[Clash, ...]
    plans: tuple

    @property
    def largest(self):
        """The plan of the largest config that fits, or None."""
        fitting = [plan for plan in self.plans if plan.fits]
        return max(fitting, key=lambda plan: plan.parameters, default=None)


def run() -> Checkup:
    """Looks at everything; nothing is written and nothing stays allocated."""
    versions = installed_versions()
    device, devices, trouble = jax_devices()
    bandwidth = measure.read_bandwidth(
        seconds=_BANDWIDTH_S, max_bytes=_BANDWIDTH_BYTES, device=device
    )
    planned, no_models = plans(device) if device else ((), "")
    return Checkup(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=f"{platform.python_version()}, {sys.executable}",
        processor=measure.cpu_model(),
        threads=measure.threads_available(),
        instruction_sets=measure.instruction_sets(),
        compiler=compiler(),
        devices=devices,
        trouble=trouble or no_models,
        backends=backend_reasons(device) if device else {},
        memory_total_bytes=measure.memory_total_bytes(device),
        memory_available_bytes=measure.memory_available_bytes(device),
        bandwidth=bandwidth,
        versions=versions,
        clashes=tuple(find_clashes(versions, sys.version_info[:2], gpu=has_nvidia_gpu())),
        plans=planned,
    )


def installed_versions() -> dict[str, str | None]:
    """Version of each package that counts, without importing it; CUDA plugins if present."""
    found: dict[str, str | None] = {}
    for name in (*FLOORS, *_CUDA):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in FLOORS:
                found[name] = None
    return found


def number(version: str | None) -> tuple[int, ...]:
    """(0, 10, 2) of "0.10.2.dev3"; (0,) where there is none."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[a-z+]", version or "0")[0])))


def find_clashes(versions, python: tuple[int, int], gpu: bool = False) -> list[Clash]:
    """What in `versions` does not go together or is too old, each with what mends it.

    Args:
      versions: package -> version or None, as `installed_versions` returns them.
      python: (major, minor) of the interpreter.
      gpu: whether there is an NVIDIA GPU.
    """
    clashes = []
    if python < (3, 11):
        words = ".".join(map(str, python))
        clashes.append(
            Clash(f"Python {words}; 3.11 or newer is needed", "make env PYTHON=python3.12")
        )
    for name, floor in FLOORS.items():
        version = versions.get(name)
        wanted = f"{name}>={floor}" if floor else name
        if version is None:
            clashes.append(Clash(f"{name} is absent", f'pip install "{wanted}"'))
        elif number(version) < number(floor):
            clashes.append(
                Clash(f"{name} {version} is older than {floor}", f'pip install -U "{wanted}"')
            )
    jax, jaxlib, flax = (versions.get(name) for name in ("jax", "jaxlib", "flax"))
    if jax and jaxlib and number(jax)[:3] != number(jaxlib)[:3]:
        clashes.append(
            Clash(f"jax {jax} with jaxlib {jaxlib}", f'pip install "jax=={jax}" "jaxlib=={jax}"')
        )
    if jax and flax and number(jax) >= (0, 11, 1) and (0, 12, 8) <= number(flax) < (0, 12, 9):
        # flax 0.12.8 is the last for Python 3.11, where jax ends at 0.10.2.
        mend = (
            'pip install "flax>=0.12.9"'
            if python >= (3, 12)
            else 'pip install "jax==0.10.2" "jaxlib==0.10.2"'
        )
        clashes.append(Clash(f"flax {flax} cannot import nnx under jax {jax}", mend))
    plugins = {name: versions[name] for name in _CUDA if versions.get(name)}
    for name, version in plugins.items():
        if jaxlib and number(version)[:3] != number(jaxlib)[:3]:
            cuda = name.removeprefix("jax-").partition("-")[0]
            clashes.append(
                Clash(
                    f"{name} {version} with jaxlib {jaxlib}",
                    f'pip install "jax[{cuda}]=={jax or jaxlib}"',
                )
            )
    if gpu and not plugins:
        clashes.append(
            Clash(
                "an NVIDIA GPU is here, but JAX has no CUDA plugin",
                f'pip install "jax[cuda13]=={jax or FLOORS["jax"]}"',
            )
        )
    return clashes


def has_nvidia_gpu() -> bool:
    """Whether the driver shows a GPU."""
    return os.path.exists("/proc/driver/nvidia/gpus") and bool(
        os.listdir("/proc/driver/nvidia/gpus")
    )


def compiler() -> str | None:
    """Version and path of the C++ compiler that builds kernels here, or None."""
    named = os.environ.get("CXX")
    path = next(
        filter(None, map(shutil.which, [named] if named else ["g++", "clang++", "c++"])), None
    )
    if path is None:
        return None
    try:
        said = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path}, which does not run: {error}"
    return f"{said.splitlines()[0] if said else 'version unknown'}, {path}"


def jax_devices():
    """(the first device or None, all in words, why JAX does not work or "")."""
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # a broken installation fails in many ways
        return None, (), first_line(error)
    kinds = [f"{device.platform} ({device.device_kind})" for device in devices]
    counts = {kind: kinds.count(kind) for kind in kinds}
    return devices[0], tuple(f"{n} x {kind}" for kind, n in counts.items()), ""


def backend_reasons(device) -> dict[str, str | None]:
    """Kernel backend -> None if it can run on the device's platform, else why not."""
    from ternax.kernels.backends import BACKENDS

    return {name: b.why_not(device.platform, None, None) for name, b in BACKENDS.items()}


def plans(device) -> tuple[tuple, str]:
    """(what every named config needs, "") or, where models cannot be imported, ((), why)."""
    try:
        from ternax import cost
    except Exception as error:  # flax and jax that clash fail in many ways
        return (), first_line(error)
    available, fused = cost.available_bytes(device), cost.fuses(device)
    return tuple(
        cost.plan(
            config,
            context=min(CONTEXT, config.max_context),
            available_bytes=available,
            fused=fused,
        )
        for config in CONFIGS.values()
    ), ""


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"


def lines(found: Checkup) -> list[str]:
    """The screen."""
    versions = ", ".join(
        f"{name} {version or 'absent'}" for name, version in found.versions.items()
    )
    text = [
        row("system", found.system),
        row("python", found.python),
        row("cpu", f"{found.processor}, {found.threads} threads"),
        row("", f"kernels may use: {' '.join(found.instruction_sets) or 'nothing special'}"),
        row("compiler", found.compiler or "none: the reference backend will be used"),
        row("devices", ", ".join(found.devices) or f"none: {found.trouble}"),
        row(
            "memory",
            f"{amount(found.memory_total_bytes)} in all, "
            f"{amount(found.memory_available_bytes)} available, read at "
            f"{found.bandwidth.median:.1f} GB/s ({found.bandwidth.method})",
        ),
    ]
    for i, (name, reason) in enumerate(found.backends.items()):
        text.append(row("" if i else "backends", f"{name}: {reason or 'can run'}"))
    text.append(row("versions", versions))
    for i, clash in enumerate(found.clashes):
        text += [row("" if i else "clashes", clash.found), row("", f"  {clash.mend}")]
    if not found.clashes:
        text.append(row("clashes", "none"))
    return [*text, *plan_table(found), "", *conclusion(found)]


def plan_table(found: Checkup) -> list[str]:
    """One line a config. The bound is a limit, so its column says so."""
    if not found.plans:
        return []
    head = f"{'configs':9}{'':14}{'parameters':>12}{'GiB':>9}  {'':14}{'bound, tokens/s':>15}"
    text = [head + f"  (batch 1, context {CONTEXT})"]
    for plan in found.plans:
        context = "" if plan.context == CONTEXT else f"  (context {plan.context})"
        text.append(
            f"{'':9}{plan.config.name:14}{billions(plan.parameters):>12}"
            f"{plan.total_bytes / 2**30:9.2f}  {'fits' if plan.fits else 'does not fit':14}"
            f"{rate(plan.bound_tokens_per_s(found.bandwidth.median)):>15}{context}"
        )
    return text


def conclusion(found: Checkup) -> list[str]:
    """One plain sentence and the next command."""
    best = found.largest
    if found.trouble:
        mend = found.clashes[0].mend if found.clashes else "make env"
        return [textwrap.fill(f"Nothing can run here yet: {found.trouble}", 100), f"next: {mend}"]
    if best is None:
        said = "No named config fits the memory that is available."
        command = f"--config={found.plans[0].config.name} --plan_only"
    else:
        bound = rate(best.bound_tokens_per_s(found.bandwidth.median))
        said = (
            f"{best.config.name} is the largest config that fits; reading its weights bounds "
            f"it to {bound} tokens/s here."
        )
        command = f"--config={best.config.name}"
    if found.clashes:
        said += " Mend the clashes first."
    return [textwrap.fill(said, 100), f"next: python -m experiments.decode {command}"]


def amount(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else binary(nbytes)


def billions(count: int) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e8 else f"{count / 1e6:.3g} M"


def doctor_flags(define) -> None:
    define.section("Run")
    define.integer(
        "threads",
        None,
        "processor threads to use",
        lower=1,
        upper=measure.threads_available(),
        default_text="all available",
    )
    define.boolean("debug", "show the traceback of an error")


def doctor(args) -> None:
    """The command: look, print."""
    if args.threads is not None:
        measure.limit_threads(args.threads)
    print("\n".join(lines(run())))


COMMAND = flags.Command(
    name="doctor",
    summary="Tells what this machine is, what can run on it, and what stands in the way.",
    groups=(doctor_flags,),
    examples=(("", "everything, on one screen"), ("--threads=1", "the same for one processor")),
)


def main(argv=None) -> int:
    return COMMAND.run(doctor, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Step `facts`: the device as it was found. NVML is asked and never told anything."""

import importlib.metadata
import platform
from typing import Any

from ternax import measure
from ternax.gpu.made import Step

_PACKAGES = ("torch", "triton", "nvidia-ml-py", "jax-cuda13-plugin", "nvidia-cublas", "gemlite")
# Why clocks are lower than they could be: NVML's bits.
_REASONS = {
    0x1: "idle",
    0x2: "set by an application",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}


def run(step: Step) -> None:
    import jax

    device = jax.devices()[0]
    metrics, words = nvml()
    total = measure.memory_total_bytes(device)
    free = measure.memory_available_bytes(device)
    if free is not None:
        metrics["available_memory_bytes"] = free
    capability = getattr(device, "compute_capability", None)
    cores = getattr(device, "core_count", None)
    words = [
        f"{device.device_kind}, {device.platform}",
        *([f"compute capability {capability}"] if capability else []),
        *([f"{cores} processors"] if cores else []),
        *([f"{total} bytes for JAX"] if total else []),
        *words,
        f"JAX's platform: {' '.join(getattr(device.client, 'platform_version', '?').split())}",
        f"Linux {platform.release()}",
        *(f"{name} {version(name)}" for name in _PACKAGES),
    ]
    step.keep("device", metrics, ", ".join(words))


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def nvml() -> tuple[dict[str, float], list[str]]:
    """(metrics, facts in words) of the first visible GPU; empty where NVML does not answer."""
    handles = measure.nvml_handles()
    if not handles:
        return {}, ["NVML does not answer"]
    import pynvml

    handle = handles[0][1]

    def ask(function: str, *arguments) -> Any:
        try:
            found = getattr(pynvml, function)(*arguments)
        except Exception:  # a driver or a GPU that does not tell this
            return None
        return found.decode() if isinstance(found, bytes) else found

    metrics: dict[str, float] = {}
    for name, function, arguments, unit in (
        ("sm_clock_mhz", "nvmlDeviceGetClockInfo", (handle, 1), 1),
        ("memory_clock_mhz", "nvmlDeviceGetClockInfo", (handle, 2), 1),
        ("watts", "nvmlDeviceGetPowerUsage", (handle,), 1e-3),
        ("temperature_c", "nvmlDeviceGetTemperature", (handle, 0), 1),
    ):
        value = ask(function, *arguments)
        if value is not None:
            metrics[name] = value * unit
    limit, most = ask("nvmlDeviceGetEnforcedPowerLimit", handle), "nvmlDeviceGetMaxClockInfo"
    words = [
        f"driver {ask('nvmlSystemGetDriverVersion')}",
        f"CUDA {ask('nvmlSystemGetCudaDriverVersion_v2') or ask('nvmlSystemGetCudaDriverVersion')}",
        f"clocks at most {ask(most, handle, 1)} and {ask(most, handle, 2)} MHz",
        f"power limit {limit / 1e3 if limit else '?'} W",
        f"throttled: {throttled(handle) or 'not told'}",
        f"processes on it: {_count(ask('nvmlDeviceGetComputeRunningProcesses', handle))}",
        f"ECC {ask('nvmlDeviceGetEccMode', handle)}, MIG {ask('nvmlDeviceGetMigMode', handle)}",
    ]
    return metrics, words


def throttled(handle=None) -> str:
    """Why clocks are held down now, in words; "" where NVML does not say."""
    try:
        import pynvml

        handle = handle or measure.nvml_handles()[0][1]
        names = ("CurrentClocksEventReasons", "CurrentClocksThrottleReasons")
        asked = next(f for n in names if (f := getattr(pynvml, f"nvmlDeviceGet{n}", None)))
        bits = asked(handle)
    except Exception:
        return ""
    return " and ".join(word for bit, word in _REASONS.items() if bits & bit) or "no"


def _count(found) -> str:
    return "?" if found is None else str(len(found))

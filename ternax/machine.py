"""What this machine has: processors, caches, memory and how much of it is free.

Everything degrades: what the machine does not tell is None, never zero. Functions
that take a `device` want a JAX device; None, or one whose platform is "cpu",
means the host.
"""

import os
import pathlib
import platform
import re

_PROC = pathlib.Path("/proc")
_CGROUP = pathlib.Path("/sys/fs/cgroup")
_CACHES = pathlib.Path("/sys/devices/system/cpu/cpu0/cache")


def read_text(path: pathlib.Path) -> str:
    """A file of the kernel's, or "" where there is none or it may not be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def threads_available() -> int:
    """Processors this process may run on: its affinity, not what the machine holds."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def limit_threads(threads: int) -> None:
    """Keeps this process on its first `threads` processors; call it before JAX starts its pools."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _cpuinfo(*keys: str) -> str:
    """The first of `keys` in /proc/cpuinfo, or ""."""
    text = read_text(_PROC / "cpuinfo")
    for key in keys:
        found = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
        if found:
            return found.group(1).strip()
    return ""


def cpu_model() -> str:
    """The processor's name, as its maker or the hypervisor gives it."""
    return (
        _cpuinfo("model name", "Hardware", "cpu model")
        or platform.processor()
        or (platform.machine())
    )


def device_name(device) -> str:
    """A device in words, for records: with the host go the threads this process may use."""
    if on_host(device):
        return f"{cpu_model()}, {threads_available()} threads"
    return device.device_kind


_INSTRUCTION_SETS = (
    "avx2",
    "fma",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512vbmi",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
    "sme",
)


def instruction_sets() -> tuple[str, ...]:
    """Those vector and matrix extensions the processor has that kernels care about."""
    flags = set(_cpuinfo("flags", "Features").split())
    return tuple(name for name in _INSTRUCTION_SETS if name in flags)


def last_level_cache_bytes() -> int | None:
    """Bytes of the largest cache of processor 0, where Linux tells."""
    sizes = [read_text(path).strip() for path in _CACHES.glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if size[-1:] == "K"), default=None)


def _kib_line(path: pathlib.Path, key: str) -> int | None:
    """Bytes of a line "key:  123 kB"."""
    found = re.search(rf"^{key}:\s*(\d+) kB", read_text(path), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def read_number(path: pathlib.Path) -> int | None:
    text = read_text(path).strip()
    return int(text) if text.isdigit() else None  # "max" is no limit


def _cgroup_memory() -> list[tuple[int, int]]:
    """(limit, free) in bytes of every control group with a limit that holds this process.

    A group's children share its limit, so all groups from the process' own up to
    the root count. Page cache that was not touched lately is charged to a group
    but given back before anything fails, hence it counts as free.
    """
    found = []
    for line in read_text(_PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = _CGROUP, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = _CGROUP / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.lstrip("/")
        # Inside a container the path may be the host's; then only the root is there.
        for directory in (group, *group.parents):
            limit, used = read_number(directory / names[0]), read_number(directory / names[1])
            if limit is not None and used is not None:
                stat = read_text(directory / "memory.stat")
                cache = re.search(rf"^{names[2]} (\d+)$", stat, re.MULTILINE)
                reclaimable = int(cache.group(1)) if cache else 0
                found.append((limit, max(0, limit - used + reclaimable)))
            if directory == root:
                break
    return found


def _device_stat(device, *keys: str) -> int | None:
    """The first of `keys` an accelerator's allocator reports."""
    stats = device.memory_stats() or {}
    return next((stats[key] for key in keys if key in stats), None)


def on_host(device) -> bool:
    return device is None or device.platform == "cpu"


def sharing(device) -> int:
    """Devices of this process that share a memory: all of them on a host, else one."""
    import jax

    return jax.local_device_count() if on_host(device) else 1


def memory_total_bytes(device=None) -> int | None:
    """Bytes this process could ever use there."""
    if not on_host(device):
        return _device_stat(device, "bytes_limit", "bytes_reservable_limit")
    total = _kib_line(_PROC / "meminfo", "MemTotal")
    if total is None:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *(limit for limit, _ in _cgroup_memory())])


def memory_available_bytes(device=None) -> int | None:
    """Bytes this process can still allocate there without swapping or being killed.

    On the host the least of MemAvailable and what each control group leaves.
    """
    if not on_host(device):
        limit, used = memory_total_bytes(device), _device_stat(device, "bytes_in_use")
        return None if limit is None or used is None else limit - used
    available = _kib_line(_PROC / "meminfo", "MemAvailable")
    if available is None:
        # No Linux: where free pages are not told, trust in half of what is built in.
        name, share = (
            ("SC_AVPHYS_PAGES", 1)
            if "SC_AVPHYS_PAGES" in os.sysconf_names
            else ("SC_PHYS_PAGES", 2)
        )
        available = os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") // share
    return min([available, *(free for _, free in _cgroup_memory())])


def resident_bytes(device=None) -> int | None:
    """Bytes this process holds there now."""
    if not on_host(device):
        return _device_stat(device, "bytes_in_use")
    now = _kib_line(_PROC / "self" / "status", "VmRSS")
    return now if now is not None else peak_resident_bytes()


def peak_resident_bytes(device=None) -> int | None:
    """The most this process held there, since its start or the last `reset_peak`."""
    if not on_host(device):
        return _device_stat(device, "peak_bytes_in_use")
    peak = _kib_line(_PROC / "self" / "status", "VmHWM")
    if peak is not None:
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def reset_peak() -> bool:
    """Starts the host's peak again from what is resident now; False where that cannot be done."""
    try:
        (_PROC / "self" / "clear_refs").write_text("5")
        return True
    except OSError:
        return False

"""Memory, bandwidth, energy and processor facts, on this machine and on made-up ones."""

import sys
import types

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from ternax import machine, measure

GIB = 2**30


def write(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A machine of its own: write files below `proc`, `cgroup` and `powercap`."""
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(measure, "_POWERCAP", tmp_path / "powercap")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    return tmp_path


# --- Percentiles -------------------------------------------------------------------------


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 100))
def test_percentile_is_numpys(samples, q):
    assert measure.percentile(samples, q) == pytest.approx(np.percentile(samples, q), abs=1e-6)


@pytest.mark.parametrize("samples, q", [([], 50), ([1.0], -1), ([1.0], 101)])
def test_percentile_of_nothing(samples, q):
    with pytest.raises(ValueError):
        measure.percentile(samples, q)


# --- Memory ------------------------------------------------------------------------------

MEMINFO = "MemTotal:  8388608 kB\nMemFree:  10 kB\nMemAvailable:  4194304 kB\n"  # 8 and 4 GiB


@pytest.mark.parametrize(
    "name, files, total, available",
    [
        ("no control group", {}, 8, 4),
        (
            "v2, unlimited",
            {
                "proc/self/cgroup": "0::/\n",
                "cgroup/memory.max": "max\n",
                "cgroup/memory.current": "5\n",
            },
            8,
            4,
        ),
        (
            "v2",
            {
                "proc/self/cgroup": "0::/\n",
                "cgroup/memory.max": f"{3 * GIB}\n",
                "cgroup/memory.current": f"{2 * GIB}\n",
            },
            3,
            1,
        ),
        (
            "v2, with page cache",
            {
                "proc/self/cgroup": "0::/\n",
                "cgroup/memory.max": f"{3 * GIB}\n",
                "cgroup/memory.current": f"{2 * GIB}\n",
                "cgroup/memory.stat": f"anon 1\ninactive_file {GIB}\n",
            },
            3,
            2,
        ),
        (
            "v2, the parent's limit",
            {
                "proc/self/cgroup": "0::/a/b\n",
                "cgroup/a/b/memory.max": "max\n",
                "cgroup/a/b/memory.current": "0\n",
                "cgroup/a/memory.max": f"{2 * GIB}\n",
                "cgroup/a/memory.current": "0\n",
            },
            2,
            2,
        ),
        (
            "v2, a path of the host's",
            {
                "proc/self/cgroup": "0::/system/docker-1\n",
                "cgroup/memory.max": f"{2 * GIB}\n",
                "cgroup/memory.current": f"{GIB}\n",
            },
            2,
            1,
        ),
        (
            "v1",
            {
                "proc/self/cgroup": "9:cpu:/x\n4:memory:/job\n0::/\n",
                "cgroup/memory/job/memory.limit_in_bytes": f"{2 * GIB}\n",
                "cgroup/memory/job/memory.usage_in_bytes": f"{GIB}\n",
                "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
            },
            2,
            1,
        ),
        (
            "v2, over its limit",
            {
                "proc/self/cgroup": "0::/\n",
                "cgroup/memory.max": f"{GIB}\n",
                "cgroup/memory.current": f"{2 * GIB}\n",
            },
            1,
            0,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_memory_is_the_least_of_all_limits(fake, name, files, total, available):
    write(fake, {"proc/meminfo": MEMINFO} | files)
    assert measure.memory_total_bytes() == total * GIB
    assert measure.memory_available_bytes() == available * GIB


def test_memory_without_proc(fake):
    assert 0 < measure.memory_available_bytes() <= measure.memory_total_bytes()
    assert 0 < measure.resident_bytes() <= measure.peak_resident_bytes()
    assert measure.reset_peak() is False


def test_memory_of_this_machine():
    assert 0 < measure.memory_available_bytes() <= measure.memory_total_bytes()
    assert 0 < measure.resident_bytes() <= measure.peak_resident_bytes()


def test_peak_follows_and_starts_again():
    if not measure.reset_peak():
        pytest.skip("the peak cannot be reset here")
    before = measure.peak_resident_bytes()
    block = np.ones(64 * 2**20, np.uint8)
    del block
    assert measure.peak_resident_bytes() - before > 50 * 2**20
    measure.reset_peak()
    assert measure.peak_resident_bytes() - before < 50 * 2**20


def test_memory_of_an_accelerator():
    stats = {"bytes_limit": 10 * GIB, "bytes_in_use": GIB, "peak_bytes_in_use": 3 * GIB}
    device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    assert measure.memory_total_bytes(device) == 10 * GIB
    assert measure.memory_available_bytes(device) == 9 * GIB
    assert measure.resident_bytes(device) == GIB
    assert measure.peak_resident_bytes(device) == 3 * GIB
    silent = types.SimpleNamespace(platform="gpu", memory_stats=lambda: None)
    assert measure.memory_available_bytes(silent) is None
    assert measure.peak_resident_bytes(silent) is None


# --- Bandwidth ---------------------------------------------------------------------------


def test_read_bandwidth_is_bounded_and_gives_its_memory_back(monkeypatch):
    monkeypatch.setattr(measure, "memory_available_bytes", lambda: 4 * GIB)
    before = measure.resident_bytes()
    found = measure.read_bandwidth(threads=2, seconds=0.05, max_bytes=64 * 2**20)
    assert measure.resident_bytes() - before < 32 * 2**20
    assert found.threads == 2 and found.buffer_bytes == 64 * 2**20
    assert len(found.samples_gb_per_s) >= 3 and min(found.samples_gb_per_s) > 0.1
    assert found.median == np.median(found.samples_gb_per_s)
    assert "2 threads" in found.method and found.copy_gb_per_s == ()


def test_read_bandwidth_takes_little_of_a_full_machine(monkeypatch):
    monkeypatch.setattr(measure, "memory_available_bytes", lambda: 200 * 2**20)
    monkeypatch.setattr(measure, "last_level_cache_bytes", lambda: 32 * 2**20)
    found = measure.read_bandwidth(seconds=0.01)
    assert found.buffer_bytes <= 10 * 2**20
    assert "32 MiB cache" in found.method  # and says that the figure is then doubtful


def test_read_bandwidth_of_a_device_runs():
    import jax

    found = measure._device_read_bandwidth(jax.devices("cpu")[0], 0.01, 2**20)
    assert found.buffer_bytes == 2**20 and found.median > 0
    assert len(found.copy_gb_per_s) == 5


# --- Energy ------------------------------------------------------------------------------


def test_energy_is_absent_where_nothing_tells(fake):
    with measure.energy_meter() as meter:
        pass
    assert meter.joules is None and meter.sources == ()


def test_energy_of_packages_counts_each_once_and_wraps(fake):
    counters = {
        "intel-rapl:0": ("package-0", "1000000"),
        "intel-rapl:1": ("package-1", "9000000"),
        "intel-rapl:0:0": ("core", "500"),
        "intel-rapl-mmio:0": ("package-0", "1000000"),
        "intel-rapl:2": ("psys", "7"),
    }
    for name, (domain, energy) in counters.items():
        write(
            fake,
            {
                f"powercap/{name}/name": f"{domain}\n",
                f"powercap/{name}/energy_uj": energy,
                f"powercap/{name}/max_energy_range_uj": "10000000\n",
            },
        )
    with measure.energy_meter() as meter:
        write(
            fake,
            {
                "powercap/intel-rapl:0/energy_uj": "3000000\n",
                "powercap/intel-rapl:1/energy_uj": "500000\n",
            },
        )  # 1.5 J, past the range
    write(fake, {"powercap/intel-rapl:0/energy_uj": "8000000\n"})  # after the end: not counted
    assert meter.sources == ("rapl:package-0", "rapl:package-1")
    assert meter.joules == pytest.approx(2.0 + 1.5)


def test_energy_that_stops_being_told_is_absent(fake):
    write(fake, {"powercap/intel-rapl:0/name": "package-0", "powercap/intel-rapl:0/energy_uj": "1"})
    with measure.energy_meter() as meter:
        (fake / "powercap/intel-rapl:0/energy_uj").unlink()
    assert meter.joules is None


@pytest.mark.parametrize(
    "visible, sources",
    [(None, ("nvml:0", "nvml:1")), ("1", ("nvml:1",)), ("GPU-ab,0", ("nvml:GPU-ab", "nvml:0"))],
)
def test_energy_of_gpus(fake, monkeypatch, visible, sources):
    millijoules = iter(range(0, 100_000, 1000))
    nvml = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetHandleByUUID=lambda u: u,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(millijoules),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with measure.energy_meter() as meter:
        pass
    assert meter.sources == sources
    assert meter.joules == len(sources) ** 2  # each call is one joule on, each is asked in turn


# --- Processor ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, model, sets",
    [
        (
            "model name\t: Some CPU @ 2GHz\nflags\t\t: sse avx2 avx512f avx512_vnni\n",
            "Some CPU @ 2GHz",
            ("avx2", "avx512f", "avx512_vnni"),
        ),
        (
            "Hardware\t: Board\nFeatures\t: fp asimd asimddp i8mm\n",
            "Board",
            ("asimd", "asimddp", "i8mm"),
        ),
    ],
)
def test_processor(fake, text, model, sets):
    write(fake, {"proc/cpuinfo": text})
    assert measure.cpu_model() == model
    assert measure.instruction_sets() == sets


def test_processor_without_proc(fake):
    assert measure.cpu_model() and measure.instruction_sets() == ()


def test_threads_are_at_least_one():
    assert measure.threads_available() >= 1

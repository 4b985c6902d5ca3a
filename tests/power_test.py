"""Power on machines that are made up, since this one may tell nothing."""

import sys
import time
import types

import pytest

from ternax import measure, power


def nvml(**changes):
    """A machine with two GPUs of 300 W, the second the hotter and the busier one."""
    functions = dict(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetHandleByUUID=lambda u: u,
        nvmlDeviceGetPowerUsage=lambda gpu: 300_000,
        nvmlDeviceGetTemperature=lambda gpu, sensor: 50 + 10 * gpu,
        nvmlDeviceGetUtilizationRates=lambda gpu: types.SimpleNamespace(gpu=60 + 40 * gpu),
    )
    return types.SimpleNamespace(**functions | changes)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets what `import pynvml` gives; no processor tells anything."""
    monkeypatch.setattr(measure, "_POWERCAP", tmp_path)
    monkeypatch.setattr(power, "_PERIOD_S", 0.005)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return lambda module: monkeypatch.setitem(sys.modules, "pynvml", module)


def test_a_machine_that_does_not_tell(machine):
    machine(None)
    with power.power_meter() as meter:
        pass
    assert meter.metrics(tokens=10, seconds=1.0) == {}
    assert meter.note == "energy: this machine does not tell"


def test_power_is_sampled_where_no_counter_is(machine):
    machine(nvml())
    start = time.perf_counter()
    with power.power_meter() as meter:
        time.sleep(0.1)
    seconds = time.perf_counter() - start
    found = meter.metrics(tokens=100, seconds=2.0)
    assert found["joules"] <= 600 * seconds and found["joules"] > 0
    assert found["watts"] == found["joules"] / 2
    assert found["joules_per_token"] == found["joules"] / 100
    assert (found["temperature_c"], found["utilization_share"]) == (60, pytest.approx(0.8))
    assert meter.note == "energy: NVML, sampled power"


def test_counters_are_preferred_to_samples(machine):
    millijoules = iter(range(0, 100_000, 1000))
    machine(nvml(nvmlDeviceGetTotalEnergyConsumption=lambda gpu: next(millijoules)))
    with power.power_meter() as meter:
        pass
    assert meter.metrics(tokens=1, seconds=1.0)["joules"] == 4  # each call is one joule on
    assert meter.note == "energy: nvml:0, nvml:1"


def test_a_driver_that_leaves_ends_the_samples(machine):
    calls = iter(range(3))

    def watts(gpu):
        next(calls)  # StopIteration at the fourth
        return 100_000

    machine(nvml(nvmlDeviceGetPowerUsage=watts))
    with power.power_meter() as meter:
        time.sleep(0.05)
    assert meter.metrics(tokens=1, seconds=1.0)["temperature_c"] == 60
    assert "joules" not in meter.metrics(tokens=1, seconds=1.0)  # one whole look alone

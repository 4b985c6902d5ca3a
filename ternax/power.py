"""Energy, temperature and load of the devices while something runs.

Joules come from counters where there are some (RAPL of processor packages, NVML of NVIDIA
GPUs), else from power that is sampled; temperature and load are sampled from NVML. What the
machine does not tell is absent, and a note says so.
"""

import statistics
import threading
import time
from typing import Any

from ternax import measure

_PERIOD_S = 0.25


class PowerMeter:
    """Watches from `__enter__` to `__exit__`.

    with power_meter() as meter:
        ...
    meter.metrics(tokens=100, seconds=2.5)  # joules, watts, temperature_c, ...: what is known
    """

    def __init__(self, energy: measure.EnergyMeter, gpus: list[Any]):
        """gpus: NVML handles to sample."""
        self._energy, self._gpus = energy, gpus
        self._samples: list[tuple[float, float, float, float]] = []  # time, W, deg C, load
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self):
        self._samples, self._stop = [], threading.Event()
        self._energy.__enter__()
        if self._gpus and self._sample():
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind, error, traceback):
        self._energy.__exit__(kind, error, traceback)
        self._stop.set()
        if self._thread:
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        while not self._stop.wait(_PERIOD_S) and self._sample():
            pass

    def _sample(self) -> bool:
        """One look at all GPUs: power together, the hottest, the mean load. False: no more."""
        try:
            import pynvml

            watts = [pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3 for gpu in self._gpus]
            hot = [pynvml.nvmlDeviceGetTemperature(gpu, 0) for gpu in self._gpus]
            load = [pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100 for gpu in self._gpus]
        except Exception:  # a driver that leaves, or a GPU that does not tell
            return False
        self._samples.append((time.perf_counter(), sum(watts), max(hot), statistics.fmean(load)))
        return True

    @property
    def joules(self) -> float | None:
        """By counters; else by the sampled power of the GPUs; None where nothing tells."""
        counted = self._energy.joules
        if counted is not None or len(self._samples) < 2:
            return counted
        pairs = zip(self._samples, self._samples[1:], strict=False)
        return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairs)

    @property
    def note(self) -> str:
        """Where the joules come from, for a record."""
        if self.joules is None:
            return "energy: this machine does not tell"
        return f"energy: {', '.join(self._energy.sources) or 'NVML, sampled power'}"

    def metrics(self, *, tokens: float, seconds: float) -> dict[str, float]:
        """What is known, as a Record names it, for so many tokens in so many seconds."""
        found: dict[str, float] = {}
        joules = self.joules
        if joules is not None:
            found |= {
                "joules": joules,
                "joules_per_token": joules / tokens,
                "watts": joules / seconds,
            }
        if self._samples:
            _, _, hot, load = zip(*self._samples, strict=True)
            found |= {"temperature_c": max(hot), "utilization_share": statistics.fmean(load)}
        return found


def power_meter() -> PowerMeter:
    """A meter over all that this machine lets one read."""
    gpus = [handle for _, handle in measure.nvml_handles()]
    return PowerMeter(measure.energy_meter(), gpus)

"""Records of a step, and the lines in which its process hands them to the one that keeps them."""

import json
import sys
import time
from collections.abc import Callable

from ternax.record import Record

EXPERIMENT = "gpu_day"
_RECORD = "record "


class Step:
    """What a step of a run is given.

    Attributes:
      rehearse: on tiny shapes, whatever the device.
      read_gb_per_s: the best read rate that the run has measured so far, or None.
      folder: where files of the run go.
      flags: the command line, for them.
      note: said in each of its records, as of CUDA graphs that are off.
    """

    def __init__(
        self,
        seconds: float,
        keep: Callable[[Record], None],
        say: Callable[[str], None] = lambda line: None,
        *,
        rehearse: bool = False,
        read_gb_per_s: float | None = None,
        folder: str = ".",
        note: str = "",
        flags: str = "",
    ):
        """seconds: that it may take; keep: takes each Record; say: takes lines of text."""
        self._end = time.monotonic() + seconds
        self._keep, self.say = keep, say
        self.rehearse, self.read_gb_per_s = rehearse, read_gb_per_s
        self.folder, self.note, self.flags = folder, note, flags

    @property
    def left_s(self) -> float:
        """Seconds left of its own."""
        return self._end - time.monotonic()

    def keep(
        self,
        phase: str,
        metrics: dict[str, float],
        note: str,
        *,
        samples=(),
        unit: str = "s",
        config: str = "",
        scheme: str = "",
        inputs: str = "",
        backend: str = "",
        layers: int = 0,
        batch: int = 0,
        context: int = 0,
    ) -> Record:
        """Makes a measured Record and hands it on at once."""
        record = Record(
            experiment=EXPERIMENT,
            config=config,
            scheme=scheme,
            inputs=inputs,
            backend=backend,
            device=device_name(),
            layers=layers,
            batch=batch,
            context=context,
            phase=phase,
            kind="measured",
            samples=tuple(samples),
            sample_unit=unit if samples else "",
            metrics=metrics,
            flags=self.flags,
            note="; ".join(part for part in (note, self.note) if part),
        )
        self.keep_record(record)
        return record

    def keep_record(self, record: Record) -> None:
        self._keep(record)


def device_name() -> str:
    import jax

    from ternax import measure

    return measure.device_name(jax.devices()[0])


def tell(record: Record) -> None:
    """Writes a record's line, for the process that started this one."""
    print(_RECORD + json.dumps(record.to_dict(), allow_nan=False), flush=True)


def told(line: str) -> Record | None:
    """The record of such a line; None for any other line, and for one that was cut off."""
    if not line.startswith(_RECORD):
        return None
    try:
        return Record.from_dict(json.loads(line.removeprefix(_RECORD)))
    except ValueError:
        return None


def say(line: str) -> None:
    print(line, flush=True, file=sys.stdout)

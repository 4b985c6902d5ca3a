"""What a file of claims says: documents, tables, rows. Nothing is judged here."""

import dataclasses

from ternax.anatomy import Shape
from ternax.audit.quantities import Quantity
from ternax.configs.hardware import Device
from ternax.formats import Format


@dataclasses.dataclass(frozen=True)
class Model:
    """What a claim is about: a shape, or a number of parameters and nothing more.

    `active`: of a mixture of experts, the parameters that one token reads and multiplies.
    """

    name: str
    parameters: float
    shape: Shape | None = None
    active: float | None = None


@dataclasses.dataclass(frozen=True)
class Claim:
    """One row: quantities by field, settings by field, and where it stands in the file.

    `rival` is the device of `faster_than` or `cheaper_than`.
    """

    place: str
    quantities: dict[str, Quantity]
    settings: dict[str, str]
    model: Model | None
    device: Device | None
    weights: Format | None
    tables: Format | None
    rival: Device | None = None

    @property
    def says(self) -> str:
        """The source's words, or the row's own values."""
        if "says" in self.settings:
            return self.settings["says"]
        named = [self.settings[k] for k in ("id", "model", "device") if k in self.settings]
        return ", ".join([*named, *(q.text for q in self.quantities.values())])

    def without(self, name: str) -> "Claim":
        """The row as it would be had it not stated that field."""
        quantities = {key: found for key, found in self.quantities.items() if key != name}
        settings = {key: found for key, found in self.settings.items() if key != name}
        return dataclasses.replace(self, quantities=quantities, settings=settings)

    def count(self, name: str, default: int = 1) -> int:
        """A setting that counts; of `batch: best` one, the least there can be."""
        text = self.settings.get(name, default)
        return 1 if text == "best" else int(text)


@dataclasses.dataclass(frozen=True)
class Table:
    name: str
    claims: tuple[Claim, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """A document: where it is from, when, and its tables."""

    title: str
    source: str
    year: int
    tables: tuple[Table, ...]

"""Reads a file of claims: YAML, or Markdown tables under a block of YAML.

What cannot be read is refused with its line and column. `docs/audit.md` describes both forms.
"""

import dataclasses
import pathlib
import re
from typing import Any

import yaml

from ternax import configs
from ternax.anatomy import Shape
from ternax.audit import markdown_tables, references
from ternax.audit.claims import Case, Claim, Model, Table
from ternax.audit.fields import (
    COUNTS,
    MAY_BE_NEGATIVE,
    MAY_BE_ZERO,
    NOTHING,
    QUANTITIES,
    SETTINGS,
    WORDS,
)
from ternax.audit.nodes import Leaf, Source, near, place
from ternax.audit.quantities import Quantity, UnknownUnit, parse
from ternax.config import ModelConfig
from ternax.configs.hardware import PCIE_4, Device, get_device
from ternax.errors import BadModelFile, UsageError
from ternax.formats import get_format


def read(path: str | pathlib.Path) -> Case:
    """Reads a `.yaml`, `.yml` or `.md` file. Raises BadModelFile with line and column."""
    path = pathlib.Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise BadModelFile(path, "file", f"cannot be read as UTF-8 text: {why}") from error
    reader = _Reader(path)
    if path.suffix == ".md":
        return reader.markdown(text)
    if path.suffix in (".yaml", ".yml"):
        return reader.case(reader.compose(text, 0), [])
    raise BadModelFile(path, "name", "expected a file that ends in .yaml, .yml or .md")


class _Reader(Source):
    def __init__(self, path: pathlib.Path):
        super().__init__(path)
        self.models: dict[str, Model] = {}
        self.devices: dict[str, Device] = {}

    # --- A case ----------------------------------------------------------------------------

    def case(self, node: yaml.Node, tables: list[tuple[str, list[dict[str, Leaf]]]]) -> Case:
        """The case of a head; tables: (name, rows) that Markdown brought, else they are in it."""
        head = self.mapping(node, "claims")
        legal = ("title", "source", "year", "defaults", "models", "devices", "tables", "columns")
        for name, (key, _) in head.items():
            if name not in legal:
                line, column = place(key)
                raise self.refuse(line, column, f"no entry is named {name!r}; {near(name, legal)}")
        line, column = place(node)
        for name in ("title", "source", "year"):
            if name not in head:
                raise self.refuse(line, column, f"{name} is missing: {_HEAD[name]}")
        title, source, year = (self.leaf(head[n][1], n) for n in ("title", "source", "year"))
        if not re.fullmatch(r"\d{4}", year[0]):
            raise self.refuse(*year[1:], f"year: expected four digits, found {year[0]!r}")
        for name, make in (("models", self.model), ("devices", self.device)):
            if name in head:
                for key, (_, value) in self.mapping(head[name][1], name).items():
                    make(key, self.leaves(value, key), place(value))
        shared = self.leaves(head["defaults"][1], "defaults") if "defaults" in head else {}
        if "tables" in head and not tables:
            tables = [self.table(entry) for entry in self.sequence(head["tables"][1], "tables")]
        if not tables:
            raise self.refuse(line, column, "expected at least one table of claims")
        if not any(rows for _, rows in tables):
            raise self.refuse(line, column, "expected at least one row of claims, found none")
        tables = [(name, [shared | row for row in rows]) for name, rows in tables]
        references.check(self, [row for _, rows in tables for row in rows])
        return Case(
            title[0],
            source[0],
            int(year[0]),
            tuple(Table(name, tuple(self.claim(row) for row in rows)) for name, rows in tables),
        )

    def table(self, node: yaml.Node) -> tuple[str, list[dict[str, Leaf]]]:
        entries = self.mapping(node, "table")
        line, column = place(node)
        for name, (key, _) in entries.items():
            if name not in ("name", "defaults", "rows"):
                raise self.refuse(
                    *place(key), f"no entry of a table is named {name!r}: name, defaults or rows"
                )
        if "name" not in entries or "rows" not in entries:
            raise self.refuse(line, column, "a table needs a name and rows")
        shared = self.leaves(entries["defaults"][1], "defaults") if "defaults" in entries else {}
        rows = self.sequence(entries["rows"][1], "rows")
        name = self.leaf(entries["name"][1], "name")[0]
        return name, [shared | self.row(row) for row in rows]

    def row(self, node: yaml.Node) -> dict[str, Leaf]:
        found = self.leaves(node, "row")
        if not found:
            raise self.refuse(*place(node), "row: expected at least one field, such as says")
        return found

    def model(self, name: str, values: dict[str, Leaf], place: tuple[int, int]) -> None:
        """`config: 70b`, or `parameters: 24B`, or the fields of a shape; overrides of a config.

        A mixture of experts is `parameters: 46.7B, active: 12.9B`.
        """
        fields = {f.name: f for f in dataclasses.fields(Shape) if f.name != "name"}
        numbers: dict[str, Any] = {}
        for key, (text, line, column) in values.items():
            legal = (*fields, "config", "parameters", "active")
            if key not in legal:
                close = near(key, legal)
                raise self.refuse(line, column, f"no field of a model is named {key!r}; {close}")
            if key in fields:
                boolean = fields[key].type is bool
                if not re.fullmatch("true|false" if boolean else r"\d+", text):
                    kind = "true or false" if boolean else "a whole number"
                    raise self.refuse(line, column, f"{key}: expected {kind}, found {text!r}")
                numbers[key] = text == "true" if boolean else int(text)
        if "active" in values and values.keys() != {"active", "parameters"}:
            raise self.refuse(*values["active"][1:], "active: expected beside parameters, alone")
        try:
            if "config" in values:
                base = Shape.of(configs.get_config(values["config"][0]))
                shape = dataclasses.replace(base, **numbers)
            elif "parameters" in values and not numbers:
                count = self.quantity("parameters", values["parameters"])
                active = None
                if "active" in values:
                    active = self.quantity("parameters", values["active"], "active").nominal
                    if not 0 < active <= count.nominal:
                        why = (
                            f"active: expected at most {count.text}, found {values['active'][0]!r}"
                        )
                        raise self.refuse(*values["active"][1:], why)
                self.models[name] = Model(name, count.nominal, active=active)
                return
            else:
                shape = Shape(name=name, **numbers)
        except (UsageError, TypeError) as error:
            why = str(error).replace("Shape.__init__() missing", "a shape lacks")
            raise self.refuse(*place, f"{name}: {why}") from error
        if shape.projection_parameters == 0:
            raise self.refuse(*place, f"{name}: a shape without weights")
        self.models[name] = Model(name, shape.parameters, shape)

    def device(self, name: str, values: dict[str, Leaf], place: tuple[int, int]) -> None:
        """A device that the catalogue lacks: bandwidth, memory, and peaks by type."""
        peaks = {}
        known = {"bandwidth": "bandwidth", "memory": "device_memory", "watts": "power"}
        found = {}
        for key, leaf in values.items():
            if key in known:
                found[key] = self.quantity(known[key], leaf, key)
            elif key in ("fp32", "tf32", "fp16", "fp8", "int8", "int4", "fp4"):
                peaks[key] = self.quantity("peak", leaf, key).nominal / 1e12
            else:
                raise self.refuse(*leaf[1:], f"no field of a device is named {key!r}")
        for key in ("bandwidth", "memory"):
            if key not in found:
                raise self.refuse(*place, f"device {name}: {key} is missing")
        if not peaks:
            raise self.refuse(*place, f"device {name}: a peak is missing, such as `int8: 20 TOPS`")
        self.devices[name] = Device(
            name=name,
            title=name,
            year=0,
            # As in the catalogue: GB as advertised, GiB as they are.
            memory_gb=found["memory"].nominal / (2**30 if "iB" in found["memory"].text else 1e9),
            bandwidth_gb_per_s=found["bandwidth"].nominal / 1e9,
            peak_tflops=peaks,
            watts=found["watts"].nominal if "watts" in found else 0.0,
            source="the claims themselves",
            pcie=PCIE_4,
        )

    # --- A claim ---------------------------------------------------------------------------

    def claim(self, row: dict[str, Leaf]) -> Claim:
        quantities: dict[str, Quantity] = {}
        settings: dict[str, str] = {}
        where = row[next(reversed(row))]
        for name, (text, line, column) in row.items():
            if name in QUANTITIES:
                if text.strip() not in NOTHING:
                    quantities[name] = self.quantity(name, (text, line, column))
            elif name in SETTINGS:
                self.check_word(name, text, line, column)
                if name == "other_price":
                    self.quantity("price", (text, line, column), name)
                settings[name] = text
            else:
                close = near(name, [*QUANTITIES, *SETTINGS])
                if re.match(r"\d\d\d", name):
                    close = "between braces a number with a comma stands in quotes"
                raise self.refuse(line, column, f"no field is named {name!r}; {close}")
        found = {}
        for name, find in (("model", self.find_model), ("device", self.find_device)):
            if name in settings:
                found[name] = self.named(find, row[name])
        for name in ("weights", "tables"):
            if name in settings:
                found[name] = self.named(get_format, row[name])
        for name in ("kv",):
            if name in settings:
                self.named(get_format, row[name])
        for name in ("cheaper_than", "faster_than"):
            if name in settings:
                found["rival"] = self.named(self.find_device, row[name])
        shape = found["model"].shape if "model" in found else None
        if "layers" in settings and shape and int(settings["layers"]) > shape.num_layers:
            _, line, column = row["layers"]
            why = f"layers: {shape.name} has {shape.num_layers}, found {settings['layers']}"
            raise self.refuse(line, column, why)
        place = f"line {where[1]}"
        return Claim(
            place,
            quantities,
            settings,
            found.get("model"),
            found.get("device"),
            found.get("weights"),
            found.get("tables"),
            found.get("rival"),
        )

    def check_word(self, name: str, text: str, line: int, column: int) -> None:
        if name in COUNTS and not re.fullmatch(r"[1-9]\d{0,11}", text):
            if (name, text) != ("batch", "best"):
                what = "a whole number or best" if name == "batch" else "a whole number"
                raise self.refuse(line, column, f"{name}: expected {what}, found {text!r}")
        if name == "id" and not re.fullmatch(r"[^\s.;()]+", text):
            why = f"id: expected a word without '.', ';' or brackets, as `of` is written: {text!r}"
            raise self.refuse(line, column, why)
        if name in WORDS and text not in WORDS[name]:
            legal = ", ".join(WORDS[name])
            raise self.refuse(line, column, f"{name}: expected one of {legal}, found {text!r}")

    def quantity(self, name: str, leaf: Leaf, called: str = "") -> Quantity:
        """A quantity of the dimension of a field; `called` so in what is refused."""
        text, line, column = leaf
        field = QUANTITIES[name]
        called = called or name
        if field.dimensions == ("number",):
            text = re.sub(r"(?<=\d) (?=[KMBT]$)", "", text)  # "6.74 B": a count, not bytes
        try:
            found = parse(text, field.unit)
        except UnknownUnit as error:
            raise self.refuse(line, column, f"{called}: {error}") from error
        if "*" not in field.dimensions and found.dimension not in field.dimensions:
            wanted = " or ".join(field.dimensions)
            raise self.refuse(
                line, column, f"{called}: expected {wanted}, found {found.dimension} ({text})"
            )
        if found.low <= 0 and name not in MAY_BE_ZERO:
            raise self.refuse(line, column, f"{called}: expected more than zero, found {text!r}")
        if found.high < 0 and name not in MAY_BE_NEGATIVE:
            raise self.refuse(line, column, f"{called}: expected zero or more, found {text!r}")
        return found

    def named(self, find, leaf: Leaf):
        try:
            return find(leaf[0])
        except UsageError as error:
            raise self.refuse(*leaf[1:], str(error)) from error

    def find_model(self, name: str) -> Model:
        if name in self.models:
            return self.models[name]
        try:
            config: ModelConfig = configs.get_config(name)
        except UsageError:
            close = near(name, [*self.models, *configs.CONFIGS])
            raise UsageError(f"no model is named {name!r}: add it under models; {close}") from None
        return Model(name, Shape.of(config).parameters, Shape.of(config))

    def find_device(self, name: str) -> Device:
        return self.devices[name] if name in self.devices else get_device(name)

    def markdown(self, text: str) -> Case:
        """A block of YAML between two `---` lines, then tables, each under its heading."""
        lines = text.split("\n")
        if lines[0].strip() != "---" or "---" not in [line.strip() for line in lines[1:]]:
            raise self.refuse(1, 1, "expected a block of YAML between two lines of ---")
        end = next(i for i, line in enumerate(lines[1:], 1) if line.strip() == "---")
        head = self.compose("\n".join(lines[1:end]), 1)
        entries = self.mapping(head, "claims")
        renamed = self.leaves(entries["columns"][1], "columns") if "columns" in entries else {}
        names = {header: field for header, (field, _, _) in renamed.items()}
        return self.case(head, markdown_tables.tables(self, lines[end + 1 :], end + 2, names))


_HEAD = {
    "title": "what the document is called",
    "source": "where it can be read",
    "year": "when it was published; devices sold later do not count",
}

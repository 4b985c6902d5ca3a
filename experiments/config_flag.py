"""`--config=name` and `--config.field=value`: from words to a checked ModelConfig, and back.

The values travel through ml_collections' config flags; names, types and the
model's own rules are checked around them, so that each mistake is one line.
"""

import dataclasses
import inspect
import math
import re
import textwrap

from absl import flags as absl_flags
from ml_collections import config_dict, config_flags

from ternax import configs
from ternax.config import ModelConfig
from ternax.errors import UsageError

WIDTH = 100
# What identifies a named model, and what every record holds in a field of its own.
_FIXED = ("name", "source")
_RECORDED_APART = ("scheme", "inputs")

BOOLEAN_FIELDS = frozenset(f.name for f in dataclasses.fields(ModelConfig) if f.type is bool)
_PARSERS = {
    bool: absl_flags.BooleanParser(),
    int: absl_flags.IntegerParser(),
    float: absl_flags.FloatParser(),
    str: absl_flags.ArgumentParser(),
}


def check_value(label: str, parser, text: str) -> None:
    """Raises UsageError unless `parser` takes `text`. `label` is the flag as typed."""
    legal, bound = None, None
    if isinstance(parser, absl_flags.BooleanParser):
        legal = "true or false"
    elif isinstance(parser, absl_flags.EnumParser):
        legal = f"one of {', '.join(parser.enum_values)}"
    elif isinstance(parser, (absl_flags.IntegerParser, absl_flags.FloatParser)):
        integer = isinstance(parser, absl_flags.IntegerParser)
        legal = "an integer" if integer else "a finite number"
        try:
            number = parser.convert(text)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UsageError(f"{label} must be {legal}, found {text!r}")
        if parser.lower_bound is not None and number < parser.lower_bound:
            bound = f"at least {parser.lower_bound}"
        if parser.upper_bound is not None and number > parser.upper_bound:
            bound = f"at most {parser.upper_bound}"
        if bound:
            raise UsageError(f"{label} must be {bound}, found {text}")
    try:
        parser.parse(text)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{label} must be {legal or error}, found {text!r}") from error


def counts(flag: str, text: str | None, default: tuple[int, ...] = ()) -> tuple[int, ...]:
    """--flag=1,2,4 as numbers from 1 up; the default where it was not given."""
    if text is None:
        return default
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise UsageError(f"--{flag} must be numbers from 1 up behind commas, found {text!r}")
    return tuple(dict.fromkeys(map(int, words)))


def _field(config: ModelConfig, path: str):
    """The present value at a dotted path, or UsageError naming the nearest fields."""
    label, value, prefix = f"--config.{path}", config, ""
    for word in path.split("."):
        if value is None:
            raise UsageError(
                f"{label}: {prefix[:-1]} is None in {config.name} and has no fields; "
                "start from a model that has it (--list_configs)"
            )
        if not dataclasses.is_dataclass(value):
            raise UsageError(f"{label}: {prefix[:-1]} is a single value and has no fields")
        names = [field.name for field in dataclasses.fields(value)]
        if word not in names:
            near = ", ".join(prefix + name for name in configs.nearest(word, names)[:3])
            raise UsageError(f"{label}: no such field; nearest: {near} (--print_config shows all)")
        value, prefix = getattr(value, word), f"{prefix}{word}."
    if path in _FIXED:
        raise UsageError(f"{label} cannot be changed: it identifies the model that --config names")
    if dataclasses.is_dataclass(value):
        inner = ", ".join(f"{label}.{f.name}" for f in dataclasses.fields(value))
        raise UsageError(f"{label} is set by its fields: {inner}")
    if type(value) not in _PARSERS:
        raise UsageError(
            f"{label} is {value} in {config.name} and cannot be set; "
            "start from a model that has it (--list_configs)"
        )
    return value


def override(config: ModelConfig, overrides: list[tuple[str, str]]) -> ModelConfig:
    """`config` with each (dotted path, text) put in, typed, and checked as a whole.

    A model changed in anything but scheme and inputs is another model and says so
    in its name: "70b(num_layers=4)".
    """
    for path, text in overrides:
        check_value(f"--config.{path}", _PARSERS[type(_field(config, path))], text)
    arguments = ["", *(f"--config.{path}={text}" for path, text in overrides)]
    values = absl_flags.FlagValues()
    config_flags.DEFINE_config_dict(
        "config",
        config_dict.ConfigDict(dataclasses.asdict(config)),
        flag_values=values,
        sys_argv=arguments,
    )
    values(arguments)
    changed = {
        path: value
        for path, value in values["config"].override_values.items()  # type: ignore[attr-defined]
        if value != _field(config, path)
    }
    renamed = [f"{path}={value}" for path, value in changed.items() if path not in _RECORDED_APART]
    result = _replace(config, changed)
    if renamed:
        result = dataclasses.replace(result, name=f"{config.name}({','.join(renamed)})")
    return result


def _replace(value, changes: dict):
    """A frozen dataclass with the changes at dotted paths, all made at once."""
    nested: dict[str, dict] = {}
    direct = {}
    for path, change in changes.items():
        head, dot, rest = path.partition(".")
        if dot:
            nested.setdefault(head, {})[rest] = change
        else:
            direct[head] = change
    inner = {head: _replace(getattr(value, head), change) for head, change in nested.items()}
    return dataclasses.replace(value, **direct, **inner)


def with_short_forms(config: ModelConfig, args) -> ModelConfig:
    """--scheme and --inputs stand for --config.scheme and --config.inputs."""
    changes = {}
    for field in ("scheme", "inputs"):
        value = getattr(args, field)
        if value is None:
            continue
        if f"config.{field}" in args.given and getattr(config, field) != value:
            raise UsageError(
                f"--{field} and --config.{field} must agree, found {value!r} and "
                f"{getattr(config, field)!r}; give one of them"
            )
        changes[field] = value
    return dataclasses.replace(config, **changes) if changes else config


def layers(args) -> int:
    """--layers, checked against the model; all of them when it is not given."""
    config = args.config
    if args.layers is None:
        return config.num_layers
    if args.layers > config.num_layers:
        raise UsageError(
            f"--layers must be at most {config.num_layers}, the layers of "
            f"{config.name}, found {args.layers}; --config.num_layers={args.layers} "
            "makes a deeper model"
        )
    return args.layers


def _field_docs() -> dict[str, str]:
    """Field -> sentence, from the "Attributes:" part of ModelConfig's docstring."""
    _, _, attributes = inspect.cleandoc(ModelConfig.__doc__ or "").partition("Attributes:\n")
    found = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", attributes, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def config_lines(config: ModelConfig) -> str:
    """The model, one field a line, each with what it means."""
    docs, lines = _field_docs(), []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        rows = [(field.name, value)]
        if dataclasses.is_dataclass(value):
            rows = [
                (f"{field.name}.{inner.name}", getattr(value, inner.name))
                for inner in dataclasses.fields(value)
            ]
        for i, (name, shown) in enumerate(rows):
            head = f"{name} = {shown}"
            text = f"# {docs.get(field.name, '')}" if i == 0 else "#"
            if len(head) > 42:
                lines += textwrap.wrap(head, WIDTH, subsequent_indent="  ")
                head = ""
            lines += textwrap.wrap(
                text, WIDTH, initial_indent=f"{head:44}", subsequent_indent=" " * 44 + "# "
            )
    return "\n".join(line.rstrip(" #") for line in lines)


def config_table(count_parameters=None) -> str:
    """All named models. `count_parameters`: ModelConfig -> int, or None to leave them out."""
    aliases = {name: alias for alias, name in configs.ALIASES.items()}
    rows: list[tuple[str, ...]] = [
        ("config", "family", "layers", "hidden", "heads/kv", "parameters", "source")
    ]
    for config in configs.CONFIGS.values():
        count = f"{count_parameters(config) / 1e9:.4g} B" if count_parameters else ""
        alias = f"{aliases[config.name]} = " if config.name in aliases else ""
        rows.append(
            (
                config.name,
                config.family,
                str(config.num_layers),
                str(config.hidden_size),
                f"{config.num_heads}/{config.num_kv_heads}",
                count,
                alias + config.source,
            )
        )
    if not count_parameters:
        rows = [row[:5] + row[6:] for row in rows]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
        cells += [cell.rjust(w) for cell, w in zip(row[2:-1], widths[2:], strict=True)]
        line = "  ".join([*cells, row[-1]])
        lines.append(line if len(line) <= WIDTH else line[: WIDTH - 1] + "…")
    return "\n".join(lines)

"""The command line shared by every experiment.

An experiment declares its flags once and hands its body to `Command.run`:

    def decode_flags(define):
        define.section("Decode")
        define.integer("batch", 1, "sequences decoded together", lower=1)

    COMMAND = flags.Command(
        name="decode",
        summary="Decodes with a packed ternary model and sets the speed beside its bound.",
        groups=(flags.model_flags, decode_flags, flags.run_flags),
        examples=(("--config=70b", "all 80 layers of the Llama-3-70B shape"), ...))

    def decode(args) -> int | None: ...          # args.config, args.layers, args.batch, ...

    def main(argv=None) -> int:
        return COMMAND.run(decode, argv)

    if __name__ == "__main__":
        sys.exit(main())

`--config=70b` names a model and `--config.num_layers=4` makes another one of it,
in any order. Each parse has its own flag values, so `main` may be called again and
again in one process.
"""

import collections.abc
import dataclasses
import functools
import re
import shlex
import sys
import textwrap
import traceback
import types
import warnings

from ternax import configs, measure, processes
from ternax.checkpoint import box
from ternax.config import INPUTS, ModelConfig
from ternax.errors import UsageError
from ternax.experiments import config_flag, ending
from ternax.experiments.config_flag import WIDTH
from ternax.experiments.definer import Definer
from ternax.interop.gguf import I2_S


def model_flags(define: Definer) -> None:
    """Which model: becomes `args.config` (a ModelConfig) and `args.layers` (int)."""
    define.section("Model")
    define.config()
    define.string(
        "scheme",
        None,
        "how the projections are quantized, options behind commas "
        "(int4,group_size=64), or package.module:Class",
        form="NAME",
        default_text="the config's",
    )
    define.choice(
        "inputs", None, INPUTS, "how their inputs are quantized", default_text="the config's"
    )
    define.integer(
        "layers", None, "run only the first N layers of the model", lower=1, default_text="all"
    )
    define.choice("weights", "auto", box.WEIGHTS, "auto: stored ones where there are any")
    define.choice(
        "i2_s",
        None,
        I2_S,
        "how a GGUF file's I2_S is laid out",
        default_text="none: such files are refused",
    )
    define.boolean("list_configs", "print the named models and exit")
    define.boolean("print_config", "print the model, overrides included, and exit")


def run_flags(define: Definer) -> None:
    """How any experiment runs and where its results go."""
    define.section("Run")
    define.output_dir()
    define.integer("seed", 0, "root of every random draw", lower=0, upper=2**32 - 1)
    define.integer(
        "threads",
        None,
        "processor threads to use",
        lower=1,
        upper=measure.threads_available(),
        default_text="all available",
    )
    define.string("profile_dir", None, "write a profile of the timed part there", form="DIR")
    define.boolean("debug", "show the traceback of an error")


@dataclasses.dataclass(frozen=True)
class Command:
    """One experiment's command line.

    Attributes:
      name: the experiment, as in `python -m experiments.<name>`.
      summary: what it answers, for --help.
      groups: functions that declare flags, in the order --help shows them.
      examples: (arguments, what they do), three or so.
      default_config: the model when --config is not given.
      count_parameters: ModelConfig -> number of parameters, for --list_configs.
    """

    name: str
    summary: str
    groups: tuple[collections.abc.Callable, ...] = (model_flags, run_flags)
    examples: tuple[tuple[str, str], ...] = ()
    default_config: str = "1b"
    count_parameters: collections.abc.Callable[[ModelConfig], int] | None = None

    def _definer(self) -> Definer:
        define = Definer(self.default_config)
        for group in self.groups:
            group(define)
        return define

    def parse(self, argv) -> types.SimpleNamespace:
        """The flags as attributes of a namespace.

        Args:
          argv: arguments behind the program's name.

        Returns:
          One attribute per flag, and: `config`, the checked ModelConfig; `source`, what its
          name stands for (`checkpoint.box.Source`); `scheme`, `inputs`
          and `layers`, the config's when not given; `given`, the names of the flags on the
          command line; `command_line`, argv as one shell string.
        """
        define = self._definer()
        named, overrides, others = _sort_arguments(define, list(argv))
        define.values([self.name, *(f"--{name}={text}" for name, text in others)])
        args = types.SimpleNamespace(**define.values.flag_values_dict())
        args.given = frozenset(name for name, _ in others)
        args.command_line = shlex.join(argv)
        if define.takes_config:
            args.given |= {"config"} if named is not None else set()
            args.given |= {f"config.{path}" for path, _ in overrides}
            named = self.default_config if named is None else named
            args.source = box.find(
                named, getattr(args, "weights", "random"), getattr(args, "i2_s", None)
            )
            args.config = config_flag.override(args.source.config, overrides)
            args.config = config_flag.with_short_forms(args.config, args)
            args.scheme, args.inputs = args.config.scheme, args.config.inputs
            args.layers = config_flag.layers(args)
        return args

    def run(self, body, argv=None) -> int:
        """Parses, calls `body(args)` and returns the exit code. An error becomes one line.

        Args:
          body: takes the parsed flags; returns an exit code, or None for 0.
          argv: arguments behind the program's name; None reads sys.argv.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _warn
                code = self._run(body, argv)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            ending.flush_or_discard()
            return 141  # as a program that SIGPIPE ends; nobody is there to tell more
        except (Exception, KeyboardInterrupt) as error:
            ending.flush_or_discard()
            if any(re.fullmatch("--?debug(=true|=t|=1)?", argument) for argument in argv):
                traceback.print_exc()
            code, line = ending.describe(error)
            print(f"error: {' '.join(line.split())}", file=sys.stderr)
            return processes.leave(code)

    def _run(self, body, argv) -> int:
        if not {"--help", "-help", "-h", "--helpfull"}.isdisjoint(argv):
            print(self.help())
            return 0
        if "--version" in argv:
            from ternax.record import environment

            print(environment().versions)
            return 0
        args = self.parse(argv)
        if getattr(args, "list_configs", False):
            print(config_flag.config_table(self.count_parameters))
            return 0
        if getattr(args, "print_config", False):
            print(config_flag.config_lines(args.config))
            return 0
        return body(args) or 0

    def help(self) -> str:
        """Usage, examples and every flag with its default, at most WIDTH columns wide."""
        program = f"python -m experiments.{self.name}"
        lines = [*textwrap.wrap(self.summary, WIDTH), "", f"usage: {program} [--flag=value ...]"]
        lines += ["", "Examples"] if self.examples else []
        for arguments, meaning in self.examples:
            lines += [
                f"  {program} {arguments}",
                *textwrap.wrap(
                    meaning, WIDTH - 6, initial_indent=" " * 6, subsequent_indent=" " * 6
                ),
            ]
        other = [("help", "this page", ""), ("version", "versions of everything that counts", "")]
        for title, rows in [*self._definer().sections, ("Other", other)]:
            lines += ["", title]
            for form, text, default in rows:
                text += f" [{default}]" if default else ""
                head = f"  --{form}".ljust(28)
                if len(head) > 28:
                    lines.append(head)
                    head = " " * 28
                lines += textwrap.wrap(
                    text,
                    WIDTH,
                    initial_indent=head,
                    break_on_hyphens=False,
                    subsequent_indent=" " * 28,
                )
        return "\n".join(lines)


def words(args, without: collections.abc.Collection[str] = (), **changed) -> list[str]:
    """The given flags as arguments again: first `changed`, then the rest but for `without`."""
    given = sorted(name for name in args.given if name not in without)
    values = {name: functools.reduce(getattr, name.split("."), args) for name in given}
    if "config" in values:
        values["config"] = args.source.name
    out = []
    for name, value in (changed | values | changed).items():
        off = "no" if value is False else ""
        out.append(f"--{off}{name}" if isinstance(value, bool) else f"--{name}={value}")
    return out


def _warn(message, category, filename, lineno, file=None, line=None) -> None:
    """A warning as one line, as an error is."""
    del category, filename, lineno, line
    print(f"warning: {' '.join(str(message).split())}", file=file or sys.stderr)


def _sort_arguments(define: Definer, argv: list[str]):
    """Splits argv by what each argument is.

    Returns:
      The last --config (None when absent), the overrides as [(dotted path, text)] and
      all other flags as [(name, text)], checked against their parsers.
    """
    named, overrides, others = None, [], []
    rest = iter(argv)

    def value(label: str, text: str | None) -> str:
        # As in absl, "--flag value" is "--flag=value"; but never "--flag --other".
        if text is None:
            text = next(rest, None)
            if text is None or text.startswith("--"):
                raise UsageError(f"{label} needs a value: {label}=...")
        return text

    for argument in rest:
        name, equals, after = argument.lstrip("-").partition("=")
        text = after if equals else None
        label = f"--{name}"
        if not re.match("--?[A-Za-z]", argument):
            raise UsageError(f"unexpected argument {argument!r}: flags are written --name=value")
        negated = name.removeprefix("no") if name.startswith("no") else ""
        if define.takes_config and name == "config":
            named = value(label, text)
        elif define.takes_config and name.startswith("config."):
            path = name.removeprefix("config.")
            switch = text is None and path in config_flag.BOOLEAN_FIELDS
            overrides.append((path, "true" if switch else value(label, text)))
        elif define.takes_config and negated.removeprefix("config.") in config_flag.BOOLEAN_FIELDS:
            overrides.append((negated.removeprefix("config."), _no_value(label, text)))
        elif name in define.values:
            flag = define.values[name]
            text = "true" if flag.boolean and text is None else value(label, text)
            config_flag.check_value(label, flag.parser, text)
            others.append((name, text))
        elif negated in define.values and define.values[negated].boolean:
            others.append((negated, _no_value(label, text)))
        else:
            raise UsageError(f"{label}: no such flag; {_nearest_flags(define, name)}")
    return named, overrides, others


def _no_value(label: str, text: str | None) -> str:
    if text is not None:
        raise UsageError(f"{label} takes no value, found {text!r}")
    return "false"


def _nearest_flags(define: Definer, name: str) -> str:
    legal = [*define.values, "help", "version"]
    if define.takes_config:
        fields = [field.name for field in dataclasses.fields(ModelConfig)]
        if name in fields:
            return f"it is a field of the model: --config.{name}=..."
        legal += ["config", *(f"config.{field}" for field in fields)]
    near = configs.nearest(name, legal)
    # `nearest` returns everything when nothing is near.
    known = f"nearest: {', '.join(f'--{n}' for n in near)} (--help shows all)"
    return known if len(near) <= 3 else "--help shows all"

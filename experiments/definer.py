"""Where an experiment's groups of flags declare themselves, each with its line of --help."""

from absl import flags as absl_flags


class Definer:
    """Where a group declares its flags, each with a default and a line for --help.

    A default of None means "not given"; `default_text` says what then happens.
    """

    def __init__(self, default_config: str = ""):
        self.values = absl_flags.FlagValues()
        self.default_config = default_config
        self.takes_config = False
        self.sections: list[tuple[str, list[tuple[str, str, str]]]] = []

    def section(self, title: str) -> None:
        """Starts a heading of --help; the flags that follow stand under it."""
        self.sections.append((title, []))

    def _help(self, form: str, text: str, default: str) -> None:
        self.sections[-1][1].append((form, text, default))

    def _add(self, define, name, default, text, form, default_text, **options) -> None:
        define(name, default, help=text, flag_values=self.values, **options)
        shown = default_text or ("" if default is None or default is False else str(default))
        self._help(f"{name}{form}", text, shown)

    def integer(self, name, default, text, *, lower=None, upper=None, default_text=""):
        self._add(
            absl_flags.DEFINE_integer,
            name,
            default,
            text,
            "=N",
            default_text,
            lower_bound=lower,
            upper_bound=upper,
        )

    def number(self, name, default, text, *, lower=None, upper=None, default_text=""):
        self._add(
            absl_flags.DEFINE_float,
            name,
            default,
            text,
            "=X",
            default_text,
            # Floats, since absl shares a parser between bounds that are equal, and prints its own.
            lower_bound=None if lower is None else float(lower),
            upper_bound=None if upper is None else float(upper),
        )

    def string(self, name, default, text, *, form="TEXT", default_text=""):
        self._add(absl_flags.DEFINE_string, name, default, text, f"={form}", default_text)

    def strings(self, name, text, *, form="TEXT"):
        """A flag that may be given several times: a list, empty when it is not."""
        self._add(absl_flags.DEFINE_multi_string, name, [], text, f"={form}", "may be repeated")

    def choice(self, name, default, legal, text, *, default_text=""):
        self._add(
            absl_flags.DEFINE_enum,
            name,
            default,
            text,
            f"={'|'.join(legal)}",
            default_text,
            enum_values=list(legal),
        )

    def boolean(self, name, text):
        """A switch, off unless given; `--no<name>` turns it off again."""
        self._add(absl_flags.DEFINE_boolean, name, False, text, "", "")

    def config(self):
        """--config and --config.field, see `config_flag`."""
        self.takes_config = True
        self._help(
            "config=NAME",
            "the model, or a path: a directory of ternax.save or of Hugging Face, a GGUF file; "
            "--list_configs",
            self.default_config,
        )
        self._help("config.FIELD=VALUE", "another model of it; --print_config shows fields", "")

    def output_dir(self):
        """--output_dir, as every experiment has it."""
        self.string(
            "output_dir",
            None,
            "where the results go",
            form="DIR",
            default_text="a new directory under runs/",
        )

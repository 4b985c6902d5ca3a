"""What experiments share that predict and do not run: formats as flags, and where results go."""

import pathlib
from collections.abc import Callable, Iterable

from ternax import drawing
from ternax.formats import get_format
from ternax.record import Record, open_store

HERE = pathlib.Path(__file__).resolve().parent
# Rates that others measured, and those committed here: what predictions are held against.
PUBLISHED = HERE / "claims" / "published" / "decode.yaml"
RESULTS = HERE.parent / "results"


def output_flags(define):
    """Where results go: `args.output_dir`."""
    define.section("Run")
    define.output_dir()
    define.boolean("debug", "show the traceback of an error")


def format_flags(define):
    """How tables and cache are stored; `formats` reads them."""
    define.string("tables", "fp16", "format of embedding and head", form="FORMAT")
    define.string("kv", "fp16", "format of the cache", form="FORMAT")


def formats(args) -> dict[str, str]:
    """`tables` and `kv` by the names that formats have. UsageError for unknown ones."""
    return {name: get_format(getattr(args, name)).name for name in ("tables", "kv")}


def keep(
    args,
    records: Iterable[Record],
    names: tuple[str, str, str],
    draw: Callable[[pathlib.Path], pathlib.Path | None] | None = None,
) -> str:
    """Stores records, and what `draw` makes of a file's name beside them.

    names: experiment, config and backend, after which a new folder is called.

    Returns:
      The line that says where they are.
    """
    with open_store(args.output_dir, *names) as store:
        for record in records:
            store.append(record)
        said = drawing.said(draw(store.directory / f"{names[0]}.png")) if draw else ""
    return f"wrote    {store.directory}/results.json{said}"

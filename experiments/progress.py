"""A bar or a spinner on long phases; nothing at all when stderr is not a terminal."""

import contextlib
import sys


@contextlib.contextmanager
def progress(name: str, total: int | None, unit: str):
    """Shows one phase on stderr while it lasts.

    Args:
      name: of the phase.
      total: how much there is to do, or None for a spinner.
      unit: of `total`; "bytes" is shown in GB.

    Yields:
      advance(amount), or None when nothing is shown.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress as bars
    from rich.console import Console

    console = Console(stderr=True)
    columns = [
        bars.SpinnerColumn(),
        bars.TextColumn("{task.description}"),
        bars.TimeElapsedColumn(),
    ]
    if total is not None:
        count = bars.DownloadColumn() if unit == "bytes" else bars.MofNCompleteColumn()
        columns[2:] = [
            bars.BarColumn(),
            count,
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
        ]
    with bars.Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(name, total=total)
        yield lambda amount: shown.advance(task, amount)

"""What has been found so far? One report of a folder of records.

    python -m experiments.report                      # the committed ones
    python -m experiments.report --results=runs

Tables by experiment and kind, each row with the file and line it comes from, the machines and
versions behind them, plans against what was measured, and two plots. `ternax.frame` gives the
same records as a pandas frame.
"""

import json
import pathlib
import statistics
import sys

from ternax import book, drawing
from ternax.checkpoint import whole
from ternax.errors import OutputError, UsageError
from ternax.experiments import flags
from ternax.record import records_csv, run_directory

RESULTS = pathlib.Path(__file__).resolve().parent.parent / "results"


def report_flags(define):
    define.section("Records")
    define.string(
        "results",
        None,
        "a folder with records in any depth: results or runs",
        form="DIR",
        default_text="results/ of the checkout",
    )
    define.string("experiment", None, "these alone", form="NAME,...", default_text="all")
    define.number("usd_per_hour", None, "price of a measured machine, for a token's", lower=0)
    define.section("Run")
    define.string(
        "output_dir",
        None,
        "where the report goes",
        form="DIR",
        default_text="a new directory under runs/",
    )
    define.boolean("debug", "show the traceback of an error")


def run(folder, experiments: set[str] | None = None, usd_per_h: float | None = None):
    """Reads and tells.

    Returns:
      (the Records in the order of their files, the page as Markdown, its rows).
    """
    entries, others = book.read_folder(folder)
    if experiments is not None:
        known = dict.fromkeys(entry.record.experiment for entry in entries)
        unknown = sorted(experiments - known.keys())
        if unknown:
            raise UsageError(
                f"--experiment={','.join(unknown)}: no such records in {folder}; there are: "
                f"{', '.join(known)}"
            )
        entries = book.select(entries, lambda record: record.experiment in experiments)
    text = book.page(entries, others, f"Records in {pathlib.Path(folder).name}", usd_per_h)
    return [entry.record for entry in entries], text, book.rows(entries)


def draw(rows: list[book.Row], target: pathlib.Path) -> pathlib.Path | None:
    """Measured over bound rates, and planned over peak memory; None without matplotlib."""
    pyplot = drawing.pyplot()
    decodes = [
        row for row in rows if row.record.kind == "measured" and "share_of_bound" in row.metrics
    ]
    memory = book.memory_errors(rows)
    if pyplot is None or not decodes:
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for device in dict.fromkeys(row.record.device for row in decodes):
        at = [row.metrics for row in decodes if row.record.device == device]
        x, y = ([m[name] for m in at] for name in ("bound_tokens_per_s", "tokens_per_s"))
        left.plot(x, y, "o", label=device, markersize=4)
    ends = [m["bound_tokens_per_s"] for m in (row.metrics for row in decodes)]
    left.plot([min(ends), max(ends)], [min(ends), max(ends)], color="#999999", label="bound")
    left.set(xscale="log", yscale="log", xlabel="bound, tokens/s", ylabel="measured, tokens/s")
    left.legend(fontsize=7)
    peaks = [row.metrics["peak_memory_bytes"] / 2**30 for row, _ in memory]
    right.plot(peaks, [100 * error for _, error in memory], "o", markersize=4)
    right.axhline(0, color="#999999")
    right.set(xlabel="measured peak, GiB", ylabel="planned over it, % too much", xscale="log")
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


def report(args) -> None:
    """The command: read, write the page, the records and the plot."""
    folder = pathlib.Path(args.results or RESULTS)
    wanted = {name.strip() for name in args.experiment.split(",")} if args.experiment else None
    records, text, rows = run(folder, wanted, args.usd_per_hour)
    target = pathlib.Path(args.output_dir or run_directory("runs", "report", folder.name, ""))
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--output_dir: {target} cannot be used: {error.strerror}") from error
    _write(target / "report.md", text)
    _write(target / "records.csv", records_csv(records))
    _write(target / "records.json", json.dumps([r.to_dict() for r in records], indent=1) + "\n")
    picture = draw(rows, target / "report.png")
    experiments = dict.fromkeys(record.experiment for record in records)
    print(f"report   {len(records)} records of {', '.join(experiments)} in {len(rows)} rows")
    for line in _said(rows):
        print(line)
    print(f"wrote    {target}/report.md{drawing.said(picture)}")


def _said(rows: list[book.Row]) -> list[str]:
    memory, rates = book.memory_errors(rows), book.rate_errors(rows)
    lines = []
    if memory:
        row, worst = max(memory, key=lambda pair: abs(pair[1]))
        half = statistics.median(abs(error) for _, error in memory)
        lines.append(
            f"memory   half of {len(memory)} measured peaks planned within {100 * half:.1f} %; "
            f"worst {100 * worst:+.1f} %, {row.place}"
        )
    if rates:
        worst = max(abs(error) for error in rates.values())
        lines.append(
            f"rates    each model by the others of its machine: within {100 * worst:.1f} % for "
            f"{len(rates)} models"
        )
    return lines


def _write(path: pathlib.Path, text: str) -> None:
    with whole.whole_file(str(path), "--output_dir") as file:
        file.write(text.encode())


COMMAND = flags.Command(
    name="report",
    summary="One report of a folder of records: tables, plots, environment, provenance.",
    groups=(report_flags,),
    examples=(
        ("", "the committed measurements"),
        ("--results=runs --experiment=decode,scaling", "of your own, these alone"),
    ),
)


def main(argv=None) -> int:
    return COMMAND.run(report, argv)


if __name__ == "__main__":
    sys.exit(main())

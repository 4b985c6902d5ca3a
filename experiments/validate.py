"""How well does the law of decoding predict rates that were measured, by others and here?

    python -m experiments.validate

One efficiency for each device, and an error for each row, predicted by the other rows alone.
`ternax.validation` predicts; here are the flags, the records and the table.
"""

import pathlib
import sys
import textwrap

from ternax import validation
from ternax.errors import UsageError
from ternax.experiments import flags
from ternax.experiments.keeping import PUBLISHED, RESULTS, keep, output_flags
from ternax.record import Record
from ternax.table import rate


def validate_flags(define):
    define.section("Rates")
    define.string(
        "published",
        None,
        "a file of claims, each with model, weights, device and tokens_per_s",
        form="FILE",
        default_text="the one that comes with ternax",
    )
    define.string(
        "results",
        None,
        "a folder of our own records, a folder a machine",
        form="DIR",
        default_text="results/ of the checkout",
    )


def run(published: list[validation.Row], own: list[validation.Row], flags_text: str = ""):
    """Predicts both groups, each by its own rows.

    Returns:
      (title, predictions) for each group that has rows, and a `predicted` Record a row.
    """
    groups = [
        (title, validation.predict(rows))
        for title, rows in (("published", published), ("our own records", own))
        if rows
    ]
    records = [
        Record(
            experiment="validate",
            config=found.row.model,
            scheme=found.row.weights,
            inputs="",
            backend="",
            device=found.row.device,
            layers=found.row.layers,
            batch=found.row.batch,
            context=found.row.context,
            phase="decode",
            kind="predicted",
            metrics={
                "tokens_per_s": found.tokens_per_s,
                "bound_tokens_per_s": found.row.bound_tokens_per_s,
                "share_of_bound": found.efficiency,
                "reference_tokens_per_s": found.row.tokens_per_s,
                "prediction_error": found.error,
            },
            flags=flags_text,
            note=f"{title}: {found.row.source}",
        )
        for title, predictions in groups
        for found in predictions
    ]
    return groups, records


def screen(groups) -> list[str]:
    """A table for each group: a row a rate, then the median and each device's efficiency."""
    lines = []
    for title, predictions in groups:
        lines += [
            title,
            f"  {'device':12}{'model':18}{'layers':>6} {'weights':7}{'measured':>9}"
            f"{'predicted':>10}{'error':>9}  source",
        ]
        for found in predictions:
            row = found.row
            line = (
                f"  {row.device:12}{row.model:18}{row.layers:>6} {row.weights:7}"
                f"{rate(row.tokens_per_s):>9}{rate(found.tokens_per_s):>10}"
                f"{100 * found.error:>+7.1f} %  {row.source}"
            )
            lines.append(line if len(line) <= 100 else f"{line[:99]}…")
        efficiency = validation.efficiencies([found.row for found in predictions])
        said = ", ".join(f"{device} {share:.2f}" for device, share in efficiency.items())
        error = 100 * validation.median_error(predictions)
        lines += [
            f"  median error {error:.1f} % of {len(predictions)} rows, each by the others",
            *textwrap.wrap(
                f"efficiency: {said}", 100, initial_indent="  ", subsequent_indent="    "
            ),
            "",
        ]
    return lines


def validate(args) -> None:
    """The command: read both, predict, print, keep."""
    folder = pathlib.Path(args.results or RESULTS)
    if args.results and not folder.is_dir():
        raise UsageError(f"--results={args.results}: expected a folder of records, found none")
    groups, records = run(
        validation.published(args.published or PUBLISHED),
        validation.own(folder) if folder.is_dir() else [],
        args.command_line,
    )
    print("\n".join(screen(groups)))
    print(keep(args, records, ("validate", "decode", "law")))


COMMAND = flags.Command(
    name="validate",
    summary="Predicts measured decode rates from bytes, bandwidth and one efficiency a device.",
    groups=(validate_flags, output_flags),
    examples=(
        ("", "published rates, and the records in results/"),
        ("--published=mine.yaml", "rates of your own: docs/audit.md says how they are written"),
    ),
)


def main(argv=None) -> int:
    return COMMAND.run(validate, argv)


if __name__ == "__main__":
    sys.exit(main())

"""What do physics and arithmetic say of a table of published numbers?

    python -m experiments.audit CLAIMS.yaml

Each row comes out possible, impossible, mislabelled or unverifiable, with the arithmetic
shown. `ternax.audit` judges; here are the flags and the printing. docs/audit.md is the guide.
"""

import os
import pathlib
import sys
import textwrap

from ternax import audit
from ternax.errors import NumericCheckFailed, OutputError
from ternax.experiments import flags
from ternax.table import row

CASES = pathlib.Path(__file__).parent / "claims"


def audit_flags(define):
    define.section("Claims")
    define.strings(
        "claims", "a file of claims, .yaml or .md; none: the five documents here", form="FILE"
    )
    define.string("output", None, "write the audit as Markdown there", form="FILE")
    define.boolean("all", "print the rows that are possible too")
    define.boolean("strict", "exit 5 when a row is impossible or mislabelled")
    define.boolean("debug", "show the traceback of an error")


def run(paths) -> list[audit.Audit]:
    """The audits of files of claims, in order. Raises BadModelFile with line and column."""
    return [audit.audit(audit.read(path)) for path in paths]


def shipped() -> list[pathlib.Path]:
    """The documents that come with ternax."""
    return sorted(CASES.glob("*.yaml"))


def screen(audits: list[audit.Audit], everything: bool) -> list[str]:
    """A line for each row and its arithmetic below; `everything`: possible ones too."""
    lines = []
    for found in audits:
        lines += [*textwrap.wrap(audit.summary(found), 100), ""]
        for judged in found.rows:
            if everything or judged.verdict != "possible":
                lines.append(f"{judged.verdict:13} {judged.claim.says}")
                lines += [
                    row("", finding.said)
                    for finding in judged.findings
                    if everything or finding.verdict == judged.verdict
                ]
        lines.append("")
    return lines


def write(path: str, text: str) -> None:
    """Puts `text` at `path`, whole or not at all. Raises OutputError."""
    target = pathlib.Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        try:
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"--output={path}: cannot be written: {error.strerror}") from error


def audit_command(args) -> None:
    """The command: read, judge, print, write."""
    audits = run(args.claims or shipped())
    print("\n".join(screen(audits, args.all)).rstrip())
    if args.output:
        write(args.output, audit.markdown(audits))
        print(f"wrote    {args.output}")
    bad = sum(found.counts["impossible"] + found.counts["mislabelled"] for found in audits)
    if args.strict and bad:
        raise NumericCheckFailed(f"{bad} rows are impossible or mislabelled, expected none")


COMMAND = flags.Command(
    name="audit",
    summary="Recomputes a table of published numbers: possible, impossible, mislabelled?",
    groups=(audit_flags,),
    examples=(
        ("", "the five documents that come with ternax"),
        ("mine.yaml", "a table of your own; docs/audit.md shows how one is written"),
        ("mine.md --output=audit.md --strict", "as a page, and as a check in CI"),
    ),
)


def main(argv=None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    leading = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    named = [f"--claims={word}" for word in argv[:leading]]
    return COMMAND.run(audit_command, [*named, *argv[leading:]])


if __name__ == "__main__":
    sys.exit(main())

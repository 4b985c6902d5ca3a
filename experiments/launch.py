"""Run an experiment as several processes of this machine, as several hosts would.

    python -m experiments.launch --processes=2 -- experiments.decode --config=8b --mesh=tensor:2

What stands behind `--` is the command that every process gets. It ends with the exit code of
the run and, where that is bad, one sentence: which process, and why.
"""

import importlib.util
import sys

from ternax import launch, processes
from ternax.errors import UsageError
from ternax.experiments import flags


def launch_flags(define):
    define.section("Launch")
    define.integer("processes", 2, "how many processes to start", lower=1)
    define.integer("port", None, "where the first one listens", upper=65535, lower=1)
    define.integer(
        "heartbeat_s",
        processes.HEARTBEAT_S,
        "seconds after which a silent process is given up",
        lower=1,
    )
    define.string("stderr_dir", None, "keep what each process says on stderr there", form="DIR")
    define.boolean("debug", "show the traceback of an error")


COMMAND = flags.Command(
    name="launch",
    summary="Runs an experiment as several processes on this machine.",
    groups=(launch_flags,),
    examples=(
        (
            "--processes=2 -- experiments.decode --config=8b --mesh=tensor:2",
            "every matrix shared by two processes",
        ),
        ("--processes=4 -- experiments.train --mesh=fsdp:4 ...", "weights and batch in four"),
    ),
)


def main(argv=None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    # The command begins behind --, or with the first word that is no flag of this one.
    cut = next((i for i, w in enumerate(argv) if w == "--" or w[:1] != "-"), len(argv))
    command = argv[cut + (argv[cut : cut + 1] == ["--"]) :]

    def body(args):
        if not command:
            raise UsageError(
                "expected a command behind the flags, such as experiments.decode --config=8b"
            )
        module = f"ternax.{command[0].removeprefix('ternax.')}"
        known = module.startswith("ternax.experiments.") and importlib.util.find_spec(module)
        if not known:
            raise UsageError(
                f"expected an experiment, such as experiments.decode, found {command[0]!r}"
            )
        ending = launch.run(
            module,
            command[1:],
            args.processes,
            heartbeat_s=args.heartbeat_s,
            port=args.port,
            folder=args.stderr_dir,
        )
        if ending.sentence:
            print(f"error: {ending.sentence}", file=sys.stderr)
        return ending.code

    return COMMAND.run(body, argv[:cut])


if __name__ == "__main__":
    sys.exit(main())

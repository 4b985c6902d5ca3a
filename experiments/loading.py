"""How long does loading a model take, beside one read of its files?

    python -m experiments.loading --config=DIR --rounds=7

Each round reads the files once, from first to last, and then loads the model. The files lie in
the system's page cache: the first read, which is not counted, brings them there. What a disk
takes to be read is a fact about the disk.
"""

import gc
import os
import pathlib
import sys
import textwrap
import time

from ternax import estimate, machine, measure
from ternax.checkpoint import box
from ternax.errors import UsageError
from ternax.experiments import flags
from ternax.interop.gguf import I2_S
from ternax.record import Record, Store, open_store
from ternax.table import binary, decimal, row

WIDTH = 100
# Read into one such piece of memory, which stays in a core's cache.
_PIECE_BYTES = 1 << 20


def loading_flags(define):
    define.section("Loading")
    define.string("config", None, "a stored model: a directory, or a GGUF file", form="PATH")
    define.integer("rounds", 7, "times that files are read and the model is loaded", lower=1)
    define.choice("i2_s", None, I2_S, "how a GGUF file's I2_S is laid out")


def run(source: box.Source, rounds: int, store: Store, flags_text: str = "") -> Record:
    """Reads the files of a stored model and loads it, `rounds` times in turn.

    Args:
      source: from `box.find`, of a model that is stored.
      rounds: how often.
      store: takes the Record.
      flags_text: the command line, for the record.

    Returns:
      A Record of phase "create" whose samples are the loads' seconds. Its ratio is the median
      of a load over the read of the same round; its memory, the most that any load held beyond
      what was resident before.
    """
    import jax

    from ternax.engine import load_stored

    assert source.directory is not None
    files = files_of(source.directory)
    read_once(files)
    reads, loads, held = [], [], []
    weight_bytes = 0
    for _ in range(rounds):
        reads.append(read_once(files))
        gc.collect()
        told = machine.reset_peak()
        before = machine.resident_bytes()
        start = time.perf_counter()
        model = load_stored(source)
        jax.block_until_ready(leaves := jax.tree.leaves(model))
        loads.append(time.perf_counter() - start)
        after = machine.peak_resident_bytes()
        if told and before is not None and after is not None:
            held.append(after - before)
        weight_bytes = sum(leaf.nbytes for leaf in leaves)
        config = model.config
        del model, leaves
    ratio = estimate.median([load / read for load, read in zip(loads, reads, strict=True)])
    metrics = {
        "create_s": estimate.median(loads).value,
        "file_bytes": sum(path.stat().st_size for path in files),
        "file_read_s": estimate.median(reads).value,
        **estimate.named("load_read_ratio", ratio),  # five rounds are too few for its ends
        "weight_bytes": weight_bytes,
    }
    if held:
        metrics["load_memory_bytes"] = max(held)
    record = Record(
        experiment="loading",
        config=config.name,
        scheme=config.scheme,
        inputs=config.inputs,
        backend="",
        device=measure.device_name(jax.devices()[0]),
        layers=config.num_layers,
        batch=0,
        context=0,
        phase="create",
        kind="measured",
        samples=tuple(loads),
        sample_unit="s",
        metrics=metrics,
        seed=0,
        flags=flags_text,
        note=f"{config.source}; files in the page cache; reads, one a round before its load, in s: "
        + ", ".join(f"{read:.5g}" for read in reads),
    )
    store.append(record)
    return record


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
    """The files of a stored model, in the order of their names."""
    return [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())


def read_once(files: list[pathlib.Path]) -> float:
    """Seconds to read all bytes of `files`, in one thread, into memory that is used again."""
    piece = [memoryview(bytearray(_PIECE_BYTES))]
    start = time.perf_counter()
    for path in files:
        file = os.open(path, os.O_RDONLY)
        while os.readv(file, piece):
            pass
        os.close(file)
    return time.perf_counter() - start


def loading(args) -> None:
    """The command: find the model, measure, say what was found."""
    if args.threads is not None:
        measure.limit_threads(args.threads)
    if args.profile_dir:
        raise UsageError("--profile_dir is for experiments.decode: this times whole loads")
    if args.config is None:
        raise UsageError("--config must name a stored model, a directory or a GGUF file")
    source = box.find(args.config, i2_s=args.i2_s)
    if source.directory is None:
        raise UsageError(f"--config must be a stored model; {source.name} has random weights")
    with open_store(args.output_dir, "loading", source.config.name, "load") as store:
        record = run(source, args.rounds, store, args.command_line)
    m = record.metrics
    print(row("loading", f"{source.name}, {decimal(m['file_bytes'])} on disk"))
    memory = "The most memory it held is not told by this system."
    if "load_memory_bytes" in m:
        share = m["load_memory_bytes"] / m["weight_bytes"]
        memory = (
            f"At most it held {binary(m['load_memory_bytes'])}, {share:.3f} times the "
            f"{binary(m['weight_bytes'])} of the model."
        )
    interval = "no interval of so few"
    if "load_read_ratio_low" in m:
        interval = f"{m['load_read_ratio_low']:.2f} to {m['load_read_ratio_high']:.2f}"
    print(
        textwrap.fill(
            f"Loading takes {m['create_s']:.3f} s, {m['load_read_ratio']:.2f} times one read of "
            f"the files ({interval}; medians of {args.rounds} rounds, the best load "
            f"{min(record.samples):.3f} s). {memory}",
            WIDTH,
        )
    )
    print(f"wrote {store.directory}/results.json")


COMMAND = flags.Command(
    name="loading",
    summary="Times loading a stored model, beside reading its files, and the memory it takes.",
    groups=(loading_flags, flags.run_flags),
    examples=(
        ("--config=path/to/model", "a Hugging Face directory"),
        ("--config=model.gguf --rounds=3", "a GGUF file, three times"),
    ),
)


def main(argv=None) -> int:
    return COMMAND.run(loading, argv)


if __name__ == "__main__":
    sys.exit(main())

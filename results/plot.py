"""Draws the committed comparisons of one machine: python results/plot.py results/cpu-zen4

Every dot is one round; a bar is the median. Needs matplotlib (`pip install -e '.[plots]'`).
"""

import collections
import pathlib
import statistics
import sys

from ternax.record import read_records

PANELS = (("decode", "tokens_per_s"), ("prefill", "prefill_tokens_per_s"))


def draw(folder: pathlib.Path) -> pathlib.Path:
    """Writes compare.png into the folder that holds compare-*.jsonl, and returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = sorted(folder.glob("compare-*.jsonl"))
    if not files:
        raise SystemExit(f"{folder}: expected compare-*.jsonl, found none")
    figure, axes = pyplot.subplots(
        len(files), len(PANELS), figsize=(11, 2 * len(files) + 0.6), squeeze=False
    )
    for row, path in zip(axes, files, strict=True):
        records = [r for r in read_records(path) if "round" in r.metrics]
        for axis, (phase, metric) in zip(row, PANELS, strict=True):
            speeds = collections.defaultdict(list)
            for record in records:
                if record.phase == phase:
                    ours = record.inputs != ""
                    speeds["ternax" if ours else record.backend].append(record.metrics[metric])
            names = sorted(speeds, key=lambda name: statistics.median(speeds[name]))
            middles = [statistics.median(speeds[name]) for name in names]
            colours = ["#d1495b" if name == "ternax" else "#9aa5b1" for name in names]
            axis.barh(names, middles, color=colours, height=0.6)
            for place, name in enumerate(names):
                axis.plot(speeds[name], [place] * len(speeds[name]), "k.", markersize=3)
            axis.set_xlabel(f"{phase}, tokens/s")
            axis.tick_params(labelsize=8)
        length = next(r.metrics["prompt_tokens"] for r in records if r.phase == "prefill")
        row[0].set_title(f"{path.stem}: prompt of {length}, batch 1", fontsize=9, loc="left")
    figure.tight_layout()
    target = folder / "compare.png"
    figure.savefig(target, dpi=110)
    return target


if __name__ == "__main__":
    print(draw(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "results/cpu-zen4")))

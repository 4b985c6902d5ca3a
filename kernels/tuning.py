"""Tuned settings of kernels: files `tuned/<device>.json`, and the search that makes them.

What is asked for explicitly comes first, then a tuned file, then the kernel's heuristic. A file
says which order of bytes its kernels read; one of another order is refused, in one line. It
keeps every setting that was tried, with all samples:

    {"device": "NVIDIA H200", "layout": "tiles-...", "versions": ..., "commit": ..., "entries": [
      {"kernel": "decode", "k": 8192, "n": 10240, "rows": 8, "config": {"blocks": ...},
       "median_us": 5.1, "tried": [{"config": ..., "samples_us": [...]}, ...]}, ...]}

A chain goes by the K and N of its widest link.
"""

import functools
import json
import os
import pathlib
import re
import statistics
from collections.abc import Iterable, Mapping

from .pallas import tiles

# A folder of tuned files that goes before the one beside the kernels.
FOLDER = "TERNAX_TUNED"
_BESIDE = pathlib.Path(__file__).parent / "pallas" / "tuned"
_KEYS = {"device", "layout", "versions", "commit", "entries"}
# Shared memory that a block may have on Hopper, less what barriers and alignment take.
_SHARED_BYTES = 225 << 10
# Of rows of activations the kernel knows these: others are padded to the next.
ROWS = (8, 16)


class TunedFileError(ValueError):
    """A tuned file that cannot be used, in one line."""


def file_name(device: str) -> str:
    """ "NVIDIA H200" -> "nvidia-h200.json"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def rows_class(rows: int) -> int | None:
    """The number of ROWS that `rows` are padded to; None: another kernel's."""
    return next((each for each in ROWS if rows <= each), None)


def find(device: str) -> pathlib.Path | None:
    """The tuned file of a device, or None."""
    folders = [pathlib.Path(os.environ[FOLDER])] if os.environ.get(FOLDER) else []
    paths = (folder / file_name(device) for folder in (*folders, _BESIDE))
    return next((path for path in paths if path.is_file()), None)


def settings(
    device: str, shape: tuple[int, int], rows: int, kernel: str = "decode"
) -> Mapping[str, int] | None:
    """What a tuned file says of (K, N) and so many rows on `device`; None where it says nothing.

    Raises:
      TunedFileError: there is a file, and it cannot be used.
    """
    path = find(device)
    if path is None:
        return None
    return _entries(path, path.stat().st_mtime_ns).get((kernel, *shape, rows_class(rows)))


@functools.lru_cache(maxsize=4)
def _entries(path: pathlib.Path, changed_ns: int) -> dict[tuple, dict[str, int]]:
    del changed_ns  # a file that was written anew is read anew
    found = read(path)
    return {_key(entry): dict(entry["config"]) for entry in found["entries"]}


def _key(entry: Mapping) -> tuple:
    return entry["kernel"], entry["k"], entry["n"], entry["rows"]


def read(path: pathlib.Path) -> dict:
    """A tuned file, checked. Raises TunedFileError."""
    try:
        found = json.loads(path.read_text())
        assert isinstance(found, dict) and found.keys() >= _KEYS
        for entry in found["entries"]:
            assert isinstance(entry["kernel"], str)
            assert all(isinstance(entry[name], int) for name in ("k", "n", "rows"))
            assert all(isinstance(value, int) for value in entry["config"].values())
    except (OSError, ValueError, AssertionError, KeyError, TypeError, AttributeError) as error:
        raise TunedFileError(
            f"{path}: not a file of tuned settings; make it anew with "
            "python -m experiments.gpu_day --steps=tune, or remove it"
        ) from error
    if found["layout"] != tiles.LAYOUT:
        raise TunedFileError(
            f"{path}: tuned for layout {found['layout']!r}, kernels read {tiles.LAYOUT!r}; make it "
            "anew with python -m experiments.gpu_day --steps=tune, or remove it"
        )
    return found


def space(cores: int, rows: int) -> list[dict[str, int]]:
    """Settings worth trying on a GPU of so many processors, the likeliest first.

    One block has a processor for itself. Few stages leave memory waiting, many take longer
    to fill. Two pairs of consumers are not tried: compiled, they spill registers, and one wgmma
    waits for another (kernels.aot).
    """
    stage = tiles.TILE_BYTES + rows * tiles.TILE_K
    return [
        {"blocks": cores, "stages": stages, "consumers": 2}
        for stages in (8, 6, 10, 4, 9, 7, 11, 5)
        if stages * stage <= _SHARED_BYTES
    ]


def chain_space(first: Mapping[str, int]) -> list[dict[str, int]]:
    """The same of a chain, round its heuristic's settings: rows entered together where blocks may
    enter them alone, fewer stages, tiles on their way into L2."""
    other = [{"stages": 8}, {"stages": 6}, {"ahead": 4}, {"ahead": 8}]
    other = [{"alone": 0}, *other] if first["alone"] else other
    return [dict(first), *({**first, **settings} for settings in other)]


def entry(
    kernel: str,
    shape: tuple[int, int],
    rows: int,
    tried: Iterable[tuple[Mapping[str, int], list[float]]],
) -> dict:
    """What a file keeps of one shape: the setting of the least median, and all samples.

    tried: (config, seconds of each sample).
    """
    table = [(dict(config), [round(1e6 * s, 4) for s in samples]) for config, samples in tried]
    best, samples_us = min(table, key=lambda one: statistics.median(one[1]))
    return {
        "kernel": kernel,
        "k": shape[0],
        "n": shape[1],
        "rows": rows,
        "config": best,
        "median_us": round(statistics.median(samples_us), 4),
        "tried": [{"config": config, "samples_us": samples} for config, samples in table],
    }


def write(
    folder: pathlib.Path, device: str, entries: list[dict], versions: str, commit: str
) -> pathlib.Path:
    """`folder/<device>.json`, whole or not at all; earlier entries of other shapes stay."""
    path = folder / file_name(device)
    new = set(map(_key, entries))
    try:
        kept = read(path)["entries"] if path.is_file() else []
    except TunedFileError:
        kept = []
    kept = [entry for entry in kept if _key(entry) not in new]
    head = {"device": device, "layout": tiles.LAYOUT, "versions": versions, "commit": commit}
    lines = ",\n ".join(json.dumps(e) for e in [*kept, *entries])
    text = f'{json.dumps(head)[:-1]}, "entries": [\n {lines}\n]}}\n'
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{path.name}.{os.getpid()}"
    draft.write_text(text)
    os.replace(draft, path)
    return path

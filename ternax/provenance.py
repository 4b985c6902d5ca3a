"""Which program made a number: versions, commit, and a hash of every source file."""

import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import NamedTuple

import ternax


class Environment(NamedTuple):
    versions: str
    commit: str
    source_sha256: str


def _versions() -> str:
    words = [f"python {platform.python_version()}"]
    for package in ("jax", "jaxlib", "flax", "numpy"):
        try:
            words.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            words.append(f"{package} absent")
    return ", ".join([*words, f"ternax {ternax.__version__}"])


def _source_directories() -> dict[str, pathlib.Path]:
    """Where the four packages' sources are: side by side in a checkout, nested in a wheel."""
    package = pathlib.Path(__file__).resolve().parent
    found = {"ternax": package}
    for name in ("kernels", "configs", "experiments"):
        nested = package / name
        found[name] = nested if nested.is_dir() else package.parent / name
    return found


def _source_sha256() -> str:
    """SHA-256 over path, length and content of every .py, .cc and .h, by relative path.

    The paths are those of a checkout, so a wheel built from it has the same hash.
    """
    directories = _source_directories()
    nested = {path for name, path in directories.items() if name != "ternax"}
    files = {}
    for name, directory in directories.items():
        for path in directory.rglob("*"):
            if path.suffix not in (".py", ".cc", ".h") or not path.is_file():
                continue
            if name == "ternax" and not nested.isdisjoint(path.parents):
                continue
            files[f"{name}/{path.relative_to(directory).as_posix()}"] = path
    digest = hashlib.sha256()
    for relative in sorted(files):
        content = files[relative].read_bytes()
        digest.update(f"{relative}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _commit() -> str:
    package = pathlib.Path(__file__).resolve().parent
    stamp = package / "build_stamp.txt"  # written by whoever builds a wheel, if at all
    if stamp.is_file():
        return stamp.read_text().strip() or "unknown"
    root = package.parent
    # An installed package may lie inside somebody else's repository: ask only our own.
    if not (root / ".git").exists():
        return "unknown"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    command = [
        "git",
        "-c",
        f"safe.directory={root}",
        "-C",
        str(root),
        "describe",
        "--always",
        "--abbrev=12",
        "--dirty",
        "--exclude=*",
    ]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip() or "unknown"


@functools.cache
def environment() -> Environment:
    """Versions, commit and source hash of this process; jax is not imported for it."""
    return Environment(_versions(), _commit(), _source_sha256())

"""Builds the C++ kernels on this machine at first use, keeps them, and registers them.

The library is cached under a key of its sources, the compiler, its flags, the CPU's
instruction sets and jaxlib's version: XLA's FFI headers and its runtime must agree.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile

_HERE = pathlib.Path(__file__).resolve().parent
_HEADERS = (
    "memory",
    "processor",
    "parallel",
    "order",
    "body",
    "isa",
    "product",
    "glue",
    "digits",
    "attention",
)
_SOURCES = ("kernels.cc", *(f"{name}.h" for name in _HEADERS))
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread")
TARGETS = (
    "ternax_accumulate",
    "ternax_matmul",
    "ternax_project",
    "ternax_step",
    "ternax_zeros",
)


class BuildError(RuntimeError):
    """The library cannot be had; the message is one line."""


def compiler() -> str | None:
    """The C++ compiler: $CXX, else the first of g++, clang++, c++ on the path."""
    named = os.environ.get("CXX")
    return (
        shutil.which(named)
        if named
        else next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    )


def cache_directory() -> pathlib.Path:
    """$TERNAX_CACHE, else the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get("TERNAX_CACHE") or pathlib.Path(home) / "ternax")


def _cache_key(cxx: str, flags: tuple[str, ...], sources: tuple[str, ...]) -> str:
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [importlib.metadata.version("jaxlib"), version, " ".join(flags), platform.machine()]
    parts += [(_HERE / name).read_text() for name in sources]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _headers() -> tuple[str, str]:
    """Flags for XLA's. Other libraries need none, and are built where jax cannot be imported."""
    import jax

    return "-isystem", jax.ffi.include_dir()


@contextlib.contextmanager
def _one_at_a_time(path: pathlib.Path):
    """Waits for whoever else is inside: processes that start together compile once."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back with the file, a killed process's too
        yield


def build(
    extra_flags: tuple[str, ...] = (),
    sources: tuple[str, ...] = _SOURCES,
    what: str = "the CPU kernels",
) -> pathlib.Path:
    """The path of the built library, compiled now if it is not in the cache.

    Args:
      extra_flags: after the usual ones.
      sources: files of this folder; the first is compiled, the rest are what it includes.
      what: the name of the library in the line that says it is being built.

    Raises:
      BuildError: no compiler, or it failed; what it said first is in the message.
    """
    cxx = compiler()
    if cxx is None:
        raise BuildError("no C++ compiler found (install g++ or set CXX)")
    flags = (*_FLAGS, *extra_flags)
    target = cache_directory() / f"libternax-{_cache_key(cxx, flags, sources)}.so"
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            _one_at_a_time(target.with_suffix(".lock")),
            tempfile.TemporaryDirectory(dir=target.parent) as scratch,
        ):
            if target.is_file():  # another process has built it while this one waited
                return target
            print(
                f"ternax: building {what} with {pathlib.Path(cxx).name}, once (up to 30 s)",
                file=sys.stderr,
                flush=True,
            )
            draft = pathlib.Path(scratch) / target.name
            command = [
                cxx,
                *flags,
                *(_headers() if sources == _SOURCES else ()),
                str(_HERE / sources[0]),
                "-o",
                str(draft),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = next(
                    (line for line in done.stderr.splitlines() if "error" in line),
                    done.stderr[:200],
                )
                raise BuildError(f"{cxx} failed: {said.strip()}")
            os.replace(draft, target)  # whole or not at all
    except OSError as error:
        raise BuildError(f"cannot write {target.parent}: {error.strerror or error}") from error
    return target


@functools.cache
def library() -> "ctypes.CDLL":
    """The loaded library with its FFI targets registered. Raises BuildError."""
    try:
        loaded = ctypes.CDLL(str(build()))
    except OSError as error:
        raise BuildError(f"cannot load the built library: {error}") from error
    loaded.ternax_isa_name.restype = ctypes.c_char_p
    import jax

    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    return loaded


@functools.cache
def instruction_sets() -> dict[str, int]:
    """Name -> index of the instruction sets this CPU can run, fastest first. Raises BuildError."""
    loaded, found, index = library(), {}, 0
    while (name := loaded.ternax_isa_name(index)) is not None:
        if loaded.ternax_isa_supported(index):
            found[name.decode()] = index
        index += 1
    return found

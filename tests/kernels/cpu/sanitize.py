"""`make sanitize`: the C++ kernels under the compiler's sanitizers; 0 when nothing is found.

Two programs from one source, `sanitize.cc`: with AddressSanitizer and UBSan over all of its
cases, then with ThreadSanitizer over fewer, for what threads share.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402

from ternax.kernels.cpu.build import compiler  # noqa: E402
from ternax.kernels.packing import FORMATS  # noqa: E402
from ternax.kernels.ternary_matmul import largest_k  # noqa: E402

SOURCE = pathlib.Path(__file__).with_suffix(".cc")
# -O1: -O2 compiles half as long again and finds the same.
FLAGS = ("-std=c++17", "-O1", "-g1", "-fno-omit-frame-pointer", "-pthread")
# name -> (flags, stride of the sweep, whether it tries each format's largest K).
# The vector flag makes std::vector's spare room out of bounds, as scratch memory has.
BUILDS = {
    "address and undefined behaviour": (
        (
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=all",
            "-D_GLIBCXX_SANITIZE_VECTOR=1",
        ),
        3,
        True,
    ),
    "threads": (("-fsanitize=thread",), 40, False),
}
OPTIONS = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


class Failed(Exception):
    """What went wrong, in one line."""


def check_libraries(cxx: str, scratch: pathlib.Path) -> None:
    """Links an empty program with each sanitizer: a compiler may come without them."""
    empty = scratch / "empty.cc"
    empty.write_text("int main() {}\n")
    for name, (flags, _, _) in BUILDS.items():
        command = [cxx, *flags, str(empty), "-o", str(scratch / "empty")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed(
                f"{cxx} cannot link the sanitizer of {name} (libasan, libubsan and libtsan "
                f"come with GCC and clang): {done.stderr.strip().splitlines()[-1]}"
            )


def start_build(cxx: str, flags, target: pathlib.Path) -> subprocess.Popen:
    kernels = ROOT / "kernels" / "cpu"
    include = ["-isystem", jax.ffi.include_dir(), "-I", str(kernels)]
    command = [cxx, *FLAGS, *flags, *include, str(SOURCE), "-o", str(target)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def main() -> None:
    cxx = compiler()
    if cxx is None:
        raise Failed("no C++ compiler found (install g++ or set CXX)")
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        check_libraries(cxx, scratch)
        targets = {name: scratch / name.split()[0] for name in BUILDS}
        builds = {name: start_build(cxx, BUILDS[name][0], targets[name]) for name in BUILDS}
        said = {name: build.communicate()[1] for name, build in builds.items()}
        for name, build in builds.items():
            if build.returncode:
                error = next(
                    (s for s in said[name].splitlines() if "error" in s), "no reason given"
                )
                raise Failed(f"{cxx} failed: {error.strip()}")
        for name, (_, stride, whole) in BUILDS.items():
            print(f"sanitize: {name}", flush=True)
            began = time.monotonic()
            longest = [str(largest_k(format) if whole else 1000) for format in FORMATS]
            command = [str(targets[name]), str(stride), *longest]
            done = subprocess.run(command, env=OPTIONS | os.environ, check=False)
            if done.returncode:
                raise Failed(f"failed: {name}, exit status {done.returncode}")
            print(f"sanitize: nothing found in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except Failed as failure:
        sys.exit(f"sanitize: {failure}")

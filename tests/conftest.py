"""What all tests share: compiled programs, hypothesis, options, the marker of tests/legs.py."""

import os
import pathlib
import tempfile

import hypothesis
import pytest

from tests import legs

# What several tests compile alike, here or in processes they start, is compiled once.
_COMPILED = tempfile.TemporaryDirectory(prefix="ternax-compiled-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _COMPILED.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# By default XLA cuts a program into parts for the compiler's threads. The workers already keep
# every core busy, and a part costs: whole, the same code takes 8 % less of a core's time.
_WHOLE = "--xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_WHOLE}".strip()

# Compiling a new shape takes longer than any deadline. In CI the same examples each time;
# elsewhere new ones, with the line that repeats a failure.
hypothesis.settings.register_profile(
    "ternax", deadline=None, max_examples=25, print_blob=True, derandomize="CI" in os.environ
)
hypothesis.settings.load_profile("ternax")


# Compiled code takes mappings, a process has 65,530 of them by default, and at the last XLA's
# compiler crashes. A worker's share of the suite comes near.
_MANY_MAPPINGS = 25_000


@pytest.fixture(autouse=True, scope="module")
def programs_of_earlier_modules_go_before_mappings_run_out():
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MANY_MAPPINGS:
        import jax

        jax.clear_caches()


def pytest_addoption(parser):
    parser.addoption(
        "--scheme",
        action="append",
        default=[],
        metavar="package.module:Class",
        help="run the conformance suite of tests/quant over this scheme too",
    )


@pytest.hookimpl(tryfirst=True)  # before -m looks
def pytest_collection_modifyitems(items):
    for item in items:
        if legs.in_one_leg(item.nodeid.removeprefix("tests/")):
            item.add_marker(pytest.mark.one_leg)

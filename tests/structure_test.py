"""The house: imports go downward only, nothing runs code from data, files stay readable."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

from tests import legs

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Bottom first. A line may import from lines above it; entries of one line do not import
# each other, modules of one package do. A new module needs a place here.
LAYERS = (
    (
        "ternax.kernels",
        "ternax.counter_hash",
        "ternax.drawing",
        "ternax.errors",
        "ternax.estimate",
        "ternax.machine",
        "ternax.metrics",
        "ternax.provenance",
        "ternax.reply",
        "ternax.roofline",
        "ternax.table",
    ),
    ("ternax.regression", "ternax.roll_call", "ternax.sizes", "ternax.watchdog"),
    ("ternax.processes",),
    (
        "ternax.config",
        "ternax.data",
        "ternax.endpoint",
        "ternax.formats",
        "ternax.interrupt",
        "ternax.measure",
        "ternax.mesh",
        "ternax.optimizer",
        "ternax.options",
        "ternax.prompts",
        "ternax.record",
        "ternax.resample",
        "ternax.sampling",
    ),
    (
        "ternax.anatomy",
        "ternax.book",
        "ternax.configs",
        "ternax.frame",
        "ternax.heldout",
        "ternax.power",
        "ternax.sharding",
    ),
    (
        "ternax.audit",
        "ternax.collectives",
        "ternax.launches",
        "ternax.prediction",
        "ternax.quantized",
        "ternax.row_order",
        "ternax.shapes",
    ),
    ("ternax.levers", "ternax.noise", "ternax.page", "ternax.validation"),
    ("ternax.noise_table", "ternax.planner"),
    ("ternax.plan_table",),
    ("ternax.quant",),
    ("ternax.nn",),
    ("ternax.models",),
    ("ternax.calibrate", "ternax.edit", "ternax.taps"),
    ("ternax.convert",),
    ("ternax.random_weights",),
    ("ternax.gather", "ternax.striking"),
    ("ternax.targets",),
    ("ternax.injection",),
    ("ternax.trit_edits",),
    ("ternax.checkpoint",),
    ("ternax.interop",),
    ("ternax.checkpoint.box",),
    ("ternax.engine", "ternax.cost", "ternax.evaluate"),
    ("ternax.mesh_choice", "ternax.placement", "ternax.run_folder"),
    ("ternax.loss_band", "ternax.robustness", "ternax.train", "ternax.untrained"),
    ("ternax.response", "ternax.training"),
    ("ternax.noise_forecast", "ternax.noise_point"),
    ("ternax.noise_controls", "ternax.noise_summary"),
    ("ternax.noise_meta", "ternax.noise_study"),
    ("ternax.noise_axes",),
    ("ternax.noise_lines",),
    ("ternax.noise_lines_table",),
    ("ternax.dispatch", "ternax.harness", "ternax.workload"),
    ("ternax.ahead", "ternax.decode_metrics", "ternax.steps"),
    ("ternax.decoding", "ternax.speedtest", "ternax.turns"),
    ("ternax.gpu", "ternax.local"),
    ("ternax.peer",),
    ("ternax.comparison", "ternax.crash", "ternax.launch"),
    ("ternax.scheme_speed", "ternax.sweep"),
    ("ternax.card", "ternax.curves"),
    ("ternax.experiments",),
)
RANK = {entry: rank for rank, entries in enumerate(LAYERS) for entry in entries}

# All that the ground floor may know.
KERNELS_IMPORT = {"jax", "jaxlib", "numpy", *sys.stdlib_module_names}
# Folders beside ternax: imported as ternax.kernels, ..., or one file is loaded twice.
BESIDE = ("kernels", "configs", "experiments")
# What experiments share; apart from these, each stands alone.
SHARED_BY_EXPERIMENTS = {
    "ternax.experiments.flags",
    "ternax.experiments.config_flag",
    "ternax.experiments.definer",
    "ternax.experiments.ending",
    "ternax.experiments.keeping",
    "ternax.experiments.mesh_flag",
    "ternax.experiments.progress",
    "ternax.experiments.scheme_card",
    "ternax.experiments.untrained_table",
}
# They run code from data, or weigh more than everything here together.
BANNED_IMPORTS = {
    "pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "marshal",
    "shelve",
    "joblib",
    "torch",
    "tensorflow",
}
# What is measured beside ours, by one module each, which says why not where it is not installed.
MEASURED = {"ternax.gpu.torch_peer": {"import torch"}}
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
BANNED_KEYWORDS = {"allow_pickle", "shell"}  # set to anything but False
MAX_LINES = 400


def files() -> dict[str, pathlib.Path]:
    """Module name -> file, of all code that ships."""
    found = {}
    for top in ("ternax", *BESIDE):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join(parts if top == "ternax" else ("ternax", *parts))] = path
    return found


FILES = files()


def entry_of(module: str) -> str | None:
    """The entry of LAYERS a module belongs to: itself or the package it is in."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in names if name in RANK), None)


def imports(module: str, source: str, modules) -> list[tuple[int, str]]:
    """(line, imported module) of every import, wherever it stands; submodules in full."""
    is_package = any(name.startswith(f"{module}.") for name in modules)
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = module.split(".")[: len(module.split(".")) - node.level + is_package]
            base = ".".join([*(up if node.level else []), *([node.module] if node.module else [])])
            full = [f"{base}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name if name in modules else base) for name in full]
    return found


def direction_problems(module: str, source: str, modules) -> list[tuple[int, str]]:
    """(line, what is wrong and what to do) of the imports of one module."""
    problems = []
    mine = entry_of(module)
    for line, name in imports(module, source, modules):
        top = name.partition(".")[0]
        theirs = entry_of(name)
        if top in BESIDE:
            problems.append((line, f"import {name} as ternax.{name}, or it is loaded twice"))
        elif mine == "ternax.kernels" and theirs != mine and top not in KERNELS_IMPORT:
            problems.append((line, f"kernels know jax and numpy alone: move what needs {name} up"))
        elif top != "ternax" or name == "ternax" or theirs is None or mine is None:
            continue  # not ours, or without a layer, which another test reports
        elif mine == theirs == "ternax.experiments":
            if name not in SHARED_BY_EXPERIMENTS:
                problems.append(
                    (
                        line,
                        f"experiments do not import each other: move what {name} "
                        "shares down into ternax",
                    )
                )
        elif mine != theirs and RANK[theirs] >= RANK[mine]:
            problems.append(
                (
                    line,
                    f"{mine} may not import {name}: move what it needs below "
                    "both, or the importer up (LAYERS in tests/structure_test.py)",
                )
            )
    return problems


def banned(source: str) -> list[tuple[int, str]]:
    """(line, what is banned) of one module."""
    found = [
        (line, f"import {name}")
        for line, name in imports("", source, ())
        if name.partition(".")[0] in BANNED_IMPORTS
    ]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in BANNED_CALLS:
            found.append((node.lineno, f"{node.func.id}()"))
        for keyword in node.keywords:
            off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in BANNED_KEYWORDS and not off:
                found.append((node.lineno, f"{keyword.arg}="))
    return found


def told(problems: dict[str, list[tuple[int, str]]]) -> list[str]:
    """file:line: problem."""
    return [
        f"{FILES[module].relative_to(ROOT)}:{line}: {text}"
        for module, lines in problems.items()
        for line, text in lines
    ]


SOURCES = {module: path.read_text() for module, path in FILES.items()}


# --- The tree ------------------------------------------------------------------------------


def test_every_module_has_a_layer():
    lost = [
        f"{path.relative_to(ROOT)}: give {module} a line in LAYERS of tests/structure_test.py"
        for module, path in FILES.items()
        if module != "ternax" and entry_of(module) is None
    ]
    assert lost == []


def test_every_layer_is_there():
    gone = [entry for entry in RANK if not any(entry_of(module) == entry for module in FILES)]
    assert gone == [], "remove them from LAYERS"


def test_imports_go_downward():
    problems = {m: direction_problems(m, source, FILES) for m, source in SOURCES.items()}
    assert told(problems) == []


def test_no_module_imports_itself_in_a_circle():
    """Within a package as well, where LAYERS say nothing."""
    graph = {
        m: {name for _, name in imports(m, source, FILES) if name in FILES and name != m}
        for m, source in SOURCES.items()
        if m != "ternax"
    }
    for names in graph.values():
        names.discard("ternax")
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_nothing_runs_code_from_data():
    found = {
        module: [hit for hit in banned(source) if hit[1] not in MEASURED.get(module, ())]
        for module, source in SOURCES.items()
    }
    assert told(found) == []


def test_files_stay_readable():
    long = [
        f"{FILES[module].relative_to(ROOT)}: {lines} lines, at most {MAX_LINES}: which two "
        "ideas does it hold?"
        for module, source in SOURCES.items()
        if (lines := len(source.splitlines())) > MAX_LINES
    ]
    assert long == []


@pytest.mark.parametrize(
    "names", ["ternax", "ternax, ternax.errors, ternax.config, ternax.configs"]
)
def test_import_is_light(names):
    """--help and refusals answer at once; jax alone takes half a second."""
    heavy = "jax", "jaxlib", "flax", "numpy", "optax", "orbax", "ml_collections"
    code = f"import sys, {names}\nprint([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


# --- Legs of CI ----------------------------------------------------------------------------

TESTS = {path.relative_to(ROOT / "tests"): path for path in (ROOT / "tests").rglob("*_test.py")}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}


def test_every_entry_of_legs_names_a_test():
    """Cases aside, which pytest alone knows: an entry without one leaves its test in both legs."""
    tests = [
        f"{name}::{node.name}"
        for name, path in TESTS.items()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    ]
    entries = [entry.partition("[")[0] for entry in legs.LISTED]
    assert [e for e in entries if not any(legs.names(e, test) for test in tests)] == []


def test_what_has_nothing_of_jax_imports_none():
    wrong = [
        str(name)
        for name, path in TESTS.items()
        if any(legs.names(entry, f"{name}::") for entry in legs.NOTHING_OF_JAX)
        and {found.partition(".")[0] for _, found in imports("", path.read_text(), ())} & JAX
    ]
    assert wrong == [], "these need both legs: take them out of NOTHING_OF_JAX in tests/legs.py"


def test_both_legs_reach_all_that_uses_jax():
    """Every module that imports JAX or what stands on it is imported by a test of both legs."""
    uses = {
        module: {name for _, name in imports(module, source, FILES)}
        for module, source in SOURCES.items()
    }
    reached, new = set(), set()
    for name, path in TESTS.items():
        if not legs.in_one_leg(f"{name}::"):
            new |= {found for _, found in imports("", path.read_text(), FILES)}
    while new:
        reached |= new
        new = {found for module in new for found in uses.get(module, ())} - reached
    on_jax = {m for m, names in uses.items() if JAX & {name.partition(".")[0] for name in names}}
    assert sorted(on_jax - reached) == []


# --- The checks themselves can fail --------------------------------------------------------

MODULES = {
    "ternax",
    "ternax.errors",
    "ternax.nn",
    "ternax.nn.rope",
    "ternax.nn.cache",
    "ternax.engine",
    "ternax.kernels",
    "ternax.kernels.packing",
    "ternax.experiments",
    "ternax.experiments.flags",
    "ternax.experiments.decode",
    "ternax.configs",
}


@pytest.mark.parametrize(
    "module, source",
    [
        ("ternax.nn.rope", "from ternax.engine import generate"),
        ("ternax.nn.rope", "import ternax.engine"),
        ("ternax.nn.rope", "def f():\n    from ternax import engine"),
        ("ternax.nn.rope", "from .. import engine"),
        ("ternax.nn", "from ..engine import generate"),
        ("ternax.errors", "from ternax.table import report"),
        ("ternax.nn.rope", "from kernels.packing import pack"),
        ("ternax.nn.rope", "import configs"),
        ("ternax.engine", "from ternax.experiments import flags"),
        ("ternax.kernels.packing", "from ternax.errors import UsageError"),
        ("ternax.kernels.packing", "from ..errors import UsageError"),
        ("ternax.kernels.packing", "import flax"),
        ("ternax.kernels.packing", "import ternax"),
        ("ternax.experiments.flags", "from ternax.experiments import decode"),
        ("ternax.experiments.flags", "from . import decode"),
    ],
)
def test_wrong_direction_is_found(module, source):
    assert len(direction_problems(module, source, MODULES)) == 1


@pytest.mark.parametrize(
    "module, source",
    [
        ("ternax.engine", "from ternax.nn.cache import KVCache"),
        ("ternax.engine", "from ternax import configs, errors"),
        ("ternax.nn.rope", "from ternax.nn.cache import KVCache"),
        ("ternax.nn.rope", "from .cache import KVCache"),
        ("ternax.nn.rope", "from ternax.kernels.packing import pack"),
        ("ternax.nn", "from .rope import rotate"),
        ("ternax.kernels.packing", "import dataclasses, numpy as np, jax.numpy as jnp"),
        ("ternax.kernels.packing", "from . import packing\nfrom .packing import pack"),
        ("ternax.experiments.decode", "from ternax.experiments import flags"),
        ("ternax.experiments.decode", "import flax, absl.flags"),
    ],
)
def test_right_direction_is_let_through(module, source):
    assert direction_problems(module, source, MODULES) == []


@pytest.mark.parametrize(
    "source, count",
    [
        ("import pickle", 1),
        ("from pickle import loads", 1),
        ("import torch.nn as nn", 1),
        ("eval('1')", 1),
        ("exec(open(path).read())", 1),
        ("np.load(p, allow_pickle=True)", 1),
        ("subprocess.run(c, shell=flag)", 1),
        ("re.compile('x')", 0),
        ("nnx.eval_shape(f)", 0),
        ("np.load(p, allow_pickle=False)", 0),
        ("'import pickle'", 0),
        ("lowered.compile()", 0),
    ],
)
def test_what_is_banned(source, count):
    assert len(banned(source)) == count


@pytest.mark.parametrize(
    "entry, test, named",
    [
        ("audit", "audit/judge_test.py::test_a", True),
        ("book_test.py", "book_test.py::test_a[x]", True),
        ("book_test.py", "book_test.py::", True),
        ("book_test.py", "audit/book_test.py::test_a", False),
        ("book_test.py::test_a", "book_test.py::test_a[x::y[0]]", True),
        ("book_test.py::test_a", "book_test.py::test_ab", False),
        ("book_test.py::test_a", "book_test.py::", False),
        ("book_test.py::test_*[x*]", "book_test.py::test_a[xy]", True),
        ("book_test.py::test_*[x*]", "book_test.py::test_a[y]", False),
        ("book_test.py::test_a[[!x]*]", "book_test.py::test_a[yx]", True),
        ("book_test.py::test_a[[!x]*]", "book_test.py::test_a[xy]", False),
        ("book_test.py::test_a[x]", "book_test.py::test_a", False),
    ],
)
def test_what_an_entry_of_legs_names(entry, test, named):
    assert legs.names(entry, test) == named

"""The check-up of this machine and of made-up ones, and the versions that clash."""

import configparser
import dataclasses
import pathlib
import platform
import re
import shlex
import subprocess
import sys

import pytest

from ternax import configs, cost, measure
from ternax.experiments import decode, doctor
from ternax.kernels.backends import BACKENDS
from ternax.kernels.cpu import build

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKING = {
    "jax": "0.10.2",
    "jaxlib": "0.10.2",
    "flax": "0.12.8",
    "numpy": "2.4.6",
    "optax": "0.2.8",
    "orbax-checkpoint": "0.12.8",
    "absl-py": "2.5.1",
    "ml_collections": "1.1.0",
    "rich": "15.0.0",
    "pyyaml": "6.0.3",
}


@pytest.fixture(scope="module")
def found():
    return doctor.run()


# --- This machine ----------------------------------------------------------------------------


def test_every_question_is_answered(found):
    assert found.system.startswith(platform.system())
    assert found.python.startswith(platform.python_version())
    assert found.threads == measure.threads_available()
    assert found.devices and not found.trouble
    assert found.memory_available_bytes <= found.memory_total_bytes
    assert found.bandwidth.median > 0
    assert found.versions.keys() >= doctor.FLOORS.keys()


def test_every_backend_can_run_or_says_why(found):
    assert found.backends.keys() == BACKENDS.keys()
    assert found.backends["reference"] is None
    assert all(reason is None or reason for reason in found.backends.values())


def test_every_config_is_planned(found):
    assert [plan.config.name for plan in found.plans] == list(configs.CONFIGS)
    for plan in found.plans:
        assert plan.context == min(512, plan.config.max_context) and plan.batch == 1
        assert plan.available_bytes is not None
    fitting = [plan for plan in found.plans if plan.fits]
    assert found.largest.parameters == max(plan.parameters for plan in fitting)


def test_the_environment_of_the_tests_has_no_clash(found):
    assert found.clashes == ()


def test_one_screen_that_ends_with_a_command_that_parses(found, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "run", lambda: found)
    assert doctor.main([]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == "" and len(lines) <= 45 and max(map(len, lines)) <= 100
    for label in (
        "system",
        "python",
        "cpu",
        "compiler",
        "devices",
        "memory",
        "backends",
        "versions",
        "clashes",
        "configs",
    ):
        assert any(line.startswith(label) for line in lines)
    assert "bound, tokens/s" in out and "GB/s" in out
    table = {line.split()[0]: line for line in lines if line.startswith(" " * 9) and line.split()}
    assert all(re.search("does not fit|fits", table[name]) for name in configs.CONFIGS)
    words = shlex.split(lines[-1].removeprefix("next: "))
    assert words[:3] == ["python", "-m", "experiments.decode"]
    assert decode.COMMAND.parse(words[3:]).config.name == found.largest.config.name


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--config=70b"], "--config: no such flag"),
        (["--threads=0"], "--threads must be at least"),
        (["70b"], "unexpected argument"),
    ],
)
def test_bad_flags(argv, words, capsys):
    assert doctor.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and words in err and err.count("\n") == 1


# --- Other machines --------------------------------------------------------------------------


def screen(found, **changes) -> str:
    text = "\n".join(doctor.lines(dataclasses.replace(found, **changes)))
    assert max(map(len, text.splitlines())) <= 100
    return text


def test_no_compiler(found):
    assert "none: the reference backend will be used" in screen(found, compiler=None)


def test_a_backend_that_cannot_run_says_why(found):
    text = screen(found, backends={"cpu": "no C++ compiler found", "reference": None})
    assert "backends cpu: no C++ compiler found\n         reference: can run\n" in text


def test_a_machine_that_tells_little(found):
    text = screen(found, memory_total_bytes=None, memory_available_bytes=None, instruction_sets=())
    assert "unknown in all, unknown available" in text and "nothing special" in text


def test_a_machine_too_small_for_anything(found):
    plans = tuple(dataclasses.replace(plan, available_bytes=2**20) for plan in found.plans)
    text = screen(found, plans=plans)
    assert "No named config fits" in text and text.endswith("--config=tiny-llama --plan_only")
    assert " fits" not in text.partition("configs")[2].partition("\n\n")[0]


def test_clashes_stand_beside_what_mends_them(found):
    clash = doctor.Clash("jax 0.11.1 with jaxlib 0.10.2", 'pip install "jaxlib==0.11.1"')
    text = screen(found, clashes=(clash,))
    assert f"clashes  {clash.found}\n           {clash.mend}\n" in text
    assert "Mend the clashes first." in " ".join(text.split())


def test_where_nothing_runs_the_next_command_mends_it(found):
    clash = doctor.Clash("flax is absent", 'pip install "flax>=0.12.8"')
    broken = dict(devices=(), trouble="ImportError: no flax", backends={}, plans=())
    text = screen(found, **broken, clashes=(clash,))
    assert "devices  none: ImportError: no flax" in text
    assert text.endswith(
        'Nothing can run here yet: ImportError: no flax\nnext: pip install "flax>=0.12.8"'
    )
    assert screen(found, **broken).endswith("next: make env")


STUB = "raise RuntimeError('jaxlib is version 0.9.0, but this jax needs 0.10.2')\n"


def test_a_broken_jax_is_told_not_raised(tmp_path):
    (tmp_path / "jax.py").write_text(STUB)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
        "from ternax.experiments import doctor; sys.exit(doctor.main([]))"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (child.returncode, child.stderr) == (0, "")
    assert "none: RuntimeError: jaxlib is version 0.9.0" in child.stdout
    assert "Nothing can run here yet" in child.stdout


# --- Compilers -------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path, monkeypatch):
    """An empty directory, alone on the path."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


def install(directory, name, script):
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


def test_compiler_absent(path):
    assert doctor.compiler() is None


@pytest.mark.parametrize(
    "names, taken",
    [(["c++"], "c++"), (["clang++", "c++"], "clang++"), (["clang++", "g++", "c++"], "g++")],
)
def test_the_compiler_is_the_one_that_builds(names, taken, path):
    for name in names:
        install(path, name, f"echo '{name} 1.2'\necho more")
    assert doctor.compiler() == f"{taken} 1.2, {path / taken}"
    assert build.compiler() == str(path / taken)


def test_cxx_names_the_compiler(path, monkeypatch):
    install(path, "g++", "echo g++ 1.2")
    install(path, "mine", "echo mine 3")
    monkeypatch.setenv("CXX", "mine")
    assert doctor.compiler() == f"mine 3, {path / 'mine'}"
    monkeypatch.setenv("CXX", "absent")
    assert doctor.compiler() is None and build.compiler() is None


def test_a_compiler_that_does_not_run(path):
    install(path, "g++", "exit 1")
    assert "which does not run" in doctor.compiler()


# --- Versions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, number",
    [
        ("0.10.2", (0, 10, 2)),
        ("0.11.0.dev20260101+abc", (0, 11, 0)),
        ("1.2rc1", (1, 2)),
        (None, (0,)),
    ],
)
def test_version_numbers(text, number):
    assert doctor.number(text) == number


@pytest.mark.parametrize("file, python", [("py311", (3, 11)), ("py312", (3, 12))])
def test_the_versions_in_constraints_do_not_clash(file, python):
    lines = (ROOT / "constraints" / f"{file}.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    names = {name: name.replace("_", "-") for name in doctor.FLOORS}
    versions = {name: pins[pinned] for name, pinned in names.items()}
    assert doctor.find_clashes(versions, python) == []


def test_floors_are_those_of_setup_cfg():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split()
    wanted = {}
    for line in lines:
        name, _, floor = line.partition(";")[0].partition(">=")
        wanted.setdefault(name, floor)  # of flax the lowest, which is named first
    assert wanted == doctor.FLOORS


CLASHES = [
    # changes, python, gpu, what is found, what mends it
    (
        {"jaxlib": "0.10.1"},
        (3, 11),
        False,
        "jaxlib 0.10.1 is older than 0.10.2",
        'pip install -U "jaxlib>=0.10.2"',
    ),
    (
        {"jax": "0.11.2", "flax": "0.12.12"},
        (3, 12),
        False,
        "jax 0.11.2 with jaxlib 0.10.2",
        'pip install "jax==0.11.2" "jaxlib==0.11.2"',
    ),
    (
        {"jax": "0.9.0", "jaxlib": "0.9.0"},
        (3, 11),
        False,
        "jax 0.9.0 is older than 0.10.2",
        'pip install -U "jax>=0.10.2"',
    ),
    (
        {"jax": "0.11.1", "jaxlib": "0.11.1"},
        (3, 12),
        False,
        "flax 0.12.8 cannot import nnx under jax 0.11.1",
        'pip install "flax>=0.12.9"',
    ),
    (
        {"jax": "0.11.1", "jaxlib": "0.11.1"},
        (3, 11),
        False,
        "flax 0.12.8 cannot import nnx under jax 0.11.1",
        'pip install "jax==0.10.2" "jaxlib==0.10.2"',
    ),
    (
        {"flax": "0.10.0"},
        (3, 11),
        False,
        "flax 0.10.0 is older than 0.12.8",
        'pip install -U "flax>=0.12.8"',
    ),
    ({"flax": None}, (3, 11), False, "flax is absent", 'pip install "flax>=0.12.8"'),
    ({"rich": None}, (3, 11), False, "rich is absent", 'pip install "rich"'),
    (
        {"orbax-checkpoint": "0.11.9"},
        (3, 11),
        False,
        "orbax-checkpoint 0.11.9 is older than 0.12",
        'pip install -U "orbax-checkpoint>=0.12"',
    ),
    ({}, (3, 10), False, "Python 3.10; 3.11 or newer is needed", "make env PYTHON=python3.12"),
    (
        {"jax-cuda13-plugin": "0.10.1"},
        (3, 11),
        True,
        "jax-cuda13-plugin 0.10.1 with jaxlib 0.10.2",
        'pip install "jax[cuda13]==0.10.2"',
    ),
    (
        {"jax-cuda12-pjrt": "0.11.0"},
        (3, 11),
        True,
        "jax-cuda12-pjrt 0.11.0 with jaxlib 0.10.2",
        'pip install "jax[cuda12]==0.10.2"',
    ),
    (
        {},
        (3, 11),
        True,
        "an NVIDIA GPU is here, but JAX has no CUDA plugin",
        'pip install "jax[cuda13]==0.10.2"',
    ),
]


@pytest.mark.parametrize(
    "changes, python, gpu, words, mend",
    CLASHES,
    ids=[row[3] + f" py{row[1][1]}" for row in CLASHES],
)
def test_clash(changes, python, gpu, words, mend):
    clashes = doctor.find_clashes(WORKING | changes, python, gpu)
    assert doctor.Clash(words, mend) in clashes
    # The one below its floor also differs from its partner; nothing else is said.
    assert len(clashes) <= 2


@pytest.mark.parametrize(
    "changes, gpu",
    [
        ({}, False),
        ({"jax-cuda13-plugin": "0.10.2", "jax-cuda13-pjrt": "0.10.2"}, True),
        ({"jax": "0.11.2", "jaxlib": "0.11.2", "flax": "0.12.12"}, False),
        ({"jaxlib": "0.10.2.dev1"}, False),
    ],
)
def test_no_clash(changes, gpu):
    assert doctor.find_clashes(WORKING | changes, (3, 12), gpu) == []


def test_an_older_flax_floor_is_not_told_twice():
    found = doctor.find_clashes(
        WORKING | {"jax": "0.11.2", "jaxlib": "0.11.2", "flax": "0.10.0"}, (3, 12)
    )
    assert [clash.found for clash in found] == ["flax 0.10.0 is older than 0.12.8"]


def test_plans_are_those_of_the_planner(found):
    one = next(plan for plan in found.plans if plan.config.name == "8b")
    fused = cost.fuses()
    assert one == cost.plan("8b", context=512, available_bytes=one.available_bytes, fused=fused)

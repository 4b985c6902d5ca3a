"""The package as setup.cfg declares it: complete, one name for each module, no local paths."""

import configparser
import glob
import os
import pathlib
import re
import subprocess
import sys

import ternax

ROOT = pathlib.Path(__file__).resolve().parent.parent
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
PACKAGES = SETUP["options"]["packages"].split()
PACKAGE_DIR = dict(
    re.split(r"\s*=\s*", line) for line in SETUP["options"]["package_dir"].split("\n") if line
)
EXPERIMENTS = sorted(
    path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__"
)


def folder(package: str) -> pathlib.Path:
    """Where setuptools looks for `package`: by its nearest mapped parent."""
    rest: list[str] = []
    name = package
    while name not in PACKAGE_DIR:
        name, _, last = name.rpartition(".")
        rest.insert(0, last)
    return ROOT.joinpath(PACKAGE_DIR[name], *rest)


def project_files() -> list[pathlib.Path]:
    """Files of the project: git's list, or what lies here when there is no git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        made = {".git", ".venv", "build", "dist", "runs", "__pycache__"}
        paths = [p for p in ROOT.rglob("*") if not made & set(p.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file()]


def test_version_has_one_source():
    assert SETUP["metadata"]["version"] == "attr: ternax.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", ternax.__version__)


def test_listed_packages_exist():
    assert [p for p in PACKAGES if not folder(p).is_dir()] == []


def test_every_folder_with_modules_is_listed():
    listed = {folder(package) for package in PACKAGES}
    found = {path.parent for top in PACKAGE_DIR.values() for path in (ROOT / top).rglob("*.py")}
    assert sorted(found - listed) == []


def test_models_in_the_box_are_package_data(tmp_path):
    """Whatever their files are called: the pattern takes folders of any depth."""
    pattern = SETUP["options.package_data"]["ternax"]
    made = tmp_path / "box" / "name" / "weights" / "d" / "0123abc"
    made.parent.mkdir(parents=True)
    made.write_bytes(b"")
    for root, files in ((tmp_path, [made]), (ROOT / "ternax", (ROOT / "ternax/box").rglob("*"))):
        taken = {root / name for name in glob.glob(pattern, root_dir=root, recursive=True)}
        assert [path for path in files if path.is_file() and path not in taken] == []


def test_the_parts_of_the_page_are_package_data():
    patterns = SETUP["options.package_data"]["*"].split(", ")
    parts = [p for p in (ROOT / "ternax" / "page").iterdir() if p.suffix not in (".py", "")]
    assert len(parts) == 5
    assert [p.name for p in parts if not any(p.match(pattern) for pattern in patterns)] == []


def test_console_scripts_name_a_main():
    for line in SETUP["options.entry_points"]["console_scripts"].strip().splitlines():
        package, module = re.fullmatch(r"\S+ = (ternax\.\w+)\.(\w+):main", line).groups()
        source = (folder(package) / f"{module}.py").read_text()
        assert re.search(r"^def main\(argv(: [^=]+)?\s*=\s*None\)", source, re.MULTILINE), line


def test_kernels_is_a_namespace_folder():
    # With an __init__ it would shadow the package of that name which transformers imports.
    assert not (ROOT / "kernels" / "__init__.py").exists()


# For each of sys.argv[1:], names of modules and packages joined by commas, imports them and
# all modules of the packages, and prints every file that sys.modules then holds under more
# than one name. Then it forgets them, so that each argument begins as a process would.
LOADED_TWICE = """
import collections, importlib, os, pkgutil, sys
root = os.path.join(os.getcwd(), "")
for names in sys.argv[1:]:
    for name in names.split(","):
        module = importlib.import_module(name)
        # ternax's second path entry is the checkout itself, whose folders are listed by name.
        for info in pkgutil.iter_modules(list(getattr(module, "__path__", ()))[:1]):
            importlib.import_module(f"{name}.{info.name}")
    ours = collections.defaultdict(set)
    for name, module in list(sys.modules.items()):
        if (file := getattr(module, "__file__", None)) and os.path.realpath(file).startswith(root):
            ours[os.path.realpath(file)].add(name)
    for file, found in sorted(ours.items()):
        if len(found) > 1:
            print(file, *sorted(found))
    for name in list(sys.modules):
        if name.partition(".")[0] in ("ternax", "experiments", "kernels", "configs"):
            del sys.modules[name]
"""


def loaded_twice(*names: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LOADED_TWICE, *names],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_library_module_has_two_names():
    # Experiments are programs, each alone in its process: the test below.
    assert loaded_twice(",".join(p for p in PACKAGES if p != "ternax.experiments")) == ""


def test_no_module_of_an_experiment_has_two_names():
    assert loaded_twice(*(f"experiments.{name}" for name in EXPERIMENTS)) == ""


def test_files_name_no_path_of_one_machine():
    local = re.compile(r"(?<![\w.~:/-])/(?:home|Users|root|work|workspace|mnt)/[\w.-]+")
    found = []
    for path in project_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {hit}" for hit in local.findall(text)]
    assert found == []

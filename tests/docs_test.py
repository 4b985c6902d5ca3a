"""What docs show is there: files behind links, commands that parse, the layers as they are."""

import dataclasses
import importlib
import pathlib
import re
import runpy
import shlex
import xml.etree.ElementTree

import pytest

from ternax.anatomy import Shape
from ternax.configs.stdlib import STDLIB_BITNET
from tests import structure_test

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "BUILD.md", *sorted((ROOT / "docs").glob("*.md"))]
GALLERY = (ROOT / "docs" / "gallery.md").read_text()
COMMANDS = re.findall(r"^python -m experiments\.(\w+) (.*)$", GALLERY, re.MULTILINE)
BOOK = (ROOT / "docs" / "book.md").read_text()
COMMANDS += re.findall(r"`python -m experiments\.(\w+) ?([^`]*)`", BOOK)
SCRIPTS = re.findall(r"`python ((?:results|docs)/[^`]*)`", GALLERY)


def links(page: pathlib.Path) -> list[str]:
    """Targets of a page's links and pictures within the project."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    return [link.partition("#")[0] for link in found if not re.match(r"https?:|#", link)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page):
    assert [link for link in links(page) if not (page.parent / link).exists()] == []


def test_the_gallery_shows_every_picture_and_its_records():
    shown = {(ROOT / "docs" / link).resolve() for link in links(ROOT / "docs" / "gallery.md")}
    pictures = set((ROOT / "results").rglob("*.png")) | set((ROOT / "docs").glob("*.svg"))
    assert pictures and pictures - shown == set()
    drawn = {
        path
        for folder in ("cpu-zen4", "cpu-zen5")
        for path in (ROOT / "results" / folder).glob("compare-*.jsonl")
    }
    assert drawn - shown == set()


@pytest.mark.parametrize("name, words", COMMANDS)
def test_a_command_of_the_gallery_or_the_book_parses(name, words):
    args = importlib.import_module(f"ternax.experiments.{name}").COMMAND.parse(shlex.split(words))
    assert args.given == {word[2:].partition("=")[0] for word in shlex.split(words)}


@pytest.mark.parametrize("words", SCRIPTS)
def test_a_script_of_the_gallery_is_there_with_what_it_reads(words):
    assert [word for word in words.split() if not (ROOT / word).exists()] == []


def test_sizes_of_the_loop_over_sizes_are_what_the_config_makes():
    found = re.search(
        r"for size in ([\d: ]+); do", (ROOT / "docs" / "noise_studies.md").read_text()
    )
    for width, parameters in (map(int, size.split(":")) for size in found[1].split()):
        changed = dict(hidden_size=width, intermediate_size=width, num_heads=width // 64)
        shape = Shape.of(dataclasses.replace(STDLIB_BITNET, **changed))
        assert shape.parameters == parameters


def test_every_document_with_claims_has_a_chapter_of_the_book():
    documents = {path.name for path in (ROOT / "experiments" / "claims").glob("*.yaml")}
    assert documents == set(re.findall(r"^## .*\(`([\w-]+\.yaml)`\)$", BOOK, re.MULTILINE))


def plans() -> list[str]:
    """The book's plans: quick enough to be run as they stand."""
    found = [words for name, words in COMMANDS if name == "plan" and f"plan {words}`" in BOOK]
    return [words for words in found if "--compile" not in words]  # takes a compiler


@pytest.mark.parametrize("words", plans())
def test_a_plan_of_the_book_is_answered(words, tmp_path, capsys, monkeypatch):
    plan = importlib.import_module("ternax.experiments.plan")
    monkeypatch.setattr(plan.plan_table, "draw", lambda *args: None)
    assert plan.main([*shlex.split(words), f"--output_dir={tmp_path}"]) == 0
    assert "predicted" in capsys.readouterr().out


def test_every_section_of_the_gallery_says_how_it_was_made():
    for section in GALLERY.split("\n## ")[1:]:
        assert "](" in section and re.search(r"python (-m experiments|results/|docs/)", section)


def test_the_architecture_is_drawn_from_the_layers():
    """The committed picture is what the script draws now, and names every layer."""
    drawn = runpy.run_path(str(ROOT / "docs" / "architecture.py"))["picture"]()
    committed = (ROOT / "docs" / "architecture.svg").read_text()
    assert committed == drawn, "python docs/architecture.py draws it anew"
    words = [node.text for node in xml.etree.ElementTree.fromstring(committed).iter()]
    assert {entry.removeprefix("ternax.") for entry in structure_test.RANK} <= set(words)

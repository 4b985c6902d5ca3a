"""docs/tour.ipynb, run from top to bottom by a kernel of its own, holds what it shows."""

import pathlib
import re

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMITTED = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)


def printed(notebook, code: str) -> str:
    """The output of the one cell that holds `code`."""
    (cell,) = (c for c in notebook.cells if c.cell_type == "code" and code in c.source)
    return "".join(out.text for out in cell.outputs if out.output_type == "stream")


@pytest.fixture(scope="module", params=["committed", "now"])
def tour(request):
    """The notebook with its outputs: those it was committed with, and those of a run here."""
    if request.param == "committed":
        return COMMITTED
    notebook = nbformat.from_dict(COMMITTED)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    where = {"metadata": {"path": str(ROOT)}}
    return nbclient.NotebookClient(
        notebook, timeout=300, coalesce_streams=True, resources=where
    ).execute()


def test_every_cell_ran_in_order(tour):
    code = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def test_integers_are_exact(tour):
    assert "32,772 packed" in printed(tour, "quantized.pack()")
    assert "the same codes: True" in printed(tour, "quantized.pack()")
    assert printed(tour, "oracle").count("1,024 of 1,024 sums equal numpy's") == 2


def test_the_model_in_the_box_writes(tour):
    text = printed(tour, "ternax.generate(model")
    assert text.startswith("def main(") and re.search("return|self", text)


def test_a_rate_stands_beside_its_bound(tour):
    out = printed(tour, "decode.run")
    rate, bound = (
        float(x) for x in re.search(r"([\d.]+) tokens/s[^:]*allows ([\d.]+)", out).groups()
    )
    assert out.count("measured:") == 2 and 0 < rate < 1.5 * bound


def test_what_is_not_here_is_planned_and_predicted(tour):
    assert "70,553,706,496 parameters" in printed(tour, "ternax.plan")
    law = printed(tour, "roofline.decode_step")
    assert law.startswith("predicted") and "by weights" in law and "by compute" in law


def test_noise_costs_more_the_more_there_is(tour):
    out = printed(tour, "ternax.perturb")
    clean, *noisy = (float(x) for x in re.findall(r"(\d\.\d{3})(?: bits per byte|, \+)", out))
    assert len(noisy) == 3 and clean < noisy[0] < noisy[1] < noisy[2]


def test_the_reader_s_scheme_learns_and_packs(tour):
    out = printed(tour, "class LargerHalf")
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) == 3 and losses[-1] < losses[0] and "packed:" in out


def test_the_table_is_refused(tour):
    out = printed(tour, "audit.run")
    assert "1 impossible, 1 mislabelled, 0 unverifiable, 1 possible" in out


def test_nothing_of_the_machine_is_committed():
    text = (ROOT / "docs" / "tour.ipynb").read_text()
    assert len(text) < 40_000 and re.findall(r"/(?:home|root|tmp|Users|work)\b", text) == []
    assert COMMITTED.metadata.kernelspec.name == "python3"
    shown = [out for cell in COMMITTED.cells for out in cell.get("outputs", [])]
    assert {(out.output_type, out.get("name")) for out in shown} == {("stream", "stdout")}

"""A report of made records: medians by hand, kinds apart, every number with its place."""

import json

import pytest

from ternax import book
from ternax.errors import UsageError
from ternax.frame import frame
from ternax.record import Record


def record(rate=10.0, **changes) -> Record:
    metrics = changes.pop("metrics", {}) | {
        "tokens_per_s": rate,
        "bound_tokens_per_s": 20.0,
        "share_of_bound": rate / 20,
    }
    given = dict(
        experiment="decode",
        config="8b",
        scheme="absmean",
        inputs="int8",
        backend="cpu",
        device="a device",
        layers=32,
        batch=1,
        context=32,
        phase="decode",
        kind="measured",
        samples=(1 / rate,),
        sample_unit="s/token",
        metrics=metrics,
    )
    return Record(**given | changes)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    told = [line if isinstance(line, str) else json.dumps(line.to_dict()) for line in lines]
    path.write_text("\n".join(told) + "\n")


@pytest.fixture
def folder(tmp_path):
    rounds = [record(rate, metrics={"round": i}) for i, rate in enumerate((8.0, 12.0, 9.0), 1)]
    write(tmp_path / "mine" / "a.jsonl", *rounds, '{"another": "layout"}')
    peak = {"peak_memory_bytes": 1000, "planned_memory_bytes": 1040}
    write(
        tmp_path / "mine" / "b" / "c.jsonl",
        record(16.0, config="1b", metrics=peak, note="of a | kind"),
        record(5.0, kind="predicted", samples=(), sample_unit=""),
    )
    return tmp_path


def test_rounds_are_one_row_of_medians_with_its_places(folder):
    entries, others = book.read_folder(folder)
    assert others == {"mine/a.jsonl": 1} and len(entries) == 5
    rounds, one, predicted = book.rows(entries)
    assert rounds.metrics["tokens_per_s"] == 9 and rounds.place == "mine/a.jsonl:1, 2, 3"
    assert one.place == "mine/b/c.jsonl:1" and predicted.record.kind == "predicted"


def test_the_page_keeps_kinds_apart_and_names_every_source(folder):
    text = book.page(*book.read_folder(folder), "Mine", usd_per_h=3.6)
    measured = text.partition("### decode, measured")[2].partition("\n### ")[0]
    predicted = text.partition("### decode, predicted")[2].partition("\n## ")[0]
    assert "mine/a.jsonl:1, 2, 3" in measured and "mine/b/c.jsonl:2" not in measured
    assert "mine/b/c.jsonl:2" in predicted and "usd_per_million" not in predicted
    # 3.6 USD an hour are 1e-3 a second: 9 tokens/s cost 111 USD a million.
    assert "| 111.1 |" in measured and "of a \\| kind" in measured
    assert record().versions in text and "mine/a.jsonl (1)" in text
    for table in text.split("\n\n"):
        rows = [line.replace("\\|", "") for line in table.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1, table


def test_plans_are_held_against_what_was_measured(folder):
    rows = book.rows(book.read_folder(folder)[0])
    ((row, error),) = book.memory_errors(rows)
    assert row.record.config == "1b" and error == pytest.approx(0.04)
    # 8b reaches 0.45 of its bound, 1b 0.8: each is predicted by the other.
    assert book.rate_errors(rows) == {
        ("mine: a device", "8b"): pytest.approx(0.8 / 0.45 - 1),
        ("mine: a device", "1b"): pytest.approx(0.45 / 0.8 - 1),
    }


def test_a_folder_without_records(tmp_path):
    with pytest.raises(UsageError, match="expected a folder of records, found none"):
        book.read_folder(tmp_path / "none")
    write(tmp_path / "x.jsonl", "not JSON")
    with pytest.raises(UsageError, match=r"expected records in \*.jsonl, found none"):
        book.read_folder(tmp_path)


def test_a_frame_has_a_column_a_metric():
    pandas = pytest.importorskip("pandas")
    found = frame([record(10.0), record(5.0, config="1b", metrics={"joules": 3.0})])
    assert isinstance(found, pandas.DataFrame) and len(found) == 2
    assert list(found["tokens_per_s"]) == [10, 5] and found["samples"][0] == (0.1,)
    assert pandas.isna(found["joules"][0]) and found["joules"][1] == 3
    means = found.groupby("config")["tokens_per_s"].mean()
    assert means.to_dict() == {"8b": 10, "1b": 5}


def test_the_environment_names_machines_that_ran_something(folder):
    """A device that a number was only predicted for is none of them."""
    write(
        folder / "plan.jsonl",
        record(device="h100-sxm", kind="predicted", samples=(), sample_unit=""),
    )
    text = book.page(*book.read_folder(folder), "made")
    environment = text.partition("## Environment")[2].partition("\n## ")[0]
    assert "| a device |" in environment and "h100-sxm" not in environment
    (computed,) = [line for line in environment.splitlines() if "none: predicted" in line]
    assert "| 2 |" in computed

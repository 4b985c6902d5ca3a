"""Numbers and rows as a reader sees them. Tables of records: see record_test."""

import hypothesis
import hypothesis.strategies as st
import pytest

from ternax.table import binary, columns, decimal, rate, row


@pytest.mark.parametrize(
    "number, text",
    [
        (0.0123456, "0.0123"),
        (0.000001234, "0.00000123"),
        (0.9996, "1"),
        (5, "5"),
        (62.2449, "62.2"),
        (99.96, "100"),
        (367_123, "367,000"),
        (1.5e9, "1,500,000,000"),
        (0, "0"),
    ],
)
def test_rate(number, text):
    assert rate(number) == text


@hypothesis.given(st.floats(1e-9, 1e15))
def test_rate_is_within_half_a_percent_and_has_no_exponent(number):
    assert float(rate(number).replace(",", "")) == pytest.approx(number, rel=0.0051)
    assert "e" not in rate(number)


@pytest.mark.parametrize(
    "nbytes, text",
    [
        (18_201_000_000, "18.2 GB"),
        (500_000_000, "0.5 GB"),
        (499_000_000, "499 MB"),
        (83_640, "83.6 kB"),
        (285, "0.285 kB"),
    ],
)
def test_decimal(nbytes, text):
    assert decimal(nbytes) == text


@pytest.mark.parametrize(
    "nbytes, text",
    [
        (19_906_000_000, "18.54 GiB"),
        (2**30 // 5, "0.20 GiB"),
        (2**30 // 20, "51.20 MiB"),
        (2**20 // 20, "51.20 KiB"),
        (0, "0.00 KiB"),
    ],
)
def test_binary(nbytes, text):
    assert binary(nbytes) == text


@hypothesis.given(st.lists(st.text("abc-", min_size=1, max_size=30), min_size=1, max_size=60))
def test_row_keeps_every_word_in_a_column_of_its_own(words):
    lines = row("label", " ".join(words)).splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert lines[0].startswith("label    ")
    assert all(line.startswith(" " * 9) for line in lines[1:])
    assert " ".join(line[9:] for line in lines).split() == " ".join(words).split()


def test_columns_leave_out_what_is_empty():
    heads = [("name", 4), ("none", 6), ("n", 3), ("last", 5)]
    found = columns(heads, [["alphabet", "", "1", ""], ["b", "", "22", "x"]], width=14)
    assert found == ["name   n  last", "alph   1", "b     22     x"]
    assert columns(heads, [["alphabet", "", "1", ""]]) == ["name       n", "alphabet   1"]
    assert columns(heads, []) == ["name"]

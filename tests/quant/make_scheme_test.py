"""Schemes by name: what is built, and one line for what cannot be."""

import sys
import types

import pytest

from ternax.errors import UsageError
from ternax.quant import SCHEMES, Scheme, make_scheme, parse_scheme
from ternax.quant.ternary import TWN


class Custom(Scheme):
    """Every type an option can have."""

    def __init__(
        self,
        shape,
        *,
        alpha: float = 0.5,
        steps: int = 2,
        mode: str = "a",
        loud: bool = False,
        layers=None,
        rngs=None,
    ):
        super().__init__(shape, rngs=rngs)
        self.options = (alpha, steps, mode, loud, layers)


@pytest.fixture(autouse=True)
def module(monkeypatch):
    """Importable as `outsider`."""
    outsider = types.ModuleType("outsider")
    outsider.Custom, outsider.number, outsider.Other = Custom, 3, dict
    monkeypatch.setitem(sys.modules, "outsider", outsider)


def test_names_and_options():
    assert isinstance(make_scheme("twn", (32, 4)), TWN)
    grouped = make_scheme("twn,granularity=group,group_size=16", (32, 4))
    assert (grouped.groups, grouped.shape) == (2, (32, 4))
    assert make_scheme("none,dtype=f32", (3, 4)).dtype == "f32"
    assert parse_scheme("absmean") == (SCHEMES["absmean"], {})


def test_options_take_the_type_of_their_default():
    scheme = make_scheme("outsider:Custom,alpha=0.25,steps=3,mode=b,loud=True,layers=7", (3, 4))
    assert scheme.options == (0.25, 3, "b", True, 7)
    assert make_scheme("outsider:Custom", (3, 4)).options == (0.5, 2, "a", False, None)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("ternry", "expected one of absmean, twn, .* or package.module:Class, found 'ternry'"),
        ("", "expected one of absmean, .*found ''"),
        ("twn,group=3", "'twn': expected key=value with key among granularity, .*found 'group=3'"),
        ("twn,granularity", "expected key=value .* found 'granularity'"),
        ("twn,shape=3", "with key among granularity, group_size, found 'shape=3'"),
        ("twn,group_size=big", "group_size must be int, found 'big'"),
        ("twn,group_size=16.5", "group_size must be int, found '16.5'"),
        ("twn,granularity=3", "granularity must be str, found '3'"),
        ("outsider:Custom,loud=1", "loud must be bool, found '1'"),
        ("outsider:Custom,steps=True", "steps must be int, found 'True'"),
        ("twn,granularity=column", "granularity must be one of tensor, row, group, found 'column'"),
        (
            "twn,granularity=group,group_size=24",
            "must be a multiple of 16 that divides K = 32, found 24",
        ),
        ("twn,granularity=group", "that divides K = 32, found 128"),
        ("twn,granularity=group,group_size=0", "found 0"),
        ("none,dtype=f16", "dtype must be one of bf16, f32, found 'f16'"),
        ("nowhere.at_all:Class", "cannot import 'nowhere.at_all:Class': No module named 'nowhere'"),
        ("outsider:Missing", "cannot import 'outsider:Missing': .*no attribute 'Missing'"),
        ("outsider:", "cannot import 'outsider:'"),
        (":Custom", "cannot import ':Custom'"),
        ("outsider:number", "must be a subclass of ternax.quant.Scheme, found 3"),
        ("outsider:Other", "must be a subclass of ternax.quant.Scheme, found <class 'dict'>"),
    ],
)
def test_refuses_in_one_line(spec, message):
    with pytest.raises(UsageError, match=message) as raised:
        make_scheme(spec, (32, 4))
    assert raised.value.exit_code == 2 and "\n" not in str(raised.value)


def test_a_module_that_fails_to_import_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_scheme.py").write_text("import no_such_library\n")
    (tmp_path / "garbled_scheme.py").write_text("class Scheme(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="No module named 'no_such_library'"):
        make_scheme("broken_scheme:Scheme", (32, 4))
    with pytest.raises(UsageError, match="cannot import 'garbled_scheme:Scheme'"):
        make_scheme("garbled_scheme:Scheme", (32, 4))

"""The scheme card: its specs, its rows, its resume, its front."""

import dataclasses

import pytest

from ternax import card, data, heldout
from ternax.configs import get_config
from ternax.errors import UsageError
from ternax.experiments import scheme_card
from ternax.record import Store
from ternax.train import TrainSpec


def test_a_part_with_an_equals_sign_is_an_option_of_the_scheme_before():
    assert card.split_schemes("absmean, int4,group_size=64,a=b,m.n:Mine,absmean") == (
        "absmean",
        "int4,group_size=64,a=b",
        "m.n:Mine",
    )
    assert card.split_schemes("") == ()
    with pytest.raises(UsageError, match="expected a scheme before its option 'a=1'"):
        card.split_schemes("a=1,absmean")


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    text = folder / "text.py"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(60)))
    (folder / "corpus").mkdir()
    for i in range(8):
        (folder / "corpus" / f"{i}.py").write_text(f"def g{i}(x):\n    return x * {i}\n" * 40)
    return card.Card(
        config=get_config("tiny-bitnet"),
        schemes=(),
        after=("nf4", "absmean"),
        seeds=2,
        spec=TrainSpec(steps=3, batch=2, length=32),
        corpus=data.open_corpus(str(folder / "corpus")),
        text=heldout.open_text(str(text)),
        directory=folder / "out",
        calibrate_tokens=64,
        rounds=2,
    )


@pytest.fixture(scope="module")
def found(asked):
    return card.run(asked, Store(asked.directory))


def test_every_contender_has_a_line_over_its_seeds(asked, found):
    assert [(r.scheme, card._way(r)) for r in found] == [
        ("none", card.TRAINED),
        ("nf4", card.CONVERTED),
        ("absmean", card.CONVERTED),
    ]
    held = [r for r in Store(asked.directory).records if r.phase == "evaluate"]
    losses = {(r.scheme, r.seed): r.metrics["bits_per_byte"] for r in held}
    for record in found:
        mine = [losses[record.scheme, seed] for seed in (0, 1)]
        assert list(record.samples) == mine
        m = record.metrics
        assert m["seed_bits_per_byte"] == pytest.approx(sum(mine) / 2)
        # Two values: the interval reaches 12.706 standard errors, |a - b| / 2, to each side.
        reach = 12.7062 * abs(mine[0] - mine[1]) / 2
        assert m["seed_bits_per_byte_high"] - m["seed_bits_per_byte"] == pytest.approx(
            reach, rel=1e-4
        )
        if record.scheme != "none":
            gaps = [mine[seed] - losses["none", seed] for seed in (0, 1)]
            assert m["gap_bits_per_byte"] == pytest.approx(sum(gaps) / 2)
    none, nf4, absmean = (record.metrics for record in found)
    assert 2 < absmean["bits_per_weight"] < 3 < 4 < nf4["bits_per_weight"] < 6 < 16
    assert "weight_bytes" in absmean and "weight_bytes" not in nf4
    assert none["step_time_ratio"] == 1 and "step_time_ratio" not in nf4
    assert "gap_bits_per_byte" not in none


def test_a_finished_card_measures_nothing_again(asked, found, monkeypatch):
    before = len(Store(asked.directory).records)
    monkeypatch.setattr(card, "_quality", None)
    monkeypatch.setattr(card, "update_seconds", None)
    again = card.run(asked, Store(asked.directory))
    assert [r.metrics for r in again] == [r.metrics for r in found]
    assert len(Store(asked.directory).records) == before + len(found)


def test_another_card_in_the_folder_is_refused(asked, found):
    other = dataclasses.replace(asked, spec=dataclasses.replace(asked.spec, steps=4))
    with pytest.raises(UsageError, match=r"holds another card .*3 steps.*4 steps"):
        card.run(other, Store(asked.directory))


def test_a_scheme_that_is_none_is_told_before_anything_runs(asked):
    with pytest.raises(UsageError, match="nosuch"):
        dataclasses.replace(asked, schemes=("nosuch",))


def test_the_table_and_the_plot(asked, found, tmp_path):
    lines = scheme_card.table(found)
    assert max(map(len, [*lines, *scheme_card.legend(asked)])) <= 100
    order = sorted(found, key=lambda r: r.metrics["seed_bits_per_byte"])
    assert [line.split()[0] for line in lines[1:]] == [r.scheme for r in order]
    assert "absmean *" in "\n".join(lines)
    pytest.importorskip("matplotlib")
    picture = scheme_card.draw(found, tmp_path / "card.png")
    assert picture is not None and picture.read_bytes()[:4] == b"\x89PNG"


def test_the_front_is_what_nothing_beats():
    places = [(1.0, 5.0), (2.0, 3.0), (2.0, 4.0), (3.0, 3.5), (4.0, 1.0)]
    assert scheme_card.front(places, 1) == [(1.0, 5.0), (2.0, 3.0), (4.0, 1.0)]
    assert scheme_card.front(places, -1) == [(4.0, 1.0)]

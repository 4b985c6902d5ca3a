"""Lines along size and training, through folders of made-up studies whose laws are known."""

import json

import numpy as np
import pytest

from ternax import noise_lines, regression
from ternax.experiments import robustness
from ternax.noise_axes import Response
from ternax.noise_lines import Line
from ternax.noise_lines_table import CELL, interval
from ternax.record import Record, read_records

ALONG = ("parameters", "tokens_per_parameter")
PLACES = [(n, r) for n in (100_000, 200_000, 400_000) for r in (5, 20) for _ in range(3)]
# Noise -> log2 of the strength that costs 0.05, and what it gains for a doubling of each axis.
LAWS = {"sign_flip": (-6, 0.2, -0.1), "stuck": (-4, 0.2, -0.1), "bitflip": (-7, 0.5, -0.1)}


def study(folder, parameters, tokens, strengths, *, clean=1.5, select="layers..*", text="heldout"):
    """A folder as a finished study leaves it: two draws at two strengths, and the headlines.

    strengths: noise -> the strength that costs 0.05; the rise grows with it in proportion.
    """
    how = f"; study: weights from {folder}; {text}, 3 sequences of 32; select {select}, rows 1.0"
    shared = dict.fromkeys(("scheme", "inputs", "backend", "device"), "")
    shared |= dict(experiment="robustness", layers=1, batch=8, context=32, kind="measured")
    shared |= dict(config=f"mine(hidden_size={parameters})")
    found = []
    for noise, strength in strengths.items():
        for at in (0.01, 0.1):
            for draw in range(2):
                rise = 0.05 * at / strength + 0.001 * (2 * draw - 1)
                metrics = {"noise_strength": at, "bits_per_byte_rise": rise}
                metrics["bits_per_byte"] = clean + rise
                note = f"{noise} at {at:g} on {select}, draw {draw}{how}"
                fields = dict(phase="evaluate", samples=(rise,) * 3, sample_unit="bits/byte")
                found.append(Record(**shared, **fields, metrics=metrics, note=note))
        alone = dict(
            phase="evaluate",
            samples=(9.0,) * 3,
            sample_unit="bits/byte",
            note=(f"{noise} at 0.1 on layers.0.attn.q, draw 0{how}"),
        )  # no point of the sweep
        found.append(Record(**shared, **alone, metrics=metrics | {"bits_per_byte_rise": 9.0}))
        metrics = {"parameters": parameters, "trained_tokens": tokens, "tolerated_005": strength}
        metrics = {name: value for name, value in metrics.items() if value is not None}
        note = f"{noise} on {select}: strengths tolerated{how}"
        found.append(Record(**shared, phase="noise", metrics=metrics, note=note))
    folder.mkdir()
    lines = "".join(json.dumps(record.to_dict()) + "\n" for record in found)
    (folder / "results.jsonl").write_text(lines)
    return str(folder)


def studies(root, laws=LAWS, *, seed=0, places=PLACES):
    """A folder a place; models scatter by 0.1 in all noises together and by 0.03 in each."""
    random = np.random.default_rng(seed)
    root.mkdir()
    folders = []
    for i, (n, r) in enumerate(places):
        luck, x, y = random.normal(0, 0.1), np.log2(n / 2e5), np.log2(r / 10)
        strengths = {
            noise: 2 ** (level + a * x + b * y + luck + random.normal(0, 0.03))
            for noise, (level, a, b) in laws.items()
        }
        clean = 2 - 0.1 * x - 0.2 * y + random.normal(0, 0.01)
        folders.append(study(root / f"{i:02}", n, n * r, strengths, clean=clean))
    return folders


def near(found, truth):
    """Twice an interval's reach: how often one reach holds the truth is for regression_test."""
    return abs(found.value - truth) < found.high - found.low


def test_slopes_and_which_of_them_are_equal(tmp_path):
    found = noise_lines.find(ALONG, studies(tmp_path / "all"))
    lines = {line.response: line for line in found.lines}
    for noise, law in LAWS.items():
        for i, truth in enumerate(law):
            assert near(lines[Response(noise, loss=0.05)].fit.coefficient(i), truth)
    assert near(lines[Response()].fit.coefficient(2), -0.2)
    assert lines[Response("stuck", strength=0.1)].values.max() < 1  # not those of a projection
    assert all(line.lack_of_fit.p_value > 0.001 for line in found.lines if line.response.loss)
    [one] = found.comparisons
    by_noise = {line.response.noise: line.fit for line in one.differences}
    # What noises share drops out: the difference is known better than either.
    reach = [fit.coefficient(1).high - fit.coefficient(1).value for fit in by_noise.values()]
    alone = lines[Response("stuck", loss=0.05)].fit.coefficient(1)
    assert max(reach) < 0.7 * (alone.high - alone.value)
    assert near(by_noise["stuck"].coefficient(1), 0)
    assert near(by_noise["bitflip"].coefficient(1), 0.3)
    assert by_noise["bitflip"].coefficient(1).low > 0.2
    assert one.tests["parameters"].p_value < 1e-4 < 0.01 < one.tests["tokens_per_parameter"].p_value
    assert one.tests["parameters and tokens_per_parameter"].p_value < 1e-4


def test_two_arms_and_all_that_is_written(tmp_path, capsys):
    ours = studies(tmp_path / "ours")
    theirs = studies(tmp_path / "theirs", LAWS | {"stuck": (-4, 0.5, -0.1)}, seed=1)
    flags = [*(f"--combine={f}" for f in ours), *(f"--against={f}" for f in theirs)]
    out = tmp_path / "out"
    assert robustness.main([*flags, f"--along={','.join(ALONG)}", f"--output_dir={out}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in said if not line.startswith("wrote")) <= 100
    records = {r.note: r for r in read_records(out / "results.jsonl")}
    models = [r for r in records.values() if r.note.startswith("model ")]
    assert len(models) == 36 and models[0].metrics["tokens_per_parameter"] == 5
    response = "stuck: strength that costs 0.05 bits per byte"
    mine = records[f"{response}: parameters, the first arm"]
    other = records[f"{response}: parameters, the other arm"]
    apart = records[f"{response}, less the other arm: parameters"].metrics
    assert apart["slope"] == pytest.approx(mine.metrics["slope"] - other.metrics["slope"])
    assert apart["slope_low"] < -0.3 < apart["slope_high"] < 0 and len(mine.samples) == 18
    tests = {
        noise: records[f"{response.replace('stuck', noise)}: equal in parameters"].metrics
        for noise in LAWS
    }
    assert tests["stuck"]["p_value"] < 0.001 and tests["sign_flip"]["p_value"] > 0.01
    assert tests["stuck"]["f_error_degrees"] == 15
    page, rows = (out / "along.md").read_text(), (out / "results.csv").read_text().splitlines()
    assert set(said[:-1]) <= set(page.splitlines()) and len(rows) == 1 + len(records)
    assert ("![](along.png)" in page) == (out / "along.png").exists()


@pytest.mark.parametrize("size", [1e-4, 1, 30, 1e4])
def test_wide_intervals_stay_in_their_column(size):
    y = size * np.array([1.0, -2, 1, 3])
    fit = regression.fit(np.array([[1.0, 0, 0], [1, 1, 0], [1, 0, 1], [1, 1, 2]]), y)
    shown = interval(Line(Response(), "", y, fit, None), 1)
    assert len(shown) <= CELL and shown.count("[") == 1


def test_one_axis_and_what_not_all_models_tell(tmp_path, capsys):
    places = [(n, 10) for n in (100_000, 200_000, 400_000)]
    folders = studies(tmp_path / "all", {"stuck": LAWS["stuck"]}, places=places)
    last = tmp_path / "last"
    folders.append(study(last, 800_000, None, {"stuck": 0.1, "gaussian": 0.2}))
    flags = [f"--combine={folder}" for folder in folders]
    assert robustness.main([*flags, "--along=parameters", f"--output_dir={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().out
    assert "4 models at 4 places: parameters 100,000 to 800,000" in said
    assert "left out: gaussian at 0.01: rise in loss: 1 of 4 models tell it" in said
    assert "equal?" not in said


@pytest.mark.parametrize(
    "case, why",
    [
        ("sizes", "--along=parameters: a slope needs models whose parameters differ, found 4 of"),
        ("few", "a level and 2 slopes with intervals need 4 models, found 3: add sizes or seeds"),
        ("together", "parameters and tokens_per_parameter change together in these 4 models"),
        ("tokens", "--along=tokens_per_parameter: {0} does not tell what its model was trained on"),
        ("old", "{0} does not tell its model's size: run its command again"),
        ("unfinished", "{0} holds no finished study"),
        ("text", "studies are of other texts: 'heldout, 3 sequences"),
        ("pairs", "--against: pairs need equal parameters, found 100000 and 200000"),
        ("axis", "expected one or two of parameters, trained_tokens, tokens_per_parameter, found"),
        ("alone", "--combine is missing"),
    ],
)
def test_refusals_are_one_line(case, why, tmp_path, capsys):
    law, along = {"stuck": LAWS["stuck"]}, ",".join(ALONG)
    places = {
        "sizes": [(100_000, r) for r in (5, 5, 20, 20)],
        "few": [(100_000, 5), (100_000, 20), (200_000, 5)],
        "together": [(100_000 * n, 5 * n) for n in (1, 2, 4, 8)],
    }.get(case, [(100_000, 5), (200_000, 20)])
    folders, others = studies(tmp_path / "all", law, places=places), []
    if case == "tokens":
        folders = [study(tmp_path / "new", 100_000, None, {"stuck": 0.1})]
    elif case == "old":
        folders = [study(tmp_path / "new", None, None, {"stuck": 0.1})]
    elif case == "unfinished":
        path = tmp_path / "all" / "00" / "results.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    elif case == "text":
        folders.append(study(tmp_path / "new", 100_000, 10, {"stuck": 0.1}, text="mine"))
    elif case == "pairs":
        others = folders[::-1]
    elif case == "axis":
        along = "width"
    elif case == "alone":
        folders = []
    flags = [*(f"--combine={f}" for f in folders), *(f"--against={f}" for f in others)]
    flags += [f"--along={along}", f"--output_dir={tmp_path / 'out'}"]
    assert robustness.main(flags) == 2
    said = capsys.readouterr()
    assert why.format(*folders) in said.err and len(said.err.splitlines()) == 1 and not said.out

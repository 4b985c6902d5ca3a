"""Studies together: where a mean's error comes from, against draws made with known spreads."""

import numpy as np
import pytest

from ternax.experiments import robustness
from ternax.noise_meta import parts
from ternax.record import Record, Store, read_records


def test_each_spread_is_found_where_it_was_put():
    """2000 made-up experiments of 6 models, 5 draws, 40 sequences: squared errors, in the mean."""
    random, found = np.random.default_rng(0), []
    for _ in range(2000):
        model, text = random.normal(0, 0.3, 6), random.normal(0, 0.5, 40)
        draws = random.normal(0, 0.2, (6, 5))
        rises = model[:, None, None] + draws[..., None] + text + random.normal(0, 0.1, (6, 5, 40))
        one = parts(list(rises))
        found.append([one.noise_error**2, one.text_error**2, one.training_error**2])
    wanted = [0.2**2 / 30, 0.5**2 / 40, 0.3**2 / 6]
    assert np.mean(found, axis=0) == pytest.approx(wanted, rel=0.08)


def test_one_of_each_has_no_errors():
    one = parts([np.array([[0.1]])])
    assert one.value == 0.1 and one.noise_error is one.text_error is one.training_error is None


def study(folder, level, *, sequences=4, clean=1.5):
    """A folder as a study leaves it: two draws at one strength."""
    store = Store(folder)
    for draw in range(2):
        rises = tuple(level + 0.01 * draw + 0.001 * s for s in range(sequences))
        rise = float(np.mean(rises))
        store.append(
            Record(
                **dict.fromkeys(("scheme", "inputs", "backend", "device"), ""),
                experiment="robustness",
                config="mine",
                layers=1,
                batch=8,
                context=32,
                phase="evaluate",
                kind="measured",
                metrics={
                    "noise_strength": 0.1,
                    "bits_per_byte": clean + rise,
                    "bits_per_byte_rise": rise,
                },
                samples=rises,
                sample_unit="bits/byte",
                note=f"stuck at 0.1 on all, draw {draw}; study: text",
            )
        )
    return str(folder)


def test_arms_seed_by_seed(tmp_path, capsys):
    plain = [study(tmp_path / f"plain{i}", 0.3 + 0.1 * i) for i in range(3)]
    aware = [study(tmp_path / f"aware{i}", 0.2 + 0.1 * i, clean=1.6) for i in range(3)]
    flags = [f"--combine={a}" for a in aware] + [f"--against={p}" for p in plain]
    assert robustness.main([*flags, f"--output_dir={tmp_path / 'out'}"]) == 0
    record = read_records(tmp_path / "out" / "results.jsonl")[0]
    assert record.metrics["rise_difference"] == pytest.approx(-0.1)
    assert record.metrics["bits_per_byte_difference"] == pytest.approx(0.1)
    assert record.flags.startswith("--combine=") and "--against=" in record.flags
    assert record.metrics["models"] == 3 and len(record.samples) == 3
    said = capsys.readouterr().out
    assert "stuck" in said and max(map(len, said.splitlines())) <= 100
    # Clean 0.1 worse, and the noise costs 0.1 less: under it both are alike.
    assert record.metrics["bits_per_byte_struck_difference"] == pytest.approx(0)
    assert "other arm's: 0.100 [0.100, 0.100]" in said and "loss under the noise" in said
    report = (tmp_path / "out" / "report.md").read_text()
    assert set(said.splitlines()[:-1]) <= set(report.splitlines())


def test_one_arm_has_no_column_of_differences(tmp_path, capsys):
    flags = [f"--combine={study(tmp_path / f'one{i}', 0.1 * i)}" for i in range(2)]
    assert robustness.main([*flags, f"--output_dir={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().out
    assert "other arm" not in said and "+-training" in said


@pytest.mark.parametrize("case", ["nothing", "pairs", "texts"])
def test_refusals(case, tmp_path, capsys):
    one = study(tmp_path / "one", 0.1)
    flags, why = {
        "nothing": ([f"--combine={tmp_path}"], "expected a study's folder"),
        "pairs": ([f"--combine={one}"] + [f"--against={one}"] * 2, "found 1 and 2"),
        "texts": (
            [f"--combine={one}", f"--combine={study(tmp_path / 'two', 0.1, sequences=5)}"],
            "was measured on other texts",
        ),
    }[case]
    assert robustness.main([*flags, f"--output_dir={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert why in said and len(said.splitlines()) == 1

import pytest

from ternax import turns
from ternax.configs import get_config
from ternax.errors import DoesNotFit, UsageError
from ternax.experiments import scaling
from ternax.record import read_records
from ternax.workload import Workload


def test_contexts_decode_in_turn_behind_prompts_of_their_length(tmp_path, capsys):
    words = [
        "--config=tiny-llama",
        "--axis=context:12,40",
        "--in_turn",
        "--rounds=4",
        "--num_tokens=2",
        "--layers=1",
    ]
    assert scaling.main([*words, f"--output_dir={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    short, long, ratio = read_records(tmp_path / "results.jsonl")
    assert (short.context, long.context, ratio.context) == (12, 40, 40)
    assert all(len(r.samples) == 4 and r.kind == "measured" for r in (short, long, ratio))
    assert {r.layers for r in (short, long, ratio)} == {1}
    assert ratio.samples == tuple(a / b for a, b in zip(short.samples, long.samples, strict=True))
    assert f"{ratio.metrics['speed_ratio']:.3f} too few rounds for an interval" in shown
    assert "speed at context 40 over 12, round by round in turn" in shown


def test_the_cache_is_full_behind_the_last_round():
    study = turns.Turns((100, 300), 6, 8, Workload())
    for context in study.contexts:
        work = study.of(context)
        assert work.context == context and work.num_tokens == 1 + 6 * 8


def test_six_rounds_give_an_interval():
    study = turns.Turns((16, 32), 6, 2, Workload())
    taken = {16: [1.0, 1.0, 2.0, 2.0, 1.0, 1.0], 32: [2.0, 2.5, 4.0, 4.0, 2.0, 1.6]}
    *_, ratio = turns.records(get_config("tiny-llama"), study, taken, [50.0, 51.0])
    assert ratio.metrics["speed_ratio"] == 0.5
    assert ratio.metrics["speed_ratio_low"] == 0.4 and ratio.metrics["speed_ratio_high"] == 0.625


@pytest.mark.parametrize(
    "words, said",
    [
        (["--axis=context:8,40", "--rounds=4", "--num_tokens=2"], "a context of 8 holds less"),
        (["--axis=context:40,80", "--num_tokens=17"], "1 to 16 in turn"),
        (["--axis=batch:1,2"], "--in_turn is for one --axis=context"),
        (["--axis=context:40,80", "--profile_dir=p"], "takes no --profile_dir"),
        (["--axis=context:40,80", "--prompt_length=9"], "--prompt_length is not for --in_turn"),
    ],
)
def test_what_cannot_take_turns_is_refused(words, said, tmp_path, capsys):
    assert (
        scaling.main(["--config=tiny-llama", "--in_turn", f"--output_dir={tmp_path}", *words]) == 2
    )
    assert said in capsys.readouterr().err


def test_caches_that_do_not_fit_together_are_refused():
    study = turns.Turns((131072, 131000), 6, 8, Workload(batch=64))
    with pytest.raises(DoesNotFit, match="give fewer or shorter"):
        turns.check_fits(get_config("8b"), study)
    with pytest.raises(UsageError, match="holds less"):
        turns.Turns((49, 99), 6, 8, Workload())

"""`experiments.speedtest` as a user runs it: the engine, a server on this machine, none at all."""

import re

import pytest

from ternax import cost, drawing
from ternax.experiments import speedtest
from ternax.prompts import KINDS
from ternax.record import read_records
from tests.endpoint_test import serving


def test_this_engine(tmp_path, capsys):
    flags = ["--config=tiny-bitnet", "--workload=8:4,short/short,long/short", "--max_tokens=4"]
    flags += ["--requests=2", "--expect=median_ttft_ms:1e9", f"--output_dir={tmp_path}"]
    assert speedtest.main(flags) == 0
    out = capsys.readouterr().out
    fixed, text, long, verdict = read_records(tmp_path / "results.jsonl")
    assert (fixed.config, fixed.phase, fixed.kind, fixed.context) == (
        "tiny-bitnet",
        "serve",
        "measured",
        12,
    )
    m = fixed.metrics
    assert (m["completed"], m["total_input_tokens"], m["total_output_tokens"]) == (2, 16, 8)
    assert m["cold_ttft_ms"] > m["median_ttft_ms"] > 0 and 0 < m["share_of_bound"] < 1
    assert text.metrics["total_input_tokens"] == 2 * len(KINDS["short/short"].text)
    # 2,600 bytes do not fit a context of 256: the row says so and the test goes on.
    assert long.incomplete and "must fit the context of 256 positions" in long.note
    assert "failed: prompt and new tokens must fit" in out
    assert verdict.note.endswith(": met") and "\nverdict: median_ttft_ms" in out
    assert max(map(len, out.splitlines()[:-1])) <= 100
    assert (tmp_path / "speedtest.png").exists() == bool(drawing.pyplot())


def test_a_server_stands_in_the_same_table(tmp_path, capsys):
    with serving() as (inner, url):
        flags = [f"--endpoint={url}", "--workload=98:4,code", "--concurrency=1,2", "--requests=2"]
        flags += ["--usd_per_hour=1", f"--output_dir={tmp_path / 'out'}"]
        assert speedtest.main(flags) == 0
        asked = [body["prompt"] for _, body, _ in inner.asked]
        probes = [body["prompt"] for _, body, _ in inner.asked if body["max_tokens"] == 1]
    # The prompt's number, and words: the server counts 2 tokens and 3 a word.
    assert [len(prompt.split()) for prompt in probes] == [1 + 64, 1 + 32, 1 + 31]
    assert len(set(asked)) == len(asked) == 3 + 14  # no prompt twice: servers keep prefixes
    records = read_records(tmp_path / "out" / "results.jsonl")
    assert [(r.config, r.batch, r.metrics["completed"]) for r in records] == [
        ("served", 1, 2),
        ("served", 1, 2),
        ("served", 2, 2),
        ("served", 2, 2),
    ]
    assert all(r.backend == f"server at {url}" for r in records)
    m = records[0].metrics
    assert m["total_input_tokens"] == 2 * 98
    assert m["median_ttft_ms"] >= 20 and "bound_tokens_per_s" not in m
    assert m["usd_per_million_tokens"] == pytest.approx(1 / 3600 / m["output_throughput"] * 1e6)
    assert "pp98+tg4 x2" in capsys.readouterr().out


def test_no_answer_at_all(tmp_path, capsys):
    with serving() as (_, url):
        pass
    flags = [f"--endpoint={url}", f"--output_dir={tmp_path}"]
    unnamed = [f"--endpoint={url}", f"--output_dir={tmp_path / 'unnamed'}", "--workload=5:4,6:4"]
    assert speedtest.main(unnamed) == 7  # each row is marked, and the run went on
    captured = capsys.readouterr()
    assert captured.out.count("failed: connection refused") == 2
    assert "is it running? --model names one" in captured.err
    assert [r.config for r in read_records(tmp_path / "unnamed" / "results.jsonl")] == [
        "unknown"
    ] * 2
    assert speedtest.main([*flags, "--model=m", "--workload=5:4"]) == 7
    captured = capsys.readouterr()
    assert "failed: connection refused" in captured.out
    assert "was answered: connection refused" in captured.err
    (record,) = read_records(tmp_path / "results.jsonl")
    assert record.incomplete and record.metrics["failed"] == 4


def test_what_does_not_fit_is_refused_before_it_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cost, "available_bytes", lambda device=None: 1 << 29)
    assert speedtest.main(["--config=70b", f"--output_dir={tmp_path / 'out'}"]) == 3
    assert re.search(r"70b does not fit: it needs 2[01]\.\d+ GiB", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--config=stdlib-bitnet", "--scheme=int4"], "stdlib-bitnet"),
        (["--workload=poem"], "--workload must be all"),
        (["--concurrency=0"], "--concurrency must be numbers from 1 up"),
        (["--expect=speed:3"], "--expect takes times and rates"),
        (["--endpoint=localhost"], "--endpoint must be as http://"),
        (["--endpoint=http://localhost:1", "--dispatch=layer"], "are of this engine"),
        (["--endpoint=http://localhost:1", "--timeout_s=0"], "--timeout_s must be above 0"),
    ],
)
def test_mistakes_are_one_line(flags, says, tmp_path, capsys):
    assert speedtest.main([*flags, f"--output_dir={tmp_path / 'none'}"]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and not (tmp_path / "none").exists()

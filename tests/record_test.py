"""Records, their store, their tables, and where they say they come from."""

import csv
import dataclasses
import errno
import io
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from ternax import provenance, record
from ternax.errors import BadModelFile, OutputError, UsageError
from ternax.metrics import METRICS
from ternax.record import Record, Store
from ternax.table import format_metric, table


def make(**changes) -> Record:
    fields = dict(
        experiment="decode",
        config="70b",
        scheme="absmean",
        inputs="int8",
        backend="reference",
        device="some processor",
        layers=80,
        batch=1,
        context=512,
        phase="decode",
        kind="measured",
        samples=[0.9, 1.1, 1.0],
        sample_unit="s/token",
        metrics={"tokens_per_s": 1.0},
        flags="--config=70b",
    )
    return Record(**(fields | changes))


# --- Record ------------------------------------------------------------------------------


def test_promised_names_are_there():
    assert {
        "experiment",
        "config",
        "scheme",
        "backend",
        "device",
        "layers",
        "batch",
        "context",
        "phase",
        "kind",
        "samples",
        "versions",
        "commit",
        "metrics",
    } <= make().to_dict().keys()
    assert {
        "tokens_per_s",
        "bound_tokens_per_s",
        "share_of_bound",
        "bytes_per_step",
        "read_bandwidth_gb_per_s",
        "ttft_ms",
        "tpot_ms_p50",
        "tpot_ms_p99",
        "peak_memory_bytes",
        "planned_memory_bytes",
    } <= METRICS.keys()


def test_every_metric_is_documented():
    for name, metric in METRICS.items():
        assert re.fullmatch("[a-z0-9_]+", name)
        assert metric.meaning and "\n" not in metric.meaning


def test_values_are_flat_but_for_samples_and_metrics():
    nested = {name for name, value in make().to_dict().items() if isinstance(value, (list, dict))}
    assert nested == {"samples", "metrics"}


finite = st.floats(allow_nan=False, allow_infinity=False)


@hypothesis.settings(deadline=None)
@hypothesis.given(
    samples=st.lists(finite, max_size=4),
    metrics=st.dictionaries(st.sampled_from(list(METRICS)), finite | st.integers(), max_size=5),
    note=st.text(),
    incomplete=st.booleans(),
    batch=st.integers(0, 2**40),
)
def test_round_trip_through_json(samples, metrics, note, incomplete, batch):
    before = make(samples=samples, metrics=metrics, note=note, incomplete=incomplete, batch=batch)
    line = json.dumps(before.to_dict(), allow_nan=False)
    assert "\n" not in line
    assert Record.from_dict(json.loads(line)) == before


def test_numpy_scalars_become_plain_numbers():
    metrics = make(metrics={"tokens_per_s": np.float32(2), "weight_bytes": np.int64(3)}).metrics
    assert [type(value) for value in metrics.values()] == [float, int]


@pytest.mark.parametrize(
    "changes",
    [
        {"phase": "dance"},
        {"kind": "guessed"},
        {"layers": -1},
        {"layers": 1.5},
        {"batch": True},
        {"seed": None},
        {"config": 70},
        {"samples": [1.0, math.nan]},
        {"samples": ["1"]},
        {"samples": 1.0},
        {"samples": [1.0], "sample_unit": ""},
        {"metrics": []},
        {"metrics": {"tokens_per_s": math.nan}},
        {"metrics": {"tokens_per_s": math.inf}},
        {"metrics": {"tokens_per_s": None}},
        {"metrics": {"tokens_per_s": True}},
        {"metrics": {"tokens_per_sec": 1.0}},
        {"incomplete": 1},
        {"schema": 2},
    ],
    ids=str,
)
def test_bad_values_are_refused_in_one_line(changes):
    with pytest.raises(UsageError) as caught:
        make(**changes)
    assert "record." in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_metric_names_the_nearest():
    with pytest.raises(UsageError, match="nearest: tokens_per_s"):
        make(metrics={"tokens_per_sec": 1.0})


def test_from_dict_fills_in_nothing():
    values = make().to_dict()
    with pytest.raises(UsageError, match="unknown field color"):
        Record.from_dict(values | {"color": "red"})
    with pytest.raises(UsageError, match="missing field versions"):
        Record.from_dict({k: v for k, v in values.items() if k != "versions"})
    with pytest.raises(UsageError, match="schema must be 1, found 9"):
        Record.from_dict(values | {"schema": 9, "color": "red"})


def test_a_record_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().batch = 2


# --- Store -------------------------------------------------------------------------------


def test_store_writes_all_forms(tmp_path):
    records = [make(), make(kind="extrapolated", samples=[], metrics={"joules": 3})]
    with Store(tmp_path / "a" / "b") as store:
        for item in records:
            store.append(item)
    directory = store.directory
    assert sorted(os.listdir(directory)) == [
        "report.md",
        "results.csv",
        "results.json",
        "results.jsonl",
    ]
    assert record.read_records(directory / "results.jsonl") == records
    loaded = json.loads((directory / "results.json").read_text())
    assert [Record.from_dict(values) for values in loaded] == records
    rows = list(csv.DictReader(io.StringIO((directory / "results.csv").read_text())))
    assert [row["samples"] for row in rows] == ["0.9 1.1 1.0", ""]
    assert [row["tokens_per_s"] for row in rows] == ["1.0", ""]  # absent, not zero
    assert [row["joules"] for row in rows] == ["", "3"]
    page = (directory / "report.md").read_text()
    assert page.startswith("# decode: 70b") and "--config=70b" in page


def test_a_second_run_appends(tmp_path):
    for expected in (1, 2):
        with Store(tmp_path) as store:
            store.append(make())
        assert len(json.loads((tmp_path / "results.json").read_text())) == expected


def test_two_runs_at_once_do_not_share_a_folder(tmp_path):
    """A run holds its folder until it ends, also by SIGKILL; one that comes later goes on."""
    holder = (
        "import sys, time; from ternax.record import Store\n"
        f"with Store({str(tmp_path)!r}): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(UsageError, match="another run is going on in .*--output_dir"):
                Store(tmp_path)
        finally:
            other.kill()
    with Store(tmp_path) as store:
        store.append(make())
        with pytest.raises(UsageError, match="another run is going on"):
            Store(tmp_path)
    assert len(Store(tmp_path).records) == 1


def test_torn_last_line_is_dropped_wherever_it_tore(tmp_path):
    store = Store(tmp_path)
    store.append(make(batch=1))
    whole = store.path.read_bytes()
    store.append(make(batch=2))
    both = store.path.read_bytes()
    for cut in (1, 2, 50, len(both) - len(whole) - 1):
        store.path.write_bytes(both[: len(whole) + cut])
        assert [r.batch for r in record.read_records(store.path)] == [1]
        again = Store(tmp_path)
        again.append(make(batch=3))
        assert [r.batch for r in record.read_records(store.path)] == [1, 3]


def test_a_bad_line_in_the_middle_is_named(tmp_path):
    Store(tmp_path).append(make())
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"experiment": 1}\n' + path.read_bytes())
    with pytest.raises(BadModelFile, match=r"results\.jsonl: line 1: not a record"):
        Store(tmp_path)


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_keeps_what_was_written(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.append(make(batch=1))
    before = store.path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OutputError, match="No space left on device; the 1 records") as caught:
            store.append(make(batch=2))
    assert caught.value.exit_code == 6 and "\n" not in str(caught.value)
    assert store.path.read_bytes() == before
    store.append(make(batch=3))
    assert (
        [r.batch for r in record.read_records(store.path)]
        == [1, 3]
        == [r.batch for r in store.records]
    )


def test_a_write_cut_short_by_the_system_leaves_no_half_line(tmp_path):
    store = Store(tmp_path)
    store.append(make())
    before = store.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(OutputError, match="too large"):
            store.append(make())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.path.read_bytes() == before


def test_derived_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.append(make())
    store.finish()
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    store.records.append(make(batch=2))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OutputError, match="results.json cannot be written"):
            store.finish()
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_leaving_never_hides_the_first_error(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt), Store(tmp_path) as store:
        store.append(make(incomplete=True))
        monkeypatch.setattr(os, "fsync", full_disk)
        raise KeyboardInterrupt
    monkeypatch.undo()
    assert record.read_records(store.path)[0].incomplete


@pytest.mark.parametrize("place", ["file/run", "file", "taken"])
def test_unusable_directory_is_one_line(tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "results.jsonl").mkdir(parents=True)
    with pytest.raises(OutputError, match="choose another --output_dir") as caught:
        Store(tmp_path / place)
    assert caught.value.exit_code == 6 and "\n" not in str(caught.value)


def test_run_directories_differ_and_hold_no_awkward_characters(tmp_path):
    names = [record.run_directory(tmp_path, "decode", "70b(num_layers=4)", "a/b c") for _ in "ab"]
    assert names[0] != names[1] and not names[0].exists()
    assert re.fullmatch(r"70b-num_layers=4-a-b-c-\d{8}T\d{6}Z-[0-9a-f]{8}", names[0].name)
    assert names[0].parent == tmp_path / "decode"
    assert record.run_directory(tmp_path, "..", "..", "").is_relative_to(tmp_path / "none")


def test_latest_follows_the_newest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        store = record.open_store(None, "decode", "1b", "reference")
        assert os.readlink("runs/decode/latest") == store.directory.name
    assert record.open_store("mine", "decode", "1b", "reference").directory.name == "mine"
    assert sorted(os.listdir(tmp_path)) == ["mine", "runs"]


# --- Table -------------------------------------------------------------------------------


def many_records():
    long = {name: 123456789.123 for name in METRICS}
    return [
        make(metrics=long),
        make(kind="predicted", samples=[]),
        make(phase="create", samples=[52.0], sample_unit="s", metrics={"create_s": 52.0}),
        make(config="x" * 200, incomplete=True),
        make(kind="extrapolated", batch=7),
    ]


@pytest.mark.parametrize("width", [80, 100])
def test_tables_are_narrow_and_never_mix_kinds(width):
    text = table(many_records(), width)
    assert max(map(len, text.splitlines())) <= width
    blocks = text.split("\n\n")
    assert [block.split(":")[0] for block in blocks] == ["measured", "predicted", "extrapolated"]
    assert "context 512" in blocks[1] and "…" not in blocks[1]
    assert "incomplete" in blocks[0] and "incomplete" not in blocks[1]


def test_records_that_differ_in_everything_still_fit():
    fields = ("experiment", "config", "scheme", "inputs", "backend", "device")
    records = [
        make(
            **{name: f"{name}{i}" * 9 for name in fields},
            layers=i,
            batch=i,
            context=i,
            seed=i,
            incomplete=bool(i),
        )
        for i in range(3)
    ]
    assert max(map(len, table(records).splitlines())) <= 100


def test_every_metric_is_shown():
    shown = "".join(table(many_records()).split())
    assert all(name.split("_")[0] in shown for name in METRICS)


def test_nothing_gives_an_empty_table():
    assert table([]) == ""
    assert "Nothing was measured" in record.report([])


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("peak_memory_bytes", 3 * 2**30, "3.00 GiB"),
        ("bytes_per_step", 5, "5 B"),
        ("share_of_bound", 0.687, "68.7 %"),
        ("parameters", 70553706496, "70,553,706,496"),
        ("tokens_per_s", 1.0331, "1.033"),
        ("joules", None, ""),
    ],
)
def test_metrics_are_readable(name, value, text):
    assert format_metric(name, value) == text


# --- Provenance --------------------------------------------------------------------------


def test_environment_names_versions_and_sources():
    found = record.environment()
    assert re.match(
        r"python 3\.\d+\.\d+, jax [\d.]+, jaxlib [\d.]+, flax [\d.]+, numpy ", found.versions
    )
    assert re.fullmatch("[0-9a-f]{64}", found.source_sha256)
    assert found.commit == "unknown" or re.fullmatch("[0-9a-f]{12,40}(-dirty)?", found.commit)
    assert make().versions == found.versions


def tree(root, nested):
    """A little checkout, or the same files as a wheel lays them out."""
    for path, text in {
        "ternax/provenance.py": "1",
        "ternax/quant/a.py": "2",
        "kernels/cpu/k.cc": "3",
        "configs/c.py": "4",
        "experiments/e.py": "5",
        "experiments/notes.txt": "6",
    }.items():
        path = path if path.startswith("ternax") or not nested else f"ternax/{path}"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root / "ternax" / "provenance.py"


def test_a_wheel_has_the_hash_of_its_checkout(tmp_path, monkeypatch):
    hashes = []
    for nested in (False, True):
        monkeypatch.setattr(provenance, "__file__", str(tree(tmp_path / str(nested), nested)))
        hashes.append(provenance._source_sha256())
    assert hashes[0] == hashes[1]
    (tmp_path / "True" / "ternax" / "kernels" / "cpu" / "k.cc").write_text("changed")
    assert provenance._source_sha256() != hashes[0]


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_commit_knows_dirt_stamps_and_strangers(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    monkeypatch.setattr(provenance, "__file__", str(tree(tmp_path, nested=False)))
    assert provenance._commit() == "unknown"
    git("init")
    assert provenance._commit() == "unknown"  # a repository without a commit
    git("add", ".")
    git("commit", "-m", "first")
    assert re.fullmatch("[0-9a-f]{12}", provenance._commit())
    (tmp_path / "configs" / "c.py").write_text("changed")
    assert re.fullmatch("[0-9a-f]{12}-dirty", provenance._commit())
    # An environment inside somebody's repository is not that repository's commit.
    monkeypatch.setattr(provenance, "__file__", str(tree(tmp_path / "site-packages", nested=True)))
    assert provenance._commit() == "unknown"
    (tmp_path / "site-packages" / "ternax" / "build_stamp.txt").write_text("0.1.0+abc\n")
    assert provenance._commit() == "0.1.0+abc"

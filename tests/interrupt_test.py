"""Ctrl-C: noted, answered where it may be, and never in the middle of a record."""

import os
import signal
import threading

import pytest

from ternax.interrupt import Stop
from ternax.record import Record, Store, read_records


def test_one_is_answered_at_the_next_check():
    before = signal.getsignal(signal.SIGINT)
    with Stop() as stop:
        stop.check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            stop.check()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_one_is_answered_at_once():
    with Stop():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_handler_is_put_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError), Stop():
        raise ValueError
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_changes_nothing():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with Stop() as stop:
            seen.append(signal.getsignal(signal.SIGINT))
            stop.check()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def record() -> Record:
    return Record(
        experiment="decode",
        config="1b",
        scheme="absmean",
        inputs="int8",
        backend="reference",
        device="a processor",
        layers=1,
        batch=1,
        context=1,
        phase="plan",
        kind="predicted",
    )


def test_no_half_record_is_left(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.append(record())

    def interrupted(file):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.append(record())
        with pytest.raises(KeyboardInterrupt):
            store.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]
    store.append(record())
    assert len(read_records(store.path)) == 2

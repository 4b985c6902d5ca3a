"""experiments.chat: what is asked, what is answered, and when it ends."""

import io

import numpy as np
import pytest
import tokenizers

import ternax
from ternax import engine
from ternax.experiments import chat
from ternax.interop.tokenizer import ByteTokenizer, FileTokenizer, chat_prompt
from ternax.record import read_records
from tests.interop import models

DECODING = dict(max_tokens=6, temperature=0.0, top_p=1.0, seed=0)


@pytest.fixture(scope="module")
def model():
    return models.packed(models.BITNET)


def test_an_answer_is_what_generate_says(model):
    """The template's text is the prompt, and the answer joins the conversation."""
    tokenizer = ByteTokenizer(model.config.vocab_size, stop=())
    conversation = chat.Conversation(model, tokenizer, **DECODING)
    said = "".join(conversation.answer("hello"))
    prompt = "user: hello\nassistant:"
    ids = np.array([list(prompt.encode())], np.int32)
    expected = ternax.generate(model, ids, max_new_tokens=6)[0, len(prompt) :]
    assert said == tokenizer.decode(expected.tolist())[: len(said)]
    assert conversation.count == 6
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"]
    list(conversation.answer("more"))
    assert len(conversation.messages) == 4


def test_an_answer_ends_at_a_stop_token(model, monkeypatch):
    monkeypatch.setattr(engine, "stream", lambda *_, **__: iter([np.array([[72, 105, 0, 65]])]))
    conversation = chat.Conversation(model, ByteTokenizer(260), **DECODING)
    assert "".join(conversation.answer("x")) == "Hi" and conversation.count == 2
    monkeypatch.setattr(engine, "stream", lambda *_, **__: iter([np.array([list(b"Hi\nuser: I")])]))
    assert "".join(conversation.answer("x")).startswith("Hi\nuser")
    assert conversation.messages[-1] == {"role": "assistant", "content": "Hi"}


def test_the_vocabulary_says_what_ends_an_answer(model):
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<|eot_id|>": 1}, []))
    tokenizer = FileTokenizer(inner, bos=None, stop=(0,), template="{{ messages[0].content }}")
    assert chat.Conversation(model, tokenizer, **DECODING).stop == (0, 1)
    assert chat_prompt(tokenizer, [{"role": "user", "content": "text"}]) == "text"


def test_the_command(model, tmp_path, capsys, monkeypatch):
    ternax.save(model, tmp_path / "m.gguf", "gguf:TQ2_0")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nagain\n\nnever read\n"))
    arguments = [f"--config={tmp_path / 'm.gguf'}", "--max_tokens=4", "--system=be brief"]
    assert chat.main([*arguments, f"--output_dir={tmp_path / 'out'}"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "no chat template: lines of user: and assistant:; an empty line ends it" in " ".join(
        out.split()
    )
    records = read_records(tmp_path / "out" / "results.jsonl")
    assert [record.phase for record in records] == ["decode", "decode"]
    assert all(record.metrics["generated_tokens"] <= 4 for record in records)


def test_random_weights_do_not_talk(tmp_path, capsys):
    assert chat.main(["--config=tiny-llama", f"--output_dir={tmp_path / 'out'}"]) == 2
    assert "tiny-llama has random weights: give the path of a model" in capsys.readouterr().err

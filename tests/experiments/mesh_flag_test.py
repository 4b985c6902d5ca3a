"""--mesh in experiments that read text and answer: one device's numbers and words on two."""

import json

import numpy as np

from ternax.experiments import chat, decode, train
from tests import split

_BOTH = """
import contextlib, io, json, sys
from ternax.experiments import chat, evaluate
from ternax.record import read_records

folder, text = sys.argv[1:]
for i, mesh in enumerate(([], ["--mesh=data:2"], ["--mesh=tensor:2"])):
    sys.stdin, said = io.StringIO("def main(\\n\\n"), io.StringIO()
    with contextlib.redirect_stdout(said):
        talk, read = ([f"--output_dir={folder}/{name}{i}", *mesh] for name in ("chat", "evaluate"))
        if mesh != ["--mesh=data:2"]:  # a conversation is one row
            assert chat.main(["--max_tokens=8", *talk]) == 0
        assert evaluate.main([f"--text={text}", "--length=16", "--batch=4", *read]) == 0
    [record] = read_records(f"{folder}/evaluate{i}/results.jsonl")
    answer = [line for line in said.getvalue().splitlines() if line.startswith(" ")][0]
    bits = record.metrics["bits_per_byte"]
    print(json.dumps([answer, record.device, record.note.rpartition("; ")[2], bits]))
"""


def test_chat_and_evaluate(tmp_path):
    text = tmp_path / "text"
    text.write_text("import os, sys; print(os.path, sys.argv) " * 8)
    said = split.run(_BOTH, 2, str(tmp_path), str(text)).splitlines()
    (words, device, _, bits), over_data, over_tensor = map(json.loads, said)
    for found, mesh in ((over_data, "data:2"), (over_tensor, "tensor:2")):
        assert found[1:3] == [f"2 x {device}", f"mesh {mesh}"]
        assert np.isclose(found[3], bits, rtol=1e-5)
    assert over_tensor[0] == words


def test_what_a_mesh_is_not_for(capsys):
    assert train.main(["--config=tiny-bitnet", "--mesh=auto"]) == 2
    assert "--mesh=auto weighs packed models" in capsys.readouterr().err
    processes = ["--coordinator=localhost:1", "--processes=2", "--process=0"]
    assert chat.main(["--mesh=tensor:2", *processes]) == 2
    assert "one process reads what you type" in capsys.readouterr().err


def test_heads_that_several_devices_hold(capsys):
    assert decode.main(["--config=70b", "--mesh=tensor:16", "--plan_only"]) == 0
    said = capsys.readouterr().out
    assert "80x1x16x32x128   80x1x1x32x128   kv_heads: tensor" in said
    assert "8 kv heads over 16: each on 2, counted in whole" in said

"""`--mesh=auto`: the split it takes, against bytes and exchanges computed by hand."""

import dataclasses

import numpy as np
import pytest

from ternax import configs, mesh, mesh_choice
from ternax.errors import UsageError
from ternax.experiments import decode

WORK = {"batch": 1, "context": 4096}


def choose(name, device, count, **work):
    machine = mesh_choice.of_catalogue(device, count)
    return mesh_choice.choose(configs.get_config(name), machine, **WORK | work)


def test_auto_is_a_mesh():
    assert [mesh.of_auto(text) for text in ("auto", "auto:4", "tensor:4")] == [0, 4, None]
    for text in ("auto:", "auto:0", "auto:x"):
        with pytest.raises(UsageError, match="expected auto, or auto:4"):
            mesh.of_auto(text)


def test_exchanges_stand_against_reading():
    """70b at batch 1: trits, int8 tables, a bf16 cache; 322 exchanges a step of 10 us."""
    choice = choose("70b", "h200", 8)
    rates = {str(o): o.tokens_per_s for o in choice.options if not o.why and "seq" not in str(o)}
    assert list(rates) == ["one device", "tensor:2", "tensor:4", "tensor:8"]
    config = configs.get_config("70b")
    cache = 4 * config.num_layers * config.num_kv_heads * config.head_dim * 4096
    read_s = (68451041280 / 4 + config.vocab_size * (8192 + 4) + cache) / 4.8e12
    for n, found in zip((1, 2, 4, 8), rates.values(), strict=True):
        moved = 161 * 4 * 8192 * 2 * (n - 1) / n / 450e9 + 4 * 128256 * (n - 1) / n / 450e9
        expected = read_s / n + (n > 1) * (322 * 10e-6 + moved)
        assert np.isclose(1 / found, expected, rtol=2e-3), n
    assert str(choice.best) == max(rates, key=lambda name: rates[name]) == "tensor:8"
    assert rates["tensor:2"] < rates["one device"]


def test_a_long_cache_is_split_by_slots():
    def rates(context):
        options = choose("8b", "h100", 2, context=context).options
        return {str(option): option.tokens_per_s for option in options}

    assert rates(131072)["sequence:2"] > 1.3 * rates(131072)["one device"]
    assert rates(1024)["sequence:2"] < rates(1024)["one device"]


def test_rows_go_over_data_where_weights_fit():
    assert str(choose("70b", "h200", 2, batch=16).best) == "data:2"
    assert str(choose("70b", "l4", 2, batch=2).best) == "tensor:2"
    nothing = choose("405b", "l4", 2)
    assert str(nothing.best) == "tensor:2" and "needs" in nothing.lines()[0]


def test_what_cannot_be_is_named():
    lines = choose("bitnet-2b4t", "h100", 4, batch=2).lines()
    first, second = (" ".join(line.split()) for line in lines)
    assert "auto: data:2 of 4" in first and "one device" in first
    assert "5 kv heads, which would be cut" in second and "data:4: a batch" in second
    machine = mesh_choice.of_catalogue("h100", 4)
    config = configs.get_config("bitnet-2b4t")
    with pytest.raises(UsageError, match="does not split over 4: .*tensor:4: 5 kv heads"):
        mesh_choice.choose(config, machine, all_devices=True, **WORK | {"batch": 3})
    odd = dataclasses.replace(config, num_heads=4, num_kv_heads=2, vocab_size=32002)
    choice = mesh_choice.choose(odd, machine, all_devices=True, **WORK | {"batch": 2})
    assert [str(o) for o in choice.options if not o.why] == ["tensor:4", "data:2,tensor:2"]


def test_a_processor_shares_its_memory(capsys):
    assert decode.main(["--config=tiny-llama", "--mesh=auto:4", "--plan_only"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("mesh     auto: one device of 4") and "one memory" in said
    assert decode.main(["--config=bitnet-700m", "--mesh=tensor:4", "--plan_only"]) == 0
    assert "32,002 does not divide by 4: tables whole" in capsys.readouterr().out

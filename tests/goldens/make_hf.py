# Copyright 2026 The ternax authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Writes golden logits of tiny random Hugging Face models to `hf_*.npz`.

The files are committed, so the tests that read them need neither torch nor
transformers. Run this again only to change a case:

    python -m venv hf && hf/bin/pip install torch transformers numpy
    hf/bin/python tests/goldens/make_hf.py  # CPU, under a minute, no downloads

Made with Python 3.11, torch 2.15.0, transformers 5.23.0, numpy 2.4.6. A second
run with the same versions writes the same bytes.

Each file holds (load with `np.load(path, allow_pickle=False)`):

    config_json  unicode scalar; the fields of HF's config.json. RoPE is given in
                 both spellings: `rope_theta` + `rope_scaling` as in published
                 checkpoints, and `rope_parameters` as transformers 5 writes it.
    <HF name>    float16; every weight, in HF's [out, in] layout. All are
                 rounded to 8 significant bits before the forward, so float16
                 loses nothing (and the file compresses). Tied models have no
                 `lm_head.weight`, as in HF's own checkpoints.
    tokens       int32 [B, T].
    logits       float32 [B, T, V]; float32 model, eager attention, no cache.
    greedy       int32 [1, 12], hf_llama_gqa and hf_bitnet_online only; the new
                 tokens that `generate(do_sample=False)` appends to tokens[:1, :6].

Cases:

    hf_llama_gqa      Llama, 4 query / 2 kv heads, untied, llama3 RoPE scaling. Of
                      the 8 frequencies the first is kept, the second is in the
                      smoothed band, and the rest are divided by `factor`.
    hf_llama_tied     Llama, tied, head_dim * heads != hidden. The residual stream
                      is of order 1e-3, so rms_norm_eps = 1e-6 changes each norm.
    hf_bitnet_online  BitNet (relu2, both sub-norms), tied. Every linear but the
                      head is HF's `AutoBitLinear` with online_quant=True; the
                      stored weights are the latent floats.
    hf_bitnet_dense   BitNet with float linears, silu, untied.

What `AutoBitLinear` computes online (transformers.integrations.bitnet), all of it
in float32, with no RMS norm of its own unless use_rms_norm (off here):

    weights, one scale per matrix, over all elements of W [out, in]:
        s_w = 1 / max(mean(|W|), 1e-5)
        W_q = clip(round(W * s_w), -1, 1) / s_w
    activations, one scale per token, over the last axis of x [..., in]:
        s_x = (1 / max(max(|x|), 1e-5)) * 127
        x_q = clip(round(x * s_x), -128, 127) / s_x
    y = x_q @ W_q.T

`round` is to nearest, ties to even. The clamp at 1e-5 is on the mean or maximum,
never on the scale. torch evaluates `127 / t` as `reciprocal(t) * 127`, two
roundings, as written above; a true division differs in the last bit for about
one value in four. Both factors are dequantized before a float32 matmul; an
integer matmul followed by `/ (s_x * s_w)` agrees to float32 rounding.

A value close to a rounding tie could fall on either side in another framework and
move the logits by far more than float32 noise. So hf_bitnet_online keeps away from
ties: its tokens are drawn one by one, and one is taken only if no activation of its
position lies within MIN_ACTIVATION_TIE_DISTANCE of a tie; positions are causal, so
earlier ones stay as they were. A seed is taken only if the same holds along the
greedy continuation, no latent weight lies within MIN_WEIGHT_TIE_DISTANCE of a tie,
and each greedy token leads the runner-up by MIN_GREEDY_LEAD.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

# HF decorates the quantizers with torch.compile; the goldens take them as written.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import numpy as np
import torch
import transformers
from transformers.integrations import bitnet

PROMPT_TOKENS = 6
NEW_TOKENS = 12
MIN_DISTINCT_TOKENS = 6
MIN_GREEDY_LEAD = 0.02  # logits
# In quantization steps. Against a float64 evaluation, float32 activations were off by
# 1e-5 (rms) and 1e-4 (maximum) steps.
MIN_ACTIVATION_TIE_DISTANCE = 5e-4
MIN_WEIGHT_TIE_DISTANCE = 1e-5

CONFIG_FIELDS = (
    "architectures",
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "vocab_size",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One golden file.

    Attributes:
        name: File name without its suffix.
        config: HF config of the model.
        seed: First seed to try; seeds are tried upwards until one is accepted.
        shape: (B, T) of the tokens.
        gain: Maps a weight's last module name to the standard deviation of its
            values, times sqrt(fan_in) for linears. Those not named have 1.
        norm_mean: Maps a norm's module name to the mean of its weights, 1 if absent.
        online: Whether linears other than the head become online `AutoBitLinear`.
        greedy: Whether to store a greedy continuation.
    """

    name: str
    config: transformers.PreTrainedConfig
    seed: int
    shape: tuple[int, int]
    gain: dict[str, float]
    norm_mean: dict[str, float] = dataclasses.field(default_factory=dict)
    online: bool = False
    greedy: bool = False


def cases() -> list[Case]:
    """Returns all cases, with the seeds found acceptable by earlier runs."""
    tiny: dict[str, Any] = {
        "vocab_size": 64,
        "num_hidden_layers": 2,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    wide = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
    }
    sharp = {"q_proj": 1.5, "k_proj": 1.5}  # attention that is far from uniform
    return [
        Case(
            name="hf_llama_gqa",
            config=transformers.LlamaConfig(
                **tiny,
                **wide,
                head_dim=16,
                max_position_embeddings=320,
                tie_word_embeddings=False,
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 500000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 40,
                },
            ),
            seed=5,
            shape=(2, 48),
            gain=sharp,
            greedy=True,
        ),
        Case(
            name="hf_llama_tied",
            config=transformers.LlamaConfig(
                **tiny,
                hidden_size=48,
                intermediate_size=80,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=32,
                max_position_embeddings=64,
                rms_norm_eps=1e-6,
                tie_word_embeddings=True,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            ),
            seed=0,
            shape=(2, 24),
            gain={
                "q_proj": 2.0,
                "k_proj": 2.0,
                "embed_tokens": 1e-3,
                "o_proj": 3e-3,
                "down_proj": 3e-3,
            },
            norm_mean={"norm": 150.0},  # brings the logits to order 1
        ),
        Case(
            name="hf_bitnet_online",
            config=transformers.BitNetConfig(
                **tiny,
                **wide,
                hidden_act="relu2",
                max_position_embeddings=64,
                tie_word_embeddings=True,
                rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            ),
            seed=562,
            shape=(2, 24),
            gain=sharp | {"embed_tokens": 0.125},
            online=True,
            greedy=True,
        ),
        Case(
            name="hf_bitnet_dense",
            config=transformers.BitNetConfig(
                **tiny,
                **wide,
                hidden_act="silu",
                max_position_embeddings=64,
                tie_word_embeddings=False,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            ),
            seed=0,
            shape=(2, 24),
            gain=sharp,
        ),
    ]


def round_to_float16(w: np.ndarray, significant_bits: int = 8) -> np.ndarray:
    """Rounds `w` to few significant bits; the float16 result is exact."""
    mantissa, exponent = np.frexp(w)
    grid = 2.0**significant_bits
    return np.ldexp(np.round(mantissa * grid) / grid, exponent).astype(np.float16)


def draw_weights(
    case: Case, shapes: dict[str, torch.Size], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Draws float16 weights for every HF name in `shapes`."""
    weights = {}
    for name, shape in sorted(shapes.items()):
        module = name.split(".")[-2]
        noise = rng.standard_normal(shape)
        if len(shape) == 1:  # norm weights
            mean = case.norm_mean.get(module, 1.0)
            weights[name] = round_to_float16(mean * (1.0 + 0.25 * noise))
        else:
            fan_in = 1 if module == "embed_tokens" else shape[1]
            scale = case.gain.get(module, 1.0) / np.sqrt(fan_in)
            weights[name] = round_to_float16(scale * noise)
    return weights


def quantization_config() -> transformers.BitNetQuantConfig:
    return transformers.BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="online")


def build_model(case: Case) -> transformers.PreTrainedModel:
    """Returns the float32 model in eval mode; its weights are yet to be loaded."""
    model_class = getattr(transformers, f"{type(case.config).__name__[:-6]}ForCausalLM")
    case.config._attn_implementation = "eager"
    model = model_class(case.config)
    if case.online:
        # As HF's loader does; the head is left out there too.
        bitnet.replace_with_bitnet_linear(
            model, ["lm_head"], quantization_config=quantization_config()
        )
        for module in model.modules():  # they are created without storage
            if isinstance(module, bitnet.AutoBitLinear):
                module.to_empty(device="cpu")
    return model.float().eval()


def weight_shapes(model: transformers.PreTrainedModel) -> dict[str, torch.Size]:
    """Shapes by HF name, without the tied head."""
    return {name: p.shape for name, p in model.named_parameters()}


def load_weights(model: transformers.PreTrainedModel, weights: dict[str, np.ndarray]) -> None:
    state = {k: torch.from_numpy(w.astype(np.float32)) for k, w in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if model.config.tie_word_embeddings else []
    if missing != tied or unexpected:
        raise ValueError(f"missing {missing}, unexpected {unexpected}")


def steps_to_tie(steps: torch.Tensor, largest: int) -> torch.Tensor:
    """Returns the distance of scaled values to the nearest tie below `largest`.

    Ties beyond do not matter: both neighbours are clipped to the same code.
    """
    steps = steps.abs().double()
    return (steps - (steps.floor() + 0.5).clamp(max=largest - 0.5)).abs()


def bit_linears(model: transformers.PreTrainedModel) -> list[bitnet.AutoBitLinear]:
    return [m for m in model.modules() if isinstance(m, bitnet.AutoBitLinear)]


def weight_tie_distance(model: transformers.PreTrainedModel) -> float:
    """Returns the smallest distance of a latent weight to a tie, in steps."""
    weights = [m.weight for m in bit_linears(model)]
    distances = [steps_to_tie(w / w.abs().mean(), 1).min().item() for w in weights]
    return min(distances, default=float("inf"))


def activation_tie_distance(
    model: transformers.PreTrainedModel, tokens: torch.Tensor
) -> torch.Tensor:
    """Returns [B, T], the distance of each position to a tie in any linear."""
    distance = torch.full(tokens.shape, float("inf"), dtype=torch.float64)

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        steps = args[0] * (127 / args[0].abs().amax(-1, keepdim=True))
        distance.copy_(distance.minimum(steps_to_tie(steps, 127).amin(-1)))

    handles = [m.register_forward_pre_hook(hook) for m in bit_linears(model)]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return distance


def extend_tokens(
    model: transformers.PreTrainedModel,
    tokens: torch.Tensor,
    length: int,
    rng: np.random.Generator,
) -> torch.Tensor:
    """Returns tokens [1, length]: `tokens` [1, T] continued at random, off ties."""
    while tokens.shape[1] < length:
        order = torch.from_numpy(rng.permutation(model.config.vocab_size))
        trials = torch.cat([tokens.expand(len(order), -1), order[:, None]], dim=1)
        distance = activation_tie_distance(model, trials)[:, -1]
        # A margin on the margin: the batch of trials is not the batch stored.
        (good,) = torch.nonzero(distance >= 1.5 * MIN_ACTIVATION_TIE_DISTANCE, as_tuple=True)
        tokens = trials[good[:1]]
    return tokens


def greedy_tokens(model: transformers.PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor | None:
    """Returns [1, NEW_TOKENS] tokens, or None if they are repetitive or undecided."""
    whole = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
    )
    new = whole[:, PROMPT_TOKENS:]
    top = model(whole[:, :-1], use_cache=False).logits.topk(2, dim=-1)
    lead = (top.values[..., 0] - top.values[..., 1])[:, PROMPT_TOKENS - 1 :]
    if lead.min() < MIN_GREEDY_LEAD or len(new.unique()) < MIN_DISTINCT_TOKENS:
        return None
    if activation_tie_distance(model, whole).min() < MIN_ACTIVATION_TIE_DISTANCE:
        return None
    if not torch.equal(top.indices[:, PROMPT_TOKENS - 1 :, 0], new):
        raise ValueError("generate with its cache disagrees with the plain forward")
    return new


def config_json(case: Case) -> str:
    config = case.config.to_dict()
    config["architectures"] = [f"{type(case.config).__name__[:-6]}ForCausalLM"]
    fields = {k: config[k] for k in CONFIG_FIELDS if k in config}
    rope = config["rope_parameters"]
    fields["rope_theta"] = rope["rope_theta"]
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    fields["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    if case.online:
        fields["quantization_config"] = quantization_config().to_dict()
    return json.dumps(fields, sort_keys=True)


def try_seed(
    case: Case, model: transformers.PreTrainedModel, seed: int
) -> dict[str, np.ndarray] | None:
    """Returns the arrays of the file, or None if the seed is not acceptable."""
    rng = np.random.default_rng(seed)
    weights = draw_weights(case, weight_shapes(model), rng)
    load_weights(model, weights)
    if weight_tie_distance(model) < MIN_WEIGHT_TIE_DISTANCE:
        return None
    batch, length = case.shape
    empty = torch.empty((1, 0), dtype=torch.long)
    first = extend_tokens(model, empty, PROMPT_TOKENS, rng)
    arrays = {"config_json": np.array(config_json(case))}
    if case.greedy:
        new = greedy_tokens(model, first)
        if new is None:
            return None
        arrays["greedy"] = new.numpy().astype(np.int32)
    rows = [extend_tokens(model, row, length, rng) for row in [first, *[empty] * (batch - 1)]]
    tokens = torch.cat(rows)
    if activation_tie_distance(model, tokens).min() < MIN_ACTIVATION_TIE_DISTANCE:
        return None
    arrays["tokens"] = tokens.numpy().astype(np.int32)
    arrays["logits"] = model(tokens, use_cache=False).logits.numpy()
    if not np.isfinite(arrays["logits"]).all():
        raise ValueError(f"{case.name}: logits are not finite")
    return arrays | weights


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    folder = pathlib.Path(__file__).parent
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for case in cases():
        model = build_model(case)
        seed = case.seed
        while (arrays := try_seed(case, model, seed)) is None:
            seed += 1
        path = folder / f"{case.name}.npz"
        np.savez_compressed(path, **arrays)
        size, std = path.stat().st_size, arrays["logits"].std()
        print(f"{path.name}: seed {seed}, {size} bytes, std of logits {std:.2f}")


if __name__ == "__main__":
    main()

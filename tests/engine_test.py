"""`load` and `generate`: rows are independent, stops stop, draws follow the numbers they claim."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import ternax
from ternax import configs, engine
from ternax.errors import UsageError
from ternax.random_weights import abstract_model, random_model
from ternax.sampling import Sampling, sample

# Inputs stay floats: with int8 ones, a sum in another order may tip a rounding over.
CONFIG = dataclasses.replace(configs.get_config("tiny-llama"), num_layers=2, inputs="none")
BATCH, WIDTH, NEW = 3, 6, 26  # 32 slots
PROMPTS = np.random.default_rng(3).integers(0, CONFIG.vocab_size, (BATCH, WIDTH))
LENGTHS = np.array([WIDTH, 2, 5])
PAD = 7


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def generate(model):
    """`generate` with the options most tests share."""

    def call(tokens=PROMPTS, **options):
        options = dict(max_new_tokens=NEW, kv_dtype="f32", pad_id=PAD) | options
        return ternax.generate(model, tokens, **options)

    return call


@pytest.fixture(scope="module")
def greedy(generate):
    """[B, WIDTH + NEW] of three whole prompts."""
    out = generate()
    new = out[:, WIDTH:]
    assert len({tuple(row) for row in new}) == BATCH and len(np.unique(new)) > 10
    return out


# --- What generate returns -----------------------------------------------------------------


def test_shape_and_prompt(greedy):
    assert greedy.shape == (BATCH, WIDTH + NEW) and greedy.dtype == np.int32
    assert np.array_equal(greedy[:, :WIDTH], PROMPTS)


def test_greedy_is_the_largest_logit_of_the_full_forward(model, greedy):
    """Without a cache and without the loop."""
    logits = np.asarray(model(greedy))
    assert np.array_equal(logits[:, WIDTH - 1 : -1].argmax(-1), greedy[:, WIDTH:])


def test_ragged_row_equals_the_row_alone(generate, greedy):
    out = generate(lengths=LENGTHS)
    assert np.array_equal(out[0], greedy[0]), "a whole row, beside shorter ones"
    length = LENGTHS[1]
    assert np.array_equal(out[1, : length + NEW], generate(PROMPTS[1:2, :length])[0])
    for row, length in enumerate(LENGTHS):
        assert np.array_equal(out[row, :length], PROMPTS[row, :length])
        assert (out[row, length + NEW :] == PAD).all()


def test_what_lies_behind_a_prompt_is_not_read(generate):
    other = PROMPTS.copy()
    other[1, 2:], other[2, 5:] = 1, 2
    assert np.array_equal(generate(lengths=LENGTHS), generate(other, lengths=LENGTHS))


@pytest.mark.parametrize("count", [1, 17, 18, NEW - 1])
def test_fewer_tokens_are_the_first_ones(count, generate, greedy):
    """The loop runs in chunks of 16 behind prefill's token; any count may be asked for."""
    assert engine.CHUNK_TOKENS == 16
    out = generate(max_new_tokens=count)
    assert np.array_equal(out, greedy[:, : WIDTH + count])


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_rounded_caches_turn_close_choices_alone(kv_dtype, model, generate):
    """Each token is, by the full forward in f32, as good as the best one; logits are of order 1."""
    out = generate(kv_dtype=kv_dtype)
    logits = np.asarray(model(out))[:, WIDTH - 1 : -1]
    chosen = np.take_along_axis(logits, out[:, WIDTH:, None], axis=-1)[..., 0]
    assert (logits.max(-1) - chosen).max() < 0.1 < np.median(logits.max(-1) - np.median(logits))


# --- Stop tokens ---------------------------------------------------------------------------


def cut(row, stops):
    """A greedy row as it is when `stops` end it."""
    new = row[WIDTH:].tolist()
    ends = [new.index(stop) for stop in stops if stop in new]
    keep = WIDTH + min(ends) + 1 if ends else len(row)
    return np.where(np.arange(len(row)) < keep, row, PAD)


# Where rows end: at prefill's token, at the first and last of a chunk, at the very end, not.
@pytest.mark.parametrize("places", [(0, 0, 0), (1, 16, 25), (0, None, 17)])
def test_stop_tokens_end_each_row_alone(places, model, generate, greedy):
    stops = [int(row[WIDTH + at]) for row, at in zip(greedy, places, strict=True) if at is not None]
    stops += [token for token in PROMPTS[0].tolist() if token not in greedy[:, WIDTH:]][:1]
    right = np.stack([cut(row, stops) for row in greedy])
    for row, at in zip(right, places, strict=True):
        end = NEW if at is None else at + 1
        assert (row[WIDTH + end :] == PAD).all() and row[WIDTH + end - 1] != PAD, "not as listed"
    assert np.array_equal(generate(stop=stops), right), "the stop token itself is returned"

    pieces = [
        piece.shape[1]
        for piece in engine.stream(
            model,
            PROMPTS,
            lengths=np.full(BATCH, WIDTH),
            max_new_tokens=NEW,
            stop=stops,
            kv_dtype="f32",
            pad_id=PAD,
        )
    ]
    assert pieces == ([1] if places == (0, 0, 0) else [1, 16, NEW - 17]), "ends once all are done"


# --- Sampling ------------------------------------------------------------------------------

SAMPLE = jax.jit(sample, static_argnums=2)


def test_greedy_takes_the_first_of_the_largest_and_shows_a_nan():
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((8, 1001)).astype(np.float32)
    logits[1, [70, 800]] = 9.0  # a tie
    logits[2] = -np.inf
    logits[3] = 0.0
    logits[4, [5, 900]] = np.inf
    logits[5, [600, 601]] = np.nan
    logits[6, 1000] = 9.0
    drawn = np.asarray(SAMPLE(logits, jax.random.split(jax.random.key(0), 8), Sampling()))
    np.testing.assert_array_equal(drawn, logits.argmax(axis=-1))  # numpy's: first, NaN first
    assert list(drawn[[1, 2, 3, 4, 5, 6]]) == [70, 0, 0, 5, 600, 1000]


DRAWS = 20_000
LOGITS = np.log([0.30, 0.05, 0.22, 0.01, 0.18, 0.12, 0.04, 0.08]).astype(np.float32)


def kept(temperature, top_k, top_p) -> np.ndarray:
    """The distribution drawn from, in numpy: top-k first, then top-p of what is left."""
    p = np.exp(LOGITS.astype(np.float64) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    keep = order[: top_k or len(p)]
    inside = np.cumsum(p[keep]) / p[keep].sum()
    keep = keep[: int(np.searchsorted(inside, top_p - 1e-9)) + 1] if top_p < 1 else keep
    out = np.zeros_like(p)
    out[keep] = p[keep] / p[keep].sum()
    return out


@pytest.mark.parametrize(
    "temperature, top_k, top_p, support",
    [
        (1.0, 0, 1.0, 8),
        (0.5, 0, 1.0, 8),
        (2.5, 0, 1.0, 8),
        (1.0, 3, 1.0, 3),
        (1.0, 8, 1.0, 8),
        (1.0, 100, 1.0, 8),
        (1.0, 0, 0.25, 1),
        (1.0, 0, 0.5, 2),
        (1.0, 0, 0.6, 3),
        (1.0, 0, 0.99, 7),
        (1.0, 0, 0.9999, 8),
        (1.5, 4, 0.5, 2),
        (1.0, 2, 0.99, 2),
    ],
)
def test_draws_follow_the_distribution(temperature, top_k, top_p, support):
    keys = jax.random.split(jax.random.key(1), DRAWS)
    logits = np.tile(LOGITS, (DRAWS, 1))
    drawn = np.asarray(SAMPLE(logits, keys, Sampling(temperature, top_k, top_p)))
    expected = kept(temperature, top_k, top_p)
    counts = np.bincount(drawn, minlength=8)
    assert (expected > 0).sum() == support
    assert set(np.flatnonzero(counts)) == set(np.flatnonzero(expected))
    seen = expected > 0
    chi_square = ((counts - DRAWS * expected)[seen] ** 2 / (DRAWS * expected[seen])).sum()
    # Mean support - 1, standard deviation sqrt of twice that; the seed is fixed.
    assert chi_square < support - 1 + 4 * np.sqrt(2 * support)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.7, top_k=1), Sampling(3.0, top_p=1e-6)]
)
def test_one_choice_left_is_greedy(sampling):
    logits = np.random.default_rng(0).standard_normal((64, 50)).astype(np.float32)
    drawn = SAMPLE(logits, jax.random.split(jax.random.key(0), 64), sampling)
    assert np.array_equal(drawn, logits.argmax(-1))


def test_generate_with_one_choice_is_greedy(generate, greedy):
    assert np.array_equal(generate(temperature=1.0, top_k=1), greedy)


def test_draws_repeat_by_seed_and_row(generate, greedy):
    """A row's draws know the seed, its index and its own tokens; not the batch or the padding."""
    hot = dict(temperature=1.5)
    out = generate(**hot, seed=5)
    assert np.array_equal(out, generate(**hot, seed=5))
    for other in (greedy, generate(**hot, seed=6)):
        assert ((out != other)[:, WIDTH:].mean(axis=1) > 0.5).all()
    changed = PROMPTS.copy()
    changed[2] = changed[2, ::-1]
    assert np.array_equal(generate(changed, **hot, seed=5)[:2], out[:2])
    ragged = generate(lengths=LENGTHS[::-1], **hot, seed=5)
    alone = generate(PROMPTS[:1, : LENGTHS[-1]], **hot, seed=5)
    assert np.array_equal(ragged[0, : LENGTHS[-1] + NEW], alone[0])


def test_equal_rows_draw_apart(generate):
    out = generate(np.repeat(PROMPTS[:1], BATCH, axis=0), temperature=1.5)
    assert len({tuple(row) for row in out.tolist()}) == BATCH


# --- Compilation ---------------------------------------------------------------------------

COMPILED: list[str] = []


def _count(name, seconds, **_):
    if name == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(name)


@pytest.fixture(scope="module")
def compilations():
    """() -> programs compiled so far in this process."""
    jax.monitoring.register_event_duration_secs_listener(_count)
    return lambda: len(COMPILED)


def test_equal_shapes_compile_once(generate, greedy, compilations):
    """Other tokens, lengths, seeds and counts are data; so are other weights."""
    generate()  # what this process has not compiled yet
    before = compilations()
    generate(PROMPTS[::-1], lengths=LENGTHS, seed=9, max_new_tokens=NEW - 1)
    assert compilations() == before
    generate(PROMPTS[:, :3])  # another shape, to see that the counter counts
    assert compilations() > before


def test_another_model_of_the_shape_compiles_nothing(generate, greedy):
    before = engine.prefill._cache_size(), engine.decode._cache_size()
    other = ternax.generate(
        random_model(CONFIG, seed=8), PROMPTS, max_new_tokens=NEW, kv_dtype="f32", pad_id=PAD
    )
    assert (engine.prefill._cache_size(), engine.decode._cache_size()) == before
    assert not np.array_equal(other, greedy)


# --- What is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([1, 2, 3], r"tokens must be \[batch, length\] .* found \(3,\)"),
        ([[]], r"tokens must be \[batch, length\] .* found \(1, 0\)"),
        (np.zeros((0, 3), int), r"tokens must be \[batch, length\] .* found \(0, 3\)"),
        ([[0, 259]], r"tokens must lie in \[0, 259\), found 0 .. 259"),
        ([[-1, 5]], r"tokens must lie in \[0, 259\), found -1 .. 5"),
        ([[2**32 + 5]], r"tokens must lie in \[0, 259\), found 4294967301 .. 4294967301"),
        ([[1.0, 2.5]], "tokens must be integers, found float64"),
        ([["a"]], "tokens must be integers, found <U1"),
    ],
)
def test_bad_tokens(tokens, message, generate):
    with pytest.raises(UsageError, match=f"^{message}"):
        generate(tokens)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lengths=[6, 6]), r"lengths must be 3 values between 1 and 6, found \[6, 6\]"),
        (dict(lengths=[6, 0, 6]), r"lengths must be 3 values .* found \[6, 0, 6\]"),
        (dict(lengths=[6, 7, 6]), r"lengths must be 3 values .* found \[6, 7, 6\]"),
        (dict(lengths=[6, 1.5, 6]), r"lengths must be 3 values .* found \[6.0, 1.5, 6.0\]"),
        (dict(lengths=6), "lengths must be 3 values .* found 6"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, found 0"),
        (dict(max_new_tokens=-1), "max_new_tokens must be at least 1, found -1"),
        (
            dict(max_new_tokens=251),
            r"prompt and new tokens .* context of 256 positions, found 6 \+ 251",
        ),
        (dict(kv_dtype="fp8"), "kv_dtype must be one of bf16, int8, f32, found 'fp8'"),
        (dict(temperature=-0.1), "temperature must be finite, 0 or more, found -0.1"),
        (dict(temperature=float("nan")), "temperature must be finite, 0 or more, found nan"),
        (dict(temperature=float("inf")), "temperature must be finite, 0 or more, found inf"),
        (dict(top_k=-1), "top_k must be 0 or more, found -1"),
        (dict(top_p=0.0), r"top_p must lie in \(0, 1\], found 0.0"),
        (dict(top_p=1.01), r"top_p must lie in \(0, 1\], found 1.01"),
        (dict(top_p=float("nan")), r"top_p must lie in \(0, 1\], found nan"),
    ],
)
def test_bad_options(options, message, generate):
    with pytest.raises(UsageError, match=f"^{message}$"):
        generate(**options)


def test_the_whole_context_may_be_used(model):
    engine.check_prompts(CONFIG, PROMPTS, None, 250)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(layers=0), "layers must lie between 1 and 3 for tiny-llama, found 0"),
        (dict(layers=4), "layers must lie between 1 and 3 for tiny-llama, found 4"),
        (dict(layers=-1), "layers must lie between 1 and 3 for tiny-llama, found -1"),
        (dict(scheme="absmeen"), "scheme: expected one of absmean, .* found 'absmeen'"),
        (dict(scheme="absmean,granularity=column"), "granularity must be one of"),
        (dict(embed_dtype="fp8"), "embed_dtype must be one of"),
        (dict(packed=False, embed_dtype="int8"), "load: embed_dtype belong to packed=True"),
    ],
)
def test_bad_load(options, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        ternax.load("tiny-llama", **options)


def test_load_of_an_unknown_name():
    with pytest.raises(UsageError, match="no model is named 'tiny'; nearest: tiny-"):
        ternax.load("tiny")


# --- load ----------------------------------------------------------------------------------


@pytest.fixture
def load(monkeypatch):
    """`load`, without memory: what it makes of its arguments."""
    seeds = []

    def abstract(config, *, seed, layout, **packing):
        assert layout is None
        seeds.append(seed)
        return abstract_model(config, **packing)

    monkeypatch.setattr(engine, "random_model", abstract)

    def call(source, **options):
        model = nnx.eval_shape(lambda: ternax.load(source, **options))
        return model, seeds[-1:]

    return call


def test_load_passes_on_what_it_is_given(load):
    model, seeds = load(
        "70b", layers=2, seed=3, scheme="int4", embed_dtype="bf16", backend="reference"
    )
    right = dataclasses.replace(configs.get_config("70b"), num_layers=2, scheme="int4")
    assert (model.config, seeds) == (right, [3])
    assert model.layers.mlp.down.packed.data.shape == (2, 1, 8192, 28672 // 2)
    assert (model.embedding.format, model.head.format) == ("bf16", "int8")
    assert model.layers.mlp.down.backend == model.head.backend == "reference"


def test_load_takes_a_config_as_it_is(load):
    assert load(CONFIG)[0].config == CONFIG
    assert load(CONFIG, packed=False)[0].config == CONFIG


def test_load_without_quantization_leaves_inputs_alone(load):
    for packed in (True, False):
        config = load("tiny-bitnet", scheme="none", packed=packed)[0].config
        assert (config.scheme, config.inputs) == ("none", "none")


def test_float_models_follow_the_seed():
    one, other = (
        ternax.load(CONFIG, packed=False, layers=1, seed=seed).layers.mlp.up.kernel[...]
        for seed in (0, 1)
    )
    assert np.isfinite(one).all() and np.abs(one - other).mean() > 0.05

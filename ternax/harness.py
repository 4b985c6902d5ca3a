"""A byte model for lm-evaluation-harness: `lm_eval.simple_evaluate(model=harness.adapter(model))`.

What is scored and generated is plain functions here, which need no lm_eval; `adapter` wraps
them. A text is its UTF-8 bytes behind one END, as files are in training.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ternax.data import BYTES, END
from ternax.edit import fit_kernels
from ternax.engine import generate
from ternax.errors import UsageError
from ternax.models import Decoder

# New bytes where a request does not say how many.
MAX_NEW_TOKENS = 256


def windows(tokens: np.ndarray, first: int, length: int) -> Iterator[tuple[np.ndarray, int]]:
    """(up to length + 1 tokens, how many of its last targets count), each target once.

    The targets are tokens[first:], first at least 1. The last window reaches back as far as
    it can, so that the end of a long text is not judged by little context.
    """
    while first < len(tokens):
        end = min(first + length, len(tokens))
        start = max(0, end - length - 1)
        yield tokens[start:end], end - first
        first = end


def score(model: Decoder, context: str, continuation: str) -> tuple[float, bool]:
    """(nats of log-likelihood, whether greedy decoding gives it) of a continuation."""
    behind = continuation.encode()
    tokens = _tokens(context + continuation)
    total, greedy = 0.0, True
    graph, leaves = nnx.split(fit_kernels(model))
    # No text, no target: a likelihood of 1.
    for window, count in windows(tokens, len(tokens) - len(behind), model.config.max_context):
        # Behind what counts, padding changes nothing: attention is causal.
        room = np.zeros((1, 1 + _bucket(len(window) - 1, model.config.max_context)), np.int32)
        room[0, : len(window)] = window
        losses, same = _scores(graph, leaves, room)
        counted = slice(len(window) - 1 - count, len(window) - 1)
        total -= float(np.asarray(losses)[0, counted].sum(dtype=np.float64))
        greedy = greedy and bool(np.asarray(same)[0, counted].all())
    return total, greedy


def continued(
    model: Decoder,
    context: str,
    until: Sequence[str] = (),
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
) -> str:
    """The text generated behind a context, up to the first of `until` or an END."""
    most = model.config.max_context
    max_new_tokens = min(max_new_tokens, most - 1)
    tokens = _tokens(context)[-(most - max_new_tokens) :]
    prompt = np.zeros((1, _bucket(len(tokens), most - max_new_tokens)), np.int32)
    prompt[0, : len(tokens)] = tokens
    out = generate(
        model,
        prompt,
        lengths=np.array([len(tokens)]),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop=[END],
        pad_id=END,
    )
    new = out[0, len(tokens) :]
    # A model may have tokens above the bytes; they stand for no text.
    raw = bytes(new[new < BYTES].astype(np.uint8)).partition(bytes([END]))[0]
    text = raw.decode(errors="replace")
    return text[: min((at for word in until if (at := text.find(word)) >= 0), default=len(text))]


def adapter(model: Decoder):
    """The model as an `lm_eval.api.model.LM`.

    Raises:
      UsageError: lm_eval is not installed, or the model has fewer tokens than bytes.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise UsageError(
            f"harness: expected the package lm_eval, found none ({error}): pip install lm_eval"
        ) from error
    if model.config.vocab_size < BYTES:
        raise UsageError(
            f"harness: expected a vocabulary of {BYTES} at least, one token a byte; "
            f"{model.config.name} has {model.config.vocab_size}"
        )

    class ByteLM(LM):
        """Requests of lm_eval, one after another."""

        def loglikelihood(self, requests):
            return [score(model, *request.args) for request in requests]

        def loglikelihood_rolling(self, requests):
            return [score(model, "", *request.args)[0] for request in requests]

        def generate_until(self, requests):
            found = []
            for request in requests:
                context, wanted = request.args
                until = wanted.get("until") or []
                found.append(
                    continued(
                        model,
                        context,
                        [until] if isinstance(until, str) else until,
                        max_new_tokens=wanted.get("max_gen_toks", MAX_NEW_TOKENS),
                        temperature=wanted.get("temperature", 0.0)
                        if wanted.get("do_sample")
                        else 0.0,
                    )
                )
            return found

    return ByteLM()


def _tokens(text: str) -> np.ndarray:
    return np.frombuffer(bytes([END]) + text.encode(), np.uint8).astype(np.int32)


def _bucket(length: int, most: int) -> int:
    """The power of two from 32 up that holds `length`, at most `most`: few shapes compile."""
    return min(max(32, 1 << (length - 1).bit_length()), most)


@functools.partial(jax.jit, static_argnums=0)
def _scores(graph, leaves, tokens):
    """int32 [B, T + 1] -> nats of each target, whether it is the likeliest token: [B, T]."""
    logits = nnx.merge(graph, leaves).forward(tokens[:, :-1])[0]
    targets = tokens[:, 1:]
    log_p = jax.nn.log_softmax(logits, axis=-1)
    losses = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return losses, logits.argmax(axis=-1) == targets

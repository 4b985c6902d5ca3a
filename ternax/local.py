"""This package's own engine as a target of a speed test: rows of a batch are requests."""

import time
from typing import Any

import jax
import numpy as np

from ternax import cost, measure
from ternax.dispatch import Stepper
from ternax.errors import UsageError
from ternax.interop.tokenizer import Tokenizer
from ternax.models import Decoder
from ternax.prompts import Workload
from ternax.reply import Reply
from ternax.workload import backend_name


class Local:
    """A model on the first device. Requests under way together are rows of one batch, which
    begin and end together; stop tokens are ignored, so that lengths are as asked for."""

    here = True

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        dispatch: str = "program",
        seed: int = 0,
        tables: tuple[str, str] = ("int8", "int8"),
    ):
        """tables: how embedding and head are stored, for the bound."""
        self.name = dispatch
        self._stepper = Stepper(model, dispatch)
        self._tokenizer, self._seed, self._tables = tokenizer, seed, tables
        self._config = model.config
        device = jax.devices()[0]
        self.common: dict[str, Any] = dict(
            config=model.config.name,
            scheme=model.config.scheme,
            inputs=model.config.inputs,
            backend=backend_name(None, device),
            device=measure.device_name(device),
            layers=model.config.num_layers,
            seed=seed,
        )

    def prompt(self, workload: Workload) -> list[int]:
        """Token ids: the text's, or random ones."""
        if workload.text is not None:
            return self._tokenizer.encode(workload.text)
        random = np.random.default_rng(self._seed)
        return random.integers(0, self._config.vocab_size, workload.prompt_tokens).tolist()

    def ask(self, workload: Workload, concurrency: int, first: int, count: int) -> list[Reply]:
        del first  # nothing is cached between requests
        ids = self.prompt(workload)
        tokens = np.tile(np.array(ids, np.int32), (concurrency, 1))
        replies = []
        for _ in range(-(-count // concurrency)):
            start = time.perf_counter()
            arrivals = []
            try:
                for _ in self._stepper.answer(tokens, workload.max_tokens):
                    arrivals.append(time.perf_counter())
            except UsageError as error:  # longer than the model's context
                return [Reply(start, time.perf_counter(), error=str(error))] * count
            one = Reply(start, arrivals[-1], tuple(arrivals), len(ids), len(arrivals))
            replies += [one] * concurrency
        return replies

    def bound_tokens_per_s(self, workload: Workload, concurrency: int) -> float | None:
        """By the memory's read rate just now, halfway through the answer."""
        gb_per_s = measure.read_bandwidth(seconds=0.5, device=jax.devices()[0]).median
        embed, head = self._tables
        context = len(self.prompt(workload)) + workload.max_tokens
        plan = cost.plan(
            self._config,
            batch=concurrency,
            context=context,
            embed_dtype=embed,
            head_dtype=head,
        )
        return plan.bound_tokens_per_s(gb_per_s, context - workload.max_tokens / 2)

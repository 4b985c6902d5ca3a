"""How fast does it decode, and how close is that to the limit?

    python -m experiments.decode --config=70b

Plans, measures this machine's read bandwidth, makes the packed model in place,
compiles, warms up, then times prefill and decode. Every phase is a Record.
"""

import contextlib
import dataclasses
import signal
import sys
import threading
import time

from ternax import cost, measure
from ternax.config import ModelConfig
from ternax.errors import BackendUnavailable, DoesNotFit, Interrupted, OutputError, UsageError
from ternax.experiments import flags, screen
from ternax.experiments.progress import progress
from ternax.experiments.screen import row
from ternax.record import Record, Store, open_store

# A timed call of the device loop lasts about this long: long against the 1 ms a call
# costs the host, short enough that Ctrl-C is answered and samples are many.
_CALL_S = 0.25
# But so many samples at least, where there are tokens enough.
_MIN_SAMPLES = 8
_SLOW_PREFILL_S = 5.0
_TRITS = "random trits, 11/16 of them non-zero"


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is decoded.

    Attributes:
      batch: rows decoded together.
      prompt_length: tokens of each prompt.
      num_tokens: new tokens a row; prefill draws the first, the second warms up.
      prompt: text, one token a byte, instead of random tokens.
      kv_dtype, embed_dtype, head_dtype: how cache and tables are stored.
      backend: a kernel backend by name, or None.
      seed: of weights and prompt.
      profile_dir: where a profile of the timed decode goes, or None.
    """

    batch: int = 1
    prompt_length: int = 16
    num_tokens: int = 16
    prompt: str | None = None
    kv_dtype: str = "bf16"
    embed_dtype: str = "int8"
    head_dtype: str = "int8"
    backend: str | None = None
    seed: int = 0
    profile_dir: str | None = None

    @property
    def context(self) -> int:
        return self.prompt_length + self.num_tokens

    @property
    def timed_context(self) -> float:
        """Tokens a row holds in the middle of the timed steps."""
        return self.prompt_length + (2 + self.num_tokens) / 2

    def plan(self, config: ModelConfig, device=None) -> cost.Plan:
        """What it needs with a model on this machine; raises UsageError where it cannot be."""
        head = self.embed_dtype if config.tie_embeddings else self.head_dtype
        return cost.plan(
            config, batch=self.batch, context=self.context, prompt=self.prompt_length,
            kv_dtype=self.kv_dtype, embed_dtype=self.embed_dtype, head_dtype=head,
            available_bytes=cost.available_bytes(device))

    def tokens(self, config: ModelConfig):
        """int32 [B, T]: the prompt's bytes, or random tokens from the seed."""
        import numpy as np

        if self.prompt is not None:
            text = np.frombuffer(prompt_bytes(self.prompt), np.uint8)
            return np.tile(text.astype(np.int32), (self.batch, 1))
        random = np.random.default_rng(self.seed)
        shape = (self.batch, self.prompt_length)
        return random.integers(0, config.vocab_size, shape, dtype=np.int32)



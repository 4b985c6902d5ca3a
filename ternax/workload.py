"""What a decode run decodes, and on what: settings and checks, before anything is allocated."""

import dataclasses

from ternax import cost, measure
from ternax.config import ModelConfig
from ternax.errors import BackendUnavailable
from ternax.sharding import Layout


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is decoded.

    Attributes:
      batch: rows decoded together.
      prompt_length: tokens of each prompt; of `prompt` where that is given.
      filled: cache slots in use before the prompt, of random keys and values: a long context
        whose prefill nobody waits for. On one device alone.
      num_tokens: new tokens a row; prefill draws the first, the second warms up.
      prompt: text instead of random tokens.
      prompt_ids: its tokens; None: one a byte.
      kv_dtype, embed_dtype, head_dtype: how cache and tables are stored.
      backend: a kernel backend by name, or None.
      seed: of weights and prompt.
      profile_dir: where a profile of the timed decode goes, or None.
    """

    batch: int = 1
    prompt_length: int = 16
    num_tokens: int = 16
    prompt: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    filled: int = 0
    kv_dtype: str = "bf16"
    embed_dtype: str = "int8"
    head_dtype: str = "int8"
    backend: str | None = None
    seed: int = 0
    profile_dir: str | None = None

    @property
    def context(self) -> int:
        return self.filled + self.prompt_length + self.num_tokens

    @property
    def of_plan(self) -> dict:
        """What `cost.plan` counts of it."""
        return dict(
            batch=self.batch,
            context=self.context,
            prompt=self.prompt_length,
            kv_dtype=self.kv_dtype,
            embed_dtype=self.embed_dtype,
            head_dtype=self.head_dtype,
        )

    def plan(self, config: ModelConfig, device=None, layout: Layout | None = None) -> cost.Plan:
        """What it needs with this model on this machine. UsageError where it cannot be done."""
        available = cost.available_bytes(device)
        if layout is not None and available is not None:
            available //= measure.sharing(device)
        return cost.plan(
            config,
            available_bytes=available,
            layout=layout,
            fused=cost.fuses(device, self.backend),
            **self.of_plan,
        )

    def tokens(self, config: ModelConfig):
        """int32 [B, T]: the prompt's tokens, or random ones from the seed."""
        import numpy as np

        if self.prompt_ids is not None:
            return np.tile(np.array(self.prompt_ids, np.int32), (self.batch, 1))
        if self.prompt is not None:
            text = np.frombuffer(prompt_bytes(self.prompt), np.uint8)
            return np.tile(text.astype(np.int32), (self.batch, 1))
        random = np.random.default_rng(self.seed)
        shape = (self.batch, self.prompt_length)
        return random.integers(0, config.vocab_size, shape, dtype=np.int32)


def prompt_bytes(prompt: str) -> bytes:
    """UTF-8; what was no UTF-8 on the command line comes through as it was typed."""
    return prompt.encode(errors="surrogateescape")


def first_device():
    """The device that runs; BackendUnavailable where JAX finds none."""
    import jax

    try:
        return jax.devices()[0]
    except RuntimeError as error:  # JAX_PLATFORMS names what is not here
        raise BackendUnavailable(f"JAX finds no device: {error}") from error


def backend_name(name: str | None, device) -> str:
    """The backend that will run: the one asked for by name, or the platform's first."""
    from ternax.kernels import backends, tuning

    try:
        return backends.choose(device.platform, name=name).name
    except (backends.BackendError, tuning.TunedFileError) as error:
        raise BackendUnavailable(f"--backend: {error}") from error

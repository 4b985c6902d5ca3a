"""Bytes and bounds, counted on the abstract model: the plan and the run share one tree.

Nothing here allocates. A decode step must read every packed weight, the head and the
cache in use once; read bandwidth over those bytes bounds its rate.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
from flax import nnx

from ternax import measure
from ternax.anatomy import Shape
from ternax.config import ModelConfig
from ternax.edit import check_table_dtypes, pack_model
from ternax.errors import UsageError
from ternax.kernels.cpu.build import compiler
from ternax.kernels.packing import FORMATS
from ternax.models import MODELS
from ternax.nn.cache import KV_DTYPES, init_cache
from ternax.nn.linear import PackedLinear, QuantLinear
from ternax.nn.table import PackedTable
from ternax.random_weights import abstract_model, abstract_part
from ternax.roofline import Load
from ternax.sharding import Layout, check_batch
from ternax.table import binary, decimal, row

# What a process that has imported jax, traced, compiled and run the CPU backend holds beside its
# arrays, at its peak, which is while it compiles. Measured with 1b, 3b, 8b, 700m and 2b4t: 0.39 to
# 0.43 GiB on jax 0.10.2, 0.33 to 0.36 on 0.11.2; with a tiny model 0.04 less.
RUNTIME_BYTES = int((0.41 if jax.__version_info__ < (0, 11) else 0.36) * 2**30)

# Left free when deciding whether a plan fits: page cache, other processes' growth.
MARGIN_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one run needs and what bounds it. On a mesh, bytes are those of one device.

    Attributes:
      config: the model, cut to the layers that run.
      batch, context: rows, and tokens of each row (prompt and new).
      parameters: of the model as configured.
      ternary_parameters: those of the projections the scheme quantizes.
      bytes: part -> bytes resident: projections, scales, norms, embedding, head, cache,
        activations, runtime. A tied head is part of the embedding.
      step_bytes: part -> bytes one decode step reads at the full context.
      bits_per_weight: stored bits of a projection weight, scales included.
      available_bytes: free for this process, its own resident memory included; None
        where the device does not say.
      mesh: "data:2,tensor:4"; "" on one device.
    """

    config: ModelConfig
    batch: int
    context: int
    parameters: int
    ternary_parameters: int
    bytes: dict[str, int]
    step_bytes: dict[str, int]
    bits_per_weight: float
    available_bytes: int | None
    mesh: str = ""

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())

    def bytes_of(self, devices: int) -> int:
        """What a process holds that runs `devices` of the mesh's devices in one memory."""
        return self.total_bytes + (devices - 1) * (self.total_bytes - self.bytes["runtime"])

    @property
    def weight_bytes(self) -> int:
        """Everything of the model itself."""
        return sum(
            self.bytes[part] for part in ("projections", "scales", "norms", "embedding", "head")
        )

    @property
    def bytes_per_step(self) -> int:
        return sum(self.step_bytes.values())

    @property
    def fits(self) -> bool:
        """Whether the total, with a margin, is free. Unknown memory counts as enough."""
        return (
            self.available_bytes is None or self.total_bytes + MARGIN_BYTES <= self.available_bytes
        )

    def bytes_per_step_at(self, context: float) -> int:
        """`bytes_per_step` when each row holds `context` tokens, not yet its full context."""
        return self.bytes_per_step - round(self.step_bytes["cache"] * (1 - context / self.context))

    @property
    def load(self) -> Load:
        """The step for `ternax.roofline`: bytes as counted here, operations from the shape."""
        shape, step = Shape.of(self.config), self.step_bytes
        return dataclasses.replace(
            shape.load("trit2"),
            projection_bytes=float(step["projections"] + step["scales"] + step["norms"]),
            head_bytes=float(step["head"]),
            embedding_bytes=float(0 if self.config.tie_embeddings else self.bytes["embedding"]),
            embedding_row_bytes=step["embedding"] / self.batch,
            kv_bytes_per_token=step["cache"] / (self.batch * self.context),
        )

    def bound_tokens_per_s(
        self, read_bandwidth_gb_per_s: float, context: float | None = None
    ) -> float:
        """Tokens/s of the whole batch if a step took only the reading of its bytes.

        `context` is what each row holds by then; None: its full context.
        """
        read_bytes = self.bytes_per_step_at(self.context if context is None else context)
        return self.batch * read_bandwidth_gb_per_s * 1e9 / read_bytes

    @property
    def layers_that_fit(self) -> int:
        """How many of its layers would fit with everything else as it is; 0 when not even one."""
        parts = ("projections", "scales", "cache")
        per_layer = sum(self.bytes[part] for part in parts) / self.config.num_layers
        return max(0, self.config.num_layers - math.ceil(self._excess_bytes / per_layer))

    @property
    def batch_that_fits(self) -> int:
        """How many rows would fit with everything else as it is; 0 when not even one."""
        per_row = (self.bytes["cache"] + self.bytes["activations"]) / self.batch
        return max(0, self.batch - math.ceil(self._excess_bytes / per_row))

    def lines(self, whole: int | None = None) -> list[str]:
        """The plan for a screen. whole: layers of the whole model, if these are fewer."""
        config, layers = self.config, ""
        if whole and config.num_layers < whole:
            layers = f", first {config.num_layers} of {whole} layers"
        # The runtime alone is half a GiB, beside which a small model would vanish.
        unit, size = ("GiB", 2**30) if self.weight_bytes > 2**27 else ("MiB", 2**20)
        parts = [f"{part} {n / size:.2f}" for part, n in self.bytes.items() if n >= size / 200]
        where = f"a device of {self.mesh}: " if self.mesh else ""
        free = "unknown" if self.available_bytes is None else binary(self.available_bytes)
        return [
            row(
                "plan",
                f"{config.name}{layers}: {self.parameters:,} parameters, "
                f"{self.ternary_parameters:,} in {config.scheme} at {self.bits_per_weight:.3g} "
                "bits",
            ),
            row("", f"{where}{' + '.join(parts)} = {self.total_bytes / size:.2f} {unit}"),
            row("", f"available {free}: {'fits' if self.fits else 'DOES NOT FIT'}"),
            row(
                "",
                f"a decode step reads {decimal(self.bytes_per_step)}{' on each' * bool(self.mesh)} "
                f"(batch {self.batch}, context {self.context})",
            ),
        ]

    def refusal(self, last: str = "--fit=auto (the largest model of its family that fits)") -> str:
        """One line: the need by part, what there is, and flags with which it would fit."""
        parts = [
            f"{part} {binary(n)}" for part, n in self.bytes.items() if n >= self.total_bytes / 50
        ]
        ways = []
        if self.layers_that_fit:
            ways.append(f"--layers={self.layers_that_fit} (part of the model)")
        if self.batch_that_fits:
            ways.append(f"--batch={self.batch_that_fits}")
        return (
            f"{self.config.name} does not fit: it needs {binary(self.total_bytes + MARGIN_BYTES)} "
            f"({', '.join(parts)}, margin {binary(MARGIN_BYTES)}), available "
            f"{binary(self.available_bytes or 0)}; would fit: {', '.join([*ways, last])}"
        )

    @property
    def _excess_bytes(self) -> int:
        if self.available_bytes is None:
            return 0
        return max(0, self.total_bytes + MARGIN_BYTES - self.available_bytes)


def plan(
    config: ModelConfig | str,
    *,
    batch: int = 1,
    context: int = 128,
    prompt: int | None = None,
    scheme: str | None = None,
    kv_dtype: str = "bf16",
    embed_dtype: str = "int8",
    head_dtype: str = "int8",
    available_bytes: int | None = None,
    layout: Layout | None = None,
    fused: bool = False,
) -> Plan:
    """Counts one decode run without allocating it.

    Args:
      config: a ModelConfig or a config name.
      batch: rows decoded together.
      context: tokens of each row, prompt and new.
      prompt: tokens read at once in prefill; None: all of `context`.
      scheme: replaces the config's.
      kv_dtype, embed_dtype, head_dtype: how cache and tables are stored.
      available_bytes: memory to fit into, a device's; None leaves `fits` true.
      layout: of this config: the plan is one device's.
      fused: what runs makes one call of a projection where it can, see `fuses`.
    """
    if isinstance(config, str):
        from ternax.configs import get_config

        config = get_config(config)
    if scheme is not None:
        config = dataclasses.replace(config, scheme=scheme)
    if kv_dtype not in KV_DTYPES:
        raise UsageError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, found {kv_dtype!r}")
    if batch < 1 or not 1 <= context <= config.max_context:
        raise UsageError(
            f"batch must be at least 1 and context between 1 and {config.max_context} "
            f"for {config.name}, found {batch} and {context}"
        )
    check_table_dtypes(config, embed_dtype, head_dtype)
    check_batch(layout, batch)
    counted = []

    def build():
        model = MODELS[config.family](config, rngs=nnx.Rngs(0))
        counted.append(_count(model))
        return pack_model(model, embed_dtype=embed_dtype, head_dtype=head_dtype)

    # One trace for both: planning every named model takes a second or two.
    model = nnx.eval_shape(build)
    parameters, ternary = counted[0]
    parts, local, rows = _resident(model), config, batch
    bits = 8 * (parts["projections"] + parts["scales"]) / ternary
    if layout is not None:
        part, _ = abstract_part(layout, embed_dtype=embed_dtype, head_dtype=head_dtype)
        parts, local, rows = _resident(part), layout.local_config, batch // layout.batch
    held = context if layout is None else layout.local_context(context)
    cache = jax.eval_shape(lambda: init_cache(local, rows, held, kv_dtype))
    parts["cache"] = _nbytes(cache)
    fused = fused and layout is None and _takes_one_call(model)
    parts["activations"] = Shape.of(local).activation_bytes(
        rows, prompt or context, context, fused=fused
    )
    parts["runtime"] = RUNTIME_BYTES
    slots = cache.k.shape[3]
    table = parts["embedding"] if config.tie_embeddings else parts["head"]
    step = {
        "projections": parts["projections"],
        "scales": parts["scales"],
        "norms": parts["norms"],
        "head": table,
        "embedding": rows * (parts["embedding"] // local.vocab_size),
        "cache": parts["cache"] * held // slots,
    }
    mesh = "" if layout is None else str(layout)
    return Plan(
        config, batch, context, parameters, ternary, parts, step, bits, available_bytes, mesh
    )


def available_bytes(device=None) -> int | None:
    """Bytes a plan may fill there: what is free and what this process already holds."""
    free = measure.memory_available_bytes(device)
    return None if free is None else free + (measure.resident_bytes(device) or 0)


def fuses(device=None, backend: str | None = None) -> bool:
    """Whether a projection can be one call there: on a CPU, by its library. Where that is not
    built yet it counts if a compiler is there, since a plan builds nothing."""
    return measure.on_host(device) and backend in (None, "cpu") and compiler() is not None


def _takes_one_call(model) -> bool:
    """Whether the library has a call for each projection of an abstract packed model."""
    linears = [node for _, node in nnx.iter_modules(model) if isinstance(node, PackedLinear)]
    return all(node.inputs == "int8" and node.format in FORMATS for node in linears)


def largest_that_fits(family: str, plan_of: Callable[[ModelConfig], Plan]) -> Plan | None:
    """The plan of the largest named model of a family that fits, or None.

    Args:
      family: of the models to choose from.
      plan_of: the plan of a model. One it refuses with UsageError, such as a context
        past the model's, is passed over.
    """
    from ternax.configs import CONFIGS

    candidates = [config for config in CONFIGS.values() if config.family == family]
    # For the order alone; what fits is counted.
    candidates.sort(
        key=lambda c: c.num_layers * c.hidden_size * (c.hidden_size + c.intermediate_size)
    )
    for candidate in reversed(candidates):
        try:
            found = plan_of(candidate)
        except UsageError:
            continue
        if found.fits or found.available_bytes is None:
            return found
        if found.available_bytes < RUNTIME_BYTES + MARGIN_BYTES:
            return None  # not even an empty model would, and each plan takes a while
    return None


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(all parameters, those of the projections), on the abstract float model."""
    return _count(abstract_model(config, packed=False))


def _count(model) -> tuple[int, int]:
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    kernels = [node.kernel for _, node in nnx.iter_modules(model) if isinstance(node, QuantLinear)]
    return total, sum(math.prod(kernel.shape) for kernel in kernels)


def _nbytes(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _resident(model) -> dict[str, int]:
    """Part -> bytes of an abstract packed model."""
    parts = dict.fromkeys(("projections", "scales", "norms", "embedding", "head"), 0)
    counted = 0
    for path, node in nnx.iter_modules(model):
        if isinstance(node, PackedLinear):
            data = _nbytes(node.packed.data)
            parts["projections"] += data
            parts["scales"] += node.packed.nbytes - data
            counted += node.packed.nbytes
        elif isinstance(node, PackedTable):
            parts[str(path[-1])] += node.packed.nbytes
            counted += node.packed.nbytes
    parts["norms"] = _nbytes(nnx.state(model)) - counted
    return parts

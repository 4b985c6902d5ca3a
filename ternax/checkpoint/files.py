"""What saving and loading share: orbax as it is used here, hashes, checks, and its errors."""

import contextlib
import hashlib

import jax
import numpy as np

from ternax import processes
from ternax.checkpoint.leaves import Leaf
from ternax.errors import BadModelFile
from ternax.kernels.packing import FORMATS, has_invalid_codes

# The folder of the arrays, beside the manifest.
WEIGHTS = "weights"
_has_invalid_codes = jax.jit(has_invalid_codes, static_argnums=1)


@contextlib.contextmanager
def open_files():
    """orbax, and its reader and writer of trees. Half a second at first use."""
    import orbax.checkpoint as orbax

    # A model is saved and loaded by each process for itself, also among others.
    index = processes.current().index
    alone = orbax.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
    )
    options = {"multiprocessing_options": alone} if processes.current().count > 1 else {}
    handler = orbax.PyTreeCheckpointHandler(**options)
    with orbax.Checkpointer(handler, **options) as files:
        yield orbax, files


def why_not(leaf: Leaf, value: np.ndarray) -> str | None:
    """What is wrong with a leaf's values, or None."""
    if leaf.format in FORMATS:
        if bool(_has_invalid_codes(value, leaf.format)):
            invalid = 3 if leaf.format == "trit2" else 0
            return f"holds code {invalid}, which no quantizer of {leaf.format} emits"
    elif leaf.format == "bf16":
        if ((value & 0x7F80) == 0x7F80).any():
            return "holds a value that is not finite"
    elif not np.isfinite(value).all():
        return "holds a value that is not finite"
    return None


def sha256(array: np.ndarray) -> str:
    """Of an array's bytes, in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def first_line(error: Exception) -> str:
    """What orbax says on up to 60 lines, on one."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def unreadable(path, where: str, error: Exception) -> BadModelFile:
    """orbax and tensorstore have no common class of errors, so callers catch them all."""
    return BadModelFile(path, where, f"cannot be read, it is damaged: {first_line(error)}")

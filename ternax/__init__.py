"""ternax: ternary language models in JAX, measured.

    import ternax
    model = ternax.load("tiny-bitnet")
    out = ternax.generate(model, tokens, max_new_tokens=16)

Names resolve on first use, so that `import ternax` costs nothing.
"""

import importlib
import pathlib

__version__ = "0.1.0"

# In a checkout `kernels/`, `configs/` and `experiments/` stand beside this package.
# They are imported as ternax.kernels, ... there as in an installed wheel, so that
# one module is never loaded under two names.
_CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
if (_CHECKOUT / "kernels" / "packing.py").is_file():
    __path__.append(str(_CHECKOUT))

_PUBLIC = {
    "load": "ternax.engine",
    "save": "ternax.interop.saving",
    "generate": "ternax.engine",
    "pack_model": "ternax.edit",
    "perturb": "ternax.injection",
    "plan": "ternax.cost",
    "get_config": "ternax.configs",
    "ModelConfig": "ternax.config",
}
__all__ = list(_PUBLIC)


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'ternax' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_PUBLIC])

"""Shapes (K, N) of the packed products of the named models: one list for bench, tuner and tests.

Written out, since this floor knows no model; tests/kernels/shapes_test.py holds them equal
to the packed models of `ternax.configs`. q, k, v and gate, up are fused along N.
"""

SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "tiny-llama": {
        "qkv": (64, 192),
        "o": (96, 64),
        "gate_up": (64, 352),
        "down": (176, 64),
        "head": (64, 259),
    },
    "tiny-bitnet": {
        "qkv": (64, 128),
        "o": (64, 64),
        "gate_up": (64, 288),
        "down": (144, 64),
        "head": (64, 259),
    },
    "stdlib-bitnet": {
        "qkv": (256, 384),
        "o": (256, 256),
        "gate_up": (256, 512),
        "down": (256, 256),
        "head": (256, 256),
    },
    "1b": {
        "qkv": (2048, 3072),
        "o": (2048, 2048),
        "gate_up": (2048, 16384),
        "down": (8192, 2048),
        "head": (2048, 128256),
    },
    "3b": {
        "qkv": (3072, 5120),
        "o": (3072, 3072),
        "gate_up": (3072, 16384),
        "down": (8192, 3072),
        "head": (3072, 128256),
    },
    "8b": {
        "qkv": (4096, 6144),
        "o": (4096, 4096),
        "gate_up": (4096, 28672),
        "down": (14336, 4096),
        "head": (4096, 128256),
    },
    "13b": {
        "qkv": (5120, 15360),
        "o": (5120, 5120),
        "gate_up": (5120, 27648),
        "down": (13824, 5120),
        "head": (5120, 32000),
    },
    "70b": {
        "qkv": (8192, 10240),
        "o": (8192, 8192),
        "gate_up": (8192, 57344),
        "down": (28672, 8192),
        "head": (8192, 128256),
    },
    "405b": {
        "qkv": (16384, 18432),
        "o": (16384, 16384),
        "gate_up": (16384, 106496),
        "down": (53248, 16384),
        "head": (16384, 128256),
    },
    "bitnet-700m": {
        "qkv": (1536, 4608),
        "o": (1536, 1536),
        "gate_up": (1536, 8192),
        "down": (4096, 1536),
        "head": (1536, 32002),
    },
    "bitnet-2b4t": {
        "qkv": (2560, 3840),
        "o": (2560, 2560),
        "gate_up": (2560, 13824),
        "down": (6912, 2560),
        "head": (2560, 128256),
    },
    "bitnet-3b": {
        "qkv": (3200, 9600),
        "o": (3200, 3200),
        "gate_up": (3200, 17280),
        "down": (8640, 3200),
        "head": (3200, 32002),
    },
    "bitnet-7b": {
        "qkv": (4096, 12288),
        "o": (4096, 4096),
        "gate_up": (4096, 22016),
        "down": (11008, 4096),
        "head": (4096, 32000),
    },
}

# Other names of models, for configs too.
ALIASES = {"2b4t": "bitnet-2b4t"}


def canonical(name: str) -> str:
    """The one name of a model that may go by another."""
    return ALIASES.get(name, name)


def products(name: str) -> dict[str, tuple[int, int]]:
    """Name -> (K, N) of "70b", all of a model's products, or of "70b:down", one; {} for neither.

    What is found goes by the model's own name: "bitnet-2b4t:down" for "2b4t:down".
    """
    model, colon, part = name.partition(":")
    model = canonical(model)
    parts = SHAPES.get(model, {})
    return {f"{model}:{key}": shape for key, shape in parts.items() if not colon or key == part}

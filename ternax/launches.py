"""How many kernels a step launches for each layer, counted in a compiled program."""

import re

# What only names or counts bytes, and launches nothing.
_NAMES = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"}
_COMPUTATION = re.compile(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \([^\n]*\) -> [^\n]*\{\n)")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = .*? ([a-z][a-z\-]*)\(")
# The loop over layers within the loop over tokens, and one layer's chain in it.
_LAYERS, _CHAIN = "while/body/while/body/", 'ternax_chain/mpmd_map"'


def a_layer(text: str) -> float | None:
    """Launches a layer of a decode loop, from its optimized HLO; None where no loop is over layers.

    A turn of the loop may hold several layers: as many as it has chains, one where it has none.
    """
    loops = [part for part in _COMPUTATION.split(text) if _LAYERS in part and "_fusion" in part]
    if not loops:
        return None
    body = max(loops, key=lambda part: part.count(_LAYERS))
    launched = layers = 0
    for line in body.splitlines()[1:]:
        match = _INSTRUCTION.match(line)
        launched += match is not None and match[1] not in _NAMES
        layers += match is not None and match[1] == "custom-call" and _CHAIN in line
    return launched / max(1, layers)

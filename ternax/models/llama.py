"""Llama: the shared decoder as it is."""

from ternax.models.decoder import Decoder


class Llama(Decoder):
    """Llama 2 and 3: pre-norm blocks, no sub-norms."""

    sub_norms = False

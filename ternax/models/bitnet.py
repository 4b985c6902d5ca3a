"""BitNet b1.58: the shared decoder with a norm in front of o and of down."""

from ternax.models.decoder import Decoder


class BitNet(Decoder):
    """BitNet b1.58 (arXiv:2402.17764): sub-norms keep the int8 inputs of o and down in range."""

    sub_norms = True

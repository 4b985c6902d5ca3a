"""Counts of instructions, from texts as ptxas and nvdisasm write them."""

import pytest

from ternax.kernels import sass

PTXAS = """ptxas info    : Function properties for kernel
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""
SERIAL = (
    "ptxas info : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized"
)

# A loop that waits, inside the loop that multiplies, inside a loop over rows; a fetching loop.
DISASSEMBLY = """
.L_x_1:
        /*0000*/                   UIADD3 UR4, UR4, 0x1, URZ ;
.L_x_2:
        /*0010*/                   LDS.128 R8, [R0+UR7] ;
.L_x_3:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR7], R3 ;
        /*0030*/              @!P0 BRA `(.L_x_3) ;
        /*0040*/                   LOP3.LUT R40, R20, 0x3030303, RZ, 0xc0, !PT ;
        /*0050*/                   LOP3.LUT R41, R21, 0x3030303, RZ, 0xc0, !PT ;
        /*0060*/                   IGMMA.64x8x32.S8.S8 R36, R40, gdesc[UR16], R36 ;
        /*0070*/               @P1 BRA `(.L_x_2) ;
        /*0080*/              @UP0 UTMALDG.3D [UR8], [UR26] ;
        /*0090*/                   BRA `(.L_x_1) ;
        /*00a0*/                   BRA `(.L_x_9) ;
.L_x_9:
        /*00b0*/                   EXIT ;
"""


def test_resources():
    found = {"registers": 168, "spill_bytes": 12, "serialized_wgmma": 0}
    assert sass.resources(PTXAS) == found
    assert sass.resources(SERIAL + PTXAS) == found | {"serialized_wgmma": 1}
    with pytest.raises(ValueError, match="expected one kernel in the text of ptxas, found 0"):
        sass.resources("")


def test_the_main_loop_is_the_innermost_that_multiplies():
    loop = sass.main_loop(DISASSEMBLY)
    assert loop.instructions == {"BRA": 2, "LOP3": 2, "LDS": 1, "SYNCS": 1, "IGMMA": 1}
    assert loop.weights_a_thread == 16
    assert loop.issued_per_weight == 7 / 16
    assert loop.alu_per_weight == 2 / 16


def test_what_waits_behind_everything_else_is_no_loop():
    """It goes back into the middle of the loop, of which it then is no turn, but shorter."""
    waits = """        /*0058*/                   BRA `(.L_x_8) ;
.L_x_7:
        /*0060*/                   IGMMA.64x8x32.S8.S8 R36, R40, gdesc[UR16], R36 ;"""
    late = """.L_x_8:
        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR7], R3 ;
        /*00d0*/                   BRA `(.L_x_7) ;
"""
    igmma = DISASSEMBLY.splitlines()[10]
    long = DISASSEMBLY.replace(igmma, "\n".join([igmma] * 9 + [waits]))
    loop = sass.main_loop(long + late)
    assert loop.instructions["IGMMA"] == 10


def test_a_kernel_without_tensor_cores_has_none():
    with pytest.raises(ValueError, match="no loop with IGMMA"):
        sass.main_loop(DISASSEMBLY.replace("IGMMA", "HMMA"))

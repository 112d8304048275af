"""The reader of compiled GPU kernels, on a listing whose numbers are known."""

from flashpo.bench import cubin

LISTING = """
.text.kernel:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   STL [R1], R4 ;
.L_x_0:
        /*0020*/              @!P0 LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64] ;
        /*0040*/                   LDL R4, [R1] ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0060*/               @P1 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
.L_x_1:
        /*0080*/                   BRA `(.L_x_1) ;
"""


def test_a_listing():
    code = cubin.parse(LISTING, registers=168, warps=4, shared=39_936)
    assert code.widths(r"LDG\.") == {16: 1, 2: 1}
    assert code.widths(r"LDG\.", hot=True) == {2: 1}
    assert code.widths("LDGSTS") == {16: 1}
    assert (code.spills, code.spills_in_main_loops) == (2, 1)
    assert len(code.loops) == 1  # what follows a kernel's end is none
    assert [code.resident_warps(capability) for capability in cubin.MULTIPROCESSORS] == [12, 12, 8]

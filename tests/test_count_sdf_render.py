"""The renderer's kernels stay within a number of instructions; and the count itself, on a piece of machine code."""

import re

import pytest

from benchmarks import count_sdf_render
from tests import scripts

# warp instructions per sample on sm_90, with some room for other versions of the compiler:
# 84, 233 and 624 with Triton 3.9
CEILINGS = {"search": 100, "forward": 260, "backward": 680}


def test_instructions_per_sample_are_below_their_ceilings():
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    done = scripts.run("-m", "benchmarks.count_sdf_render", "--products", "tf32", timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    counted = {name: int(n) for name, n in re.findall(r"(\w+) tf32 (\d+)", done.stdout.splitlines()[-1])}
    assert counted.keys() == CEILINGS.keys()
    assert all(counted[name] <= ceiling for name, ceiling in CEILINGS.items()), counted


SASS = """
        /*0000*/                   S2R R0, SR_CTAID.X ;
.L_x_1:
        /*0010*/                   IADD3 R0, R0, 0x1, RZ ;
.L_x_0:
        /*0020*/                   FADD R1, R1, R2 ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
        /*0040*/              @!P1 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);
"""
TTGIR = """
    %c0_i32 = arith.constant 0 : i32
    %c1_i32 = arith.constant 1 : i32
    %c8_i32 = arith.constant 8 : i32
    scf.for %i = %0 to %1 step %c1_i32  : i32 {
      %a = scf.for %k = %c0_i32 to %c8_i32 step %c1_i32 iter_args(%b = %a) -> (f32)  : i32 {
        scf.yield %b : f32
      }
    }
"""


def test_instructions_in_loops_count_once_per_trip():
    once, outer, inner = 3, 2, 2  # before and after, in the outer loop alone, in the inner one
    assert count_sdf_render.instructions(SASS, TTGIR, [5]) == once + 5 * (outer + 8 * inner)


def test_code_without_the_loops_of_the_source_is_not_counted():
    of_unknown_length = TTGIR.replace("%c0_i32 to %c8_i32", "%0 to %1")
    one_loop = SASS.replace("@P0 BRA `(.L_x_0)", "NOP")
    with pytest.raises(AssertionError, match="lacks a loop of unknown length"):
        count_sdf_render.instructions(one_loop, of_unknown_length, [5, 8])
    loop = "    scf.for %i = %0 to %1 step %c1_i32  : i32 {\n    }\n"
    with pytest.raises(AssertionError, match="nested differently"):
        count_sdf_render.instructions(SASS, loop + loop, [5, 8])

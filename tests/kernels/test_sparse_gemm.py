"""How the GEMMs are launched and tuned. tests/test_compiles.py checks LAUNCHES, test_sparse_conv.py the results."""

import itertools

import pytest
import torch

from tests.ahead_of_time import ASSEMBLED_TARGETS, Launch
from tests.check import launches
from unipad.kernels import sparse_gemm, tuning
from unipad.kernels.sparse_gemm import BLOCK_E, BLOCK_R, GROUP_OF, STAGES_OF, d_weight_of, gather_gemm
from unipad.kernels.sparse_tiles import NeighborTable

# PRECISION matters for fp32 only, WIDEN in the interpreter only
IEEE, TF32 = dict(PRECISION="ieee", WIDEN=False), dict(PRECISION="tf32", WIDEN=False)
BF16, FP32 = ("bf16",), ("fp32",)  # element types
BY_16 = ("I", "O")  # sizes that are multiples of 16
EVERY, ONE_TARGET = ASSEMBLED_TARGETS, ("sm_90",)  # targets whose limits are asserted
# the epilogue (scale, shift, residual, ReLU): none of it, all of it
NO_NORM = dict(norm_x_ptr=None, statistics_ptr=None, norm_out_ptr=None)
NO_PARTS = NO_NORM | dict(parts_ptr=None)
PLAIN = NO_PARTS | dict(scale_ptr=None, shift_ptr=None, residual_ptr=None, RELU=False)
FULL = NO_PARTS | dict(RELU=True)
# in training: the moments for the batch norm after it; in the backward the sums for the one before it
MOMENTS = NO_NORM | dict(scale_ptr=None, shift_ptr=None, residual_ptr=None, RELU=False)
SUMS = dict(scale_ptr=None, shift_ptr=None, RELU=False)
POINTERS = dict.fromkeys(["scale_ptr", "shift_ptr", "parts_ptr", "statistics_ptr"], "*fp32")
# gradients of the weights of four layers at once, as in a stage with two blocks
OF_LAYERS = dict(features_ptrs=("*",) * 4, d_out_ptrs=("*",) * 4, partial_ptr="*fp32")
# num_stages by vendor: the default, and the tuner's alternative
MORE, FEWER = ({vendor: stages[i] for vendor, stages in STAGES_OF.items()} for i in range(2))
# C = 0 where PACK = 1: without packing, the kernel needs no compile-time channel count
LAUNCHES = [
    Launch(
        "_gather_gemm_kernel",
        # only the gradient of the features is mirrored, and only there the weights are transposed
        flags | act | dict(MIRRORED=mirrored, TRANSPOSED=mirrored, VIA_L1=True, C=c, PACK=pack, STEPS=steps)
        | dict(BLOCK_M=m, BLOCK_I=i, BLOCK_O=o),
        POINTERS, divisible, elements, num_warps=warps, num_stages=MORE,
        registers=registers, shared=shared, mma=mma, limits_on=targets,
    )
    for flags, act, mirrored, c, pack, steps, m, i, o, warps, divisible, elements, mma, registers, shared, targets in [
        (IEEE, PLAIN, False, 16, 4, 1, 128, 64, 16, 4, BY_16, BF16, "HGMMA", 80, 59904, EVERY),
        (IEEE, PLAIN, True, 32, 2, 1, 128, 64, 32, 4, BY_16, BF16, "HGMMA", 80, 64000, ONE_TARGET),
        (IEEE, PLAIN, False, 0, 1, 1, 128, 64, 64, 4, BY_16, BF16, "HGMMA", 104, 74760, ONE_TARGET),
        (IEEE, PLAIN, False, 0, 1, 2, 64, 64, 128, 4, BY_16, BF16, "HGMMA", 120, 74248, ONE_TARGET),
        (IEEE, FULL, False, 0, 1, 2, 128, 64, 128, 8, BY_16, BF16, "HGMMA", 184, 99336, EVERY),
        (IEEE, PLAIN, True, 0, 1, 2, 128, 64, 128, 8, BY_16, BF16, "HGMMA", 120, 99336, ONE_TARGET),
        (IEEE, MOMENTS, False, 0, 1, 2, 128, 64, 128, 8, BY_16, BF16, "HGMMA", 184, 99336, EVERY),
        (IEEE, MOMENTS, False, 16, 4, 1, 128, 64, 16, 4, BY_16, BF16, "HGMMA", 80, 59904, ONE_TARGET),
        (IEEE, MOMENTS, False, 5, 3, 1, 64, 16, 16, 4, (), FP32, "", 96, 18560, ONE_TARGET),
        (IEEE, SUMS, True, 0, 1, 2, 128, 64, 128, 8, BY_16, BF16, "HGMMA", 184, 99336, EVERY),
        (IEEE, SUMS, True, 0, 1, 2, 64, 64, 128, 4, BY_16, BF16, "HGMMA", 184, 74248, ONE_TARGET),
        (IEEE, SUMS, True, 16, 4, 1, 128, 64, 16, 4, BY_16, BF16, "HGMMA", 80, 59904, EVERY),
        (IEEE, SUMS | dict(residual_ptr=None), True, 0, 1, 1, 128, 64, 64, 4, BY_16, BF16, "HGMMA", 168, 74760,
         ONE_TARGET),
        (IEEE, SUMS, True, 0, 1, 2, 64, 32, 32, 4, BY_16, FP32, "", 168, 25096, EVERY),
        (IEEE, PLAIN, False, 5, 6, 1, 64, 32, 16, 4, (), BF16, "HGMMA", 128, 8192, EVERY),
        (IEEE, PLAIN, False, 0, 1, 2, 64, 32, 64, 4, (), BF16, "HGMMA", 104, 8192, ONE_TARGET),
        (TF32, PLAIN, False, 16, 2, 1, 64, 32, 16, 4, BY_16, FP32, "HGMMA", 48, 32000, ONE_TARGET),
        (TF32, PLAIN, False, 0, 1, 2, 128, 32, 64, 4, BY_16, FP32, "HGMMA", 128, 74760, ONE_TARGET),
        (TF32, PLAIN, True, 0, 1, 2, 128, 32, 64, 4, BY_16, FP32, "HGMMA", 128, 74760, ONE_TARGET),
        (IEEE, PLAIN, False, 5, 3, 1, 64, 16, 16, 4, (), FP32, "", 96, 18560, ONE_TARGET),
        (IEEE, FULL, False, 0, 1, 2, 64, 32, 32, 4, BY_16, FP32, "", 128, 25096, EVERY),
        (IEEE, PLAIN, True, 0, 1, 2, 64, 16, 16, 4, (), FP32, "", 80, 10760, ONE_TARGET),
    ]
] + [
    Launch(
        "_gather_gemm_kernel",
        IEEE | PLAIN | dict(MIRRORED=False, TRANSPOSED=False, VIA_L1=via_l1, C=0, PACK=1, STEPS=2)
        | dict(BLOCK_M=m, BLOCK_I=64, BLOCK_O=128),
        POINTERS, BY_16, BF16, num_warps=m // 16, num_stages=stages,
        registers=120, shared=shared, mma="HGMMA",
    )
    for via_l1, m, stages, shared in [  # the tuner's other candidates for 128 input and output channels
        (False, 128, MORE, 99336),
        (False, 64, MORE, 74248),
        (True, 128, FEWER, 66568),
    ]
] + [
    Launch(  # the tuner's candidates for few channels: several kernel offsets packed into one `tl.dot`, or one (c = 64)
        "_gather_gemm_kernel",
        IEEE | PLAIN | dict(MIRRORED=True, TRANSPOSED=True, VIA_L1=via_l1, C=c if c < 64 else 0, PACK=64 // c, STEPS=1)
        | dict(BLOCK_M=m, BLOCK_I=64, BLOCK_O=max(c, 16)),
        POINTERS, BY_16, BF16, num_stages=stages, limits_on=(),  # must only compile
    )
    for c in (8, 16, 32, 64)
    for via_l1, m, stages in [(True, 64, MORE), (False, 128, MORE), (True, 128, FEWER)]
] + [
    Launch(
        "_d_weight_kernel",
        flags | dict(BLOCK_R=BLOCK_R, BLOCK_I=i, BLOCK_O=o),
        OF_LAYERS | dict(first_ptr="*i64", end_ptr="*i64"), divisible, elements,
        num_warps=8 if i * o > 8192 else 4, num_stages=stages,
        registers=registers, shared=shared, mma=mma, limits_on=targets,
    )
    for flags, i, o, stages, divisible, elements, mma, registers, shared, targets in [
        (IEEE, 16, 16, MORE, BY_16, BF16, "HMMA", 56, 7168, EVERY),
        (IEEE, 128, 128, MORE, BY_16, BF16, "HGMMA", 168, 99328, EVERY),
        (IEEE, 64, 64, MORE, (), BF16, "HGMMA", 192, 16384, ONE_TARGET),
        (TF32, 64, 64, MORE, BY_16, FP32, "HGMMA", 112, 99328, ONE_TARGET),
        (IEEE, 32, 32, FEWER, BY_16, FP32, "", 56, 33792, EVERY),
        (IEEE, 16, 16, FEWER, (), FP32, "", 72, 17408, ONE_TARGET),
    ]
] + [
    Launch(
        "_d_weight_of_groups_kernel", dict(WIDEN=False, BLOCK_R=BLOCK_R, C=c, GROUP=GROUP_OF[c], BLOCK_O=max(c, 16)),
        OF_LAYERS, ("O", "R"), BF16, num_warps=8 if GROUP_OF[c] * c * c >= 8192 else 4, num_stages=MORE,
        registers=registers, shared=shared, mma="HGMMA", limits_on=targets,
    )
    for c, registers, shared, targets in [
        (8, 0, 0, ()),  # only has to compile
        (16, 128, 59392, ONE_TARGET),
        (32, 0, 0, ()),  # likewise
        (64, 176, 124928, EVERY),
    ]
] + [
    Launch(
        "_sum_chunks_kernel", dict(BLOCK_E=BLOCK_E), dict(partial_ptr="*fp32", d_weight_ptr="*fp32"), BY_16, FP32,
        registers=64, shared=1024,
    )
]  # fmt: skip


@pytest.fixture
def tuning_ends():
    """Disables tuning after a test that enables it."""
    yield
    tuning.disable()


def test_every_candidate_gives_the_same_result_up_to_rounding(tuning_ends, device):
    """The clock makes each candidate the fastest in turn; only the order of summation differs."""
    gen = torch.Generator().manual_seed(0)
    table = torch.where(torch.rand(3, 130, generator=gen) < 0.5, torch.randint(0, 130, (3, 130), generator=gen), -1)
    table = NeighborTable(table.int().to(device))
    x, g, weight = (torch.randn(size, generator=gen).half().to(device) for size in [(130, 16), (130, 32), (32, 3, 16)])
    for run, num_candidates in [
        (lambda: gather_gemm(x, weight, table, allow_tf32=False), 8),
        (lambda: d_weight_of([(x, g), (x + 1, g)], table, allow_tf32=False), 3),
    ]:
        default = run()
        for fastest in range(num_candidates):
            calls = itertools.count()

            def clock(fn, calls=calls, fastest=fastest):
                fn()
                return abs(next(calls) - fastest)

            tuning.enable(timer=clock)
            torch.testing.assert_close(run(), default, rtol=1e-3, atol=1e-3 * default.abs().max().item())
            assert next(calls) == num_candidates


def test_only_candidates_that_compute_the_sums_are_timed(tuning_ends, monkeypatch, device):
    """The sums that a candidate with too many tiles leaves to another launch would not be timed."""
    monkeypatch.setattr(sparse_gemm, "MAX_TILES", 1)
    table = NeighborTable(torch.arange(65, dtype=torch.int32, device=device)[None])
    x, weight = torch.ones(65, 16, device=device).half(), torch.ones(32, 1, 16, device=device).half()
    calls = itertools.count()

    def clock(fn):
        fn()
        return next(calls)

    tuning.enable(timer=clock)
    _, (_, rows) = gather_gemm(x, weight, table, allow_tf32=False, with_moments=True)
    assert rows == 128 and next(calls) == 4  # candidates with tiles of 128 rows


def test_a_candidate_is_charged_for_tiles_that_no_earlier_layer_has_made(tuning_ends, device):
    """The second of two layers on a table would be faster with other tiles, but by less than they cost."""
    idx = torch.where(torch.rand(3, 130) < 0.5, torch.randint(0, 130, (3, 130)), -1).int().to(device)
    x, narrow, wide = (torch.randn(size).half().to(device) for size in [(130, 16), (8, 3, 16), (32, 3, 16)])
    tables = NeighborTable(idx), NeighborTable(idx.clone())
    # ms of the GEMM with tiles of 64 rows, of 128 rows and of six other candidates, in each of three searches: `narrow`
    # and then `wide` on tables[0], `wide` on tables[1]; making tiles takes 10 ms more
    kernel_ms = itertools.chain([2, 1] + [2] * 6, [1, 2] + [3] * 6, [1, 2] + [3] * 6)

    def clock(fn):
        with launches() as launched:
            fn()
        assert launched[-1] == "_gather_gemm_kernel"
        return next(kernel_ms) + 10 * launched.count("_tiles_kernel")

    def tiles_made(weight, table):
        with launches() as launched:
            gather_gemm(x, weight, table, allow_tf32=False)
        # the search comes first; the chosen launch is the last, right after its tiles if they are not cached
        return launched[-2:].count("_tiles_kernel")

    tuning.enable(timer=clock)
    assert tiles_made(narrow, tables[0]) == 1 and tiles_made(wide, tables[0]) == 0
    tuning.enable(timer=clock)  # forgets the choices
    assert tiles_made(wide, tables[1]) == 1  # without `narrow` before it, `wide` gets its own fastest tiles
    assert next(kernel_ms, None) is None
    for table, block_m in zip(tables, (128, 64), strict=True):
        with launches() as launched:
            table.tiles(block_m)
        assert not launched  # these are the cached tiles

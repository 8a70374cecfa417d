import pytest
import torch

import unipad.kernels.pixel_sum
from tests.ahead_of_time import ASSEMBLED_TARGETS, Launch
from tests.conftest import HAS_GPU
from tests.golden import assert_close_to_max
from unipad.kernels.pixel_sum import BLOCK, HIT, pixel_sum, sort_hits


def launch(lanes_per_pixel, channels, bins, registers):
    """A launch for tests/test_compiles.py to compile. lanes: rows of the tile; registers: their limit."""
    types = dict(begin_ptr="*i32", order_ptr="*i32", hits_ptr="*fp32", h="i32", w="i32")
    blocks = unipad.kernels.pixel_sum._blocks(lanes_per_pixel, channels, bins)
    return Launch(
        "_pixel_sum_kernel", blocks, types, divisible=("C", "D"), elements=("bf16",),
        registers=registers, shared=2048, limits_on=ASSEMBLED_TARGETS,
    )  # fmt: skip


def launch_sort(kernel, registers, shared):
    types = dict.fromkeys(("slot_ptr", "begin_ptr", "placed_ptr", "order_ptr"), "*i32")
    return Launch(
        kernel, dict(BLOCK=BLOCK), types, elements=("fp32",),
        registers=registers, shared=shared, limits_on=ASSEMBLED_TARGETS,
    )  # fmt: skip


LAUNCHES = [
    launch_sort("_place_kernel", registers=32, shared=2048),
    launch_sort("_rank_kernel", registers=32, shared=2048),
    # lanes per pixel, channels, depth bins, registers
    launch(8, 128, 64, 64),
    launch(1, 128, 64, 112),
]


@pytest.mark.parametrize("pairs, quads", [(1, 1), (BLOCK, 7), (BLOCK + 1, 1), (3 * BLOCK - 5, 40)])
@pytest.mark.parametrize("seen", [0.0, 0.3, 1.0])
def test_sort_hits_is_a_stable_sort(pairs, quads, seen, device):
    quad_idx = torch.randint(quads, (2, pairs), dtype=torch.int32).where(torch.rand(2, pairs) < seen, -1)
    flat = quad_idx.flatten()
    counts = torch.stack([(flat == q).sum() for q in range(quads)]).int()
    slot = torch.empty_like(flat)  # poisoned where the pair is not seen
    for q, count in enumerate(counts.tolist()):
        slot[flat == q] = torch.randperm(count, dtype=torch.int32)
    given = (t.to(device) for t in (quad_idx, slot.view(2, pairs), torch.nn.functional.pad(counts, (1, 0))))
    begin, order = sort_hits(*given)
    hits = flat.where(flat >= 0, quads).argsort(stable=True)[: counts.sum()]
    assert torch.equal(order[: len(hits)].cpu(), hits.int())
    assert begin.tolist() == [0, *counts.cumsum(0).tolist()] and begin.dtype == order.dtype == torch.int32


def test_sort_hits_by_hand(device):
    """Seven pairs; pairs 0, 3 and 6 fall into quad 1, pair 5 into quad 2, and no pair into quad 0."""
    quad_idx = torch.tensor([[1, -1, -1, 1, -1, 2, 1]], dtype=torch.int32, device=device)
    slot = torch.tensor([[2, 0, 0, 0, 0, 0, 1]], dtype=torch.int32, device=device)
    begin, order = sort_hits(quad_idx, slot, torch.tensor([0, 0, 3, 1], dtype=torch.int32, device=device))
    assert begin.tolist() == [0, 0, 3, 4] and order[:4].tolist() == [0, 3, 6, 5]


def test_pixel_sum_is_the_gradient_of_interpolation(device, monkeypatch):
    """Hits (projections of voxels into views) of two levels; only the second level's are summed. Some lie exactly on a
    column or row of pixels.

    The interpolation weights are written here as dense matrices, over all rows, columns and bins.
    """
    if not HAS_GPU:
        monkeypatch.setattr(unipad.kernels.pixel_sum, "TILE", 2**9)  # so that the 72 pixels take several programs
    B, N, h, w, C, D, V = 2, 3, 3, 4, 5, 6, 20
    hits = torch.rand(2, B, N, V, HIT.value, dtype=torch.float64)  # [levels, ...]
    hits[..., :3] *= torch.tensor([w - 1, h - 1, D - 1])  # column, row, depth bin
    hits[..., ::4, 0] = hits[..., ::4, 0].round()
    hits[..., ::3, 1] = hits[..., ::3, 1].round()
    visible = torch.rand(B, N, V) < 0.6
    d_volume = torch.randn(B, 1, 4, 5, C, dtype=torch.float64)  # V = 1 x 4 x 5 voxels

    x, y, z, probability, d_probability = hits[1].unbind(-1)  # [B, N, V] each
    view = torch.arange(B * N).view(B, N, 1)
    quad = ((view * h + y.floor()) * w + x.floor()).where(visible, B * N * h * w).long()  # invisible: after all quads
    first_level = torch.full_like(quad, -1)  # its hits are sorted before all quads of the second and are not read
    by_quad, order = torch.stack([first_level, quad]).flatten().sort(stable=True)
    begin = torch.searchsorted(by_quad, torch.arange(B * N * h * w + 1), out_int32=True)
    order = order.int()

    rows = (1 - (y[..., None] - torch.arange(h)).abs()).clamp(min=0)  # [B, N, V, h]
    columns = (1 - (x[..., None] - torch.arange(w)).abs()).clamp(min=0)
    bins = (1 - (z[..., None] - torch.arange(D)).abs()).clamp(min=0)
    weight = rows[..., None] * columns[..., None, :] * visible[..., None, None]  # [B, N, V, h, w]
    expected = torch.einsum("bnvhw,bnv,bvc->bnhwc", weight, probability, d_volume.view(B, V, C))
    expected_depth = torch.einsum("bnvhw,bnv,bnvd->bnhwd", weight, d_probability, bins)

    for many_hits in (False, True):
        d_feature, d_depth = torch.empty_like(expected, device=device), torch.empty_like(expected_depth, device=device)
        given = (t.to(device) for t in (begin, order, hits.flatten(1, 3), d_volume))
        pixel_sum(d_feature, d_depth, *given, many_hits=many_hits)
        assert_close_to_max(d_feature.cpu(), expected, 1e-12)
        assert_close_to_max(d_depth.cpu(), expected_depth, 1e-12)

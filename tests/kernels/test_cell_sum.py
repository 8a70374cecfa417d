import torch
from torch.nn import functional as F

from tests.ahead_of_time import Launch
from tests.golden import assert_close_to_max
from unipad.kernels.cell_sum import BLOCK_N, cell_sum
from unipad.kernels.trilinear import trilinear_ref

LAUNCHES = [
    Launch(
        "_cell_sum_kernel", dict(C=32, BLOCK_N=BLOCK_N), dict(order_ptr="*i64", first_of_cell_ptr="*i64"),
        divisible=("CHANNELS",), elements=("fp32",), num_warps=1, registers=128, shared=256,
    )
]  # fmt: skip


OUTSIDE = 2**31 - 1  # what `cell_of` returns for samples in no cell
COLUMNS = 16  # of d_feature and feature_hat, padding included


def make_inputs(R, S, channels, B=2, Z=2, Y=3, X=2):
    """Arguments of `cell_sum`, and what `trilinear` needs: grid coordinates [R, S, 3], volume indices [R].

    The rays leave their volumes; the first runs along cell faces, with more than BLOCK_N samples per cell.
    """
    volume_idx = torch.arange(R) % B
    origins, directions = torch.randn(R, 3) * 0.1, F.normalize(torch.randn(R, 3), dim=1)
    origins[:1], directions[:1] = 0, torch.tensor([1.0, 0, 0])
    edges = (torch.arange(S + 1) / 64).expand(R, S + 1).contiguous()
    cells_per_unit, cell_offset = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([0.5, 1.0, 0.5])
    d_feature, feature_hat, v = torch.randn(R * S, COLUMNS), torch.randn(R * S, COLUMNS), torch.randn(R * S, 3)
    points = origins[:, None] + directions[:, None] * edges[:, :-1, None]
    grid_coords = points * cells_per_unit + cell_offset
    x, y, z = (grid_coords.flatten(0, 1).floor() + 1).long().unbind(1)  # cells start one voxel before the volume
    inside = (x >= 0) & (x <= X) & (y >= 0) & (y <= Y) & (z >= 0) & (z <= Z)
    cell = ((volume_idx.repeat_interleave(S) * (Z + 1) + z) * (Y + 1) + y) * (X + 1) + x
    cell = torch.where(inside, cell, OUTSIDE).int()
    d_volume = torch.empty(B, Z, Y, X, channels)
    inputs = dict(
        d_volume=d_volume, cell=cell, d_feature=d_feature, feature_hat=feature_hat, v=v, origins=origins,
        directions=directions, edges=edges, cells_per_unit=cells_per_unit, cell_offset=cell_offset,
    )  # fmt: skip
    return inputs, grid_coords, volume_idx.int()


def test_cell_sum_is_the_gradient_of_trilinear(device):
    """W.r.t. the volume; both outputs of `trilinear` have one: the value, and the spatial gradient, here times v."""
    R, S, channels = 3, 140, 5
    inputs, grid_coords, volume_idx = make_inputs(R, S, channels)
    cells, counts = inputs["cell"].unique(return_counts=True)
    assert counts[:-1].max() > BLOCK_N and cells[-1] == OUTSIDE  # a cell with several iterations; samples in no cell
    volume = torch.zeros_like(inputs["d_volume"], dtype=torch.float64).requires_grad_()
    value, gradient = trilinear_ref(volume, grid_coords.double(), volume_idx)
    # `gradient` [R, S, 3, channels] is w.r.t. grid coordinates, v is a direction in the unit of the points
    slope = ((inputs["cells_per_unit"] * inputs["v"]).view(R, S, 3, 1) * gradient).sum(2)
    upstream = [inputs[d].double().view(R, S, COLUMNS)[..., :channels] for d in ("d_feature", "feature_hat")]
    (expected,) = torch.autograd.grad([value, slope], volume, upstream)
    inputs = {name: t.to(device) for name, t in inputs.items()}
    cell_sum(**inputs)
    assert_close_to_max(inputs["d_volume"].cpu(), expected, 1e-5)

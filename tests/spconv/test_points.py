"""`PointToVoxel` compared with a loop over points."""

import numpy as np
import pytest
import torch

import unipad.spconv as spconv


def by_loop(points, generator):
    """spconv's algorithm for a CPU: point after point."""
    low, vsize = generator.low.numpy(), generator.vsize.numpy()
    size, number, voxels, ids = generator.grid_size[::-1], {}, [], []
    for point in points.numpy():
        cell = tuple(np.floor((point[: len(vsize)] - low) / vsize).astype(int).tolist())
        if any(c < 0 or c >= s for c, s in zip(cell, size, strict=True)):
            ids.append(-1)
            continue
        if cell not in number and len(number) == generator.max_num_voxels:
            ids.append(-1)
            continue
        n = number.setdefault(cell, len(number))
        voxels += [[]] if n == len(voxels) else []
        ids.append(n)
        if len(voxels[n]) < generator.max_num_points_per_voxel:
            voxels[n].append(point)
    return voxels, [cell[::-1] for cell in number], ids


@pytest.mark.parametrize("ndim, max_voxels, P", [(3, 1000, 300), (3, 20, 300), (2, 1000, 300), (1, 3, 50), (3, 5, 0)])
def test_points_to_voxels(ndim, max_voxels, P):
    low, high = [-2.0, -1.0, 0.0][:ndim], [2.0, 1.5, 1.0][:ndim]
    generator = spconv.PointToVoxel([0.5, 0.25, 0.5][:ndim], low + high, ndim + 1, max_voxels, 3)
    points = 5 * torch.rand(P, ndim + 1) - 2.5
    voxels, indices, counts, ids = generator.generate_voxel_with_id(points)
    expected, cells, expected_ids = by_loop(points, generator)
    assert [tuple(i) for i in indices.tolist()] == cells and ids.tolist() == expected_ids
    assert counts.tolist() == [len(v) for v in expected] and indices.dtype == counts.dtype == torch.int32
    for voxel, count, rows in zip(voxels, counts, expected, strict=True):
        assert torch.equal(voxel[:count], torch.from_numpy(np.stack(rows))) and not voxel[count:].any()
    filled, *same = generator(points, empty_mean=True)
    assert torch.equal(same[0], indices) and torch.equal(same[1], counts)
    for voxel, count in zip(filled, counts, strict=True):
        torch.testing.assert_close(voxel[count:], voxel[:count].mean(dim=0).expand(3 - count, -1))
    features = spconv.gather_features_by_pc_voxel_id(counts[:, None].float(), ids, invalid_value=-5)
    assert features.flatten().tolist() == [-5 if i < 0 else counts[i].item() for i in expected_ids]


@pytest.mark.parametrize(
    "vsize, high, cells",
    [
        (0.2, 0.5, 3), (0.2, 0.7, 4), (0.2, 0.48, 2), (0.2, 0.52, 3), (0.5, 2.25, 5), (0.5, 2.75, 6), (1.0, 0.5, 1),
        (1.0, 1.5, 2), (0.1, 1.0, 10), (0.075, 108.0, 1440),
    ],
)  # fmt: skip
def test_the_grid_is_rounded_half_up(vsize, high, cells):
    """high / vsize, in fp32; half a cell by hand: 2.5 -> 3, 3.5 -> 4, 4.5 -> 5, 5.5 -> 6, 0.5 -> 1, 1.5 -> 2."""
    generator = spconv.PointToVoxel([vsize], [0.0, high], 2, 10, 2)
    assert generator.grid_size == [cells] and generator.coors_range == [0.0, high]
    last = torch.tensor([[(cells - 0.5) * vsize, 1.0], [(cells + 0.5) * vsize, 1.0]])
    assert generator(last)[1].tolist() == [[cells - 1]]


def test_less_than_half_a_cell_is_no_cell():
    with pytest.raises(ValueError, match="empty"):
        spconv.PointToVoxel([1.0], [0.0, 0.5 - 2**-25], 2, 10, 2)  # in fp32, this + 0.5 is 1


def test_bad_points():
    with pytest.raises(ValueError, match="range of 6 numbers"):
        spconv.PointToVoxel([1, 1, 1], [0, 0, 1, 1], 3, 10, 5)
    with pytest.raises(ValueError, match="empty"):
        spconv.PointToVoxel([1, 1], [0, 0, 0, 1], 3, 10, 5)
    with pytest.raises(ValueError, match="points have 4 values"):
        spconv.PointToVoxel([1, 1], [0, 0, 2, 1], 3, 10, 5)(torch.zeros(2, 4))

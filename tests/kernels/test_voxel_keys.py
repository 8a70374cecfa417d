from math import prod

import pytest
import torch

from tests.ahead_of_time import Launch
from tests.check import check_against_ref
from unipad.kernels.voxel_keys import BLOCK, sort_voxels, sort_voxels_ref, voxel_keys, voxel_keys_ref

TYPES = dict(coords_ptr="*i32", keys_ptr="*i64")
# Checked by tests/test_compiles.py. Compiled for one type of elements only: no argument has it, all are integers.
LAUNCHES = [Launch("_keys_kernel", dict(BLOCK=BLOCK), TYPES, elements=("fp32",), registers=32)]

# sets of voxels: B, (Z, Y, X), number of voxels
SPARSE = (3, (5, 7, 9), 200)  # 200 of 945 cells
FULL = (1, (3, 3, 3), 27)  # all cells
SETS = [
    SPARSE,
    FULL,
    (1, (1, 1, 1), 1),
    (2, (9, 8, 4), BLOCK),  # exactly one block
    (2, (9, 8, 4), BLOCK + 1),  # one more than a block
    (2, (5, 7, 9), 0),
]


def random_voxels(B, shape, N, device):
    """[N, 4] distinct voxels (b, z, y, x) in random order."""
    cells = torch.randperm(B * prod(shape), device=device)[:N]
    return torch.stack(torch.unravel_index(cells, (B, *shape)), dim=1).int()


@pytest.mark.parametrize("B, shape, N", SETS)
def test_keys_and_sorting_match_reference(B, shape, N, device):
    coords = random_voxels(B, shape, N, device)
    # float32 has no effect: all inputs and outputs are integers
    check_against_ref(voxel_keys, voxel_keys_ref, dict(coords=coords, shape=shape), torch.float32)
    for check in (True, False):
        inputs = dict(coords=coords, shape=shape, check=check)
        check_against_ref(sort_voxels, sort_voxels_ref, inputs, torch.float32)
    keys, order = sort_voxels(coords, shape)
    assert (keys[1:] > keys[:-1]).all()
    voxel = torch.stack(torch.unravel_index(keys, (B, *shape)), dim=1)
    assert torch.equal(voxel, coords[order].long())


@pytest.mark.parametrize("fn", [voxel_keys, voxel_keys_ref, sort_voxels, sort_voxels_ref])
def test_grids_beyond_32_bit_coordinates_or_62_bit_keys_are_rejected(fn, device):
    coords = torch.tensor([[0, 0, 0, 2**31 - 2]], dtype=torch.int32, device=device)
    fn(coords, (1, 1, 2**31 - 1))  # the longest axis that is accepted
    with pytest.raises(ValueError, match=r"\(1, 1, 2147483648\) cells in each of 1 samples"):
        fn(coords, (1, 1, 2**31))
    with pytest.raises(ValueError, match="too many"):
        fn(coords, (2**16, 2**16, 2**30 + 1))


@pytest.mark.parametrize("fn", [sort_voxels, sort_voxels_ref])
def test_invalid_coordinates_raise(fn, device):
    def raises(rows, message):
        with pytest.raises(ValueError, match=message):
            fn(torch.tensor(rows, dtype=torch.int32, device=device), (2, 3, 4))

    raises([[0, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]], r"\(0, 1, 1, 1\) occurs twice")
    raises([[0, 1, 1, 1], [0, 0, 3, 0]], r"\(0, 0, 3, 0\) is outside the grid \(Z, Y, X\) = \(2, 3, 4\)")
    raises([[-1, 1, 1, 1]], r"\(-1, 1, 1, 1\) is outside")
    with pytest.raises(AssertionError, match="int32"):
        fn(torch.zeros(1, 4, dtype=torch.int64, device=device), (2, 3, 4))
    with pytest.raises(AssertionError, match=r"\[N, 4\]"):
        fn(torch.zeros(1, 3, dtype=torch.int32, device=device), (2, 3, 4))

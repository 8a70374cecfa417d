"""Voxels sorted by key: the index of a sparse grid.

A voxel (b, z, y, x) of a grid (Z, Y, X) has the key ((b Z + z) Y + y) X + x, an int64: grids may have more than 2^31
cells. The sorted keys are the whole index; without a hash table or atomics, results are the same from run to run.
"""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from unipad.kernels.backend import host_wait, jit, on_triton, opaque, tl, to_host, triton

NO_KEY = 2**62  # sorts after every voxel; a power of two, since F.pad takes its value as fp64
NO_KEY_SHORT = 2**31 - 1  # the same for the 32-bit keys of sparse_outputs.py


@opaque(lambda coords, shape: coords.new_empty(len(coords), dtype=torch.int64))
def voxel_keys(coords: Tensor, shape: Sequence[int]) -> Tensor:
    """[N] int64, the key of each voxel.

    Args:
        coords: [N, 4] int32 (b, z, y, x).
        shape:  cells (Z, Y, X).
    """
    if not on_triton(coords):
        return voxel_keys_ref(coords, shape)
    coords = checked(coords, shape)
    keys = coords.new_empty(len(coords), dtype=torch.int64)
    if len(coords):
        Z, Y, X = shape
        _keys_kernel[(triton.cdiv(len(coords), BLOCK),)](
            coords_ptr=coords, keys_ptr=keys, N=len(coords), Z=Z, Y=Y, X=X, BLOCK=BLOCK
        )  # fmt: skip
    return keys


def voxel_keys_ref(coords, shape):
    """`voxel_keys` in plain PyTorch."""
    Z, Y, X = shape
    b, z, y, x = checked(coords, shape).long().unbind(1)  # [N] each
    return ((b * Z + z) * Y + y) * X + x


def _sort_voxels_fake(coords, shape, check=True):
    keys = coords.new_empty(len(coords), dtype=torch.int64)
    return keys, torch.empty_like(keys)


@opaque(_sort_voxels_fake)
def sort_voxels(coords: Tensor, shape: Sequence[int], check: bool = True) -> tuple[Tensor, Tensor]:
    """Sort voxels by key.

    Args:
        coords: [N, 4] int32 (b, z, y, x), each once, in any order.
        shape:  cells (Z, Y, X).
        check:  raise on coordinates that are outside the grid (b < 0 too; b has no upper limit) or occur twice; waits
                for the device once. Unchecked, such coordinates give wrong neighbor tables.

    Returns:
        keys:  [N] int64 ascending.
        order: [N] int64, row of each key: keys[i] is the key of coords[order[i]].

    Raises ValueError, naming the voxel, on invalid coordinates, and for a grid that `check_grid` rejects.
    """
    if not on_triton(coords):
        return sort_voxels_ref(coords, shape, check)
    keys, order = voxel_keys(coords, shape).sort()
    if check:
        _raise_on_faults(coords, shape, keys, order)
    return keys, order


def sort_voxels_ref(coords, shape, check=True):
    """`sort_voxels` in plain PyTorch."""
    keys, order = voxel_keys_ref(coords, shape).sort()
    if check:
        _raise_on_faults(coords, shape, keys, order)
    return keys, order


def _raise_on_faults(coords, shape, keys, order):
    """The checks of `sort_voxels`; keys and order are its results."""
    outside = (coords < 0).any(dim=1)
    for axis, size in enumerate(shape):
        outside |= coords[:, 1 + axis] >= size
    twice = F.pad(keys[1:] == keys[:-1], (0, 1))[: len(keys)]  # [N] by position in `keys`; cut where N is 0
    any_outside, any_twice = to_host(torch.stack([outside.any(), twice.any()]), "whether any voxel is invalid")
    with host_wait("an invalid voxel"):
        if any_outside:
            voxel = tuple(coords[outside.nonzero()[0, 0]].tolist())
            raise ValueError(f"voxel (b, z, y, x) = {voxel} is outside the grid (Z, Y, X) = {tuple(shape)}")
        if any_twice:
            voxel = tuple(coords[order[twice.nonzero()[0, 0]]].tolist())
            raise ValueError(f"voxel (b, z, y, x) = {voxel} occurs twice")


def checked(coords, shape, *triples):
    """`coords`, contiguous. Asserts that it is [N, 4] int32, and that shape and `triples` have 3 entries each.

    Raises ValueError for a grid that `check_grid` rejects.
    """
    assert coords.dim() == 2 and coords.shape[1] == 4, f"coordinates are [N, 4], not {tuple(coords.shape)}"
    assert coords.dtype == torch.int32, f"coordinates are int32, not {coords.dtype}"
    assert all(len(t) == 3 for t in (shape, *triples)), f"not triples (z, y, x): {shape}, {triples}"
    check_grid(shape)
    return coords.contiguous()


def check_grid(shape, batch_size=1):
    """Raise ValueError if coordinates in a grid of (Z, Y, X) cells exceed int32, or keys of a batch reach `NO_KEY`.

    batch_size: number of samples; 1 where the caller does not know it.

    A convolution passes its grid enlarged by the cells outside that it reaches, whose coordinates it computes in int32.
    """
    if max(shape) >= 2**31 or batch_size * prod(shape) > NO_KEY:
        raise ValueError(
            f"(z, y, x) = {tuple(shape)} cells in each of {batch_size} samples, including those that a convolution "
            "reaches outside the grid, are too many: a coordinate has 32 bits, a cell's key 62"
        )


BLOCK = 256  # voxels per program


@jit(varying=("N", "Z", "Y", "X"))
def _keys_kernel(coords_ptr, keys_ptr, N, Z, Y, X, BLOCK: tl.constexpr):  # [N, 4], [N]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    i_ok = i < N
    b, z, y, x = load_voxels(coords_ptr, i, i_ok)
    tl.store(keys_ptr + i, key_of(b, z, y, x, Z, Y, X), mask=i_ok)


@triton.jit
def load_voxels(coords_ptr, i, ok):
    """b, z, y, x of the voxels with indices i, int32; 0 where not ok."""
    voxel_ptr = coords_ptr + i.to(tl.int64) * 4
    b = tl.load(voxel_ptr, mask=ok, other=0)
    z = tl.load(voxel_ptr + 1, mask=ok, other=0)
    y = tl.load(voxel_ptr + 2, mask=ok, other=0)
    x = tl.load(voxel_ptr + 3, mask=ok, other=0)
    return b, z, y, x


@triton.jit
def key_of(b, z, y, x, Z, Y, X):
    """int64 keys of voxels in a grid (Z, Y, X)."""
    return ((b.to(tl.int64) * Z + z) * Y + y) * X + x

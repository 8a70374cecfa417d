"""Output voxels of strided and transposed sparse convolutions: their grid, and the cells of it that the inputs reach.

A cell of the output grid is a voxel if at least one input contributes to it (kernels/sparse_map.py has the formulas).
A Triton kernel writes the keys of all cells that each input reaches; their distinct values are the keys of the outputs.
References: `strided_map_ref` and `transposed_map_ref`, which share `gather_pairs_ref`; benchmark:
benchmarks/bench_sparse_map.py.

Sizes: N inputs, M outputs. All triples are (z, y, x).
"""

from collections.abc import Sequence
from itertools import product
from math import prod

import numpy as np
import torch
from torch import Tensor

from unipad.kernels.backend import host_wait, jit, tl, triton
from unipad.kernels.voxel_keys import NO_KEY, NO_KEY_SHORT, key_of, load_voxels


def out_shape(shape, kernel, stride, padding, dilation):
    """Cells (Z, Y, X) of the output of a strided convolution, as torch's conv3d.

    Raises ValueError, naming the axis, where there are none, and for an invalid kernel, stride, padding or dilation.
    """

    def extent(n, k, s, p, d):  # cells, kernel, stride, padding and dilation of an axis
        return (n + 2 * p - d * (k - 1) - 1) // s + 1

    return _extents(extent, shape, kernel, stride, padding, dilation)


def transposed_out_shape(shape, kernel, stride, padding, dilation):
    """Cells (Z, Y, X) of the output of a transposed convolution, as torch's conv_transpose3d; raises as `out_shape`."""

    def extent(n, k, s, p, d):
        return (n - 1) * s - 2 * p + d * (k - 1) + 1

    return _extents(extent, shape, kernel, stride, padding, dilation)


def _extents(extent, shape, *geometry):
    """`extent` of each axis, checked to be at least 1; also checks the geometry (kernel, stride, padding, dilation)."""
    out = []
    for axis, n, k, s, p, d in zip("zyx", shape, *geometry, strict=True):
        sizes = f"kernel {k}, stride {s}, padding {p}, dilation {d}"
        if min(k, s, d) < 1 or p < 0:
            raise ValueError(f"no convolution along {axis} has {sizes}")
        out.append(extent(n, k, s, p, d))
        if out[-1] < 1:
            raise ValueError(f"a convolution of {sizes} has no output along {axis}, where the grid has {n} cells")
    return tuple(out)


def max_readers(kernel, stride, dilation):
    """Maximum number of outputs of a strided convolution that read one cell, on each axis."""
    return tuple((k - 1) * d // s + 1 for k, s, d in zip(kernel, stride, dilation, strict=True))


def output_keys(
    coords: Tensor, out: Sequence[int], geometry: Sequence[Sequence[int]], batch_size: int | None, transposed: bool,
    inverse_idx: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[M] int64 keys of the output voxels, ascending; int32 if all keys fit. Launches a Triton kernel.

    Args:
        coords:     [N, 4] int32 (b, z, y, x) of the inputs, contiguous.
        out:        cells (Z, Y, X) of the output grid.
        geometry:   kernel, stride, padding, dilation: cells (z, y, x).
        batch_size: number of samples; None: unknown, keys are int64.
        transposed: whether the convolution is transposed; else it is strided.
        inverse_idx: [K, N] int32 or None: filled with -1 by the same launch, for `sparse_map._neighbors` to write to.

    Waits for the device once, for M.
    """
    kernel_size, stride, padding, dilation = map(tuple, geometry)
    # on each axis, the number of output cells that an input may reach
    slots = kernel_size if transposed else max_readers(kernel_size, stride, dilation)
    short = batch_size is not None and batch_size * prod(out) < NO_KEY_SHORT
    dtype, no_key = (torch.int32, NO_KEY_SHORT) if short else (torch.int64, NO_KEY)
    if not len(coords):
        return coords.new_empty(0, dtype=dtype)
    pairs = prod(slots) * len(coords)
    keys = coords.new_empty(pairs + 1, dtype=dtype)
    Z, Y, X = out
    _reached_keys_kernel[(triton.cdiv(pairs + 1, BLOCK_PAIRS),)](
        coords_ptr=coords, keys_ptr=keys, inverse_idx_ptr=inverse_idx, PAIRS=pairs, N=len(coords), Z=Z, Y=Y, X=X,
        slots=slots, kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation,
        ENTRIES=prod(kernel_size) * len(coords),
        FILLS=triton.cdiv(prod(kernel_size), prod(slots)),
        TRANSPOSED=transposed, NO_KEY=no_key, BLOCK_PAIRS=BLOCK_PAIRS,
    )  # fmt: skip
    # `unique` sorts keys without their indices, which moves half as many bytes as `sort`
    with host_wait("number of a convolution's output voxels"):
        return torch.unique(keys)[:-1]  # the last is NO_KEY, which the kernel writes at least once, after all pairs


def output_coords(keys: Tensor, out: Sequence[int]) -> tuple[Tensor, Tensor]:
    """([M, 4] int32 (b, z, y, x), [M] int64 keys) of keys [M], of any integer type, in a grid of `out` (Z, Y, X) cells.

    Launches a Triton kernel.
    """
    coords, long_keys = keys.new_empty(len(keys), 4, dtype=torch.int32), keys
    if keys.dtype != torch.int64:
        long_keys = keys.new_empty(len(keys), dtype=torch.int64)
    if len(keys):
        Z, Y, X = out
        _coords_kernel[(triton.cdiv(len(keys), BLOCK),)](
            keys_ptr=keys, coords_ptr=coords, long_keys_ptr=None if long_keys is keys else long_keys,
            M=len(keys), Z=Z, Y=Y, X=X, BLOCK=BLOCK,
        )  # fmt: skip
    return coords, long_keys


def gather_pairs_ref(coords, slots, out, kernel, with_inverse):
    """The results of `sparse_map._strided` from (input, offset) pairs, grouped by output.

    Args:
        coords: [N, 4] int32 of the inputs.
        slots:  per axis, a list of (cell, offset, valid), [N] each: output cell and offset of a candidate pair of every
                input. A pair exists where it is valid on all three axes.
        out:    cells (Z, Y, X) of the output grid.
        kernel: size (kz, ky, kx).
    """
    (Z, Y, X), (_, ky, kx), N, K = out, kernel, len(coords), prod(kernel)
    first_z = coords[:, 0].cpu().numpy().astype(np.int64) * Z  # where the samples' grids are stacked along z
    keys, ks, inputs = [], [], []
    for (z, kz, z_ok), (y, k_y, y_ok) in product(*slots[:2]):
        row, k_row, row_ok = ((first_z + z) * Y + y) * X, (kz * ky + k_y) * kx, z_ok & y_ok
        for x, k_x, x_ok in slots[2]:
            i = np.flatnonzero(row_ok & x_ok)
            keys.append((row + x)[i])
            ks.append(np.broadcast_to(np.asarray(k_row + k_x, np.int64), N)[i])
            inputs.append(i)
    bits = N.bit_length()
    key, pair = _sorted_by_key(np.concatenate(keys), np.concatenate(ks) << bits | np.concatenate(inputs), bits, K)
    first = np.flatnonzero(np.diff(key, prepend=-1))  # pair of each output
    key, M = key[first], len(first)
    m, k, i = np.repeat(np.arange(M), np.diff(first, append=len(pair))), pair >> bits, pair & ((1 << bits) - 1)
    row, plane = key // X, key // (Y * X)
    results = [np.stack([plane // Z, plane % Z, row % Y, key % X], axis=1).astype(np.int32), key]
    for columns, at, value in [(M, m, i), (N, i, m)][: 1 + with_inverse]:  # the table, and its inverse
        results.append(np.full((K, columns), -1, np.int32))
        results[-1].reshape(-1)[k * columns + at] = value
    results = [torch.from_numpy(a).to(coords.device) for a in results]
    return *results, *([] if with_inverse else [None])


def _sorted_by_key(key, pair, bits, K):
    """Both in ascending order of the keys [P], from 0 on; pair: the offset, of K, before `bits` bits of the input."""
    bits += K.bit_length()
    if len(key) and int(key.max()).bit_length() + bits < 64:
        packed = np.sort(key << bits | pair)  # several times as fast as `argsort`
        return packed >> bits, packed & ((1 << bits) - 1)
    order = key.argsort(kind="stable")
    return key[order], pair[order]


BLOCK = 256  # voxels per program
BLOCK_PAIRS = 1024  # pairs of a slot and an input per program


@jit(varying=("PAIRS", "N", "ENTRIES", "Z", "Y", "X"))
def _reached_keys_kernel(
    coords_ptr, keys_ptr, inverse_idx_ptr,  # [N, 4], [PAIRS + 1], [K, N] or None
    PAIRS, N, Z, Y, X, slots, kernel_size, stride, padding, dilation,  # PAIRS = all slots * N; Z, Y, X: output grid
    ENTRIES, FILLS: tl.constexpr,  # K N, of `inverse_idx`; at least ENTRIES / PAIRS
    TRANSPOSED: tl.constexpr, NO_KEY: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    """Keys of the output cells of all pairs of a slot and an input; NO_KEY for pairs without a cell and after the last.

    On each axis, slots number the cells that an input may reach: `slots` (z, y, x) of them.
    """
    pair = tl.program_id(0).to(tl.int64) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)  # [BLOCK_PAIRS]
    ok = pair < PAIRS
    slot, i = (pair // N).to(tl.int32), (pair % N).to(tl.int32)
    b, z, y, x = load_voxels(coords_ptr, i, ok)
    slot_z, slot_y, slot_x = slot // (slots[1] * slots[2]), slot // slots[2] % slots[1], slot % slots[2]
    z, z_ok = _reached_cell(z, slot_z, Z, kernel_size[0], stride[0], padding[0], dilation[0], TRANSPOSED)
    y, y_ok = _reached_cell(y, slot_y, Y, kernel_size[1], stride[1], padding[1], dilation[1], TRANSPOSED)
    x, x_ok = _reached_cell(x, slot_x, X, kernel_size[2], stride[2], padding[2], dilation[2], TRANSPOSED)
    key = tl.where(ok & z_ok & y_ok & x_ok, key_of(b, z, y, x, Z, Y, X), NO_KEY)
    tl.store(keys_ptr + pair, key.to(keys_ptr.dtype.element_ty), mask=pair <= PAIRS)
    if inverse_idx_ptr is not None:  # every pair fills as many entries
        for _ in tl.static_range(FILLS):
            tl.store(inverse_idx_ptr + pair, tl.full(pair.shape, -1, tl.int32), mask=ok & (pair < ENTRIES))
            pair += PAIRS


@triton.jit
def _reached_cell(cell, slot, size, kernel, stride, padding, dilation, TRANSPOSED: tl.constexpr):
    """On one axis, the output cell in a slot of an input's cell, and whether the input reaches it."""
    if TRANSPOSED:
        out = cell * stride - padding + slot * dilation
        return out, (out >= 0) & (out < size)
    else:
        out = (cell + padding) // stride - slot  # slots count down from the highest output that may read the input
        distance = cell + padding - out * stride
        offset = distance // dilation
        return out, (offset * dilation == distance) & (offset < kernel) & (out >= 0) & (out < size)


@jit(varying=("M", "Z", "Y", "X"))
def _coords_kernel(keys_ptr, coords_ptr, long_keys_ptr, M, Z, Y, X, BLOCK: tl.constexpr):
    """Keys [M] -> coordinates [M, 4] (b, z, y, x) in a grid of (Z, Y, X) cells, and unless None the keys as int64."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_ok = m < M
    key = tl.load(keys_ptr + m, mask=m_ok, other=0)  # ((b Z + z) Y + y) X + x
    row = key // X  # (b Z + z) Y + y
    plane = row // Y  # b Z + z
    voxel_ptr = coords_ptr + m.to(tl.int64) * 4
    tl.store(voxel_ptr, (plane // Z).to(tl.int32), mask=m_ok)
    tl.store(voxel_ptr + 1, (plane % Z).to(tl.int32), mask=m_ok)
    tl.store(voxel_ptr + 2, (row % Y).to(tl.int32), mask=m_ok)
    tl.store(voxel_ptr + 3, (key % X).to(tl.int32), mask=m_ok)
    if long_keys_ptr is not None:
        tl.store(long_keys_ptr + m, key.to(tl.int64), mask=m_ok)

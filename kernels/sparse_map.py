"""Neighbor tables: which input voxel each offset of a sparse convolution reads, as row numbers.

Voxels are looked up in their sorted keys (kernels/voxel_keys.py), so every table is the same from run to run.
A kernel has kz x ky x kx offsets. Offset k, a triple that counts from 0, links input cell i and output cell o by

    submanifold           i = o + (k - kernel // 2) dilation            outputs: the inputs themselves
    strided               i = o stride - padding + k dilation           outputs: every o in the grid that has an input
    transposed            o = i stride - padding + k dilation           outputs: every o in the grid that has an input
    inverse               as the convolution that it undoes, with i and o exchanged

on each axis. Rows of a table number the offsets row-major. Cells that are neighbors along x have consecutive keys. So
each reader (a voxel that looks up its neighbors) takes one binary search per column (the kx offsets of equal z and y),
for the column's first cell, and then a linear scan. The output voxels come from kernels/sparse_outputs.py. A transposed
table is the inverse of a strided one: the table of the strided convolution that maps the transposed convolution's
outputs to its inputs. The references of the strided and transposed maps materialize and sort all (input, offset) pairs
instead, which is faster on a CPU.

Sizes: N inputs, M outputs, K = kz ky kx offsets. All triples are (z, y, x).
"""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from unipad.kernels.backend import jit, on_triton, opaque, tl, triton
from unipad.kernels.sparse_outputs import max_readers, out_shape, output_coords, output_keys, transposed_out_shape
from unipad.kernels.voxel_keys import (
    NO_KEY,
    NO_KEY_SHORT,
    check_grid,
    checked,
    key_of,
    load_voxels,
    sort_voxels,
    voxel_keys_ref,
)


@opaque(lambda coords, keys, order, shape, kernel, dilation: coords.new_empty(prod(kernel), len(coords)))
def submanifold_map(
    coords: Tensor, keys: Tensor, order: Tensor | None, shape: Sequence[int], kernel: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """For each voxel of a set, its neighbors in the same set.

    Args:
        coords:      [N, 4] int32 (b, z, y, x).
        keys, order: from `sort_voxels`; order None: `coords` are sorted by key.
        shape:       cells (Z, Y, X).
        kernel:      size (kz, ky, kx). An even size has one more offset below than above: 2 covers -1 and 0.
        dilation:    distance between offsets in cells (z, y, x).

    Returns:
        neighbor_idx: [K, N] int32 rows of `coords`; -1 where there is no voxel, also beyond the borders.

    Raises ValueError if `check_grid` rejects the grid, enlarged by the cells outside it that the kernel reaches, as do
    the maps below.
    """
    if not on_triton(coords):
        return submanifold_map_ref(coords, keys, order, shape, kernel, dilation)
    coords, stride = _checked_submanifold(coords, shape, kernel, dilation), (1, 1, 1)
    padding = [size // 2 * d for size, d in zip(kernel, dilation, strict=True)]
    return _neighbors(coords, order, keys, order, shape, kernel, stride, padding, dilation)


def submanifold_map_ref(coords, keys, order, shape, kernel, dilation):
    """`submanifold_map` in plain PyTorch."""
    (_, Y, X), (kz, ky, kx), (dz, dy, dx) = shape, kernel, dilation
    N, K = len(_checked_submanifold(coords, shape, kernel, dilation)), prod(kernel)
    neighbor_idx = coords.new_full((K, N), -1)
    # the offsets of an odd kernel are symmetric: if offset k leads from i to j, offset K - 1 - k leads from j to i
    mirrored = all(size % 2 for size in kernel)
    if mirrored:
        neighbor_idx[K // 2] = torch.arange(N, dtype=torch.int32, device=coords.device)
    if order is None:
        order = torch.arange(N, device=coords.device)
    z, y, x = (coords[:, 1 + axis].index_select(0, order) for axis in range(3))  # [N] each, sorted by key
    # in_z[i], [N]: whether offset i along z leads to a cell inside the grid; keys do not tell: consecutive ones may lie
    # in different rows of cells
    in_z, in_y, in_x = (
        [(cell + (i - width // 2) * d >= 0) & (cell + (i - width // 2) * d < size) for i in range(width)]
        for cell, size, width, d in zip((z, y, x), shape, kernel, dilation, strict=True)
    )
    padded_keys = F.pad(keys, (0, 1), value=NO_KEY)
    for column in range(kz * ky // 2 + 1 if mirrored else kz * ky):
        iz, iy = divmod(column, ky)
        in_column = in_z[iz] & in_y[iy]
        wanted = keys + (((iz - kz // 2) * dz * Y + (iy - ky // 2) * dy) * X - kx // 2 * dx)  # of the first cell
        at = torch.searchsorted(keys, wanted)  # the first key >= wanted
        key = padded_keys.index_select(0, at)
        for i in range(kx):
            k = column * kx + i
            if mirrored and k == K // 2:
                break  # the offsets from here on are those filled by mirroring
            i_sorted = (in_column & in_x[i] & (key == wanted)).nonzero()[:, 0]
            reader, read = order.index_select(0, i_sorted), order.index_select(0, at.index_select(0, i_sorted))
            neighbor_idx[k].index_copy_(0, reader, read.int())
            if mirrored:
                neighbor_idx[K - 1 - k].index_copy_(0, read, reader.int())
            wanted += dx
            for _ in range(dx if i + 1 < kx else 0):  # the linear scan: at most one key in each of the next dx cells
                at += key < wanted
                key = padded_keys.index_select(0, at)
    return neighbor_idx


def _checked_submanifold(coords, shape, kernel, dilation):
    """`coords`, contiguous, after checks of the arguments."""
    coords = checked(coords, shape, kernel, dilation)
    check_grid([size + (k - 1) * d for size, k, d in zip(shape, kernel, dilation, strict=True)])
    return coords


def _map_fake(coords, shape, kernel, stride, padding, dilation, batch_size=None, keys=None, order=None):
    """Empty results of `strided_map` and `transposed_map`, for torch.compile."""
    M = torch.library.get_ctx().new_dynamic_size()
    return coords.new_empty(M, 4), coords.new_empty(prod(kernel), M)


@opaque(_map_fake)
def strided_map(
    coords: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    batch_size: int | None = None,
    keys: Tensor | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output voxels of a strided convolution, and the input voxel that each of them reads through each offset.

    Args:
        coords:   [N, 4] int32 (b, z, y, x), unique and inside the grid, in any order.
        shape:    cells (Z, Y, X) of the input.
        kernel, stride, padding, dilation: cells (z, y, x), as torch's conv3d.
        batch_size: number of samples. If it is given and all output keys fit 32 bits, a GPU sorts 32-bit keys instead
            of 64-bit ones.
        keys, order: from `sort_voxels`, if already computed; order None: `coords` are sorted by key.

    Returns:
        out_coords:   [M, 4] int32, every cell of the output grid that reads at least one voxel, sorted by key.
        neighbor_idx: [K, M] int32 rows of `coords`, -1 where there is no voxel.

    Waits for the device once, for M. Raises ValueError where the output grid has no cells, naming axis and kernel.
    """
    geometry = kernel, stride, padding, dilation
    if not on_triton(coords):
        return strided_map_ref(coords, shape, *geometry)
    out_coords, _, neighbor_idx, _ = _strided(coords, shape, geometry, batch_size, keys, order, with_inverse=False)
    return out_coords, neighbor_idx


def strided_map_ref(coords, shape, kernel, stride, padding, dilation, batch_size=None, keys=None, order=None):
    """`strided_map` in plain PyTorch; ignores `keys` and `order`."""
    _, out = _checked_strided(coords, shape, (kernel, stride, padding, dilation), batch_size)
    cells, offsets, valids = [], [], []
    for axis, (size, readers) in enumerate(zip(out, max_readers(kernel, stride, dilation), strict=True)):
        back = torch.arange(readers, device=coords.device)[:, None]  # counted back from the last reader
        padded = coords[:, 1 + axis].long() + padding[axis]  # [N], counted from the first padding cell
        cell = padded // stride[axis] - back  # [readers, N], of the output grid
        distance = padded - cell * stride[axis]
        offset = distance // dilation[axis]
        valids.append((offset * dilation[axis] == distance) & (offset < kernel[axis]) & (cell >= 0) & (cell < size))
        cells.append(cell)
        offsets.append(offset)
    return _gather_pairs_ref(coords, cells, offsets, valids, out, kernel)


def _strided_tables_fake(coords, shape, kernel, stride, padding, dilation, batch_size=None, keys=None, order=None):
    out_coords, neighbor_idx = _map_fake(coords, shape, kernel, stride, padding, dilation)
    out_keys = coords.new_empty(len(out_coords), dtype=torch.int64)
    return out_coords, out_keys, neighbor_idx, coords.new_empty(prod(kernel), len(coords))


@opaque(_strided_tables_fake)
def strided_tables(
    coords: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    batch_size: int | None = None,
    keys: Tensor | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All that a strided convolution and its gradient need, in fewer launches than one after the other.

    Args as `strided_map`, whose results are the first and the third.

    Returns:
        out_coords:   [M, 4] int32.
        out_keys:     [M] int64, `voxel_keys` of out_coords.
        neighbor_idx: [K, M] int32.
        inverse_idx:  [K, N] int32, `inverse_map` of neighbor_idx.
    """
    geometry = kernel, stride, padding, dilation
    if not on_triton(coords):
        return strided_tables_ref(coords, shape, *geometry)
    return _strided(coords, shape, geometry, batch_size, keys, order, with_inverse=True)


def strided_tables_ref(coords, shape, kernel, stride, padding, dilation, batch_size=None, keys=None, order=None):
    """`strided_tables` in plain PyTorch; ignores `keys` and `order`."""
    geometry = kernel, stride, padding, dilation
    out_coords, neighbor_idx = strided_map_ref(coords, shape, *geometry)
    out_keys = voxel_keys_ref(out_coords, out_shape(shape, *geometry))
    return out_coords, out_keys, neighbor_idx, inverse_map_ref(neighbor_idx, len(coords))


def _strided(coords, shape, geometry, batch_size, keys, order, with_inverse):
    """The results of `strided_tables`; the last is None unless `with_inverse`."""
    coords, out = _checked_strided(coords, shape, geometry, batch_size)
    inverse_idx = coords.new_empty(prod(geometry[0]), len(coords)) if with_inverse else None
    short_keys = output_keys(coords, out, geometry, batch_size, transposed=False, inverse_idx=inverse_idx)
    out_coords, out_keys = output_coords(short_keys, out)
    if keys is None:
        keys, order = sort_voxels(coords, shape, check=False)
    neighbor_idx = _neighbors(out_coords, None, keys, order, shape, *geometry, inverse_idx)
    return out_coords, out_keys, neighbor_idx, inverse_idx


def _checked_strided(coords, shape, geometry, batch_size):
    """`coords`, contiguous, and the shape (Z, Y, X) of the output grid, after checks of the arguments."""
    coords, (_, _, padding, _) = checked(coords, shape, *geometry), geometry
    check_grid([size + 2 * p for size, p in zip(shape, padding, strict=True)], batch_size or 1)
    return coords, out_shape(shape, *geometry)


@opaque(_map_fake)
def transposed_map(
    coords: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    batch_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Output voxels of a transposed convolution, and the input voxel that each of them reads through each offset.

    As `strided_map`, but input i spreads to the outputs i stride - padding + k dilation, as torch's conv_transpose3d.
    """
    geometry = kernel, stride, padding, dilation
    if not on_triton(coords):
        return transposed_map_ref(coords, shape, *geometry)
    coords, out = _checked_transposed(coords, shape, geometry, batch_size)
    out_keys = output_keys(coords, out, geometry, batch_size, transposed=True)
    # the table of the strided convolution from the outputs to the inputs
    inverse_idx = _neighbors(coords, None, out_keys, None, out, *geometry)
    return output_coords(out_keys, out)[0], inverse_map(inverse_idx, len(out_keys))


def transposed_map_ref(coords, shape, kernel, stride, padding, dilation, batch_size=None):
    """`transposed_map` in plain PyTorch."""
    _, out = _checked_transposed(coords, shape, (kernel, stride, padding, dilation), batch_size)
    cells, offsets, valids = [], [], []
    for axis, size in enumerate(out):
        offset = torch.arange(kernel[axis], device=coords.device)[:, None]
        # [kernel, N], of the output grid
        cell = coords[:, 1 + axis].long() * stride[axis] - padding[axis] + offset * dilation[axis]
        valids.append((cell >= 0) & (cell < size))
        cells.append(cell)
        offsets.append(offset.expand_as(cell))
    return _gather_pairs_ref(coords, cells, offsets, valids, out, kernel)


def _checked_transposed(coords, shape, geometry, batch_size):
    """`coords`, contiguous, and the shape (Z, Y, X) of the output grid, after checks of the arguments."""
    coords, (_, _, padding, _) = checked(coords, shape, *geometry), geometry
    out = transposed_out_shape(shape, *geometry)
    check_grid([size + 2 * p for size, p in zip(out, padding, strict=True)], batch_size or 1)
    return coords, out


def _neighbors(coords, reader_order, keys, order, shape, kernel, stride, padding, dilation, inverse_idx=None):
    """[K, M] int32 rows of the voxels that M readers read, or -1: offset k of reader o reads cell
    o stride - padding + k dilation.

    Args:
        coords:       [M, 4] int32 of the readers.
        reader_order: [M] int64, rows of `coords` in processing order: by key is fastest. None: 0, 1, 2, ...
        keys, order:  [N] of the voxels that are read, from `sort_voxels`; order None: stored by key.
        shape:        cells (Z, Y, X) of their grid.
        kernel, stride, padding, dilation: cells (z, y, x).
        inverse_idx:  [K, N] int32 of -1, or None: the inverse table is written to it.
    """
    (kz, ky, kx), (dz, dy, dx), (Z, Y, X), M, N = kernel, dilation, shape, len(coords), len(keys)
    neighbor_idx = coords.new_empty(prod(kernel), M)
    if neighbor_idx.numel():
        _neighbors_kernel[(triton.cdiv(M, BLOCK), kz * ky)](
            coords_ptr=coords, reader_order_ptr=reader_order, keys_ptr=keys, order_ptr=order,
            neighbor_idx_ptr=neighbor_idx, inverse_idx_ptr=inverse_idx, M=M, N=N, Z=Z, Y=Y, X=X, KY=ky,
            stride=tuple(stride), padding=tuple(padding), DZ=dz, DY=dy, STEPS=N.bit_length(),
            KX=kx, DX=dx, NO_KEY=NO_KEY if keys.dtype == torch.int64 else NO_KEY_SHORT, BLOCK=BLOCK,
        )  # fmt: skip
    return neighbor_idx


def _gather_pairs_ref(coords, cells, offsets, valids, out, kernel):
    """Neighbor table from (input, offset) pairs, grouped by output. On each axis, an input has T candidate pairs.

    Args:
        coords:  [N, 4] int32 of the inputs.
        cells:   per axis [T, N] int64, the output cell of each pair.
        offsets: per axis [T, N] int64, its offset.
        valids:  per axis [T, N] bool. A pair exists where it is valid on all three axes.
        out:     cells (Z, Y, X) of the output grid.
        kernel:  size (kz, ky, kx).

    Returns:
        out_coords, neighbor_idx: as `strided_map`.
    """

    def combine(z, y, x, size_y, size_x):
        """(z size_y + y) size_x + x of all combinations of the axes: [Tz, Ty, Tx, N]"""
        return (z[:, None, None] * size_y + y[:, None]) * size_x + x

    (Z, Y, X), (_, ky, kx) = out, kernel
    first_z = coords[:, 0].long() * Z  # [N], of each input's sample where the samples' grids are stacked along z
    exists = valids[0][:, None, None] & valids[1][:, None] & valids[2]
    pair = exists.flatten().nonzero()[:, 0]  # among [Tz, Ty, Tx, N]
    key = combine(cells[0] + first_z, cells[1], cells[2], Y, X).flatten().index_select(0, pair)
    k = combine(*offsets, ky, kx).flatten().index_select(0, pair)
    key, order = key.sort()
    is_first = F.pad(key[1:] != key[:-1], (1, 0), value=True)[: len(key)]
    m = is_first.cumsum(0) - 1  # output of each pair
    key = key[is_first]  # [M]
    neighbor_idx = coords.new_full((prod(kernel), len(key)), -1)
    entry = k.index_select(0, order) * len(key) + m  # in the flattened table
    neighbor_idx.view(-1).index_copy_(0, entry, (pair % max(len(coords), 1)).int().index_select(0, order))
    b, z, y, x = key // (Z * Y * X), key // (Y * X) % Z, key // X % Y, key % X
    return torch.stack([b, z, y, x], dim=1).int(), neighbor_idx


@opaque(lambda neighbor_idx, N: neighbor_idx.new_empty(len(neighbor_idx), N))
def inverse_map(neighbor_idx: Tensor, N: int) -> Tensor:
    """Invert a neighbor table: the output that each input reaches through each offset.

    Args:
        neighbor_idx: [K, M] int32 rows in [0, N) or -1, every input at most once per offset, as in the maps above.
        N:            number of inputs.

    Returns:
        [K, N] int32: entry [k, i] is the m with neighbor_idx[k, m] = i, -1 where there is none. It is the table of the
        inverse convolution and of the gradient of the features. Of a submanifold table with odd kernel it is
        `neighbor_idx.flip(0)`.
    """
    if not on_triton(neighbor_idx):
        return inverse_map_ref(neighbor_idx, N)
    K, M = neighbor_idx.shape
    inverse_idx = neighbor_idx.new_full((K, N), -1)
    if neighbor_idx.numel() and N:
        _inverse_kernel[(triton.cdiv(M, BLOCK), K)](
            neighbor_idx_ptr=neighbor_idx.contiguous(), inverse_idx_ptr=inverse_idx, M=M, N=N, BLOCK=BLOCK
        )  # fmt: skip
    return inverse_idx


def inverse_map_ref(neighbor_idx, N):
    """`inverse_map` in plain PyTorch."""
    k, m = (neighbor_idx >= 0).nonzero(as_tuple=True)
    inverse_idx = neighbor_idx.new_full((len(neighbor_idx), N), -1)
    inverse_idx[k, neighbor_idx[k, m].long()] = m.int()
    return inverse_idx


BLOCK = 256  # voxels or table entries per program


@jit(varying=("M", "N", "Z", "Y", "X", "STEPS"))
def _neighbors_kernel(
    coords_ptr, reader_order_ptr, keys_ptr, order_ptr,  # [M, 4], [M] or None, [N], [N] or None
    neighbor_idx_ptr, inverse_idx_ptr,  # [K, M], [K, N] or None
    M, N, Z, Y, X, KY, stride, padding, DZ, DY, STEPS,  # STEPS: iterations of the binary search
    KX: tl.constexpr, DX: tl.constexpr, NO_KEY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One column of offsets for BLOCK readers, usually in the order of their keys: adjacent lanes load nearby keys."""
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    p_ok = p < M
    column = tl.program_id(1)
    m = p.to(tl.int64)
    if reader_order_ptr is not None:
        m = tl.load(reader_order_ptr + p, mask=p_ok, other=0)
    b, z, y, x = load_voxels(coords_ptr, m, p_ok)  # of the reader; the next lines: of its column's first cell
    z = z * stride[0] - padding[0] + column // KY * DZ
    y = y * stride[1] - padding[1] + column % KY * DY
    x = x * stride[2] - padding[2]
    in_column = p_ok & (z >= 0) & (z < Z) & (y >= 0) & (y < Y)
    wanted = key_of(b, z, y, x, Z, Y, X)

    at = tl.zeros((BLOCK,), tl.int32)  # ends as the index of the first key >= `wanted`
    end = tl.where(in_column, N, 0)
    for _ in range(STEPS):
        middle = at + (end - at) // 2
        below = tl.load(keys_ptr + middle, mask=middle < end, other=NO_KEY) < wanted
        at, end = tl.where(below, middle + 1, at), tl.where(below, end, middle)
    for k in tl.static_range(KX):
        x_k = x + k * DX
        key = tl.load(keys_ptr + at, mask=in_column & (at < N), other=NO_KEY)
        # consecutive keys may lie in different rows of cells
        found = (key == wanted) & (x_k >= 0) & (x_k < X)
        neighbor = tl.where(found, at, -1)
        if order_ptr is not None:
            neighbor = tl.load(order_ptr + at, mask=found, other=-1).to(tl.int32)
        tl.store(neighbor_idx_ptr + (column * KX + k).to(tl.int64) * M + m, neighbor, mask=p_ok)
        if inverse_idx_ptr is not None:
            at_inverse = (column * KX + k).to(tl.int64) * N + neighbor
            tl.store(inverse_idx_ptr + at_inverse, m.to(tl.int32), mask=p_ok & found)
        wanted += DX
        if k + 1 < KX:
            for _ in tl.static_range(DX):  # the linear scan: at most one key in each of the next DX cells
                at += (tl.load(keys_ptr + at, mask=in_column & (at < N), other=NO_KEY) < wanted).to(tl.int32)


@jit(varying=("M", "N"))
def _inverse_kernel(neighbor_idx_ptr, inverse_idx_ptr, M, N, BLOCK: tl.constexpr):
    """Invert neighbor_idx [K, M] into inverse_idx [K, N], which is -1 everywhere before."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    k = tl.program_id(1).to(tl.int64)
    i = tl.load(neighbor_idx_ptr + k * M + m, mask=m < M, other=-1)
    tl.store(inverse_idx_ptr + k * N + i, m, mask=i >= 0)

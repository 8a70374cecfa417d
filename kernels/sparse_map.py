"""Which input voxel each offset of a sparse convolution reads, as tables of row numbers.

A voxel (b, z, y, x) of a grid (Z, Y, X) has the key ((b Z + z) Y + y) X + x, an int64: grids may have more than 2^31
cells. Keys in ascending order are the whole index; there is no hash table and nothing is atomic, so every table is the
same from run to run. An offset k = (kz, ky, kx) of a kernel, counted row-major, links input cell i and output cell o by

    submanifold           i = o + (k - kernel // 2) dilation            outputs: the inputs themselves
    strided               i = o stride - padding + k dilation           outputs: every o in the grid that has an input
    transposed            o = i stride - padding + k dilation           outputs: every o in the grid that has an input
    inverse               a table read backwards: from input and offset to output

on each axis. Along x the inputs that a voxel asks for lie side by side in the keys, so a submanifold table takes one
binary search a (kz, ky) column and a walk. Strided and transposed tables take none: all (input, offset) pairs are
written out under the key of their output and sorted; the pairs of one output then lie together.

Sizes: N inputs, M outputs, K = kz ky kx offsets. All triples are (z, y, x).
"""

from math import prod

import torch
import torch.nn.functional as F

from kernels.backend import on_triton, tl, triton  # noqa: F401

NO_KEY = 2**62  # sorts behind every voxel; a power of two, since F.pad takes its value as fp64


def sort_voxels(coords, shape, check=True):
    """Sort voxels by key.

    Args:
        coords: [N, 4] int32 (b, z, y, x), each once, in any order.
        shape:  cells (Z, Y, X).
        check:  raise on coordinates that are outside the grid or occur twice. It waits for the device, once; without
                it such coordinates give wrong tables.

    Returns:
        keys:  [N] int64 ascending.
        order: [N] int64, row of each key: keys[i] is the key of coords[order[i]].

    Raises ValueError naming one voxel at fault.
    """
    return sort_voxels_ref(coords, shape, check)


def sort_voxels_ref(coords, shape, check=True):
    """`sort_voxels` in plain PyTorch."""
    Z, Y, X = shape
    b, z, y, x = coords.long().unbind(1)  # [N] each
    keys, order = (((b * Z + z) * Y + y) * X + x).sort()
    if check:
        outside = (coords < 0).any(dim=1) | (coords[:, 1:] >= coords.new_tensor([Z, Y, X])).any(dim=1)
        twice = F.pad(keys[1:] == keys[:-1], (0, 1))
        fault = torch.stack([outside.any(), twice.any()]).tolist()
        if fault[0]:
            voxel = tuple(coords[outside.nonzero()[0, 0]].tolist())
            raise ValueError(f"voxel (b, z, y, x) = {voxel} is outside the grid (Z, Y, X) = {(Z, Y, X)}")
        if fault[1]:
            voxel = tuple(coords[order[twice.nonzero()[0, 0]]].tolist())
            raise ValueError(f"voxel (b, z, y, x) = {voxel} occurs twice")
    return keys, order


def submanifold_map(coords, keys, order, shape, kernel, dilation):
    """The neighbours of each voxel of a set in the same set.

    Args:
        coords:      [N, 4] int32 (b, z, y, x).
        keys, order: of `sort_voxels`.
        shape:       cells (Z, Y, X).
        kernel:      offsets (kz, ky, kx). An even kernel reaches farther down: 2 covers -1 and 0.
        dilation:    cells between offsets (z, y, x).

    Returns:
        neighbor_idx: [K, N] int32 rows of `coords`; -1 where there is no voxel, beyond the borders above all.
    """
    return submanifold_map_ref(coords, keys, order, shape, kernel, dilation)


def submanifold_map_ref(coords, keys, order, shape, kernel, dilation):
    """`submanifold_map` in plain PyTorch."""
    (Z, Y, X), (kz, ky, kx), (_, _, dx) = shape, kernel, dilation
    N, K = len(coords), prod(kernel)
    row = order.int()
    z, y, x = coords.long().index_select(0, order)[:, 1:].unbind(1)  # [N] each, sorted by key
    padded_keys = F.pad(keys, (0, 1), value=NO_KEY)
    padded_row = F.pad(row, (0, 1), value=-1)
    # an odd kernel is its own mirror image: if k leads from i to j, the mirrored offset leads from j to i
    mirrored = all(size % 2 for size in kernel)
    neighbor_idx = coords.new_full((K, N), -1)
    for column in range(kz * ky // 2 + 1 if mirrored else kz * ky):
        oz, oy = (i - n // 2 for i, n in zip(divmod(column, ky), (kz, ky), strict=True))
        oz, oy = oz * dilation[0], oy * dilation[1]
        in_column = (z + oz >= 0) & (z + oz < Z) & (y + oy >= 0) & (y + oy < Y)
        at = None
        for i in range(kx):
            k, ox = column * kx + i, (i - kx // 2) * dx
            if mirrored and 2 * k + 1 == K:  # the middle: each voxel itself
                neighbor_idx[k] = torch.arange(N, dtype=torch.int32, device=coords.device)
                break
            wanted = keys + ((oz * Y + oy) * X + ox)
            if at is None:
                at = torch.searchsorted(keys, wanted)
            else:
                for _ in range(dx):  # the walk: at most one key a cell
                    at = at + (padded_keys.index_select(0, at) < wanted)
            # the last cell of a row is followed by the first of the next
            found = in_column & (x + ox >= 0) & (x + ox < X) & (padded_keys.index_select(0, at) == wanted)
            neighbor = torch.where(found, padded_row.index_select(0, at), -1)
            neighbor_idx[k, order] = neighbor
            if mirrored:
                neighbor_idx[K - 1 - k, neighbor[found].long()] = row[found]
    return neighbor_idx


def strided_map(coords, shape, kernel, stride, padding, dilation):
    """Output voxels of a strided convolution, and the input that each offset of each one reads.

    Args:
        coords:   [N, 4] int32 (b, z, y, x), each once and inside the grid, in any order.
        shape:    cells (Z, Y, X) of the input.
        kernel, stride, padding, dilation: cells (z, y, x), as torch's conv3d.

    Returns:
        out_coords:   [M, 4] int32, every cell of the output grid that reads at least one voxel, in ascending order.
        neighbor_idx: [K, M] int32 rows of `coords`, -1 where there is no voxel.

    Waits for the device, once: for M.
    """
    return strided_map_ref(coords, shape, kernel, stride, padding, dilation)


def strided_map_ref(coords, shape, kernel, stride, padding, dilation):
    """`strided_map` in plain PyTorch."""
    # On one axis at most `reach` outputs read a cell. The highest is (i + padding) // stride.
    reach = [(k - 1) * d // s + 1 for k, s, d in zip(kernel, stride, dilation, strict=True)]
    cells, offsets, valids = [], [], []
    for axis, size in enumerate(out_shape(shape, kernel, stride, padding, dilation)):
        back = torch.arange(reach[axis], device=coords.device)[:, None]
        place = coords[:, 1 + axis].long() + padding[axis]  # [N]
        cell = place // stride[axis] - back  # [reach, N]
        distance = place - cell * stride[axis]
        offset = distance // dilation[axis]
        valids.append((offset * dilation[axis] == distance) & (offset < kernel[axis]) & (cell >= 0) & (cell < size))
        cells.append(cell)
        offsets.append(offset)
    return _gather_pairs_ref(coords, cells, offsets, valids, out_shape(shape, kernel, stride, padding, dilation), kernel)


def transposed_map(coords, shape, kernel, stride, padding, dilation):
    """Output voxels of a transposed convolution, and the input that each offset of each one reads.

    As `strided_map`, but input i spreads to the outputs i stride - padding + k dilation, as torch's conv_transpose3d.
    """
    return transposed_map_ref(coords, shape, kernel, stride, padding, dilation)


def transposed_map_ref(coords, shape, kernel, stride, padding, dilation):
    """`transposed_map` in plain PyTorch."""
    cells, offsets, valids = [], [], []
    for axis, size in enumerate(transposed_out_shape(shape, kernel, stride, padding, dilation)):
        offset = torch.arange(kernel[axis], device=coords.device)[:, None]
        cell = coords[:, 1 + axis].long() * stride[axis] - padding[axis] + offset * dilation[axis]  # [kernel, N]
        valids.append((cell >= 0) & (cell < size))
        cells.append(cell)
        offsets.append(offset.expand_as(cell))
    out = transposed_out_shape(shape, kernel, stride, padding, dilation)
    return _gather_pairs_ref(coords, cells, offsets, valids, out, kernel)


def _gather_pairs_ref(coords, cells, offsets, valids, out, kernel):
    """Collect (input, offset) pairs by their output.

    Args:
        coords:  [N, 4] int32 of the inputs.
        cells:   per axis [T, N] int64, the output cell of each pair.
        offsets: per axis [T, N] int64, its offset.
        valids:  per axis [T, N] bool. A pair exists where all three axes are.
        out:     cells (Z, Y, X) of the output grid.
        kernel:  offsets (kz, ky, kx).

    Returns:
        out_coords, neighbor_idx: as `strided_map`.
    """

    def combine(z, y, x, fz, fy):
        """((z fz) + y) fy + x of all combinations of the axes: [Tz, Ty, Tx, N]"""
        return (z[:, None, None] * fz + y[:, None]) * fy + x

    (Z, Y, X), (_, ky, kx) = out, kernel
    first = coords[:, 0].long() * Z  # [N]
    key = combine(cells[0] + first, cells[1], cells[2], Y, X)
    k = combine(*offsets, ky, kx)
    exists = valids[0][:, None, None] & valids[1][:, None] & valids[2]
    input_idx = torch.arange(len(coords), dtype=torch.int32, device=coords.device).expand_as(key)[exists]  # [pairs]
    key, order = key[exists].sort()
    is_first = F.pad(key[1:] != key[:-1], (1, 0), value=True)[: len(key)]
    m = is_first.cumsum(0) - 1
    key = key[is_first]  # [M]
    neighbor_idx = coords.new_full((prod(kernel), len(key)), -1)
    neighbor_idx[k[exists].index_select(0, order), m] = input_idx.index_select(0, order)
    b, z, y, x = key // (Z * Y * X), key // (Y * X) % Z, key // X % Y, key % X
    return torch.stack([b, z, y, x], dim=1).int(), neighbor_idx


def inverse_map(neighbor_idx, N):
    """A table read backwards: the output that each input reaches through each offset.

    Args:
        neighbor_idx: [K, M] int32 rows in [0, N) or -1, in each row of the table every input at most once, as the maps
                      above make them.
        N:            number of inputs.

    Returns:
        [K, N] int32: m where neighbor_idx[k, m] = i, -1 where there is none. It is the table of the inverse convolution
        and of the gradient of the features. Of a submanifold table with odd kernel it is `neighbor_idx.flip(0)`.
    """
    return inverse_map_ref(neighbor_idx, N)


def inverse_map_ref(neighbor_idx, N):
    """`inverse_map` in plain PyTorch."""
    k, m = (neighbor_idx >= 0).nonzero(as_tuple=True)
    inverse_idx = neighbor_idx.new_full((len(neighbor_idx), N), -1)
    inverse_idx[k, neighbor_idx[k, m].long()] = m.int()
    return inverse_idx


def out_shape(shape, kernel, stride, padding, dilation):
    """Cells (z, y, x) of the output of a strided convolution, as torch's conv3d."""
    axes = zip(shape, kernel, stride, padding, dilation, strict=True)
    return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in axes)


def transposed_out_shape(shape, kernel, stride, padding, dilation):
    """Cells (z, y, x) of the output of a transposed convolution, as torch's conv_transpose3d."""
    axes = zip(shape, kernel, stride, padding, dilation, strict=True)
    return tuple((size - 1) * s - 2 * p + d * (k - 1) + 1 for size, k, s, p, d in axes)

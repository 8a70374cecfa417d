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
outputs to its inputs. The references, in NumPy, go ways that are faster on a CPU: for submanifold tables they test bits
of cells, for the others they sort all (input, offset) pairs.

Sizes: N inputs, M outputs, K = kz ky kx offsets. All triples are (z, y, x).
"""

from collections.abc import Sequence
from functools import cache
from itertools import product
from math import prod

import numpy as np
import torch
from torch import Tensor

from unipad.kernels.backend import jit, on_triton, opaque, tl, triton
from unipad.kernels.sparse_outputs import (
    gather_pairs_ref,
    max_readers,
    out_shape,
    output_coords,
    output_keys,
    transposed_out_shape,
)
from unipad.kernels.voxel_keys import (
    NO_KEY,
    NO_KEY_SHORT,
    check_grid,
    checked,
    key_of,
    load_voxels,
    sort_voxels,
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
    """`submanifold_map` in NumPy; ignores `keys`.

    The grid is a string of bits, one per cell, of which only the words with a voxel are stored. For each offset, voxels
    test the bit of the cell that they read. In ascending order, the voxels that read at an offset and those that read
    at the opposite one are each other's neighbors.
    """
    N, K = len(_checked_submanifold(coords, shape, kernel, dilation)), prod(kernel)
    neighbor_idx = np.full((K, N), -1, np.int32)
    rows = np.arange(N, dtype=np.int32) if order is None else order.cpu().numpy().astype(np.int32)
    b, z, y, x = coords.cpu().numpy().T.astype(np.int64)
    # empty cells after each row, slice and sample: an offset that leaves one of them ends there, not in the next
    Z, Y, X = (n + size // 2 * d for n, size, d in zip(shape, kernel, dilation, strict=True))
    cell = (((b * Z + z) * Y + y) * X + x)[rows]
    word, bit = cell >> 6, np.uint64(1) << (cell & 63).astype(np.uint64)
    first = np.flatnonzero(np.diff(word, prepend=-1))  # [V], of the voxels in each word
    words, word_of = word[first], np.repeat(np.arange(len(first)), np.diff(first, append=N))
    bits = np.bitwise_or.reduceat(bit, first) if N else bit
    padded_words, padded_bits = np.append(words, -1), np.append(bits, np.uint64(0))

    # shift -> [V] index of the first word at least `shift` words after each, [V] whether it is exactly there
    located = {}

    def locate(shift):
        if shift not in located:
            at, found = located.get(shift - 1, (None, None))  # there already, unless a new column of offsets begins
            at = np.searchsorted(words, words + shift) if at is None else at + found
            located[shift] = at, padded_words[at] == words + shift
        return located[shift]

    @cache
    def shifted(shift):
        """[V] the word that is `shift` words after each stored one, 0 where it is not stored."""
        at, found = locate(abs(shift))
        if shift >= 0:
            return np.where(found, padded_bits[at], np.uint64(0))
        result = np.zeros_like(bits)
        result[at[found]] = bits[found]
        return result

    def readers(distance):
        """Indices, in ascending order, of the voxels with another one `distance` cells further on."""
        shift, low = divmod(distance, 64)
        window = shifted(shift) >> np.uint64(low)
        if low:
            window |= shifted(shift + 1) << np.uint64(64 - low)
        return rows[np.flatnonzero((window[word_of] & bit) != 0)]

    def index(offset):
        """The number of an offset (z, y, x), counted from the center; None if the kernel does not have it."""
        offset = [o + size // 2 for o, size in zip(offset, kernel, strict=True)]
        inside = all(0 <= o < size for o, size in zip(offset, kernel, strict=True))
        return (offset[0] * kernel[1] + offset[1]) * kernel[2] + offset[2] if inside else None

    neighbor_idx[index((0, 0, 0))] = np.arange(N)
    # the offsets after the center, and those opposite to them; an even kernel lacks some of the former
    for offset in product(*(range(-(size // 2), size // 2 + 1) for size in kernel)):
        k, opposite = index(offset), index([-o for o in offset])
        if offset > (0, 0, 0) and (k, opposite) != (None, None):
            z, y, x = (o * d for o, d in zip(offset, dilation, strict=True))
            distance = (z * Y + y) * X + x
            i, j = readers(distance), readers(-distance)
            if k is not None:
                neighbor_idx[k][i] = j
            if opposite is not None:
                neighbor_idx[opposite][j] = i
    return torch.from_numpy(neighbor_idx).to(coords.device)


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
    """`strided_map` in NumPy; ignores `keys` and `order`."""
    out_coords, _, neighbor_idx, _ = _strided_ref(coords, shape, (kernel, stride, padding, dilation), batch_size, False)
    return out_coords, neighbor_idx


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
    """`strided_tables` in NumPy; ignores `keys` and `order`."""
    return _strided_ref(coords, shape, (kernel, stride, padding, dilation), batch_size, True)


def _strided_ref(coords, shape, geometry, batch_size, with_inverse):
    """`_strided` in NumPy."""
    (_, out), (kernel, stride, padding, dilation) = _checked_strided(coords, shape, geometry, batch_size), geometry
    slots = []
    for axis, readers in enumerate(max_readers(kernel, stride, dilation)):
        padded = coords[:, 1 + axis].cpu().numpy().astype(np.int64) + padding[axis]  # from the first padding cell
        cells = [padded // stride[axis] - back for back in range(readers)]  # back: counted from the last reader
        distances = [padded - cell * stride[axis] for cell in cells]
        offsets = [distance // dilation[axis] for distance in distances]
        exact = [o * dilation[axis] == d for o, d in zip(offsets, distances, strict=True)]
        inside = [(o < kernel[axis]) & (c >= 0) & (c < out[axis]) for o, c in zip(offsets, cells, strict=True)]
        slots.append([(c, o, e & i) for c, o, e, i in zip(cells, offsets, exact, inside, strict=True)])
    return gather_pairs_ref(coords, slots, out, kernel, with_inverse)


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
    """`transposed_map` in NumPy."""
    _, out = _checked_transposed(coords, shape, (kernel, stride, padding, dilation), batch_size)
    slots = []
    for axis, size in enumerate(out):
        first = coords[:, 1 + axis].cpu().numpy().astype(np.int64) * stride[axis] - padding[axis]
        cells = [first + k * dilation[axis] for k in range(kernel[axis])]  # of the output grid
        slots.append([(cell, k, (cell >= 0) & (cell < size)) for k, cell in enumerate(cells)])
    out_coords, _, neighbor_idx, _ = gather_pairs_ref(coords, slots, out, kernel, with_inverse=False)
    return out_coords, neighbor_idx


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
    """`inverse_map` in NumPy."""
    inverse_idx = np.full((len(neighbor_idx), N), -1, np.int32)
    for read, inverse in zip(neighbor_idx.cpu().numpy(), inverse_idx, strict=True):
        m = np.flatnonzero(read >= 0)
        inverse[read[m]] = m
    return torch.from_numpy(inverse_idx).to(neighbor_idx.device)


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

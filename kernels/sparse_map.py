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

from collections.abc import Sequence
from functools import wraps
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import on_triton, tl, triton

NO_KEY = 2**62  # sorts behind every voxel; a power of two, since F.pad takes its value as fp64


def _opaque(fake):
    """Decorator: torch.compile calls the op without looking inside, and knows its outputs' shapes from `fake`."""

    def wrap(op):
        custom_op = torch.library.custom_op(f"unipad::{op.__name__}", op, mutates_args=())
        custom_op.register_fake(fake)

        @wraps(op)
        def call(*args, **kwargs):
            # outside of a graph the plain function: the registered one costs tens of microseconds a call
            return (custom_op if torch.compiler.is_compiling() else op)(*args, **kwargs)

        return call

    return wrap


def _sort_voxels_fake(coords, shape, check=True):
    keys = coords.new_empty(len(coords), dtype=torch.int64)
    return keys, torch.empty_like(keys)


@_opaque(_sort_voxels_fake)
def sort_voxels(coords: Tensor, shape: Sequence[int], check: bool = True) -> tuple[Tensor, Tensor]:
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
    if not on_triton(coords):
        return sort_voxels_ref(coords, shape, check)
    coords = _check(coords, shape)
    keys = coords.new_empty(len(coords), dtype=torch.int64)
    if len(coords):
        _keys_kernel[(triton.cdiv(len(coords), BLOCK),)](coords, keys, len(coords), *shape, BLOCK=BLOCK)
    keys, order = keys.sort()
    if check:
        _raise_on_faults(coords, shape, keys, order)
    return keys, order


def sort_voxels_ref(coords, shape, check=True):
    """`sort_voxels` in plain PyTorch."""
    Z, Y, X = shape
    b, z, y, x = _check(coords, shape).long().unbind(1)  # [N] each
    keys, order = (((b * Z + z) * Y + y) * X + x).sort()
    if check:
        _raise_on_faults(coords, shape, keys, order)
    return keys, order


def _raise_on_faults(coords, shape, keys, order):
    outside = (coords < 0).any(dim=1) | (coords[:, 1:] >= coords.new_tensor(shape)).any(dim=1)
    twice = F.pad(keys[1:] == keys[:-1], (0, 1))[: len(keys)]
    any_outside, any_twice = torch.stack([outside.any(), twice.any()]).tolist()
    if any_outside:
        voxel = tuple(coords[outside.nonzero()[0, 0]].tolist())
        raise ValueError(f"voxel (b, z, y, x) = {voxel} is outside the grid (Z, Y, X) = {tuple(shape)}")
    if any_twice:
        voxel = tuple(coords[order[twice.nonzero()[0, 0]]].tolist())
        raise ValueError(f"voxel (b, z, y, x) = {voxel} occurs twice")


def _check(coords, *triples):
    """The coordinates, contiguous."""
    assert coords.dim() == 2 and coords.shape[1] == 4, f"coordinates are [N, 4], not {tuple(coords.shape)}"
    assert coords.dtype == torch.int32, f"coordinates are int32, not {coords.dtype}"
    assert all(len(t) == 3 for t in triples), f"a triple (z, y, x) each: {triples}"
    return coords.contiguous()


@_opaque(lambda coords, keys, order, shape, kernel, dilation: coords.new_empty(prod(kernel), len(coords)))
def submanifold_map(
    coords: Tensor, keys: Tensor, order: Tensor, shape: Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> Tensor:
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
    if not on_triton(coords):
        return submanifold_map_ref(coords, keys, order, shape, kernel, dilation)
    coords = _check(coords, shape, kernel, dilation)
    N, (kz, ky, kx) = len(coords), kernel
    neighbor_idx = coords.new_empty(prod(kernel), N)
    if neighbor_idx.numel():
        _submanifold_kernel[(triton.cdiv(N, BLOCK), kz * ky)](
            coords, keys, order, neighbor_idx,
            N, *shape, kz, ky, *dilation[:2], N.bit_length(), KX=kx, DX=dilation[2], NO_KEY=NO_KEY, BLOCK=BLOCK,
        )  # fmt: skip
    return neighbor_idx


def submanifold_map_ref(coords, keys, order, shape, kernel, dilation):
    """`submanifold_map` in plain PyTorch."""
    (_, Y, X), (kz, ky, kx), (dz, dy, dx) = shape, kernel, dilation
    N, K = len(_check(coords, shape, kernel, dilation)), prod(kernel)
    neighbor_idx = coords.new_full((K, N), -1)
    # an odd kernel is its own mirror image: if k leads from i to j, the mirrored offset leads from j to i
    mirrored = all(size % 2 for size in kernel)
    if mirrored:
        neighbor_idx[K // 2] = torch.arange(N, dtype=torch.int32, device=coords.device)
    z, y, x = (coords[:, 1 + axis].index_select(0, order) for axis in range(3))  # [N] each, sorted by key
    # the last cell of a row is followed by the first of the next
    in_z, in_y, in_x = (
        [(cell + (i - k // 2) * d >= 0) & (cell + (i - k // 2) * d < size) for i in range(k)]
        for cell, size, k, d in zip((z, y, x), shape, kernel, dilation, strict=True)
    )
    padded_keys = F.pad(keys, (0, 1), value=NO_KEY)
    for column in range(kz * ky // 2 + 1 if mirrored else kz * ky):
        iz, iy = divmod(column, ky)
        in_column = in_z[iz] & in_y[iy]
        wanted = keys + (((iz - kz // 2) * dz * Y + (iy - ky // 2) * dy) * X - kx // 2 * dx)
        at = torch.searchsorted(keys, wanted)  # the first key that is not below
        key = padded_keys.index_select(0, at)
        for i in range(kx):
            k = column * kx + i
            if mirrored and k == K // 2:
                break
            i_sorted = (in_column & in_x[i] & (key == wanted)).nonzero()[:, 0]
            reader, read = order.index_select(0, i_sorted), order.index_select(0, at.index_select(0, i_sorted))
            neighbor_idx[k].index_copy_(0, reader, read.int())
            if mirrored:
                neighbor_idx[K - 1 - k].index_copy_(0, read, reader.int())
            wanted += dx
            for _ in range(dx if i + 1 < kx else 0):  # the walk: at most one key a cell
                at += key < wanted
                key = padded_keys.index_select(0, at)
    return neighbor_idx


def _pairs_fake(coords, shape, kernel, stride, padding, dilation):
    M = torch.library.get_ctx().new_dynamic_size()
    return coords.new_empty(M, 4), coords.new_empty(prod(kernel), M)


@_opaque(_pairs_fake)
def strided_map(
    coords: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor]:
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
    if not on_triton(coords):
        return strided_map_ref(coords, shape, kernel, stride, padding, dilation)
    out = out_shape(shape, kernel, stride, padding, dilation)
    geometry = kernel, stride, padding, dilation
    return _gather_pairs(_check(coords, shape, *geometry), out, _reach(kernel, stride, dilation), geometry, False)


def strided_map_ref(coords, shape, kernel, stride, padding, dilation):
    """`strided_map` in plain PyTorch."""
    _check(coords, shape, kernel, stride, padding, dilation)
    out = out_shape(shape, kernel, stride, padding, dilation)
    cells, offsets, valids = [], [], []
    for axis, (size, reach) in enumerate(zip(out, _reach(kernel, stride, dilation), strict=True)):
        back = torch.arange(reach, device=coords.device)[:, None]
        place = coords[:, 1 + axis].long() + padding[axis]  # [N]
        cell = place // stride[axis] - back  # [reach, N]
        distance = place - cell * stride[axis]
        offset = distance // dilation[axis]
        valids.append((offset * dilation[axis] == distance) & (offset < kernel[axis]) & (cell >= 0) & (cell < size))
        cells.append(cell)
        offsets.append(offset)
    return _gather_pairs_ref(coords, cells, offsets, valids, out, kernel)


def _reach(kernel, stride, dilation):
    """How many outputs of a strided convolution read one cell, at most, on each axis."""
    return tuple((k - 1) * d // s + 1 for k, s, d in zip(kernel, stride, dilation, strict=True))


@_opaque(_pairs_fake)
def transposed_map(
    coords: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Output voxels of a transposed convolution, and the input that each offset of each one reads.

    As `strided_map`, but input i spreads to the outputs i stride - padding + k dilation, as torch's conv_transpose3d.
    """
    if not on_triton(coords):
        return transposed_map_ref(coords, shape, kernel, stride, padding, dilation)
    out = transposed_out_shape(shape, kernel, stride, padding, dilation)
    geometry = kernel, stride, padding, dilation
    return _gather_pairs(_check(coords, shape, *geometry), out, kernel, geometry, True)


def transposed_map_ref(coords, shape, kernel, stride, padding, dilation):
    """`transposed_map` in plain PyTorch."""
    _check(coords, shape, kernel, stride, padding, dilation)
    out = transposed_out_shape(shape, kernel, stride, padding, dilation)
    cells, offsets, valids = [], [], []
    for axis, size in enumerate(out):
        offset = torch.arange(kernel[axis], device=coords.device)[:, None]
        cell = coords[:, 1 + axis].long() * stride[axis] - padding[axis] + offset * dilation[axis]  # [kernel, N]
        valids.append((cell >= 0) & (cell < size))
        cells.append(cell)
        offsets.append(offset.expand_as(cell))
    return _gather_pairs_ref(coords, cells, offsets, valids, out, kernel)


def _gather_pairs(coords, out, slots, geometry, transposed):
    """`_gather_pairs_ref` by kernels, which find the pairs of each input themselves.

    Args:
        coords:     [N, 4] int32 of the inputs.
        out:        cells (Z, Y, X) of the output grid.
        slots:      places for pairs on each axis; an input has up to their product.
        geometry:   kernel, stride, padding, dilation.
        transposed: True where an input spreads, False where an output reads.
    """
    N, K, T = len(coords), prod(geometry[0]), prod(slots)
    if not N or min(out) <= 0:
        return coords.new_empty(0, 4), coords.new_empty(K, 0)
    grid = (triton.cdiv(T * N, BLOCK_PAIRS),)
    sizes = T * N, N, tuple(out), tuple(slots), *map(tuple, geometry)
    flags = dict(TRANSPOSED=transposed, NO_KEY=NO_KEY, BLOCK_PAIRS=BLOCK_PAIRS)
    keys = coords.new_empty(T * N, dtype=torch.int64)
    _pair_keys_kernel[grid](coords, keys, *sizes, **flags)
    keys, order = keys.sort()
    is_first = keys != NO_KEY
    is_first[1:] &= keys[1:] != keys[:-1]
    number = is_first.cumsum(0, dtype=torch.int32)  # of the pair's output, from 1 on
    M = int(number[-1])
    out_coords = coords.new_empty(M, 4)
    neighbor_idx = coords.new_full((K, M), -1)
    if M:
        _fill_pairs_kernel[grid](
            coords, keys, order, is_first, number, out_coords, neighbor_idx, M, *sizes, **flags
        )  # fmt: skip
    return out_coords, neighbor_idx


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
    exists = valids[0][:, None, None] & valids[1][:, None] & valids[2]
    pair = exists.flatten().nonzero()[:, 0]  # among [Tz, Ty, Tx, N]
    key = combine(cells[0] + first, cells[1], cells[2], Y, X).flatten().index_select(0, pair)
    k = combine(*offsets, ky, kx).flatten().index_select(0, pair)
    key, order = key.sort()
    is_first = F.pad(key[1:] != key[:-1], (1, 0), value=True)[: len(key)]
    m = is_first.cumsum(0) - 1
    key = key[is_first]  # [M]
    neighbor_idx = coords.new_full((prod(kernel), len(key)), -1)
    place = k.index_select(0, order) * len(key) + m
    neighbor_idx.view(-1).index_copy_(0, place, (pair % max(len(coords), 1)).int().index_select(0, order))
    b, z, y, x = key // (Z * Y * X), key // (Y * X) % Z, key // X % Y, key % X
    return torch.stack([b, z, y, x], dim=1).int(), neighbor_idx


@_opaque(lambda neighbor_idx, N: neighbor_idx.new_empty(len(neighbor_idx), N))
def inverse_map(neighbor_idx: Tensor, N: int) -> Tensor:
    """A table read backwards: the output that each input reaches through each offset.

    Args:
        neighbor_idx: [K, M] int32 rows in [0, N) or -1, in each row of the table every input at most once, as the maps
                      above make them.
        N:            number of inputs.

    Returns:
        [K, N] int32: m where neighbor_idx[k, m] = i, -1 where there is none. It is the table of the inverse convolution
        and of the gradient of the features. Of a submanifold table with odd kernel it is `neighbor_idx.flip(0)`.
    """
    if not on_triton(neighbor_idx):
        return inverse_map_ref(neighbor_idx, N)
    K, M = neighbor_idx.shape
    inverse_idx = neighbor_idx.new_full((K, N), -1)
    if neighbor_idx.numel() and N:
        _inverse_kernel[(triton.cdiv(M, BLOCK), K)](neighbor_idx.contiguous(), inverse_idx, M, N, BLOCK=BLOCK)
    return inverse_idx


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


BLOCK = 256  # voxels or table entries per program
BLOCK_PAIRS = 1024  # pairs per program


@triton.jit
def _keys_kernel(coords_ptr, keys_ptr, N, Z, Y, X, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    i_ok = i < N
    b, z, y, x = _load_voxels(coords_ptr, i, i_ok)
    tl.store(keys_ptr + i, _key(b, z, y, x, Z, Y, X), mask=i_ok)


@triton.jit
def _submanifold_kernel(
    coords_ptr, keys_ptr, order_ptr, neighbor_idx_ptr,  # [N, 4], [N], [N], [K, N]
    N, Z, Y, X, KZ, KY, DZ, DY, STEPS,  # STEPS halvings of N leave nothing
    KX: tl.constexpr, DX: tl.constexpr, NO_KEY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One (kz, ky) column of offsets of BLOCK voxels, in the order of their keys: neighbours search alike."""
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    p_ok = p < N
    column = tl.program_id(1)
    oz, oy = (column // KY - KZ // 2) * DZ, (column % KY - KY // 2) * DY
    i = tl.load(order_ptr + p, mask=p_ok, other=0)
    b, z, y, x = _load_voxels(coords_ptr, i, p_ok)
    z, y = z + oz, y + oy
    in_column = p_ok & (z >= 0) & (z < Z) & (y >= 0) & (y < Y)
    first_x: tl.constexpr = -(KX // 2) * DX
    wanted = _key(b, z, y, x, Z, Y, X) + first_x

    at = tl.zeros((BLOCK,), tl.int32)  # becomes the first key that is not below `wanted`
    end = tl.where(in_column, N, 0)
    for _ in range(STEPS):
        middle = at + (end - at) // 2
        below = tl.load(keys_ptr + middle, mask=middle < end, other=NO_KEY) < wanted
        at, end = tl.where(below, middle + 1, at), tl.where(below, end, middle)
    for k in tl.static_range(KX):
        x_k = x + (first_x + k * DX)
        key = tl.load(keys_ptr + at, mask=in_column & (at < N), other=NO_KEY)
        # the last cell of a row is followed by the first of the next
        found = (key == wanted) & (x_k >= 0) & (x_k < X)
        neighbor = tl.load(order_ptr + at, mask=found, other=-1)
        tl.store(neighbor_idx_ptr + (column * KX + k).to(tl.int64) * N + i, neighbor.to(tl.int32), mask=p_ok)
        wanted += DX
        if k + 1 < KX:
            for _ in tl.static_range(DX):  # the walk: at most one key a cell
                at += (tl.load(keys_ptr + at, mask=in_column & (at < N), other=NO_KEY) < wanted).to(tl.int32)


@triton.jit
def _pair_keys_kernel(
    coords_ptr, keys_ptr,  # [N, 4], [PAIRS]
    PAIRS, N, out, slots, kernel, stride, padding, dilation,  # PAIRS = T * N
    TRANSPOSED: tl.constexpr, NO_KEY: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)  # [BLOCK_PAIRS]
    ok = pair < PAIRS
    b, z, y, x, _, _, exists = _pair(
        coords_ptr, pair, ok, N, out, slots, kernel, stride, padding, dilation, TRANSPOSED
    )  # fmt: skip
    tl.store(keys_ptr + pair, tl.where(exists, _key(b, z, y, x, out[0], out[1], out[2]), NO_KEY), mask=ok)


@triton.jit
def _fill_pairs_kernel(
    coords_ptr, keys_ptr, order_ptr, is_first_ptr, number_idx_ptr,  # [N, 4], [PAIRS] each; keys and the rest sorted
    out_coords_ptr, neighbor_idx_ptr,  # [M, 4], [K, M] filled with -1
    M, PAIRS, N, out, slots, kernel, stride, padding, dilation,
    TRANSPOSED: tl.constexpr, NO_KEY: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    q = tl.program_id(0).to(tl.int64) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)  # [BLOCK_PAIRS]
    ok = tl.load(keys_ptr + q, mask=q < PAIRS, other=NO_KEY) != NO_KEY
    pair = tl.load(order_ptr + q, mask=ok, other=0)
    b, z, y, x, i, k, _ = _pair(
        coords_ptr, pair, ok, N, out, slots, kernel, stride, padding, dilation, TRANSPOSED
    )  # fmt: skip
    m = tl.load(number_idx_ptr + q, mask=ok, other=1).to(tl.int64) - 1
    tl.store(neighbor_idx_ptr + k.to(tl.int64) * M + m, i, mask=ok)
    is_first = ok & (tl.load(is_first_ptr + q, mask=ok, other=0) != 0)
    at = out_coords_ptr + m * 4
    tl.store(at, b, mask=is_first)
    tl.store(at + 1, z, mask=is_first)
    tl.store(at + 2, y, mask=is_first)
    tl.store(at + 3, x, mask=is_first)


@triton.jit
def _inverse_kernel(neighbor_idx_ptr, inverse_idx_ptr, M, N, BLOCK: tl.constexpr):
    """[K, M] -> [K, N], filled with -1."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    k = tl.program_id(1).to(tl.int64)
    i = tl.load(neighbor_idx_ptr + k * M + m, mask=m < M, other=-1)
    tl.store(inverse_idx_ptr + k * N + i, m, mask=i >= 0)


@triton.jit
def _pair(
    coords_ptr, pair, ok, N, out, slots, kernel, stride, padding, dilation, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """Of the pairs [T, N]: output cells (b, z, y, x), rows of the inputs, offsets, and whether the pairs exist."""
    t, i = (pair // N).to(tl.int32), (pair % N).to(tl.int32)
    b, z, y, x = _load_voxels(coords_ptr, i, ok)
    tz, ty, tx = t // (slots[1] * slots[2]), t // slots[2] % slots[1], t % slots[2]
    z, kz, z_ok = _pair_axis(z, tz, out[0], kernel[0], stride[0], padding[0], dilation[0], TRANSPOSED)
    y, ky, y_ok = _pair_axis(y, ty, out[1], kernel[1], stride[1], padding[1], dilation[1], TRANSPOSED)
    x, kx, x_ok = _pair_axis(x, tx, out[2], kernel[2], stride[2], padding[2], dilation[2], TRANSPOSED)
    return b, z, y, x, i, (kz * kernel[1] + ky) * kernel[2] + kx, ok & z_ok & y_ok & x_ok


@triton.jit
def _pair_axis(cell, slot, size, kernel, stride, padding, dilation, TRANSPOSED: tl.constexpr):
    """Output cell, offset, and whether the pair exists; a strided pair's slot counts the outputs from the highest."""
    if TRANSPOSED:
        offset = slot
        place = cell * stride - padding + offset * dilation
        exists = (place >= 0) & (place < size)
    else:
        place = (cell + padding) // stride - slot
        distance = cell + padding - place * stride
        offset = distance // dilation
        exists = (offset * dilation == distance) & (offset < kernel) & (place >= 0) & (place < size)
    return place, offset, exists


@triton.jit
def _load_voxels(coords_ptr, i, ok):
    """b, z, y, x of the voxels i, int32."""
    at = coords_ptr + i.to(tl.int64) * 4
    b = tl.load(at, mask=ok, other=0)
    z = tl.load(at + 1, mask=ok, other=0)
    y = tl.load(at + 2, mask=ok, other=0)
    x = tl.load(at + 3, mask=ok, other=0)
    return b, z, y, x


@triton.jit
def _key(b, z, y, x, Z, Y, X):
    return ((b.to(tl.int64) * Z + z) * Y + y) * X + x

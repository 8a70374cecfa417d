"""The layouts of a neighbor table that the sparse GEMMs read: tiles of output rows, and pairs of rows by kernel offset.

For a tile of BLOCK_M output rows, the GEMM multiplies at every offset at which any of the rows has a neighbor. A tile
is stored in the order of the GEMM's loop, which then has no branch and can prefetch: a list of those offsets and, for
each, the input rows that the outputs read. Rows with neighbors at the same offsets should be in the same tile: within a
window of consecutive rows, rows are sorted by their set of offsets. A wider window means fewer products with missing
neighbors, but each input row that a tile reads is then used by fewer of its outputs; benchmarks/count_sparse_conv.py
counts both. In the inverse table of a stride-2 convolution, the parity of a cell's (z, y, x) decides at which offsets
it has neighbors, and the same sort groups the eight kinds of cells.

The gradient of the weights sums over the pairs of each offset. The center offset has several times as many pairs as the
others, so pairs are stored offset after offset and split into chunks of equal length.

All this is computed once per `NeighborTable` and cached in it, for all layers on one set of voxels and their gradients.
"""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from unipad.kernels.backend import StreamCache, jit, tl, triton


class Tiles(NamedTuple):
    """T tiles of BLOCK_M outputs each. The suffix `_idx` marks int32 (rows or counts), as in kernel arguments."""

    row_idx: Tensor  # [T, BLOCK_M] int32, output rows of each tile; -1 for padding after the last row
    count_idx: Tensor  # [T] int32, number of offsets at which any row of the tile has a neighbor
    offset_idx: Tensor  # [T, K] int32, these offsets, ascending; only the first `count_idx` are written
    read_idx: Tensor  # [T, K, BLOCK_M] int32, input row that each output reads there, -1 for none; written likewise
    pairs_idx: Tensor  # [K, windows] int32, number of pairs of each offset in each window of rows


class Pairs(NamedTuple):
    """All pairs of an input row and the output row that reads it, by offset, then by output row; and the chunks of
    equal length into which the pairs of each offset are split, in the same order, with room for C chunks."""

    read_idx: Tensor  # [K * M] int32, input rows; not written after the last pair
    row_idx: Tensor  # [K * M] int32, output rows; likewise
    first: Tensor  # [C] int64, index of the chunk's first pair ...
    end: Tensor  # [C] int64, ... and one past its last; unused chunks are empty
    chunk_end_idx: Tensor  # [K] int32, one past the last chunk of each offset


# Rows that are sorted together. With windows of 1024, 4096 and all rows, the GEMM computes 1.95, 1.80 and 1.65 times
# the necessary products at stage 1 of the LiDAR encoder, 1.32, 1.28 and 1.18 times at stage 2; unsorted 2.56 and 1.54
# times (counted for tiles of 64). Beyond 1024 the sort spills registers.
WINDOW = 1024
BLOCK_K = 8  # offsets per step of a loop, or per program
BLOCK_C = 16  # chunks per program
BLOCK_COUNTS = 1024  # counts of pairs that a program adds up at once
# Bits of the sort key, one per offset; beyond 48 offsets, consecutive ones share a bit and may carry into the next. The
# rest of an int64 holds the row's number in the window. With more than MAX_SORTED offsets, 16 per bit, keys could reach
# that of the padding, 1 << 52, so rows are not sorted then.
KEY_BITS, MAX_SORTED = 48, 768

_tables = weakref.WeakValueDictionary()  # id of an index tensor -> its `NeighborTable`


class NeighborTable:
    """A neighbor table with a cache of the layouts that kernels read; an argument of `sparse_conv`.

    idx: [K, M] int32, the input row that each of M outputs reads at each of K kernel offsets; -1 for none.

    The cache is freed with `idx`: keep it while convolutions use it, and do not modify it.
    """

    def __init__(self, idx: Tensor):
        self.idx = idx.contiguous()
        self._version = _version(self.idx)
        # An attribute of the tensor: all that compiled code keeps for its backward are tensors.
        version, cache = getattr(self.idx, "_layouts", (None, None))
        self.cache = StreamCache() if cache is None or version != self._version else cache
        self.idx._layouts = self._version, self.cache
        _tables.setdefault(id(self.idx), self)

    def __reduce__(self):
        return NeighborTable, (self.idx,)  # the version counter of a copied tensor starts at 0

    @staticmethod
    def of(table: "Tensor | NeighborTable") -> "NeighborTable":
        """`table` itself if it is a `NeighborTable`; else the one made of this tensor, if there is one and the tensor
        was not modified since; else a new one.

        The lookup by tensor is for compiled code, which passes tensors only.
        """
        if isinstance(table, NeighborTable):
            return table
        owner = _tables.get(id(table))
        return NeighborTable(table) if owner is None or owner._version != _version(table) else owner

    def get(self, key, make):
        """The cached value of `key`; `make()` computes it the first time."""
        assert self._version == _version(self.idx), "a neighbor table was modified: its cache is no longer valid"
        return self.cache.get(key, self.idx.device, make)

    def tiles(self, block_m, sort=True):
        """`Tiles`, for M > 0. sort: False leaves the rows in the order of the table."""

        def make():
            tiles = _make_tiles(self.idx, block_m, sort)
            self.cache.put("counts", self.idx.device, tiles.pairs_idx)
            return tiles

        return self.get(("tiles", block_m, sort), make)

    def pairs(self, max_chunks, min_pairs, multiple):
        """`Pairs`, for M > 0, in at most max_chunks + K chunks, since the last chunk of each offset may be shorter.

        Their length in pairs is the smallest with which `max_chunks` full chunks hold all pairs, that is at least
        `min_pairs`, and that is a multiple of `multiple`. Other chunks of the same table share the rows.
        """

        def make():
            device = self.idx.device
            # pairs per offset and window: the same for every block_m; 64 is arbitrary
            counts = self.cache.find("counts", device)
            counts = self.tiles(64).pairs_idx if counts is None else counts
            rows = self.cache.find("pairs", device)
            pairs = _make_pairs(self.idx, counts, rows, max_chunks, min_pairs, multiple)
            self.cache.put("pairs", device, (pairs.read_idx, pairs.row_idx))
            return pairs

        return self.get(("chunks", max_chunks, min_pairs, multiple), make)

    def trial(self):
        """A copy for timing candidates: starts with this table's cache, and adds nothing to it."""
        trial = NeighborTable(self.idx)
        trial.cache = self.cache.copy()
        return trial


def _version(idx):
    return None if idx.is_inference() else idx._version


def _window(M):
    # a power of two, at least 128, which makes it a multiple of every BLOCK_M
    return min(WINDOW, max(128, triton.next_power_of_2(M)))


def _make_tiles(table, block_m, sort):
    (K, M), window = table.shape, _window(table.shape[1])
    windows = triton.cdiv(M, window)
    T, sort = windows * (window // block_m), sort and K <= MAX_SORTED
    tiles = Tiles(*(table.new_empty(size) for size in [(T, block_m), T, (T, K), (T, K, block_m), (K, windows)]))
    _tiles_kernel[(windows,)](
        table_idx_ptr=table, row_idx_ptr=tiles.row_idx, count_idx_ptr=tiles.count_idx, offset_idx_ptr=tiles.offset_idx,
        read_idx_ptr=tiles.read_idx, pairs_idx_ptr=tiles.pairs_idx, M=M, K=K, W=windows,
        SORT=sort, OFFSETS_PER_BIT=triton.cdiv(K, KEY_BITS), WINDOW=window, BLOCK_M=block_m, BLOCK_K=BLOCK_K,
        num_warps=16,  # 8 spill registers
    )  # fmt: skip
    return tiles


def _make_pairs(table, counts, rows, max_chunks, min_pairs, multiple):
    """rows: the first two fields, if they exist already; then only the chunks are made."""
    (K, M), windows = table.shape, counts.shape[1]
    C, pair_programs = max_chunks + K, 0 if rows else windows * triton.cdiv(K, BLOCK_K)
    read_idx, row_idx = rows or (table.new_empty(K * M), table.new_empty(K * M))
    first, end = (table.new_empty(C, dtype=torch.int64) for _ in range(2))
    pairs = Pairs(read_idx, row_idx, first, end, table.new_empty(K))
    _pairs_kernel[(pair_programs + triton.cdiv(C, BLOCK_C),)](
        table_idx_ptr=table, counts_idx_ptr=counts, read_idx_ptr=read_idx, row_idx_ptr=row_idx,
        first_ptr=first, end_ptr=end, chunk_end_idx_ptr=pairs.chunk_end_idx,
        M=M, K=K, W=windows, PAIR_PROGRAMS=pair_programs, MAX_CHUNKS=max_chunks, MIN_PAIRS=min_pairs, MULTIPLE=multiple,
        WINDOW=_window(M), BLOCK_K=BLOCK_K, BLOCK_C=BLOCK_C, BLOCK_OFFSETS=triton.next_power_of_2(K),
        BLOCK_COUNTS=BLOCK_COUNTS, num_warps=8,
    )  # fmt: skip
    return pairs


@jit(varying=("M", "W"))
def _tiles_kernel(
    table_idx_ptr,  # [K, M]
    row_idx_ptr, count_idx_ptr, offset_idx_ptr, read_idx_ptr, pairs_idx_ptr,  # the fields of `Tiles`
    M, K, W,  # W windows
    SORT: tl.constexpr, OFFSETS_PER_BIT: tl.constexpr,  # of the sort key
    WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All tiles of one window."""
    TILES: tl.constexpr = WINDOW // BLOCK_M
    window = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WINDOW)  # number of a row in the window
    if SORT:
        key = tl.zeros((WINDOW,), tl.int64)
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)[:, None]
            m = window * WINDOW + i[None, :]
            ok = (k < K) & (m < M)
            n = tl.load(table_idx_ptr + k.to(tl.int64) * M + m, mask=ok, other=-1)
            key += tl.sum((n >= 0).to(tl.int64) << (k // OFFSETS_PER_BIT).to(tl.int64), axis=0)
        key = tl.where(window * WINDOW + i < M, key, 1 << 52)  # after the last row: sorted to the end
        i = (_sort(key * WINDOW + i, WINDOW) % WINDOW).to(tl.int32)
    m = window * WINDOW + i
    m_ok = m < M
    tl.store(row_idx_ptr + window * WINDOW + tl.arange(0, WINDOW), tl.where(m_ok, m, -1).to(tl.int32))

    tile = window * TILES + tl.arange(0, TILES)[None, :]
    lane = tl.arange(0, BLOCK_M)[None, None, :]
    count = tl.zeros((TILES,), tl.int32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        ok = (k < K)[:, None] & m_ok[None, :]
        n = tl.load(table_idx_ptr + k.to(tl.int64)[:, None] * M + m[None, :], mask=ok, other=-1)  # [BLOCK_K, WINDOW]
        tl.store(pairs_idx_ptr + k.to(tl.int64) * W + window, tl.sum((n >= 0).to(tl.int32), axis=1), mask=k < K)
        n = tl.reshape(n, (BLOCK_K, TILES, BLOCK_M))
        has = tl.max(n, axis=2) >= 0  # [BLOCK_K, TILES]
        dest = tile * K + count[None, :] + tl.cumsum(has.to(tl.int32), axis=0) - 1  # entry of `offset_idx`
        tl.store(offset_idx_ptr + dest, tl.broadcast_to(k[:, None], has.shape), mask=has)
        tl.store(read_idx_ptr + dest[:, :, None] * BLOCK_M + lane, n, mask=has[:, :, None])
        count += tl.sum(has.to(tl.int32), axis=0)
    tl.store(count_idx_ptr + window * TILES + tl.arange(0, TILES), count)


@triton.jit
def _sort(key, SIZE: tl.constexpr):
    """[SIZE] keys, ascending: a bitonic sort like `tl.sort`, which would take a second in the interpreter."""
    i = tl.arange(0, SIZE)
    size = 2
    while size <= SIZE:
        stride = size // 2
        while stride > 0:
            other = tl.gather(key, i ^ stride, 0)
            takes_min = ((i & size) == 0) == ((i & stride) == 0)
            key = tl.where(takes_min, tl.minimum(key, other), tl.maximum(key, other))
            stride = stride // 2
        size = size * 2
    return key


@jit(varying=("M", "W", "PAIR_PROGRAMS", "MAX_CHUNKS"))
def _pairs_kernel(
    table_idx_ptr, counts_idx_ptr,  # [K, M], [K, W]: `Tiles.pairs_idx`
    read_idx_ptr, row_idx_ptr, first_ptr, end_ptr, chunk_end_idx_ptr,  # the fields of `Pairs`
    M, K, W, PAIR_PROGRAMS, MAX_CHUNKS,
    MIN_PAIRS: tl.constexpr, MULTIPLE: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_OFFSETS: tl.constexpr, BLOCK_COUNTS: tl.constexpr,
):  # fmt: skip
    """The pairs of BLOCK_K offsets in one window; after PAIR_PROGRAMS such programs, BLOCK_C chunks each.

    Every program adds up the counts that it needs itself, which are few and in the L2, so that one launch is enough.
    """
    program = tl.program_id(0)
    if program < PAIR_PROGRAMS:
        _write_pairs(
            table_idx_ptr, counts_idx_ptr, read_idx_ptr, row_idx_ptr, program % W, program // W, M, K, W,
            WINDOW, BLOCK_K, BLOCK_COUNTS,
        )  # fmt: skip
    else:
        _write_chunks(
            counts_idx_ptr, first_ptr, end_ptr, chunk_end_idx_ptr, program - PAIR_PROGRAMS, K, W, MAX_CHUNKS,
            MIN_PAIRS, MULTIPLE, BLOCK_C, BLOCK_OFFSETS, BLOCK_COUNTS,
        )  # fmt: skip


@triton.jit
def _write_pairs(
    table_idx_ptr, counts_idx_ptr, read_idx_ptr, row_idx_ptr, window, block, M, K, W,
    WINDOW: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_COUNTS: tl.constexpr,
):  # fmt: skip
    k = (block * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    # Pairs before those of each offset in this window: the first `before` counts. Those of earlier blocks are added up
    # once for all offsets of this block.
    before = tl.where(k < K, k * W + window, 0)
    first, needed = block.to(tl.int64) * BLOCK_K * W, tl.max(before, axis=0)
    earlier, i = tl.zeros((BLOCK_COUNTS,), tl.int64), tl.arange(0, BLOCK_COUNTS).to(tl.int64)
    for _ in range(tl.cdiv(first, BLOCK_COUNTS).to(tl.int32)):
        earlier += tl.load(counts_idx_ptr + i, mask=i < first, other=0)
        i += BLOCK_COUNTS
    begin = tl.zeros((BLOCK_K,), tl.int64) + tl.sum(earlier, axis=0)
    i = first + tl.arange(0, BLOCK_COUNTS)
    for _ in range(tl.cdiv(needed - first, BLOCK_COUNTS).to(tl.int32)):
        count = tl.load(counts_idx_ptr + i, mask=i < needed, other=0)
        begin += tl.sum(tl.where(i[None, :] < before[:, None], count[None, :], 0).to(tl.int64), axis=1)
        i += BLOCK_COUNTS
    m = window.to(tl.int64) * WINDOW + tl.arange(0, WINDOW)[None, :]
    n = tl.load(table_idx_ptr + k[:, None] * M + m, mask=(k < K)[:, None] & (m < M), other=-1)  # [BLOCK_K, WINDOW]
    has = n >= 0
    dest = begin[:, None] + tl.cumsum(has.to(tl.int32), axis=1) - 1
    tl.store(read_idx_ptr + dest, n, mask=has)
    tl.store(row_idx_ptr + dest, tl.broadcast_to(m, has.shape).to(tl.int32), mask=has)


@triton.jit
def _write_chunks(
    counts_idx_ptr, first_ptr, end_ptr, chunk_end_idx_ptr, block, K, W, MAX_CHUNKS,
    MIN_PAIRS: tl.constexpr, MULTIPLE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_OFFSETS: tl.constexpr, BLOCK_COUNTS: tl.constexpr,
):  # fmt: skip
    """BLOCK_C chunks; every program computes the number of chunks of all offsets."""
    BLOCK_W: tl.constexpr = BLOCK_COUNTS // BLOCK_OFFSETS if BLOCK_COUNTS > BLOCK_OFFSETS else 1
    k = tl.arange(0, BLOCK_OFFSETS)
    total = tl.zeros((BLOCK_OFFSETS,), tl.int64)  # pairs of each offset
    for first in range(0, W, BLOCK_W):
        w = first + tl.arange(0, BLOCK_W)
        ok = (k < K)[:, None] & (w < W)[None, :]
        count = tl.load(counts_idx_ptr + k.to(tl.int64)[:, None] * W + w[None, :], mask=ok, other=0)
        total += tl.sum(count.to(tl.int64), axis=1)
    end = tl.cumsum(total, axis=0)  # index of the pair after the offset's last
    size = tl.maximum(tl.cdiv(tl.sum(total, axis=0), MAX_CHUNKS), MIN_PAIRS)
    size = tl.cdiv(size, MULTIPLE) * MULTIPLE
    chunks = tl.cdiv(total, size)  # of each offset, `size` pairs long
    chunk_end = tl.cumsum(chunks, axis=0)
    tl.store(chunk_end_idx_ptr + k, chunk_end.to(tl.int32), mask=k < tl.where(block == 0, K, 0))
    chunk = block.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    nth = chunk[:, None] - (chunk_end - chunks)[None, :]  # [BLOCK_C, BLOCK_OFFSETS], from an offset's first chunk
    of_offset = (nth >= 0) & (nth < chunks[None, :])  # True at the chunk's offset; nowhere if the chunk is unused
    first = tl.sum(tl.where(of_offset, (end - total)[None, :] + nth * size, 0), axis=1)
    offset_end = tl.sum(tl.where(of_offset, end[None, :], 0), axis=1)
    tl.store(first_ptr + chunk, first, mask=chunk < MAX_CHUNKS + K)
    tl.store(end_ptr + chunk, tl.minimum(first + size, offset_end), mask=chunk < MAX_CHUNKS + K)

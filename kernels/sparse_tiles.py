"""The layouts of a neighbor table that the sparse GEMMs read: tiles of output rows, and pairs of rows by kernel offset.

For a tile of BLOCK_M output rows, the GEMM multiplies at every offset at which any of the rows has a neighbor. A tile
is stored in the order of the GEMM's loop, which then has no branch and can prefetch: a list of those offsets and, for
each, the input rows that the outputs read. Rows with neighbors at the same offsets should be in the same tile: within
a window of consecutive rows, rows are sorted by their set of offsets. A wider window leaves fewer products with missing
neighbors, but an input row that a tile reads then serves fewer of its outputs; benchmarks/count_sparse_conv.py counts
both. In the inverse table of a stride-2 convolution, the parity of a cell's (z, y, x) decides at which offsets it has
neighbors, and the same sort groups the eight kinds of cells.

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
    """All pairs of an input row and the output row that reads it, by offset, then by output row."""

    read_idx: Tensor  # [K * M] int32, input rows; not written after the last pair
    row_idx: Tensor  # [K * M] int32, output rows; likewise
    ends: Tensor  # [K, windows] int64, one past the last pair of each offset in each window


class Chunks(NamedTuple):
    """The pairs of each offset, in the order of `Pairs`, split into chunks of equal length; room for C chunks."""

    first: Tensor  # [C] int64, index of the chunk's first pair ...
    end: Tensor  # [C] int64, ... and one past its last; unused chunks are empty
    chunk_end_idx: Tensor  # [K] int32, one past the last chunk of each offset


# Rows that are sorted together. With windows of 1024, 4096 and all rows, the GEMM computes 1.95, 1.80 and 1.65 times
# the necessary products at stage 1 of the LiDAR encoder, 1.32, 1.28 and 1.18 times at stage 2; unsorted 2.56 and 1.54
# times (counted for tiles of 64). Beyond 1024 the sort spills registers.
WINDOW = 1024
BLOCK_K = 8  # offsets per step of a loop, or per program
BLOCK_C = 16  # chunks per program
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

    def pairs(self):
        """`Pairs`, for M > 0."""

        def make():
            # pairs per offset and window: the same for every block_m; 64 is arbitrary
            counts = self.cache.find("counts", self.idx.device)
            return _make_pairs(self.idx, self.tiles(64).pairs_idx if counts is None else counts)

        return self.get("pairs", make)

    def chunks(self, max_chunks, min_pairs, multiple):
        """`Chunks`, for M > 0: at most max_chunks + K of them, since the last chunk of each offset may be shorter.

        Their length in pairs is the smallest with which `max_chunks` full chunks hold all pairs, that is at least
        `min_pairs`, and that is a multiple of `multiple`.
        """
        key = "chunks", max_chunks, min_pairs, multiple
        return self.get(key, lambda: _make_chunks(self.pairs().ends, max_chunks, min_pairs, multiple))

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


def _make_pairs(table, counts):
    (K, M), windows = table.shape, counts.shape[1]
    pairs = Pairs(table.new_empty(K * M), table.new_empty(K * M), counts.flatten().cumsum(0).view(K, windows))
    _pairs_kernel[(windows, triton.cdiv(K, BLOCK_K))](
        table_idx_ptr=table, read_idx_ptr=pairs.read_idx, row_idx_ptr=pairs.row_idx, ends_ptr=pairs.ends,
        M=M, K=K, W=windows, WINDOW=_window(M), BLOCK_K=BLOCK_K, num_warps=8,
    )  # fmt: skip
    return pairs


def _make_chunks(ends, max_chunks, min_pairs, multiple):
    K, windows = ends.shape
    C = max_chunks + K
    chunks = Chunks(ends.new_empty(C), ends.new_empty(C), ends.new_empty(K, dtype=torch.int32))
    _chunks_kernel[(triton.cdiv(C, BLOCK_C),)](
        ends_ptr=ends, first_ptr=chunks.first, end_ptr=chunks.end, chunk_end_idx_ptr=chunks.chunk_end_idx,
        W=windows, K=K, MAX_CHUNKS=max_chunks,
        MIN_PAIRS=min_pairs, MULTIPLE=multiple, BLOCK_C=BLOCK_C, BLOCK_OFFSETS=triton.next_power_of_2(K),
    )  # fmt: skip
    return chunks


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


@jit(varying=("M", "W"))
def _pairs_kernel(
    table_idx_ptr, read_idx_ptr, row_idx_ptr, ends_ptr,  # [K, M], [K * M], [K * M], [K, W]
    M, K, W,
    WINDOW: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The pairs of BLOCK_K offsets in one window."""
    window = tl.program_id(0).to(tl.int64)
    m = window * WINDOW + tl.arange(0, WINDOW)[None, :]
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    n = tl.load(table_idx_ptr + k[:, None] * M + m, mask=(k < K)[:, None] & (m < M), other=-1)  # [BLOCK_K, WINDOW]
    has = n >= 0
    counts = has.to(tl.int32)
    begin = tl.load(ends_ptr + k * W + window, mask=k < K, other=0) - tl.sum(counts, axis=1)
    dest = begin[:, None] + tl.cumsum(counts, axis=1) - 1
    tl.store(read_idx_ptr + dest, n, mask=has)
    tl.store(row_idx_ptr + dest, tl.broadcast_to(m, has.shape).to(tl.int32), mask=has)


@jit(varying=("W", "MAX_CHUNKS"))
def _chunks_kernel(
    ends_ptr, first_ptr, end_ptr, chunk_end_idx_ptr,  # [K, W], [MAX_CHUNKS + K], [MAX_CHUNKS + K], [K]
    W, K, MAX_CHUNKS,
    MIN_PAIRS: tl.constexpr, MULTIPLE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_OFFSETS: tl.constexpr,
):  # fmt: skip
    """BLOCK_C chunks; every program computes the number of chunks of all offsets."""
    k = tl.arange(0, BLOCK_OFFSETS)
    end = tl.load(ends_ptr + (k + 1).to(tl.int64) * W - 1, mask=k < K, other=0)
    begin = tl.load(ends_ptr + k.to(tl.int64) * W - 1, mask=(k > 0) & (k < K), other=0)  # end of the offset before
    size = tl.maximum(tl.cdiv(tl.max(end, axis=0), MAX_CHUNKS), MIN_PAIRS)  # the largest end: the number of all pairs
    size = tl.cdiv(size, MULTIPLE) * MULTIPLE
    count = tl.where(k < K, tl.cdiv(end - begin, size), 0)  # chunks of each offset, `size` pairs long
    chunk_end = tl.cumsum(count, axis=0)
    tl.store(chunk_end_idx_ptr + k, chunk_end.to(tl.int32), mask=k < K)
    chunk = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    nth = chunk[:, None] - (chunk_end - count)[None, :]  # [BLOCK_C, BLOCK_OFFSETS], from an offset's first chunk
    of_offset = (nth >= 0) & (nth < count[None, :])  # True at the chunk's offset; nowhere if the chunk is unused
    first = tl.sum(tl.where(of_offset, begin[None, :] + nth * size, 0), axis=1)
    offset_end = tl.sum(tl.where(of_offset, end[None, :], 0), axis=1)
    tl.store(first_ptr + chunk, first, mask=chunk < MAX_CHUNKS + K)
    tl.store(end_ptr + chunk, tl.minimum(first + size, offset_end), mask=chunk < MAX_CHUNKS + K)

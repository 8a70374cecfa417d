"""`sparse_conv` in plain PyTorch, multiplying in the accumulation type: the CPU path.

For each chunk of outputs: gathers of its pairs (row read, output), a GEMM per offset, a sum per output. Dense chunks,
with zeros for missing neighbors, would take 2 to 4 times as many multiplications. A gather of wide rows takes the pairs
of a few offsets only, so that they are still in the core's own cache when they are multiplied.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Chunk(NamedTuple):
    """The pairs of consecutive outputs, by offset."""

    rows: slice  # the outputs
    read: Tensor  # [P] int32, row that each pair reads
    row: Tensor  # [P] int32, its output, counted from the chunk's first
    order: Tensor  # [P] int32, indices of the pairs, sorted by output
    starts: Tensor  # [rows] int32, position in `order` of each output's first pair
    groups: list  # of (offsets, pairs, counts): two slices, and the number of pairs of each of these offsets


def gather_gemm_ref(features, weight, table, finish=None):
    """Features [N, Cin], weights [K, Cin, Cout] and a `NeighborTable` [K, M] -> [M, Cout] in the accumulation type.

    finish: called with a chunk of the result and the slice of its rows; modifies the chunk, still in the CPU cache.
    """
    x, w = _wide(features), _wide(weight).unbind()
    out = x.new_zeros(table.idx.shape[1], weight.shape[2])
    chunks = _chunks(table, max(weight.shape[1:]))
    x_rows, products = _group_buffer(x, chunks), _buffer(out, chunks)
    for chunk in chunks:
        for offsets, pairs, counts in chunk.groups:
            rows = torch.index_select(x, 0, chunk.read[pairs], out=x_rows[: pairs.stop - pairs.start]).split(counts)
            for a, b, product in zip(rows, w[offsets], products[pairs].split(counts), strict=True):
                torch.mm(a, b, out=product)
        out[chunk.rows] = _sums(chunk, products)
        if finish is not None:
            finish(out[chunk.rows], chunk.rows)
    return out


def backward_ref(features, weight, d_out, inverse, mirrored, for_features, for_weight):
    """Gradients w.r.t. features [N, Cin] and weights [Cout, K, Cin] in the accumulation type; None if not needed.

    Both use the inverse `NeighborTable`: each chunk of rows n of `features` gathers the gradients of the outputs m that
    read them.

    mirrored: the offsets of `inverse` are in the reverse order of the weights'.
    """
    x, g = _wide(features), _wide(d_out)
    d_features = torch.zeros_like(x) if for_features else None
    d_weight = x.new_zeros(len(inverse.idx), g.shape[1], x.shape[1]) if for_weight else None
    in_order = slice(None, None, -1 if mirrored else 1)  # the weights' offsets in the order of `inverse`
    w, d_w = _wide(weight).unbind(1)[in_order], d_weight.unbind()[in_order] if for_weight else None
    chunks = _chunks(inverse, max(g.shape[1], x.shape[1]))
    g_rows, products = _group_buffer(g, chunks), _buffer(x, chunks)
    for chunk in chunks:  # its outputs are rows n, and the rows that they read are m
        for offsets, pairs, counts in chunk.groups:
            of_m = torch.index_select(g, 0, chunk.read[pairs], out=g_rows[: pairs.stop - pairs.start]).split(counts)
            of_n = products[pairs].split(counts)  # first the rows of x, then the products that overwrite them
            if for_weight:
                torch.index_select(x[chunk.rows], 0, chunk.row[pairs], out=products[pairs])
                for a, b, d in zip(of_m, of_n, d_w[offsets], strict=True):
                    d.addmm_(a.T, b)
            if for_features:
                for a, b, product in zip(of_m, w[offsets], of_n, strict=True):
                    torch.mm(a, b, out=product)
        if for_features:
            d_features[chunk.rows] = _sums(chunk, products)
    return d_features, d_weight.transpose(0, 1) if for_weight else None


def _sums(chunk, products):
    """[rows, C]: for each output of the chunk a bag, the sum of its products."""
    return F.embedding_bag(chunk.order, products[: len(chunk.order)], chunk.starts, mode="sum")


def _buffer(tensor, chunks):
    """Memory for the pairs of any chunk, with the tensor's columns: new memory per chunk would cost page faults."""
    return tensor.new_empty(max((len(chunk.read) for chunk in chunks), default=0), tensor.shape[1])


def _group_buffer(tensor, chunks):
    """The same for the pairs of any group."""
    sizes = (pairs.stop - pairs.start for chunk in chunks for _, pairs, _ in chunk.groups)
    return tensor.new_empty(max(sizes, default=0), tensor.shape[1])


def _wide(tensor):
    """The tensor in the accumulation type."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


WIDE = 128  # channels from which on groups are a part of their chunk; below, more calls cost more than caches gain
GROUP = 2**17  # numbers that such a group gathers, unless a single offset has more: half of a core's cache of 1 MiB


def _chunks(table, channels):
    """The pairs of a `NeighborTable` by chunks of outputs: a list of `Chunk`, cached in the table.

    channels: of the rows read or written, the larger number.
    """

    def make():
        idx = table.idx.cpu().numpy()
        M = idx.shape[1]
        # chunks gather about 2^20 numbers: enough rows per GEMM, and the products stay in the CPU cache
        rows = 2**20 // channels * M // max(np.count_nonzero(idx >= 0), 1)
        rows = max(256, min(rows, 4096))  # `_chunk` numbers them in 16 bits
        max_group = GROUP // channels if channels >= WIDE else idx.size
        return [_chunk(idx[:, i : i + rows], i, max_group, table.idx.device) for i in range(0, M, rows)]

    return table.get(("chunks on a CPU", channels), make)


def _chunk(idx, first, max_group, device):
    """The `Chunk` of the outputs from `first` on, with the table idx [K, R]; max_group: pairs of a group."""
    (K, R), idx = idx.shape, np.ascontiguousarray(idx)
    has = idx >= 0
    pairs = np.flatnonzero(has)  # numpy finds them 4 times as fast as torch
    counts = np.count_nonzero(has, axis=1)
    row = (pairs - np.repeat(np.arange(K) * R, counts)).astype(np.int16)  # 16 bits, which numpy sorts by radix
    lengths = np.bincount(row, minlength=R)
    arrays = idx.ravel()[pairs], row, row.argsort(kind="stable"), lengths.cumsum() - lengths
    tensors = (torch.from_numpy(a.astype(np.int32)).to(device) for a in arrays)
    return Chunk(slice(first, first + R), *tensors, _groups(counts.tolist(), max_group))


def _groups(counts, max_group):
    """The `groups` of a `Chunk`: consecutive offsets with at most `max_group` pairs, or a single offset with more."""
    groups, offset, pair = [], 0, 0
    while offset < len(counts):
        end, size = offset + 1, counts[offset]
        while end < len(counts) and size + counts[end] <= max_group:
            size += counts[end]
            end += 1
        groups.append((slice(offset, end), slice(pair, pair + size), counts[offset:end]))
        offset, pair = end, pair + size
    return groups

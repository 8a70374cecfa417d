"""`sparse_conv` in plain PyTorch, multiplying in the accumulation type: the CPU path.

For each chunk of outputs: one gather of all its pairs (row read, output), a GEMM per offset, a sum per output. Dense
chunks, with zeros for missing neighbors, would take 2 to 4 times as many multiplications.
"""

import numpy as np
import torch
import torch.nn.functional as F


def gather_gemm_ref(features, weight, table, finish=None):
    """Features [N, Cin], weights [K, Cin, Cout] and a `NeighborTable` [K, M] -> [M, Cout] in the accumulation type.

    finish: called with a chunk of the result and the slice of its rows; modifies the chunk, still in the CPU cache.
    """
    x, w = _wide(features), _wide(weight).unbind()
    out = x.new_zeros(table.idx.shape[1], weight.shape[2])
    chunks = _chunks(table, max(weight.shape[1:]))
    x_rows, products = _buffer(x, chunks), _buffer(out, chunks)
    for first, n, _, counts, order, starts in chunks:  # see `_chunks`
        P = len(n)
        torch.index_select(x, 0, n, out=x_rows[:P])
        for a, b, product in zip(x_rows[:P].split(counts), w, products[:P].split(counts), strict=True):
            torch.mm(a, b, out=product)
        rows = slice(first, first + len(starts))
        # a bag per output, the sum of its products
        out[rows] = F.embedding_bag(order, products[:P], starts, mode="sum")
        if finish is not None:
            finish(out[rows], rows)
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
    g_rows, x_rows = _buffer(g, chunks), _buffer(x, chunks)  # x_rows is reused for products
    for first, m, n, counts, order, starts in chunks:  # n and m of `_chunks` exchanged: m is read
        P, rows = len(m), slice(first, first + len(starts))
        torch.index_select(g, 0, m, out=g_rows[:P])
        by_offset = g_rows[:P].split(counts), x_rows[:P].split(counts)
        if for_weight:
            torch.index_select(x[rows], 0, n, out=x_rows[:P])
            for a, b, d in zip(*by_offset, d_w, strict=True):
                d.addmm_(a.T, b)
        if for_features:
            for a, product, b in zip(*by_offset, w, strict=True):
                torch.mm(a, b, out=product)
            d_features[rows] = F.embedding_bag(order, x_rows[:P], starts, mode="sum")
    return d_features, d_weight.transpose(0, 1) if for_weight else None


def _buffer(tensor, chunks):
    """Memory for the pairs of any chunk, with the tensor's columns: new memory per chunk would cost page faults."""
    return tensor.new_empty(max((len(n) for _, n, *_ in chunks), default=0), tensor.shape[1])


def _wide(tensor):
    """The tensor in the accumulation type."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _chunks(table, channels):
    """The pairs of a `NeighborTable` by chunks of outputs, by offset within a chunk; cached in the table.

    channels: of the rows read or written, the larger number.

    Returns a list, for each chunk of R outputs and P pairs, of
        first:  the chunk's first output.
        n, m:   [P] int32 the pairs, by offset: row that is read, output relative to `first`.
        counts: [K] list, pairs per offset.
        order:  [P] int32 indices of the pairs, sorted by output.
        starts: [R] int32 position in `order` of each output's first pair.
    """

    def make():
        idx = table.idx.cpu().numpy()
        M = idx.shape[1]
        # chunks gather about 2^20 numbers: enough rows per GEMM, and the gathered rows stay in the CPU cache
        rows = 2**20 // channels * M // max(np.count_nonzero(idx >= 0), 1)
        rows = max(256, min(rows, 4096))  # `_chunk` numbers them in 16 bits
        return [_chunk(idx[:, i : i + rows], i, table.idx.device) for i in range(0, M, rows)]

    return table.get(("chunks on a CPU", channels), make)


def _chunk(idx, first, device):
    """The entry of `_chunks` for the outputs from `first` on, with the table idx [K, R]."""
    (K, R), idx = idx.shape, np.ascontiguousarray(idx)
    has = idx >= 0
    pairs = np.flatnonzero(has)  # numpy finds them 4 times as fast as torch
    counts = np.count_nonzero(has, axis=1)
    m = (pairs - np.repeat(np.arange(K) * R, counts)).astype(np.int16)  # 16 bits, which numpy sorts by radix
    lengths = np.bincount(m, minlength=R)
    arrays = idx.ravel()[pairs], m, m.argsort(kind="stable"), lengths.cumsum() - lengths
    n, m, order, starts = (torch.from_numpy(a.astype(np.int32)).to(device) for a in arrays)
    return first, n, m, counts.tolist(), order, starts

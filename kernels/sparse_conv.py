"""Sparse voxel convolution: over a neighbour table, a gather, a GEMM and a sum.

    out[m] = sum_k W_k x[i(k, m)]              over the offsets k at which m has a neighbour, i = neighbor_idx
    dL/dx[n] = sum_k W_k^T g[j(k, n)]          g = dL/dout, j = inverse_idx: the same sum over the inverse table
    dL/dW_k = sum_m g[m] x[i(k, m)]^T

Submanifold, strided, inverse and transposed convolution differ in their tables alone (kernels/sparse_map.py). Every
output row is summed by one program, in the order of the offsets, and the weights' gradient in chunks of rows that are
added in order: nothing is added atomically.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kernels import backend
from kernels.backend import on_triton, tl, triton


def sparse_conv(features, weight, neighbor_idx, inverse_idx, allow_tf32=False):
    """Convolve the features of N voxels to those of M voxels.

    Args:
        features:     [N, Cin] fp16, bf16 or fp32; fp64 takes the reference.
        weight:       [Cout, kz, ky, kx, Cin] any floating type, rounded to the features' type; K = kz * ky * kx.
        neighbor_idx: [K, M] int32, the row of `features` that an output reads at an offset; -1 where no voxel is. At
                      one offset no row is read twice. Not checked.
        inverse_idx:  [K, N] int32, the inverse: m where neighbor_idx[k, m] = n, else -1. Not checked.
        allow_tf32:   multiply fp32 features in tf32 (10 bits of mantissa) rather than in fp32.

    Returns:
        [M, Cout] in the features' type; 0 for an output without neighbours.

    Differentiable once in `features` and `weight`. Accumulates in fp32 (fp64 for fp64 features); the weights' gradient
    stays fp32 until it is rounded to their type, so fp32 weights get it whole, under fp16 features too. Autocast casts
    the features. Bit-equal from run to run. Raises AssertionError if shapes or types do not fit.
    """
    features = _check(features, weight, neighbor_idx, inverse_idx)
    reference = features.dtype == torch.float64 or not on_triton(features)
    return _sparse_conv(features, weight, neighbor_idx, inverse_idx, allow_tf32, reference)


def sparse_conv_ref(features, weight, neighbor_idx, inverse_idx, allow_tf32=False):
    """`sparse_conv` in plain PyTorch, which multiplies in the type it accumulates in."""
    features = _check(features, weight, neighbor_idx, inverse_idx)
    return _sparse_conv(features, weight, neighbor_idx, inverse_idx, allow_tf32, True)


def _check(features, weight, neighbor_idx, inverse_idx):
    """The features, in autocast's type where that is on."""
    fits = features.dim() == 2 and weight.dim() == 5 and features.shape[1] == weight.shape[4]
    assert fits, f"{tuple(features.shape)=} and {tuple(weight.shape)=} do not fit"
    K, N = weight.shape[1:4].numel(), features.shape[0]
    fits = neighbor_idx.dim() == 2 and neighbor_idx.shape[0] == K and inverse_idx.shape == (K, N)
    assert fits, f"{tuple(neighbor_idx.shape)=} and {tuple(inverse_idx.shape)=} are no tables of {K} offsets, {N} rows"
    assert neighbor_idx.dtype == inverse_idx.dtype == torch.int32, "tables are int32"
    assert features.is_floating_point() and weight.is_floating_point(), f"{features.dtype=}, {weight.dtype=}"
    if features.dtype != torch.float64 and torch.is_autocast_enabled(features.device.type):
        return features.to(torch.get_autocast_dtype(features.device.type))
    return features


def _gather_gemm_ref(features, weight, table):
    """Features [N, Cin], weights [K, Cin, Cout] and a table [K, M] -> [M, Cout] in the type that is summed in.

    A chunk of outputs at a time: one gather of all its pairs, a GEMM an offset, one sum a row. Dense chunks, with zeros
    where no neighbour is, would multiply 2 to 4 times as much.
    """
    x, w = _wide(features), _wide(weight).unbind()
    out = x.new_zeros(table.shape[1], weight.shape[2])
    chunks = _chunks(table, max(weight.shape[1:]))
    x_rows, products = _buffer(x, chunks), _buffer(out, chunks)
    for first, n, _, counts, order, starts in chunks:
        P = len(n)
        torch.index_select(x, 0, n, out=x_rows[:P])
        for a, b, product in zip(x_rows[:P].split(counts), w, products[:P].split(counts), strict=True):
            torch.mm(a, b, out=product)
        out[first : first + len(starts)] = F.embedding_bag(order, products[:P], starts, mode="sum")
    return out


def _backward_ref(features, weight, d_out, inverse_idx, for_features, for_weight):
    """Gradients of features [N, Cin] and weights [Cout, K, Cin] in the type that is summed in, None if not asked for.

    Both over the inverse table: a chunk of rows of `features` gathers what its outputs' gradients are.
    """
    x, w, g = _wide(features), _wide(weight).unbind(1), _wide(d_out)
    d_features = torch.zeros_like(x) if for_features else None
    d_weight = x.new_zeros(len(inverse_idx), g.shape[1], x.shape[1]) if for_weight else None
    chunks = _chunks(inverse_idx, max(g.shape[1], x.shape[1]))
    g_rows, x_rows = _buffer(g, chunks), _buffer(x, chunks)  # the latter holds products too
    for first, m, n, counts, order, starts in chunks:
        P, there = len(m), slice(first, first + len(starts))
        torch.index_select(g, 0, m, out=g_rows[:P])
        by_offset = g_rows[:P].split(counts), x_rows[:P].split(counts)
        if for_weight:
            torch.index_select(x[there], 0, n, out=x_rows[:P])
            for a, b, d in zip(*by_offset, d_weight, strict=True):
                d.addmm_(a.T, b)
        if for_features:
            for a, product, b in zip(*by_offset, w, strict=True):
                torch.mm(a, b, out=product)
            d_features[there] = F.embedding_bag(order, x_rows[:P], starts, mode="sum")
    return d_features, d_weight.transpose(0, 1) if for_weight else None


def _buffer(tensor, chunks):
    """Room for the pairs of any chunk, with the tensor's columns: new memory for each chunk would cost a page fault."""
    return tensor.new_empty(max((len(n) for _, n, *_ in chunks), default=0), tensor.shape[1])


def _wide(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()


_chunks_of = WeakTensorKeyDictionary()  # table -> {(version, channels): chunks}: a table serves several layers


def _chunks(table, channels):
    """The pairs of a table [K, M], some outputs at a time and within those offset by offset; kept while it lives.

    Returns a list of
        first:  the chunk's first output.
        n, m:   [P] int32 the pairs: row that is read, output counted from `first`.
        counts: [K] list, pairs an offset.
        order:  [P] int32 the same pairs sorted by output ...
        starts: [R] int32 ... and where each output's begin.
    """
    known = _chunks_of.setdefault(table, {})
    key = (None if table.is_inference() else table._version, channels)
    if key not in known:
        idx = table.cpu().numpy()
        M = idx.shape[1]
        # of 2^20 features, so that a GEMM has rows enough, and what was gathered is still in the cache when it is read
        rows = 2**20 // channels * M // max(np.count_nonzero(idx >= 0), 1)
        rows = max(256, min(rows, 4096))
        known[key] = [_chunk(idx[:, i : i + rows], i, table.device) for i in range(0, M, rows)]
    return known[key]


def _chunk(idx, first, device):
    (K, R), idx = idx.shape, np.ascontiguousarray(idx)
    there = idx >= 0
    pairs = np.flatnonzero(there)  # numpy finds them 4 times as fast as torch
    counts = np.count_nonzero(there, axis=1)
    m = (pairs - np.repeat(np.arange(K) * R, counts)).astype(np.int16)  # 16 bits, which numpy sorts by radix
    lengths = np.bincount(m, minlength=R)
    arrays = idx.ravel()[pairs], m, m.argsort(kind="stable"), lengths.cumsum() - lengths
    n, m, order, starts = (torch.from_numpy(a.astype(np.int32)).to(device) for a in arrays)
    return first, n, m, counts.tolist(), order, starts


@torch.library.custom_op("unipad::sparse_conv", mutates_args=())  # torch.compile calls it without looking inside
def _sparse_conv(
    features: Tensor, weight: Tensor, neighbor_idx: Tensor, inverse_idx: Tensor, allow_tf32: bool, reference: bool
) -> Tensor:
    """`sparse_conv`; `inverse_idx` is for the backward."""
    kernel = weight.to(features.dtype).flatten(1, 3)  # [Cout, K, Cin]
    if reference:
        return _gather_gemm_ref(features, kernel.permute(1, 2, 0), neighbor_idx).to(features.dtype)
    return _gather_gemm(features, kernel, neighbor_idx, False, allow_tf32)


@torch.library.custom_op("unipad::sparse_conv_bwd", mutates_args=())
def _sparse_conv_bwd(
    features: Tensor, weight: Tensor, neighbor_idx: Tensor, inverse_idx: Tensor, d_out: Tensor,
    for_features: bool, for_weight: bool, allow_tf32: bool, reference: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the features and of the weights; empty where not asked for."""
    kernel = weight.to(features.dtype).flatten(1, 3)
    if reference:
        d_features, d_weight = _backward_ref(features, kernel, d_out, inverse_idx, for_features, for_weight)
    else:
        d_features = _gather_gemm(d_out, kernel, inverse_idx, True, allow_tf32) if for_features else None
        d_weight = _d_weight(features, d_out, neighbor_idx, allow_tf32) if for_weight else None
    return (
        d_features.to(features.dtype) if for_features else features.new_empty(0),
        d_weight.to(weight.dtype).reshape(weight.shape) if for_weight else weight.new_empty(0),
    )


@_sparse_conv.register_fake
def _(features, weight, neighbor_idx, inverse_idx, allow_tf32, reference):
    return features.new_empty(neighbor_idx.shape[1], weight.shape[0])


@_sparse_conv_bwd.register_fake
def _(features, weight, neighbor_idx, inverse_idx, d_out, for_features, for_weight, allow_tf32, reference):
    d_features = features.new_empty(features.shape if for_features else 0)
    return d_features, weight.new_empty(weight.shape if for_weight else 0)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.allow_tf32, ctx.reference = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, d_out):
    wanted = ctx.needs_input_grad[:2]
    grads = _sparse_conv_bwd(*ctx.saved_tensors, d_out, *wanted, ctx.allow_tf32, ctx.reference)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None, None, None


_sparse_conv.register_autograd(_backward, setup_context=_setup_context)


def _gather_gemm(features, weight, table, transposed, allow_tf32):
    """Features [N, Cin], weights [Cout, K, Cin] and a table [K, M] -> [M, Cout] in the features' type.

    transposed: the features have Cout channels, the result has Cin.
    """
    (Cout, K, Cin), M = weight.shape, table.shape[1]
    I, O = (Cout, Cin) if transposed else (Cin, Cout)
    if not min(M, len(features), I, O):
        return features.new_zeros(M, O)
    out = features.new_empty(M, O)
    precision, block_i, block_o = _blocks(features, I, O, allow_tf32)
    # a wide tile reads fewer weights a row; few rows want narrow ones, or there is not one for each multiprocessor
    wide = block_o == 128 and M * triton.cdiv(O, block_o) >= MANY_ROWS
    block_m = 128 if wide else 64
    _gather_gemm_kernel[(triton.cdiv(M, block_m), triton.cdiv(O, block_o))](
        features.contiguous(), weight.contiguous(), table.contiguous(), out, M, K, I, O,
        TRANSPOSED=transposed, PRECISION=precision, WIDEN=_widen(features),
        BLOCK_M=block_m, BLOCK_I=block_i, BLOCK_O=block_o,
        BLOCK_K=min(triton.next_power_of_2(K), WORD), num_warps=8 if wide else 4,
    )  # fmt: skip
    return out


def _d_weight(features, d_out, table, allow_tf32):
    """Features [N, Cin], d_out [M, Cout] and a table [K, M] -> [Cout, K, Cin] fp32."""
    (N, I), (M, O), K = features.shape, d_out.shape, len(table)
    if not min(N, M, I, O):
        return features.new_zeros(O, K, I, dtype=torch.float32)
    # of this product both are outputs, and rows are what is summed over
    precision, _, block_i = _blocks(features, O, I, allow_tf32)
    _, _, block_o = _blocks(features, I, O, allow_tf32)
    tiles = triton.cdiv(I, block_i) * triton.cdiv(O, block_o)
    parts = min(triton.cdiv(PROGRAMS, K * tiles), triton.cdiv(M, BLOCK_R), max(1, PARTIAL // (K * O * I)))
    rows = triton.cdiv(triton.cdiv(M, parts), BLOCK_R) * BLOCK_R
    parts = triton.cdiv(M, rows)
    partial = features.new_empty(parts, O, K, I, dtype=torch.float32)
    _d_weight_kernel[(parts, K, tiles)](
        features.contiguous(), d_out.contiguous(), table.contiguous(), partial, M, K, I, O, rows,
        PRECISION=precision, WIDEN=_widen(features),
        BLOCK_R=BLOCK_R, BLOCK_I=block_i, BLOCK_O=block_o, num_warps=8 if block_i * block_o > 8192 else 4,
    )  # fmt: skip
    return partial.sum(dim=0) if parts > 1 else partial[0]


# All untuned: chosen by what the compiler makes of them for sm_90, without a GPU to time them on
MOST_HALF = 64, 128  # input and output channels a tile, of fp16 and bf16; stack is used from twice that on
MOST_TF32 = 32, 64
MOST_IEEE = 32, 32  # without tensor cores the registers bind
WORD = 32  # offsets whose presence in a tile one integer holds
MANY_ROWS = 32768  # from here on wide tiles still give each of an H200's 132 multiprocessors two
BLOCK_R = 64  # rows a step of the gradient of the weights
PROGRAMS = 2048  # that it is cut into, if there are rows enough: some 16 for each multiprocessor
PARTIAL = 2**22  # sums kept apart in it, at most: 16 MB, which are written and read


def _blocks(features, I, O, allow_tf32):
    """How to multiply, and how many input and output channels a tile has."""
    precision = "tf32" if allow_tf32 else "ieee"  # of fp32 alone
    if features.dtype == torch.float32 and not allow_tf32:
        limits = MOST_IEEE
    else:
        limits = MOST_TF32 if features.dtype == torch.float32 else MOST_HALF
        if I % 16 or O % 16:  # rows are then read element by element, which takes more registers
            limits = limits[0] // 2, limits[1] // 2
    # 16 channels is the least that tl.dot takes
    return precision, *(max(16, min(triton.next_power_of_2(c), most)) for c, most in zip((I, O), limits, strict=True))


def _widen(features):
    return backend.interpret and features.dtype == torch.bfloat16  # the interpreter multiplies bf16's bit patterns


@triton.jit
def _gather_gemm_kernel(
    features_ptr, weight_ptr, table_idx_ptr, out_ptr,  # [N, I], [O, K, I] ([I, K, O] if TRANSPOSED), [K, M], [M, O]
    M, K, I, O,  # outputs, offsets, input and output channels
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tl.program_id(1).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    bit = tl.arange(0, BLOCK_K)
    m_ok, o_ok = m < M, o < O
    steps = tl.cdiv(I, BLOCK_I)

    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for first in range(0, K, BLOCK_K):
        # which of these offsets any row of the tile has: bits of a word, so that the loop below has no branch
        offset = (first + bit).to(tl.int64)[:, None]
        rows = tl.load(table_idx_ptr + offset * M + m[None, :], mask=(offset < K) & m_ok[None, :], other=-1)
        there = (tl.max(rows, axis=1) >= 0).to(tl.int32)
        word = tl.sum(there << bit, axis=0)
        for step in range(tl.sum(there, axis=0) * steps):
            c = (step % steps) * BLOCK_I + i
            k = (first + _lowest_bit(word)).to(tl.int64)
            word = tl.where(step % steps == steps - 1, word & (word - 1), word)

            n = tl.load(table_idx_ptr + k * M + m, mask=m_ok, other=-1).to(tl.int64)
            x_ok = (n >= 0)[:, None] & (c < I)[None, :]
            x = tl.load(features_ptr + n[:, None] * I + c[None, :], mask=x_ok, other=0.0)  # [BLOCK_M, BLOCK_I]
            if TRANSPOSED:
                at = (c[:, None] * K + k) * O + o[None, :]
            else:
                at = (o[None, :] * K + k) * I + c[:, None]
            w = tl.load(weight_ptr + at, mask=(c < I)[:, None] & o_ok[None, :], other=0.0)  # [BLOCK_I, BLOCK_O]
            if WIDEN:
                x, w = x.to(tl.float32), w.to(tl.float32)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    at = m[:, None] * O + o[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=m_ok[:, None] & o_ok[None, :])


@triton.jit
def _d_weight_kernel(
    features_ptr, d_out_ptr, table_idx_ptr, partial_ptr,  # [N, I], [M, O], [K, M], [parts, O, K, I]
    M, K, I, O, R,  # outputs, offsets, input and output channels, outputs a part
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1).to(tl.int64)
    tiles_i = tl.cdiv(I, BLOCK_I)
    i = (tl.program_id(2) % tiles_i) * BLOCK_I + tl.arange(0, BLOCK_I)
    o = (tl.program_id(2) // tiles_i) * BLOCK_O + tl.arange(0, BLOCK_O)
    i_ok, o_ok = (i < I)[None, :], (o < O)[None, :]
    end = tl.minimum((part + 1) * R, M)

    acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for r in range(0, R, BLOCK_R):
        m = part * R + r + tl.arange(0, BLOCK_R)
        n = tl.load(table_idx_ptr + k * M + m, mask=m < end, other=-1).to(tl.int64)
        ok = (n >= 0)[:, None]
        g = tl.load(d_out_ptr + m[:, None] * O + o[None, :], mask=ok & o_ok, other=0.0)  # [BLOCK_R, BLOCK_O]
        x = tl.load(features_ptr + n[:, None] * I + i[None, :], mask=ok & i_ok, other=0.0)  # [BLOCK_R, BLOCK_I]
        if WIDEN:
            g, x = g.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(tl.trans(g), x, acc, input_precision=PRECISION)
    at = ((part * O + o[:, None]) * K + k) * I + i[None, :]
    tl.store(partial_ptr + at, acc, mask=(o < O)[:, None] & i_ok)


@triton.jit
def _lowest_bit(word):
    """Place of the lowest bit that is set in an int32, read off the exponent of its value."""
    lowest = (word & -word).to(tl.float32)
    return ((lowest.to(tl.int32, bitcast=True) >> 23) & 255) - 127

"""The GEMMs of a sparse convolution over a neighbor table: gathered rows times weights, and the weights' gradient.

A program computes a tile of outputs: offset by offset, it gathers rows and multiplies them by weights. The loop over
the offsets, listed by sparse_tiles, has no branch, so indices, rows and weights of the next offsets are loaded during
the current product. With few channels several offsets are packed side by side into one product. No atomics.

Sizes: N inputs and M outputs of a table of K offsets, I and O channels of the rows read and written.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from unipad.kernels import backend, tuning
from unipad.kernels.backend import cdiv, jit, pick, tl, triton
from unipad.kernels.norm_relu import MAX_TILES, masked_gradient


def gather_gemm(
    features, weight, table, allow_tf32, mirrored=False, transposed=False, act=(None, None, None, False),
    with_moments=False, norm=None,
):  # fmt: skip
    """Features [N, I], weights [O, K, I] and a `NeighborTable` [K, M] -> [M, O] in the features' type.

    mirrored:   the table's offsets are in the reverse order of the weights'.
    transposed: the weights are [I, K, O], as for the gradient of the features.
    act:        scale, shift, residual and relu of `sparse_conv_act`; tensors are contiguous.
    with_moments: return ([M, O], `moments` of `norm_relu_fwd`): a part is a tile.
    norm:       x, statistics and out of a `norm_relu` whose d_out is computed: return ([M, O], `sums` of
                `norm_relu_bwd`). With too many tiles, `moments` and `sums` are None.

    Every output is summed by one program, in the order of the offsets. If anything is empty, returns zeros, without
    `act`.
    """
    (O, K, I), M = (weight.transpose(0, 2) if transposed else weight).shape, table.idx.shape[1]
    features, weight = features.contiguous(), weight.contiguous()
    out = features.new_empty(M, O)
    if not min(M, I, O, features.shape[0]):
        return (out.zero_(), None) if with_moments or norm else out.zero_()
    scale, shift, residual, relu = act

    def launch(blocks, table=table):
        tiles = table.tiles(blocks.m, blocks.sort)
        T, parts = tiles.count_idx.shape[0], None
        if (with_moments or norm) and T <= MAX_TILES:
            parts = features.new_empty(T, 2, O, dtype=torch.float32)
        norm_x, statistics, norm_out = norm if norm and parts is not None else (None, None, None)
        _gather_gemm_kernel[(T, cdiv(O, blocks.o))](
            features_ptr=features, weight_ptr=weight, row_idx_ptr=tiles.row_idx, count_idx_ptr=tiles.count_idx,
            offset_idx_ptr=tiles.offset_idx, read_idx_ptr=tiles.read_idx, out_ptr=out,
            scale_ptr=scale, shift_ptr=shift, residual_ptr=residual, parts_ptr=parts,
            norm_x_ptr=norm_x, statistics_ptr=statistics, norm_out_ptr=norm_out, K=K, I=I, O=O,
            RELU=relu, MIRRORED=mirrored, TRANSPOSED=transposed,
            PRECISION=_precision(allow_tf32), WIDEN=_widen(features),
            C=I if blocks.pack > 1 else 0, PACK=blocks.pack, STEPS=cdiv(I, blocks.i), VIA_L1=blocks.via_l1,
            BLOCK_M=blocks.m, BLOCK_I=blocks.i, BLOCK_O=blocks.o, num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        return parts if norm or parts is None else (parts, blocks.m)

    def run_trial(blocks):
        launch(blocks, table.trial())  # a copy: tiles made in a trial are not cached, so every trial makes them

    # all that the launch is compiled for
    given = scale is not None, shift is not None, residual is not None, norm is not None
    flags = mirrored, transposed, with_moments, relu, *given
    kind = "gather_gemm", features.dtype, allow_tf32, *flags, K, I, O, M
    candidates = _blocks(features.dtype, M <= FEW_ROWS, I, O, allow_tf32)
    if with_moments or norm:  # a candidate with too many tiles would leave the sums to a launch that is not timed
        candidates = [blocks for blocks in candidates if cdiv(M, blocks.m) <= MAX_TILES] or candidates
    parts = launch(tuning.choose(kind, candidates, run_trial, features.device))
    return (out, parts) if with_moments or norm else out


def d_weight_of(layers, table, allow_tf32, submanifold=False):
    """(Features [N, I], d_out [M, O]) of L layers and their `NeighborTable` [K, M] -> [L, O, K, I] fp32, offsets in the
    order of the table.

    submanifold: the table is that of a submanifold convolution with an odd kernel, where most rows have several
        neighbors and share many of them.

    The sums of chunks of pairs, or of parts of the rows, are added in a fixed order.
    """
    all_features, d_outs = (tuple(t.contiguous() for t in tensors) for tensors in zip(*layers, strict=True))
    features, d_out, L = all_features[0], d_outs[0], len(layers)
    (N, I), (M, O), K = features.shape, d_out.shape, table.idx.shape[0]
    if not min(N, M, I, O):
        return features.new_zeros(L, O, K, I, dtype=torch.float32)
    if _in_groups(features.dtype, K, I, O, submanifold):
        return _d_weight_of_groups(all_features, d_outs, table.idx)
    d_weight = features.new_empty(L, O, K, I, dtype=torch.float32)
    _, max_block = _limits(features.dtype, I, O, allow_tf32)
    block_i, block_o = (_block(channels, max_block) for channels in (I, O))
    tiles = cdiv(I, block_i) * cdiv(O, block_o)  # of [O, I]
    # a chunk's length is a multiple of the largest candidate's step
    pairs = table.pairs(_max_chunks(K, M, I, O, tiles, L), min_pairs=MIN_PAIRS, multiple=2 * BLOCK_R)
    chunks = pairs.first.shape[0]
    partial = features.new_empty(L, chunks, O, I, dtype=torch.float32)

    def launch(candidate):
        block_r, stages = candidate
        _d_weight_kernel[(chunks, tiles, L)](
            features_ptrs=all_features, d_out_ptrs=d_outs, read_idx_ptr=pairs.read_idx, row_idx_ptr=pairs.row_idx,
            first_ptr=pairs.first, end_ptr=pairs.end, partial_ptr=partial, I=I, O=O,
            PRECISION=_precision(allow_tf32), WIDEN=_widen(features),
            BLOCK_R=block_r, BLOCK_I=block_i, BLOCK_O=block_o,
            num_warps=8 if block_i * block_o > 8192 else 4, num_stages=stages,
        )  # fmt: skip

    kind = "d_weight", features.dtype, allow_tf32, L, K, I, O, M
    candidates = [(BLOCK_R, STAGES), (2 * BLOCK_R, STAGES), (BLOCK_R, FEWER_STAGES)]  # (pairs per step, stages)
    if features.dtype == torch.float32 and not allow_tf32:
        candidates = candidates[2:]  # the others spill on sm_80
    launch(tuning.choose(kind, candidates, launch, features.device))
    _sum_chunks_kernel[(K, cdiv(O * I, BLOCK_E), L)](
        partial_ptr=partial, chunk_end_idx_ptr=pairs.chunk_end_idx, d_weight_ptr=d_weight,
        CHUNKS=chunks, K=K, I=I, O=O, BLOCK_E=BLOCK_E,
    )  # fmt: skip
    return d_weight


def _d_weight_of_groups(all_features, d_outs, neighbor_idx):
    """`d_weight_of` for dense tables and few channels: a program sums part of the rows, for a group of offsets at once.

    It reads its rows of d_out once for all offsets of the group, which read mostly the same features. It also
    multiplies zeros for missing neighbors, which is cheap with few channels.
    """
    features = all_features[0]
    I, (M, O), K, L = features.shape[1], d_outs[0].shape, neighbor_idx.shape[0], len(d_outs)
    group, block_o = GROUP_OF[I], _block(O, 64)
    groups, rows = cdiv(K, group), _group_rows(K, M, I, L)
    parts = cdiv(M, rows)
    partial = features.new_empty(L, parts, O, K, I, dtype=torch.float32)
    _d_weight_of_groups_kernel[(parts, groups, L)](
        features_ptrs=all_features, d_out_ptrs=d_outs, table_idx_ptr=neighbor_idx, partial_ptr=partial,
        M=M, K=K, O=O, R=rows, WIDEN=_widen(features), BLOCK_R=BLOCK_R, C=I, GROUP=group, BLOCK_O=block_o,
        num_warps=8 if group * I * block_o >= 8192 else 4, num_stages=STAGES,
    )  # fmt: skip
    return partial.sum(dim=1) if parts > 1 else partial[:, 0]


def _in_groups(dtype, K, I, O, submanifold):
    """Whether `_d_weight_of_groups` computes the gradient of the weights: kernels up to 3 x 3 x 3, few channels."""
    return submanifold and dtype != torch.float32 and K <= 27 and I in GROUP_OF and O <= 64


def _group_rows(K, M, I, L):
    """Rows that a program sums for a group of offsets of one of L layers."""
    parts = cdiv(GROUP_PROGRAMS, cdiv(K, GROUP_OF[I]) * L)
    return cdiv(cdiv(M, parts), BLOCK_R) * BLOCK_R


def _max_chunks(K, M, I, O, tiles, L):
    """Maximum number of chunks of pairs, not counting the last, shorter chunk of each offset.

    tiles: programs per chunk and layer, each for a tile of channels; L: layers.
    """
    return max(1, min(cdiv(PROGRAMS, tiles), cdiv(K * M, MIN_PAIRS), MAX_PARTIAL // (L * O * I)))


class Blocks(NamedTuple):
    """One way to launch the gather-GEMM."""

    m: int  # outputs per tile
    i: int  # columns of the features per step: input channels, of `pack` offsets side by side
    o: int  # output channels per tile
    pack: int  # offsets per step
    warps: int
    stages: int
    via_l1: bool  # read rows through the L1, which asynchronous 16-byte loads otherwise bypass
    sort: bool  # sort rows so that those with the same offsets share tiles


# All untuned: chosen from the counts of benchmarks/count_sparse_conv.py and the compiler's output for sm_90. Tiles of
# more than 8192 sums have 8 warps (in `_d_weight_of_groups`, of 8192 too): with 4, each thread would hold more than 64.
# Pipeline stages, (default, fewer). With 5, indices are loaded two steps before the rows that they name, and rows two
# steps before their product; with 3, one step each. AMD GPUs have less shared memory for that.
STAGES_OF = {"nvidia": (5, 3), "amd": (2, 1)}
STAGES, FEWER_STAGES = STAGES_OF["amd" if torch.version.hip else "nvidia"]
# Up to this many rows, tiles have 64 rows by default, else 128, which read the weights half as often (at the LiDAR
# encoder's stage 4, 45 MB, not 89) but leave half as many programs. Always 64: fp32 without tf32, `_elementwise` rows.
FEW_ROWS = 8192
BLOCK_R = 64  # pairs, or rows of a part, per step of the gradient of the weights
MIN_PAIRS = 1024  # pairs per chunk, at least: reading their rows then outweighs writing the chunk's sums
# Chunks (not counting the last of an offset) x tiles of channels, at most, of each layer; of one, about eight per
# multiprocessor of an H100
PROGRAMS = 1024
MAX_PARTIAL = 2**23  # partial sums of these chunks, at most: 32 MB, which stay in the L2
GROUP_OF = {8: 16, 16: 8, 32: 8, 64: 4}  # input channels -> offsets whose gradients a program sums at once
GROUP_PROGRAMS = 192  # programs of `_d_weight_of_groups_kernel`, about; more would write and read more partial sums
BLOCK_E = 1024  # elements per program of the final sum over chunks


@lru_cache
def _blocks(dtype, few_rows, I, O, allow_tf32):
    """Ways to launch the gather-GEMM, the default first."""
    step, max_o = _limits(dtype, I, O, allow_tf32)
    pack = max(1, step // I)
    i, o = step if pack > 1 else _block(I, step), _block(O, max_o)
    if _elementwise(I, O) or dtype == torch.float32 and not allow_tf32:
        default = Blocks(m=64, i=i, o=o, pack=pack, warps=4, stages=STAGES, via_l1=True, sort=True)
        return [default, default._replace(sort=False)]
    ms = (64, 128) if few_rows else (128, 64)
    # (stages, via_l1, sort): a tile reads each of its rows two to three times; only timing on a GPU can tell whether
    # they are still in the L1, and whether the sort's fewer empty products are worth reading rows farther apart
    candidates = [(STAGES, True, True), (STAGES, False, True), (FEWER_STAGES, True, True), (STAGES, True, False)]
    return [Blocks(m, i, o, pack, 8 if m * o > 8192 else 4, *candidate) for candidate in candidates for m in ms]


def _limits(dtype, I, O, allow_tf32):
    """Maximum columns per step and output channels per tile."""
    if dtype != torch.float32:
        step, max_o = 64, 128
    elif allow_tf32:
        step, max_o = 32, 64
    else:
        step, max_o = 32, 32  # without tensor cores, registers are the limit
    return (step // 2, max_o // 2) if _elementwise(I, O) else (step, max_o)


def _elementwise(*channels):
    """Whether rows are read element by element, which takes more registers than reading vectors."""
    return any(c % 16 and c != 8 for c in channels)


@lru_cache
def _block(channels, max_block):
    return max(16, min(triton.next_power_of_2(channels), max_block))  # 16 is the minimum of tl.dot


def _precision(allow_tf32):
    return "tf32" if allow_tf32 else "ieee"  # matters for fp32 only


def _widen(features):
    # the interpreter would multiply the bit patterns of bf16
    return backend.interpret and features.dtype == torch.bfloat16


@jit
def _gather_gemm_kernel(
    features_ptr, weight_ptr,  # [N, I], [O, K, I] (TRANSPOSED: [I, K, O])
    row_idx_ptr, count_idx_ptr, offset_idx_ptr, read_idx_ptr,  # of `Tiles`; `_idx`: int32, counts too
    out_ptr,  # [M, O]
    scale_ptr, shift_ptr, residual_ptr,  # [O], [O], [M, O]; each or None
    parts_ptr,  # [tiles, 2, O] or None: moments of `norm_relu_fwd`, or with the next three the sums of `norm_relu_bwd`
    norm_x_ptr, statistics_ptr, norm_out_ptr,  # [M, O], [2, O], [M, O]; all or none
    K, I, O,  # offsets, input and output channels
    RELU: tl.constexpr, MIRRORED: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    C: tl.constexpr, PACK: tl.constexpr, STEPS: tl.constexpr,  # C = I if PACK > 1, else 0 and STEPS steps per offset
    VIA_L1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    j = tl.arange(0, BLOCK_I)
    lane = tl.arange(0, BLOCK_M)
    o_ok = o < O
    weight_ptr += o[None, :] if TRANSPOSED else o.to(tl.int64)[None, :] * K * I
    offset_idx_ptr += tile * K
    read_idx_ptr += tile * K * BLOCK_M
    count = tl.load(count_idx_ptr + tile)

    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for step in range(tl.cdiv(count, PACK) if PACK > 1 else count * STEPS):
        if PACK > 1:  # columns are the channels of several offsets; slot: position in the tile's list of offsets
            slot, c = step * PACK + j // C, j % C
            c_ok = (slot < count) & (j < PACK * C)
            k = tl.load(offset_idx_ptr + slot, mask=c_ok, other=0)
            if C % 8 == 0:  # a thread's columns belong to one offset: one index for all
                n = tl.full((BLOCK_M, BLOCK_I), -1, tl.int32)
                for p in tl.static_range(PACK):
                    slot_p = step * PACK + p
                    lane_ok = lane < (count - slot_p) * BLOCK_M  # slot_p < count, for all lanes
                    rows = tl.load(read_idx_ptr + slot_p * BLOCK_M + lane, mask=lane_ok, other=-1)
                    n = tl.where((j // C == p)[None, :], rows[:, None], n)
            else:
                n = tl.load(read_idx_ptr + slot[None, :] * BLOCK_M + lane[:, None], mask=c_ok[None, :], other=-1)
            at_x = n.to(tl.int64) * C + c[None, :]
            x_ok = n >= 0
        else:
            slot, c = step // STEPS, step % STEPS * BLOCK_I + j
            c_ok = c < I
            k = tl.load(offset_idx_ptr + slot)
            n = tl.load(read_idx_ptr + slot * BLOCK_M + lane).to(tl.int64)
            at_x = n[:, None] * I + c[None, :]
            x_ok = (n >= 0)[:, None] & c_ok[None, :]
        k = (K - 1 - k if MIRRORED else k).to(tl.int64)
        if TRANSPOSED:
            at_w = (c[:, None].to(tl.int64) * K + (k[:, None] if PACK > 1 else k)) * O
        else:
            at_w = k[:, None] * C + c[:, None] if PACK > 1 else k * I + c[:, None]
        modifier: tl.constexpr = ".ca" if VIA_L1 else ""
        x = tl.load(features_ptr + at_x, mask=x_ok, other=0.0, cache_modifier=modifier)  # [BLOCK_M, BLOCK_I]
        w = tl.load(weight_ptr + at_w, mask=c_ok[:, None] & o_ok[None, :], other=0.0)  # [BLOCK_I, BLOCK_O]
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    m = tl.load(row_idx_ptr + tile * BLOCK_M + lane).to(tl.int64)
    at = m[:, None] * O + o[None, :]
    ok = (m >= 0)[:, None] & o_ok[None, :]
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + o, mask=o_ok, other=0.0)[None, :]
    if shift_ptr is not None:
        acc += tl.load(shift_ptr + o, mask=o_ok, other=0.0)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=ok, other=0.0).to(tl.float32)
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    y = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, y, mask=ok)
    if parts_ptr is not None:
        y = tl.where(ok, y.to(tl.float32), 0.0)
        if norm_x_ptr is not None:
            mean = tl.load(statistics_ptr + o, mask=o_ok, other=0.0)
            inv_std = tl.load(statistics_ptr + O + o, mask=o_ok, other=0.0)
            g, x_hat = masked_gradient(y, norm_out_ptr, norm_x_ptr, at, ok, mean, inv_std)
            first, second = tl.sum(g, axis=0), tl.sum(g * x_hat, axis=0)
        else:  # by channel, the mean of the tile's rows and the sum of squares around it
            rows = tl.sum((m >= 0).to(tl.float32), axis=0)
            first = tl.sum(y, axis=0) / tl.maximum(rows, 1.0)
            centered = tl.where(ok, y - first[None, :], 0.0)
            second = tl.sum(centered * centered, axis=0)
        tl.store(parts_ptr + tile * 2 * O + o, first, mask=o_ok)
        tl.store(parts_ptr + (tile * 2 + 1) * O + o, second, mask=o_ok)


@jit
def _d_weight_kernel(
    features_ptrs, d_out_ptrs,  # of L layers: [N, I], [M, O]
    read_idx_ptr, row_idx_ptr, first_ptr, end_ptr,  # of `Pairs`
    partial_ptr,  # [L, chunks, O, I]
    I, O,  # input and output channels
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    chunk, layer = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    features_ptr, d_out_ptr = pick(features_ptrs, layer), pick(d_out_ptrs, layer)
    tiles_i = tl.cdiv(I, BLOCK_I)
    i = (tl.program_id(1) % tiles_i) * BLOCK_I + tl.arange(0, BLOCK_I)
    o = (tl.program_id(1) // tiles_i) * BLOCK_O + tl.arange(0, BLOCK_O)
    i_ok, o_ok = (i < I)[None, :], (o < O)[None, :]
    first, end = tl.load(first_ptr + chunk), tl.load(end_ptr + chunk)

    acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for r in range(tl.cdiv(end - first, BLOCK_R).to(tl.int32)):
        p = first + r * BLOCK_R + tl.arange(0, BLOCK_R)
        n = tl.load(read_idx_ptr + p, mask=p < end, other=-1).to(tl.int64)
        m = tl.load(row_idx_ptr + p, mask=p < end, other=-1).to(tl.int64)
        x = tl.load(features_ptr + n[:, None] * I + i[None, :], mask=(n >= 0)[:, None] & i_ok, other=0.0)
        g = tl.load(d_out_ptr + m[:, None] * O + o[None, :], mask=(m >= 0)[:, None] & o_ok, other=0.0)
        if WIDEN:
            g, x = g.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(tl.trans(g), x, acc, input_precision=PRECISION)
    at = ((layer * tl.num_programs(0) + chunk) * O + o[:, None]) * I + i[None, :]
    o_end = tl.where(first < end, O, 0)  # an empty chunk stores nothing: its sum is not read
    tl.store(partial_ptr + at, acc, mask=(o < o_end)[:, None] & i_ok)


@jit(varying=("M", "R"))
def _d_weight_of_groups_kernel(
    features_ptrs, d_out_ptrs, table_idx_ptr, partial_ptr,  # of L layers: [N, C], [M, O]; [K, M], [L, parts, O, K, C]
    M, K, O, R,  # outputs, offsets, output channels, outputs per part; C = I
    WIDEN: tl.constexpr, BLOCK_R: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    part, layer = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    features_ptr, d_out_ptr = pick(features_ptrs, layer), pick(d_out_ptrs, layer)
    first = tl.program_id(1) * GROUP
    j = tl.arange(0, GROUP * C)  # channels of the group's offsets, side by side
    o = tl.arange(0, BLOCK_O)
    end = tl.minimum((part + 1) * R, M)

    acc = tl.zeros((GROUP * C, BLOCK_O), tl.float32)
    for r in range(0, R, BLOCK_R):
        m = part * R + r + tl.arange(0, BLOCK_R)
        n = tl.full((BLOCK_R, GROUP * C), -1, tl.int32)
        for p in tl.static_range(GROUP):  # the last group may have fewer offsets
            k = (first + p).to(tl.int64)
            rows = tl.load(table_idx_ptr + k * M + m, mask=m < tl.where(first + p < K, end, 0), other=-1)
            n = tl.where((j // C == p)[None, :], rows[:, None], n)
        at = n.to(tl.int64) * C + (j % C)[None, :]
        x = tl.load(features_ptr + at, mask=n >= 0, other=0.0, cache_modifier=".ca")  # [BLOCK_R, GROUP * C]
        ok = (m < end)[:, None] & (o < O)[None, :]
        g = tl.load(d_out_ptr + m[:, None] * O + o[None, :], mask=ok, other=0.0)  # [BLOCK_R, BLOCK_O]
        if WIDEN:
            x, g = x.to(tl.float32), g.to(tl.float32)
        acc = tl.dot(tl.trans(x), g, acc)
    k = first + j // C
    at = (((layer * tl.num_programs(0) + part) * O + o[None, :]) * K + k[:, None]) * C + (j % C)[:, None]
    tl.store(partial_ptr + at, acc, mask=(k < K)[:, None] & (o < O)[None, :])


@jit(varying=("CHUNKS",))
def _sum_chunks_kernel(
    partial_ptr, chunk_end_idx_ptr, d_weight_ptr,  # [L, CHUNKS, O, I], [K], [L, O, K, I]
    CHUNKS, K, I, O,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    k, layer = tl.program_id(0), tl.program_id(2).to(tl.int64)
    # chunks of offset k
    first = tl.load(chunk_end_idx_ptr + k - 1, mask=k > 0, other=0)
    end = tl.load(chunk_end_idx_ptr + k)
    e = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)  # element of [O, I]
    e_ok = e < O * I
    partial_ptr += (layer * CHUNKS + first) * O * I
    acc = tl.zeros((BLOCK_E,), tl.float32)
    for _ in range(end - first):
        acc += tl.load(partial_ptr + e, mask=e_ok, other=0.0)
        partial_ptr += O * I
    tl.store(d_weight_ptr + ((layer * O + e // I) * K + k) * I + e % I, acc, mask=e_ok)

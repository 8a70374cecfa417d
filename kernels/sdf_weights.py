"""Weights of `sdf_render`'s MLPs as operands of matrix products: rounded, in the order in which threads hold them.

A packed MLP (sdf_pack.py) has a row per output unit, layer after layer: N rows (of output units n) and STRIDE
columns (of inputs k) each. The matrix instructions of NVIDIA's GPUs spread an operand over the 32 threads of a warp.
`operands` stores each layer so that a thread reads what it holds as four consecutive numbers, and no two threads have
to exchange any. Bits of the index in a layer, the highest first (n0 is the lowest bit of n):

    of W in x W^T   [columns of 8: k3...] [rows of 16: n4...] n2 n1 n0 k2 k1 n3 k0
    of W in d_z W   [columns of 8: k3...] [rows of 16: n4...] k2 k1 k0 n2 n1 n3 n0

A layer's columns from k on, a multiple of 8, are thus one piece, which begins at k N. A product's result, stored in the
first order, is one that threads can add to without an exchange either: the weights' gradient.

A thread holds columns 2 t and 2 t + 1 of a result but columns t and t + 4 of an operand, t = 0 to 3. Since the inputs
of a product can be summed in any order, `operand` takes columns in the order 0 2 4 6 1 3 5 7, and the weights above
match it: so the result of a layer becomes the operand of the next one without an exchange. On other GPUs, and with
several warps, results are the same, but threads do exchange values.
"""

import torch

from unipad.kernels.backend import jit, tl, triton

BLOCK = 1024  # weights per program of `_reorder_kernel`


def operands(packed, layers, H, last, PREC):
    """The weights of a packed MLP [rows, STRIDE] in both orders: [2, rows, STRIDE].

    Layers have H rows, the last one `last`. Of the distance MLP, whose last layer has 1 + H rows, the first of them is
    moved behind all others, not reordered, so that `last` is H. Rounded to tf32 if PREC is "tf32". Not differentiable.
    """
    out = torch.empty(2, *packed.shape, dtype=packed.dtype, device=packed.device)
    _reorder(packed, out, layers, H, last, PREC, False)
    return out


def from_first_order(gradient, layers, H, last):
    """The packed gradient [rows, STRIDE], from one in the first order of `operands`."""
    out = torch.empty_like(gradient)
    _reorder(out, gradient, layers, H, last, "", True)
    return out


def _reorder(packed, ordered, layers, H, last, PREC, back):
    rows, STRIDE = packed.shape
    _reorder_kernel[(triton.cdiv(packed.numel(), BLOCK),)](
        packed_ptr=packed, ordered_ptr=ordered, ROWS=rows, STRIDE=STRIDE, LAYERS=layers, H=H, LAST=last,
        ROUND=PREC == "tf32", BACK=back, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit
def to_tf32(x):
    """x rounded to tf32's 10-bit mantissa, ties away from 0; tensor cores would truncate.

    Adds half a unit in the last place in fp32 arithmetic, which preserves infinities and NaNs (integer arithmetic on
    the bits would not), and clears the other 13 bits.
    """
    # the sign and exponent of x: +-2^e; half a unit is 2^(e - 11)
    power = (x.to(tl.int32, bitcast=True) & -0x800000).to(tl.float32, bitcast=True)
    return ((x + power * (1 / 2048)).to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, PREC: tl.constexpr):
    """x as the factor of a product: rounded if PREC, the products' precision, is "tf32"."""
    return to_tf32(x) if PREC == "tf32" else x


@triton.jit
def operand(x, PREC: tl.constexpr):
    """x [M, K] as the first factor of `linear` and `linear_bwd_input`: rounded, columns in the order of the header."""
    M: tl.constexpr = x.shape[0]
    K: tl.constexpr = x.shape[1]
    x = tl.permute(tl.reshape(rounded(x, PREC), (M, K // 8, 4, 2)), (0, 1, 3, 2))
    return tl.reshape(x, (M, K))


@triton.jit
def linear(x, ptr, AT: tl.constexpr, out, N: tl.constexpr, PREC: tl.constexpr):
    """out [M, N] + x [M, K] W^T. x: from `operand`; W: columns of a layer from `operands`, in the first order, at AT.

    AT is not added to ptr before the call, so that all loads share an address in a register, and AT is in the
    instruction. So it is wherever these files pass an offset.
    """
    K: tl.constexpr = x.shape[1]
    w = tl.reshape(tl.load(ptr + (AT + tl.arange(0, N * K))), (K // 8, N // 16, 8, 4, 2, 2))
    w = tl.reshape(tl.permute(w, (0, 5, 3, 1, 4, 2)), (K, N))
    return tl.dot(x, w, tl.broadcast_to(out, (x.shape[0], N)), input_precision=PREC)


@triton.jit
def linear_bwd_input(d_z, ptr, AT: tl.constexpr, out, K: tl.constexpr, PREC: tl.constexpr):
    """out [M, K] + d_z [M, N] W. d_z: from `operand`; W: as in `linear`, but in the second order of `operands`."""
    N: tl.constexpr = d_z.shape[1]
    w = tl.reshape(tl.load(ptr + (AT + tl.arange(0, N * K))), (K // 8, N // 16, 8, 4, 2, 2))
    w = tl.reshape(tl.permute(w, (1, 4, 5, 3, 0, 2)), (N, K))
    return tl.dot(d_z, w, tl.broadcast_to(out, (d_z.shape[0], K)), input_precision=PREC)


@triton.jit
def flatten(x):
    """A product's result [M, N] as [M * N] in the order of the header, in which a thread's numbers are consecutive."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    x = tl.permute(tl.reshape(x, (M // 16, 2, 8, N // 8, 4, 2)), (3, 0, 2, 4, 1, 5))
    return tl.reshape(x, (M * N,))


@triton.jit
def unflatten(x, M: tl.constexpr, N: tl.constexpr):
    """The inverse of `flatten`."""
    x = tl.permute(tl.reshape(x, (N // 8, M // 16, 8, 4, 2, 2)), (1, 4, 2, 0, 3, 5))
    return tl.reshape(x, (M, N))


@triton.jit
def linear_bwd_weight(ptr, AT: tl.constexpr, d_z, x, tangent_d_z, tangent_x, PREC: tl.constexpr):
    """Add d_z^T x, [N, M] x [M, K], to columns at AT of this program's own gradient, in the first order of `operands`.

    All factors are `rounded`, the first ones transposed. tangent_*: factors of a second product, or None.
    """
    N: tl.constexpr = d_z.shape[0]
    K: tl.constexpr = x.shape[1]
    ptr += AT + tl.arange(0, N * K)
    out = tl.dot(d_z, x, unflatten(tl.load(ptr), N, K), input_precision=PREC)
    if tangent_d_z is not None:
        out = tl.dot(tangent_d_z, tangent_x, out, input_precision=PREC)
    tl.store(ptr, flatten(out))


@jit
def _reorder_kernel(
    packed_ptr, ordered_ptr,  # [ROWS, STRIDE], [2, ROWS, STRIDE] or, with BACK, [ROWS, STRIDE]
    ROWS: tl.constexpr, STRIDE: tl.constexpr, LAYERS: tl.constexpr, H: tl.constexpr, LAST: tl.constexpr,
    ROUND: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    EXTRA: tl.constexpr = ROWS - (LAYERS - 1) * H - LAST  # rows of the last layer that are moved: 1 or 0
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < ROWS * STRIDE
    l = tl.minimum(i // (H * STRIDE), LAYERS - 1)
    N = tl.where(l == LAYERS - 1, LAST, H)
    j = i - l * H * STRIDE  # in the layer
    group = j // 128  # of 8 columns and 16 rows
    k, n = group // (N // 16) * 8, group % (N // 16) * 16 + j // 2 % 2 * 8
    low, high, pair = j % 2, j // 4 % 4 * 2, j // 16 % 8  # bit 0 of one index and bits 1 and 2 of it, the other index
    first_row = l * H + tl.where(l == LAYERS - 1, EXTRA, 0)
    for order in tl.static_range(1 if BACK else 2):
        if order == 0:
            row, column = first_row + n + pair, k + high + low
        else:
            row, column = first_row + n + high + low, k + pair
        moved = j >= N * STRIDE
        row, column = tl.where(moved, (LAYERS - 1) * H, row), tl.where(moved, j - N * STRIDE, column)
        packed = packed_ptr + row * STRIDE + column
        ordered = ordered_ptr + order * ROWS * STRIDE + i
        if BACK:
            tl.store(packed, tl.load(ordered, mask=ok, other=0.0), mask=ok)
        else:
            w = tl.load(packed, mask=ok, other=0.0)
            tl.store(ordered, to_tf32(w) if ROUND else w, mask=ok)

"""Weights of `sdf_render`'s MLPs as operands of matrix products: rounded, in the order in which threads hold them.

A packed MLP (sdf_pack.py) has a row per output unit, layer after layer: N rows (of output units n) and STRIDE
columns (of inputs k) each. The matrix instructions of NVIDIA's GPUs spread an operand over the 32 threads of a warp.
`pack` stores each layer so that a thread reads what it holds as four consecutive numbers, and no two threads have to
exchange any. Bits of the index in a layer, the highest first (n0 is the lowest bit of n):

    of W in x W^T   [columns of 8: k3...] [rows of 16: n4...] n2 n1 n0 k2 k1 n3 k0
    of W in d_z W   [columns of 8: k3...] [rows of 16: n4...] k2 k1 k0 n2 n1 n3 n0

So the columns of a layer from k on, k a multiple of 8, are contiguous and begin at k N. If the result of a product is
stored in the first order, as the weights' gradient is, threads can add to it without an exchange either. The last layer
of the distance MLP has 1 + H rows; the first of them is stored unpermuted behind all others, so that N is H there too.

A thread holds columns 2 t and 2 t + 1 of a result but columns t and t + 4 of an operand, t = 0 to 3. Since the inputs
of a product can be summed in any order, `operand` takes columns in the order 0 2 4 6 1 3 5 7, and the weights above
match it: so the result of a layer becomes the operand of the next one without an exchange. On other GPUs, and with
several warps, results are the same, but threads do exchange values.
"""

from unipad.kernels.backend import tl, triton


@triton.jit
def places(n, k, N):
    """Index in a layer of N rows of the weights in rows n and columns k, in the first order and in the second."""
    piece = (k // 8 * (N // 16) + n // 16) * 128
    n3 = n // 8 % 2 * 2
    return piece + n % 8 * 16 + k // 2 % 4 * 4 + n3 + k % 2, piece + k % 8 * 16 + n // 2 % 4 * 4 + n3 + n % 2


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
def operand_row(ptr, AT: tl.constexpr, n: tl.constexpr, K: tl.constexpr):
    """Row n, below 8, of columns at AT of a layer of 16 rows in the first order: [1, K] as in an `operand`."""
    k = tl.arange(0, K)
    return tl.load(ptr + (AT + n * 16 + k // 8 * 128 + k % 4 * 4 + k // 4 % 2))[None, :]


@triton.jit
def linear(x, ptr, AT: tl.constexpr, out, N: tl.constexpr, PREC: tl.constexpr):
    """out [M, N] + x [M, K] W^T. x: from `operand`; W: columns of a layer from `pack`, in the first order, at AT.

    AT is not added to ptr before the call, so that all loads share an address in a register, and AT is in the
    instruction. So it is wherever these files pass an offset.
    """
    K: tl.constexpr = x.shape[1]
    w = tl.reshape(tl.load(ptr + (AT + tl.arange(0, N * K))), (K // 8, N // 16, 8, 4, 2, 2))
    w = tl.reshape(tl.permute(w, (0, 5, 3, 1, 4, 2)), (K, N))
    return tl.dot(x, w, tl.broadcast_to(out, (x.shape[0], N)), input_precision=PREC)


@triton.jit
def linear_bwd_input(d_z, ptr, AT: tl.constexpr, out, K: tl.constexpr, PREC: tl.constexpr):
    """out [M, K] + d_z [M, N] W. d_z: from `operand`; W: as in `linear`, but in the second order."""
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
    """Add d_z^T x, [N, M] x [M, K], to columns at AT of this program's own gradient, in the first order.

    All factors are `rounded`, the first ones transposed. tangent_*: factors of a second product, or None.
    """
    N: tl.constexpr = d_z.shape[0]
    K: tl.constexpr = x.shape[1]
    ptr += AT + tl.arange(0, N * K)
    out = tl.dot(d_z, x, unflatten(tl.load(ptr), N, K), input_precision=PREC)
    if tangent_d_z is not None:
        out = tl.dot(tangent_d_z, tangent_x, out, input_precision=PREC)
    tl.store(ptr, flatten(out))

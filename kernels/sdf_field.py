"""The neural field on a tile of samples: device functions of the kernels of `sdf_render`.

Both MLPs (UniPAD's decoders) get the point p, and in every layer a conditioning vector (see `sdf_reference`). With
products of their matrices multiplied out,

    z_l = W_l x_l + A_l f + G_l geometry + E_l e,   x_{l+1} = act(z_l),   x_0 = 0,   e = (direction, gradient, p, 1)

where f is the interpolated feature. Unlike in `sdf_reference`, x_0 is 0: its part of z_0 is in E_0 e. In E_l, the
columns of p are 0 for l > 0, and the column of 1 is the bias. The distance MLP (softplus) has no G, and its e is only
(p, 1); the color MLP (ReLU) has all terms. The distance MLP's last z is (distance, geometry): geometry, [H], is an
input of the color MLP. The derivative of the softplus follows from its value, act'(z) = 1 - exp(-100 act(z)), so z is
not stored.

An MLP is packed into one matrix [rows, STRIDE]: one row per output unit, layer after layer, with the columns of W, A, G
and E side by side (see sdf_pack.py). C and H are powers of two from 16 on, padded with zeros, which changes no result:
the outputs of padded rows are multiplied by padded columns only. Matrix products read what `sdf_weights` makes of it.
The distance MLP has no product with e: its columns of p and of the bias, and the row of the distance, are read as
packed.

A tile of M samples belongs to one warp, which keeps activations in its registers. Sizes: CHANNELS of the volume and C
the same padded, H hidden units (padded), LAYERS of the MLP. PREC: input precision of `tl.dot`.
"""

import torch

from unipad.kernels.backend import cdiv, tl, triton
from unipad.kernels.sdf_alpha import sigmoid
from unipad.kernels.sdf_weights import linear, linear_bwd_input, operand, operand_row

COLORS = tl.constexpr(16)  # rows of the color MLP's last layer: 3 and padding up to the minimum of tl.dot
INPUTS = tl.constexpr(16)  # columns of E, with padding
# Where in E the columns of the direction, of the gradient, of the point and of 1 (the bias) begin
DIRECTION, GRADIENT, POINT, ONE = tl.constexpr(0), tl.constexpr(3), tl.constexpr(8), tl.constexpr(11)


def padded_width(width):
    """The kernels' width for `width` channels or units."""
    return max(16, 1 << (width - 1).bit_length())


def precision(exact):
    """`tl.dot`'s input precision. AMD's matrix units multiply fp32 directly."""
    return "ieee" if torch.version.hip else "tf32x3" if exact else "tf32"


# Launch parameters; untuned: on a GPU, no others were timed
BLOCK_S = 16  # samples per tile: the rows of a matrix instruction of one warp; for one warp, more would spill registers
SEARCH_BLOCK = 32  # ... in `sdf_values`, which keeps less in registers
MAX_NARROW = tl.constexpr(32)  # fields with more channels or hidden units ("wide") use more warps
# With 4, the distance's backward would need less stack, 104 bytes instead of 200 (tf32, sm_90), but all warps of the
# forward would compute the same
WIDE_WARPS = 8
PER_MULTIPROCESSOR = 8  # warps, of programs that sum gradients: as many as have room for 255 registers a thread


def tile_launch(options, block_name, block):
    """Launch options for tiles of `block` samples. options: constexpr arguments; C and H are read."""
    narrow = max(options["C"], options["H"]) <= MAX_NARROW.value
    return {block_name: block, "num_warps": 1 if narrow else WIDE_WARPS, "num_stages": 1}


def programs_for(work, multiprocessors, warps):
    """Number of programs, of as many warps, over which `work` tiles or rays, at least one, are spread.

    The fewest of which none has more than its share of what the GPU can run at once: each has sums of gradients.
    """
    share = cdiv(work, PER_MULTIPROCESSOR // warps * multiprocessors)
    return cdiv(work, share)


@triton.jit
def load_row(ptr, AT: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr = 1):
    """N values from AT on, STRIDE apart, as a row [1, N]."""
    return tl.load(ptr + (AT + tl.arange(0, N) * STRIDE))[None, :]


@triton.jit
def columns(a, at: tl.constexpr):
    """Columns at, at + 1 and at + 2 of [M, K], three of [M]."""
    k = tl.arange(0, a.shape[1])[None, :]
    x = tl.sum(tl.where(k == at, a, 0.0), axis=1)
    y = tl.sum(tl.where(k == at + 1, a, 0.0), axis=1)
    return x, y, tl.sum(tl.where(k == at + 2, a, 0.0), axis=1)


@triton.jit
def stack4(a, b, c, d):
    """[M, 2, 2] with a, b, c and d of [M] in this order."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def stack8(a, b, c, d, e, f, g, h):
    """[M, 8] from eight of [M]."""
    return tl.reshape(tl.join(stack4(a, c, e, g), stack4(b, d, f, h)), (a.shape[0], 8))


@triton.jit
def point_inputs(point, one: tl.constexpr):
    """The columns of e for p and the bias, [M, 8]; for one = 0, the derivative of these columns along v, given as p."""
    zero = tl.zeros_like(point[0])
    return stack8(point[0], point[1], point[2], zero + one, zero, zero, zero, zero)


@triton.jit
def rgb_inputs(point, direction, gradient):
    """e of the color MLP, [M, INPUTS]; the direction is one for all samples."""
    zero = tl.zeros_like(gradient[0])
    dx, dy, dz = direction
    view = stack8(zero + dx, zero + dy, zero + dz, gradient[0], gradient[1], gradient[2], zero, zero)
    e = tl.permute(tl.join(view, point_inputs(point, 1)), (0, 2, 1))
    return tl.reshape(e, (zero.shape[0], INPUTS))


@triton.jit
def point_product(point, ptr, AT: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr):
    """[M, N] point W^T; AT: the first column of p in a layer of the packed MLP."""
    x, y, z = point
    out = x[:, None] * load_row(ptr, AT, N, STRIDE) + y[:, None] * load_row(ptr, AT + 1, N, STRIDE)
    return out + z[:, None] * load_row(ptr, AT + 2, N, STRIDE)


@triton.jit
def softplus(z):
    """log(1 + exp(100 z)) / 100; exactly z where 100 z > 20. See SHARPNESS and THRESHOLD in sdf_reference.py.

    max(z, 0) + decay P(decay), decay = exp(-100 |z|). P approximates log(1 + x) / (100 x) in 0 to 1, with a relative
    error of at most 2e-7 in fp32, in half the instructions of `tl.log`: a least-squares fit of degree 8, reweighted
    until the largest error is smallest. At the threshold, the second term is below half a unit in the last place of z.
    """
    x = tl.exp(-100.0 * tl.abs(z))
    p = 0.0000538369173 * x - 0.000301090243
    p = p * x + 0.000792067319
    p = p * x - 0.00137461971
    p = p * x + 0.00191448665
    p = p * x - 0.00248528645
    p = p * x + 0.00333203299
    p = p * x - 0.00499995516
    p = p * x + 0.00999999974
    return x * p + tl.maximum(z, 0.0)


@triton.jit
def softplus_grads(x):
    """act' and act'' / act' where the softplus has value x."""
    decay = tl.exp(-100.0 * x)
    return 1.0 - decay, 100.0 * decay


@triton.jit
def sdf_hidden(
    point, feature, mlp_ptr, w_ptr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """x_1 to x_{LAYERS - 1}, [M, H] each. feature: an `operand`; mlp_ptr, w_ptr: `Packed`'s sdf and sdf_w."""
    STRIDE: tl.constexpr = C + H + INPUTS
    E: tl.constexpr = C + H + POINT
    z = load_row(mlp_ptr, E + 3, H, STRIDE) + point_product(point, mlp_ptr, E, H, STRIDE)
    x = softplus(linear(feature, w_ptr, H * H, z, H, PREC))
    xs = (x,)
    for l in tl.static_range(1, LAYERS - 1):
        z = load_row(mlp_ptr, l * H * STRIDE + E + 3, H, STRIDE)
        z = linear(feature, w_ptr, l * H * STRIDE + H * H, z, H, PREC)
        x = softplus(linear(operand(x, PREC), w_ptr, l * H * STRIDE, z, H, PREC))
        xs = xs + (x,)
    return xs


@triton.jit
def distance(x, feature, mlp_ptr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr):
    """The distance [M], from the last layer's input x and the feature [M, C]: row 0 of that layer."""
    LAST: tl.constexpr = (LAYERS - 1) * H * (C + H + INPUTS)
    sdf = tl.sum(x * load_row(mlp_ptr, LAST, H), axis=1) + tl.sum(feature * load_row(mlp_ptr, LAST + H, C), axis=1)
    return sdf + tl.load(mlp_ptr + LAST + H + C + ONE)  # the bias


@triton.jit
def geometry(
    x, feature, mlp_ptr, w_ptr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """The geometry [M, H], from the last layer's input x and the feature, `operand`s: rows from 1 on of that layer."""
    STRIDE: tl.constexpr = C + H + INPUTS
    LAST: tl.constexpr = (LAYERS - 1) * H * STRIDE
    bias = load_row(mlp_ptr, LAST + STRIDE + C + H + ONE, H, STRIDE)
    return linear(x, w_ptr, LAST, linear(feature, w_ptr, LAST + H * H, bias, H, PREC), H, PREC)


@triton.jit
def distance_bwd(
    xs, mlp_ptr, w_ptr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """Derivatives of the distance w.r.t. the point at a fixed feature, three of [M], and w.r.t. the feature, [M, C].

    xs: from `sdf_hidden`. x_hat, z_hat: w.r.t. x, z, as in `sdf_backward`.
    """
    STRIDE: tl.constexpr = C + H + INPUTS
    SECOND: tl.constexpr = (LAYERS * H + 1) * STRIDE  # where the weights' second order begins
    LAST: tl.constexpr = (LAYERS - 1) * H * STRIDE
    feature_hat = tl.broadcast_to(load_row(mlp_ptr, LAST + H, C), (xs[0].shape[0], C))
    z_hat = load_row(mlp_ptr, LAST, H) * softplus_grads(xs[LAYERS - 2])[0]
    for i in tl.static_range(LAYERS - 2):
        l = LAYERS - 2 - i
        z_operand = operand(z_hat, PREC)
        feature_hat = linear_bwd_input(z_operand, w_ptr, SECOND + l * H * STRIDE + H * H, feature_hat, C, PREC)
        x_hat = linear_bwd_input(z_operand, w_ptr, SECOND + l * H * STRIDE, tl.zeros((1, H), tl.float32), H, PREC)
        z_hat = x_hat * softplus_grads(xs[LAYERS - 3 - i])[0]
    feature_hat = linear_bwd_input(operand(z_hat, PREC), w_ptr, SECOND + H * H, feature_hat, C, PREC)
    E: tl.constexpr = C + H + POINT  # columns of p in E_0
    gx = tl.sum(z_hat * load_row(mlp_ptr, E, H, STRIDE), axis=1)
    gy = tl.sum(z_hat * load_row(mlp_ptr, E + 1, H, STRIDE), axis=1)
    return gx, gy, tl.sum(z_hat * load_row(mlp_ptr, E + 2, H, STRIDE), axis=1), feature_hat


@triton.jit
def rgb_hidden(
    e, feature, geo, w_ptr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """`sdf_hidden` for the color MLP; e (from `rgb_inputs`) and geo are `operand`s too."""
    STRIDE: tl.constexpr = C + 2 * H + INPUTS
    x = tl.maximum(_rgb_conditions(e, feature, geo, w_ptr, 0, H, C, H, PREC), 0.0)
    xs = (x,)
    for l in tl.static_range(1, LAYERS - 1):
        z = _rgb_conditions(e, feature, geo, w_ptr, l * H * STRIDE, H, C, H, PREC)
        x = tl.maximum(linear(operand(x, PREC), w_ptr, l * H * STRIDE, z, H, PREC), 0.0)
        xs = xs + (x,)
    return xs


@triton.jit
def _rgb_conditions(
    e, feature, geo, w_ptr, AT: tl.constexpr,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """[M, N] all of z of the color MLP's layer at AT but the product with x.

    The product with e has columns of zeros: Triton 3.6 multiplies 16 at least.
    """
    z = linear(e, w_ptr, AT + (2 * H + C) * N, tl.zeros((1, N), tl.float32), N, PREC)
    z = linear(feature, w_ptr, AT + H * N, z, N, PREC)
    return linear(geo, w_ptr, AT + (H + C) * N, z, N, PREC)


@triton.jit
def color_of(
    x, e, feature, geo, w_ptr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """The color [M, COLORS] in [0, 1], from the last layer's input x; columns from 3 on are padding (0.5).

    In wide fields without products of matrices: for a result as wide as it has rows, Triton would give all columns to
    each warp, in all layers, since one layout serves all products.
    """
    LAST: tl.constexpr = (LAYERS - 1) * H * (C + 2 * H + INPUTS)
    if C > MAX_NARROW or H > MAX_NARROW:
        x, channel = operand(x, PREC), tl.arange(0, COLORS)[None, :]
        z = tl.zeros((x.shape[0], COLORS), tl.float32)
        for n in tl.static_range(3):
            own = x * operand_row(w_ptr, LAST, n, H) + geo * operand_row(w_ptr, LAST + (H + C) * COLORS, n, H)
            own = tl.sum(own, axis=1)
            own += tl.sum(feature * operand_row(w_ptr, LAST + H * COLORS, n, C), axis=1)
            own += tl.sum(e * operand_row(w_ptr, LAST + (2 * H + C) * COLORS, n, INPUTS), axis=1)
            z = tl.where(channel == n, own[:, None], z)
    else:
        z = _rgb_conditions(e, feature, geo, w_ptr, LAST, COLORS, C, H, PREC)
        z = linear(operand(x, PREC), w_ptr, LAST, z, COLORS, PREC)
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def opacity(sdf, gradient, direction, delta, density_param, NEUS: tl.constexpr):
    """alpha before clipping, the SDF's slope along the ray before clipping, and two values for the backward; [M] each.

    The two values are NeuS's CDFs at the interval's ends, or VolSDF's tail and density (see `sdf_alpha`). VolSDF needs
    no slope: the distance stands in its place.
    """
    if NEUS:
        slope = gradient[0] * direction[0] + gradient[1] * direction[1] + gradient[2] * direction[2]
        half = tl.minimum(slope, 0.0) * delta / 2
        prev_cdf, next_cdf = sigmoid((sdf - half) * density_param), sigmoid((sdf + half) * density_param)
        return (prev_cdf - next_cdf + 1e-5) / (prev_cdf + 1e-5), slope, prev_cdf, next_cdf
    else:
        tail = tl.exp(-tl.abs(sdf) / density_param) / 2
        density = tl.where(sdf < 0, 1.0 - tail, tail) / density_param
        return 1.0 - tl.exp(-density * delta), sdf, tail, density

"""The neural field on a tile of samples: device functions of the kernels of `sdf_render`.

Both MLPs (UniPAD's decoders) get the point p, and in every layer a conditioning vector (see `sdf_reference`). With
products of their matrices multiplied out,

    z_l = W_l x_l + A_l f + G_l geometry + E_l e,   x_{l+1} = act(z_l),   x_0 = 0,   e = (p, 1, direction, gradient)

where f is the interpolated feature. Unlike in `sdf_reference`, x_0 is 0: its part of z_0 is in E_0 e. In E_l, the
columns of p are 0 for l > 0, and the column of 1 is the bias. The distance MLP (softplus) has no G, and its e is only
(p, 1); the color MLP (ReLU) has all terms. The distance MLP's last z is (distance, geometry): geometry, [H], is an
input of the color MLP. The derivative of the softplus follows from its value, act'(z) = 1 - exp(-100 act(z)), so z is
not stored.

An MLP is packed into one matrix [rows, STRIDE]: one row per output unit, layer after layer, with the columns of W, A, G
and E side by side (see sdf_pack.py). C and H are powers of two from 16 on, padded with zeros, which changes no result:
the outputs of padded rows are multiplied by padded columns only.

Sizes: M samples per tile, CHANNELS of the volume and C the same padded, H hidden units (padded), LAYERS of the MLP.
PREC: input precision of `tl.dot`.
"""

import torch

from unipad.kernels.backend import tl, triton
from unipad.kernels.sdf_alpha import sigmoid
from unipad.kernels.trilinear import axis_corner

COLORS = tl.constexpr(16)  # rows of the color MLP's last layer: 3 and padding up to the minimum of tl.dot
INPUTS = tl.constexpr(16)  # columns of E: p 0 to 2, the bias 3, direction 4 to 6, gradient 7 to 9, padding


def padded_width(width):
    """The kernels' width for `width` channels or units."""
    return max(16, 1 << (width - 1).bit_length())


def precision(exact):
    """`tl.dot`'s input precision. AMD's matrix units multiply fp32 directly."""
    return "ieee" if torch.version.hip else "tf32x3" if exact else "tf32"


# Launch parameters; untuned: on a GPU, no others were timed
BLOCK_S = 32  # samples of a ray per tile, at most, in the kernels that walk along rays
BLOCK_M = 64  # samples per tile (along rays: 2 rays x BLOCK_S); the rows of a Hopper matrix instruction
WARPS = 4
MAX_NARROW = 32  # fields with more channels or hidden units ("wide") use tiles of half as many samples
TF32X3_DIVISOR = 4  # tiles of BLOCK_M / 4 under tf32x3, in narrow and wide fields: it holds every operand in two parts
PROGRAMS = 528  # programs per launch, at most: 4 per multiprocessor of an H100; each writes partial MLP gradients


def sample_launch(N, options):
    """Number of programs and launch options for kernels over N samples; with more than PROGRAMS tiles, programs loop.

    options: constexpr arguments; C, H and PREC are read.
    """
    narrow = max(options["C"], options["H"]) <= MAX_NARROW
    block, warps = BLOCK_M if narrow else BLOCK_M // 2, WARPS
    if options["PREC"] == "tf32x3":  # when compiled with more warps, narrow fields spill more, wide ones less
        block, warps = BLOCK_M // TF32X3_DIVISOR, WARPS // 2 if narrow else WARPS * 2
    return min(PROGRAMS, triton.cdiv(N, block)), dict(BLOCK_M=block, num_warps=warps, num_stages=1)


def ray_launch(R, options):
    """Number of programs and launch options for kernels that walk along R rays."""
    _, launch = sample_launch(0, options)
    block = launch.pop("BLOCK_M")
    block_s = min(BLOCK_S, block)
    block_r = block // block_s
    return min(PROGRAMS, triton.cdiv(R, block_r)), dict(BLOCK_R=block_r, BLOCK_S=block_s, **launch)


def new_scratch(like, programs, layers, H):
    """Memory in which each program stores the activations of a tile: the kernels use [programs, layers, M, H] of it."""
    return like.new_empty(programs, layers, BLOCK_M, H)


@triton.jit
def sample_on_ray(
    origins_ptr, directions_ptr, volume_idx_ptr, cells_per_unit_ptr, cell_offset_ptr,  # [R, 3] x 2, [R], [3], [3]
    r, t, ok, Z,
):  # fmt: skip
    """Points, directions and grid coordinates of samples [M] on rays r at distances t.

    The grid coordinates are x, y, z in cells, then the index of the volume's first z slice among all volumes' slices.
    """
    dx = tl.load(directions_ptr + 3 * r, mask=ok, other=0.0)
    dy = tl.load(directions_ptr + 3 * r + 1, mask=ok, other=0.0)
    dz = tl.load(directions_ptr + 3 * r + 2, mask=ok, other=0.0)
    px = tl.load(origins_ptr + 3 * r, mask=ok, other=0.0) + dx * t
    py = tl.load(origins_ptr + 3 * r + 1, mask=ok, other=0.0) + dy * t
    pz = tl.load(origins_ptr + 3 * r + 2, mask=ok, other=0.0) + dz * t
    ux = px * tl.load(cells_per_unit_ptr) + tl.load(cell_offset_ptr)
    uy = py * tl.load(cells_per_unit_ptr + 1) + tl.load(cell_offset_ptr + 1)
    uz = pz * tl.load(cells_per_unit_ptr + 2) + tl.load(cell_offset_ptr + 2)
    first = tl.load(volume_idx_ptr + r, mask=ok, other=0).to(tl.int64) * Z
    return (px, py, pz), (dx, dy, dz), (ux, uy, uz, first)


@triton.jit
def corner(grid_coords, ok, Z, Y, X, k):
    """Corner k of each sample's cell: its row in the volume, whether it exists, its weight, d weight / d (x, y, z)."""
    ux, uy, uz, first = grid_coords
    z, z_ok, az, bz = axis_corner(uz, Z, k // 4)
    y, y_ok, ay, by = axis_corner(uy, Y, k // 2 % 2)
    x, x_ok, ax, bx = axis_corner(ux, X, k % 2)
    row = ((first + z) * Y + y) * X + x
    return row, ok & x_ok & y_ok & z_ok, az * ay * ax, az * ay * bx, az * by * ax, bz * ay * ax


@triton.jit
def load_features(volume_ptr, row, ok, CHANNELS, C: tl.constexpr):
    """Features [M, C] of voxels; 0 where not ok and in padded channels."""
    c = tl.arange(0, C)[None, :]
    return tl.load(volume_ptr + row[:, None] * CHANNELS + c, mask=ok[:, None] & (c < CHANNELS), other=0.0)


@triton.jit
def interpolate(volume_ptr, grid_coords, ok, Z, Y, X, CHANNELS, C: tl.constexpr):
    """The interpolated feature [M, C]."""
    feature = tl.zeros((grid_coords[0].shape[0], C), tl.float32)
    for k in range(8):
        row, row_ok, weight, _, _, _ = corner(grid_coords, ok, Z, Y, X, k)
        feature += weight[:, None] * load_features(volume_ptr, row, row_ok, CHANNELS, C)
    return feature


@triton.jit
def interpolate_along(volume_ptr, grid_coords, ok, vx, vy, vz, Z, Y, X, CHANNELS, C: tl.constexpr):
    """Derivative [M, C] of the feature along v, given in grid coordinates."""
    along = tl.zeros((vx.shape[0], C), tl.float32)
    for k in range(8):
        row, row_ok, _, bx, by, bz = corner(grid_coords, ok, Z, Y, X, k)
        along += (bx * vx + by * vy + bz * vz)[:, None] * load_features(volume_ptr, row, row_ok, CHANNELS, C)
    return along


@triton.jit
def interpolate_bwd_coords(volume_ptr, grid_coords, ok, d_feature, Z, Y, X, CHANNELS, C: tl.constexpr):
    """Gradient of the dot product d_feature . feature w.r.t. the grid coordinates: three of [M]."""
    gx = tl.zeros((d_feature.shape[0],), tl.float32)
    gy, gz = gx, gx
    for k in range(8):
        row, row_ok, _, bx, by, bz = corner(grid_coords, ok, Z, Y, X, k)
        d_weight = tl.sum(load_features(volume_ptr, row, row_ok, CHANNELS, C) * d_feature, axis=1)
        gx += bx * d_weight
        gy += by * d_weight
        gz += bz * d_weight
    return gx, gy, gz


@triton.jit
def load_row(ptr, N: tl.constexpr):
    """N consecutive values as a row [1, N]."""
    return tl.load(ptr + tl.arange(0, N))[None, :]


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
def product(a, b, out, PREC: tl.constexpr):
    """out + a @ b, with operands rounded to tf32 if PREC is "tf32"."""
    if PREC == "tf32":
        a, b = to_tf32(a), to_tf32(b)
    return tl.dot(a, b, out, input_precision=PREC)


@triton.jit
def linear(x, ptr, STRIDE: tl.constexpr, out, N: tl.constexpr, PREC: tl.constexpr):
    """out [M, N] + x [M, K] W^T, where W [N, K] are columns of a packed MLP."""
    k = tl.arange(0, x.shape[1])[:, None]
    w = tl.load(ptr + tl.arange(0, N)[None, :] * STRIDE + k)
    return product(x, w, tl.broadcast_to(out, (x.shape[0], N)), PREC)


@triton.jit
def linear_bwd_input(d_z, ptr, STRIDE: tl.constexpr, out, K: tl.constexpr, PREC: tl.constexpr):
    """out [M, K] + d_z [M, N] W, where W [N, K] are columns of a packed MLP."""
    n = tl.arange(0, d_z.shape[1])[:, None]
    w = tl.load(ptr + n * STRIDE + tl.arange(0, K)[None, :])
    return product(d_z, w, tl.broadcast_to(out, (d_z.shape[0], K)), PREC)


@triton.jit
def linear_bwd_weight(ptr, STRIDE: tl.constexpr, a, b, out, PREC: tl.constexpr):
    """Add out (None: 0) + a^T b ([M, N], [M, K] -> [N, K]) to columns of this program's own packed gradient."""
    out = product(tl.trans(a), b, out, PREC)
    out_ptr = ptr + tl.arange(0, out.shape[0])[:, None] * STRIDE + tl.arange(0, out.shape[1])[None, :]
    tl.store(out_ptr, tl.load(out_ptr) + out)


@triton.jit
def add_row(ptr, value):
    """Add value [K] to a row of this program's own packed gradient."""
    out_ptr = ptr + tl.arange(0, value.shape[0])
    tl.store(out_ptr, tl.load(out_ptr) + value)


@triton.jit
def columns(a, at: tl.constexpr):
    """Columns at, at + 1 and at + 2 of [M, K], three of [M]."""
    k = tl.arange(0, a.shape[1])[None, :]
    x = tl.sum(tl.where(k == at, a, 0.0), axis=1)
    y = tl.sum(tl.where(k == at + 1, a, 0.0), axis=1)
    return x, y, tl.sum(tl.where(k == at + 2, a, 0.0), axis=1)


@triton.jit
def sdf_inputs(point, one):
    """e [M, INPUTS] of the distance MLP at `point` (one = 1); e's derivative along v, for point = v and one = 0."""
    k = tl.arange(0, INPUTS)[None, :]
    x, y, z = point
    e = tl.where(k == 0, x[:, None], tl.where(k == 1, y[:, None], tl.where(k == 2, z[:, None], 0.0)))
    return tl.where(k == 3, one, e)


@triton.jit
def rgb_inputs(point, direction, gradient):
    """e [M, INPUTS] of the color MLP."""
    k = tl.arange(0, INPUTS)[None, :]
    dx, dy, dz = direction
    gx, gy, gz = gradient
    e = sdf_inputs(point, 1.0)
    e = tl.where(k == 4, dx[:, None], tl.where(k == 5, dy[:, None], tl.where(k == 6, dz[:, None], e)))
    return tl.where(k == 7, gx[:, None], tl.where(k == 8, gy[:, None], tl.where(k == 9, gz[:, None], e)))


@triton.jit
def softplus(z):
    """log(1 + exp(100 z)) / 100; exactly z where 100 z > 20. See SHARPNESS and THRESHOLD in sdf_reference.py."""
    value = tl.maximum(z, 0.0) + 0.01 * tl.log(1.0 + tl.exp(-100.0 * tl.abs(z)))
    return tl.where(100.0 * z > 20.0, z, value)


@triton.jit
def softplus_grads(x):
    """act' and act'' / act' where the softplus has value x."""
    decay = tl.exp(-100.0 * x)
    return 1.0 - decay, 100.0 * decay


@triton.jit
def activation_ptr(ptr, l, M: tl.constexpr, H: tl.constexpr):
    """Pointers [M, H] to where this program stores x_l."""
    return ptr + (l * M + tl.arange(0, M)[:, None]) * H + tl.arange(0, H)[None, :]


@triton.jit
def sdf_hidden(
    e, feature, mlp_ptr, scratch_ptr,
    STORE: tl.constexpr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Input of the last layer, [M, H]; with STORE, those of the layers before it are written to the scratch.

    The caller needs a `tl.debug_barrier` before the scratch is read, and one before it is overwritten.
    """
    STRIDE: tl.constexpr = C + H + INPUTS
    M: tl.constexpr = e.shape[0]
    x = tl.zeros((M, H), tl.float32)
    for l in range(LAYERS - 1):
        layer_ptr = mlp_ptr + l * H * STRIDE
        if STORE:
            tl.store(activation_ptr(scratch_ptr, l, M, H), x)
        z = linear(e, layer_ptr + C + H, STRIDE, tl.zeros((1, H), tl.float32), H, PREC)
        x = softplus(linear(x, layer_ptr, STRIDE, linear(feature, layer_ptr + H, STRIDE, z, H, PREC), H, PREC))
    return x


@triton.jit
def distance(x, feature, mlp_ptr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr):
    """The distance [M], from the last layer's input x: row 0 of that layer."""
    layer_ptr = mlp_ptr + (LAYERS - 1) * H * (C + H + INPUTS)
    sdf = tl.sum(x * load_row(layer_ptr, H), axis=1) + tl.sum(feature * load_row(layer_ptr + H, C), axis=1)
    return sdf + tl.load(layer_ptr + H + C + 3)  # the bias


@triton.jit
def geometry(x, feature, mlp_ptr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, PREC: tl.constexpr):
    """The geometry [M, H], from the last layer's input x: the rows from 1 on of that layer."""
    STRIDE: tl.constexpr = C + H + INPUTS
    layer_ptr = mlp_ptr + ((LAYERS - 1) * H + 1) * STRIDE
    bias = tl.load(layer_ptr + C + H + 3 + tl.arange(0, H) * STRIDE)[None, :]
    return linear(x, layer_ptr, STRIDE, linear(feature, layer_ptr + H, STRIDE, bias, H, PREC), H, PREC)


@triton.jit
def distance_bwd(
    x, mlp_ptr, scratch_ptr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """After `sdf_hidden` with STORE: derivatives of the distance w.r.t. the point at a fixed feature, three of [M], and
    w.r.t. the feature, [M, C]. x_hat, z_hat: w.r.t. x, z, as in `sdf_backward`."""
    STRIDE: tl.constexpr = C + H + INPUTS
    M: tl.constexpr = x.shape[0]
    layer_ptr = mlp_ptr + (LAYERS - 1) * H * STRIDE
    feature_hat = tl.broadcast_to(load_row(layer_ptr + H, C), (M, C))
    x_hat = tl.broadcast_to(load_row(layer_ptr, H), (M, H))
    z_hat = x_hat
    for i in range(LAYERS - 1):
        l = LAYERS - 2 - i
        layer_ptr = mlp_ptr + l * H * STRIDE
        z_hat = x_hat * softplus_grads(x)[0]
        feature_hat = linear_bwd_input(z_hat, layer_ptr + H, STRIDE, feature_hat, C, PREC)
        x_hat = linear_bwd_input(z_hat, layer_ptr, STRIDE, tl.zeros((1, H), tl.float32), H, PREC)
        x = tl.load(activation_ptr(scratch_ptr, l, M, H))
    # z_hat is now that of layer 0; columns of p in E_0
    ex = tl.load(mlp_ptr + C + H + tl.arange(0, H) * STRIDE)[None, :]
    ey = tl.load(mlp_ptr + C + H + 1 + tl.arange(0, H) * STRIDE)[None, :]
    ez = tl.load(mlp_ptr + C + H + 2 + tl.arange(0, H) * STRIDE)[None, :]
    return tl.sum(z_hat * ex, axis=1), tl.sum(z_hat * ey, axis=1), tl.sum(z_hat * ez, axis=1), feature_hat


@triton.jit
def rgb_hidden(
    e, feature, geo, mlp_ptr, scratch_ptr,
    STORE: tl.constexpr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """`sdf_hidden` for the color MLP."""
    STRIDE: tl.constexpr = C + 2 * H + INPUTS
    M: tl.constexpr = e.shape[0]
    x = tl.zeros((M, H), tl.float32)
    for l in range(LAYERS - 1):
        layer_ptr = mlp_ptr + l * H * STRIDE
        if STORE:
            tl.store(activation_ptr(scratch_ptr, l, M, H), x)
        z = linear(e, layer_ptr + C + 2 * H, STRIDE, tl.zeros((1, H), tl.float32), H, PREC)
        z = linear(geo, layer_ptr + C + H, STRIDE, linear(feature, layer_ptr + H, STRIDE, z, H, PREC), H, PREC)
        x = tl.maximum(linear(x, layer_ptr, STRIDE, z, H, PREC), 0.0)
    return x


@triton.jit
def color_of(
    x, e, feature, geo, mlp_ptr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """The color [M, COLORS] in [0, 1], from the last layer's input x; columns from 3 on are padding (0.5)."""
    STRIDE: tl.constexpr = C + 2 * H + INPUTS
    layer_ptr = mlp_ptr + (LAYERS - 1) * H * STRIDE
    z = linear(e, layer_ptr + C + 2 * H, STRIDE, tl.zeros((1, COLORS), tl.float32), COLORS, PREC)
    z = linear(geo, layer_ptr + C + H, STRIDE, linear(feature, layer_ptr + H, STRIDE, z, COLORS, PREC), COLORS, PREC)
    return 1.0 / (1.0 + tl.exp(-linear(x, layer_ptr, STRIDE, z, COLORS, PREC)))


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


@triton.jit
def ray_tile(edges_ptr, group, tile, R, S, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):
    """Samples [BLOCK_R * BLOCK_S] of a tile, ray by ray: ray and sample index, whether it exists, start and length.

    group: index of the BLOCK_R rays; tile: index of the BLOCK_S samples on them; sample index: of all R * S.
    """
    m = tl.arange(0, BLOCK_R * BLOCK_S).to(tl.int64)
    r = group * BLOCK_R + m // BLOCK_S
    s = tile * BLOCK_S + m % BLOCK_S
    ok = (r < R) & (s < S)
    edge_ptr = edges_ptr + r * (S + 1) + s
    start = tl.load(edge_ptr, mask=ok, other=0.0)
    return r, r * S + s, ok, start, tl.load(edge_ptr + 1, mask=ok, other=0.0) - start


@triton.jit
def load3(ptr, n, ok):
    x = tl.load(ptr + 3 * n, mask=ok, other=0.0)
    return x, tl.load(ptr + 3 * n + 1, mask=ok, other=0.0), tl.load(ptr + 3 * n + 2, mask=ok, other=0.0)


@triton.jit
def store3(ptr, n, v, ok):
    x, y, z = v
    tl.store(ptr + 3 * n, x, mask=ok)
    tl.store(ptr + 3 * n + 1, y, mask=ok)
    tl.store(ptr + 3 * n + 2, z, mask=ok)

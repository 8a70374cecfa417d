"""The neural field on a tile of samples, inside a kernel: what the kernels of `sdf_render` share.

Both MLPs see the point p and a conditioning vector c in every layer (UniPAD's decoders):

    x_0 = P p + q,   y_l = x_l + C_l c + d_l,   z_l = W_l y_l + b_l,   x_{l+1} = act(z_l)

with c = f, the interpolated feature, and a softplus for the distance; c = (direction, f, gradient, geometry) and a ReLU
for the colour. The last z of the first is the distance and the geometry vector.

The leaves of an MLP lie in one flat tensor, in the order P, q and then C_l, d_l, W_l, b_l of each layer, each row-major
[out, in] as `nn.Linear` has it. Widths are powers of two from 16 on: `packed` pads with zeros, which changes no result,
since a padded column meets a padded entry and a padded row is met by padded columns only.

Sizes: M samples a tile, C channels and H hidden units (padded), LAYERS of the MLP. PREC is `tl.dot`'s input precision.
"""

import torch
import torch.nn.functional as F

from kernels.backend import tl, triton
from kernels.trilinear import _corner

COLOURS = tl.constexpr(16)  # rows of the colour MLP's last layer: 3 and padding, as wide as a dot must be


def packed(mlp, parts, hidden, outputs):
    """One flat tensor of an MLP's leaves, padded; autograd cuts its gradient into theirs.

    mlp:     list of P, q, then C_l, d_l, W_l, b_l of each layer.
    parts:   list of (width, padded width) of the pieces of the conditioning vector.
    hidden:  padded width of the layers.
    outputs: padded width of the last one.
    """
    point, offset, *layers = mlp
    leaves = [_padded(point, hidden, 3), _padded(offset, hidden)]
    for i in range(0, len(layers), 4):
        C, d, W, b = layers[i : i + 4]
        rows = hidden if i + 4 < len(layers) else outputs
        if any(width != wide for width, wide in parts):
            pieces = C.split([width for width, _ in parts], dim=1)
            C = torch.cat([_padded(c, len(c), wide) for c, (_, wide) in zip(pieces, parts, strict=True)], dim=1)
        leaves += [_padded(C, hidden, C.shape[1]), _padded(d, hidden), _padded(W, rows, hidden), _padded(b, rows)]
    return torch.cat([leaf.reshape(-1) for leaf in leaves])


def _padded(t, *shape):
    pad = [n for have, want in zip(t.shape[::-1], shape[::-1], strict=True) for n in (0, want - have)]
    return F.pad(t, pad) if any(pad) else t


@triton.jit
def sample_on_ray(
    origins_ptr, directions_ptr, volume_idx_ptr, cells_per_unit_ptr, first_cell_ptr,  # [R, 3] x 2, [R], [3], [3]
    r, t, ok, Z,
):  # fmt: skip
    """Samples [M] of rays r at distances t: their points and directions, cell coordinates, first slices of volumes."""
    dx = tl.load(directions_ptr + 3 * r, mask=ok, other=0.0)
    dy = tl.load(directions_ptr + 3 * r + 1, mask=ok, other=0.0)
    dz = tl.load(directions_ptr + 3 * r + 2, mask=ok, other=0.0)
    px = tl.load(origins_ptr + 3 * r, mask=ok, other=0.0) + dx * t
    py = tl.load(origins_ptr + 3 * r + 1, mask=ok, other=0.0) + dy * t
    pz = tl.load(origins_ptr + 3 * r + 2, mask=ok, other=0.0) + dz * t
    ux = px * tl.load(cells_per_unit_ptr) + tl.load(first_cell_ptr)
    uy = py * tl.load(cells_per_unit_ptr + 1) + tl.load(first_cell_ptr + 1)
    uz = pz * tl.load(cells_per_unit_ptr + 2) + tl.load(first_cell_ptr + 2)
    first = tl.load(volume_idx_ptr + r, mask=ok, other=0).to(tl.int64) * Z
    return (px, py, pz), (dx, dy, dz), (ux, uy, uz, first)


@triton.jit
def corner(place, ok, Z, Y, X, K: tl.constexpr):
    """Corner K of the 8 around each place: its row in the volume, whether it is one, its share and three slopes."""
    ux, uy, uz, first = place
    z, z_ok, az, bz = _corner(uz, Z, K // 4)
    y, y_ok, ay, by = _corner(uy, Y, K // 2 % 2)
    x, x_ok, ax, bx = _corner(ux, X, K % 2)
    row = ((first + z) * Y + y) * X + x
    return row, ok & x_ok & y_ok & z_ok, az * ay * ax, az * ay * bx, az * by * ax, bz * ay * ax


@triton.jit
def rows_of(volume_ptr, row, ok, CHANNELS, C: tl.constexpr):
    """Features [M, C] of voxels; 0 where there is none and in padded channels."""
    c = tl.arange(0, C)[None, :]
    return tl.load(volume_ptr + row[:, None] * CHANNELS + c, mask=ok[:, None] & (c < CHANNELS), other=0.0)


@triton.jit
def interpolate(volume_ptr, place, ok, Z, Y, X, CHANNELS, C: tl.constexpr):
    """The feature [M, C] at each place."""
    feature = tl.zeros((place[0].shape[0], C), tl.float32)
    for k in tl.static_range(8):
        row, row_ok, share, _, _, _ = corner(place, ok, Z, Y, X, k)
        feature += share[:, None] * rows_of(volume_ptr, row, row_ok, CHANNELS, C)
    return feature


@triton.jit
def interpolate_along(volume_ptr, place, ok, vx, vy, vz, Z, Y, X, CHANNELS, C: tl.constexpr):
    """Derivative [M, C] of the feature along v, in cells."""
    feature = tl.zeros((vx.shape[0], C), tl.float32)
    for k in tl.static_range(8):
        row, row_ok, _, bx, by, bz = corner(place, ok, Z, Y, X, k)
        feature += (bx * vx + by * vy + bz * vz)[:, None] * rows_of(volume_ptr, row, row_ok, CHANNELS, C)
    return feature


@triton.jit
def slope_against(volume_ptr, place, ok, d_feature, Z, Y, X, CHANNELS, C: tl.constexpr):
    """Gradient, per cell, of d_feature [M, C] . feature by the place: three of [M]."""
    gx = tl.zeros((d_feature.shape[0],), tl.float32)
    gy, gz = gx, gx
    for k in tl.static_range(8):
        row, row_ok, _, bx, by, bz = corner(place, ok, Z, Y, X, k)
        along = tl.sum(rows_of(volume_ptr, row, row_ok, CHANNELS, C) * d_feature, axis=1)
        gx += bx * along
        gy += by * along
        gz += bz * along
    return gx, gy, gz


@triton.jit
def vector(ptr, N: tl.constexpr, stride=1):
    """[1, N]."""
    return tl.load(ptr + stride * tl.arange(0, N))[None, :]


@triton.jit
def times(x, ptr, stride, out, N: tl.constexpr, PREC: tl.constexpr):
    """out [M, N] + x [M, K] W^T, where W [N, K] has rows `stride` apart."""
    k = tl.arange(0, x.shape[1])[:, None]
    w = tl.load(ptr + tl.arange(0, N)[None, :] * stride + k)
    return tl.dot(x, w, tl.broadcast_to(out, (x.shape[0], N)), input_precision=PREC)


@triton.jit
def times_back(d_z, ptr, stride, out, K: tl.constexpr, PREC: tl.constexpr):
    """out [M, K] + d_z [M, N] W, where W [N, K] has rows `stride` apart."""
    n = tl.arange(0, d_z.shape[1])[:, None]
    w = tl.load(ptr + n * stride + tl.arange(0, K)[None, :])
    return tl.dot(d_z, w, tl.broadcast_to(out, (d_z.shape[0], K)), input_precision=PREC)


@triton.jit
def along_point(v, ptr, H: tl.constexpr):
    """P v, [M, H]."""
    vx, vy, vz = v
    x = vx[:, None] * vector(ptr, H, 3)
    x += vy[:, None] * vector(ptr + 1, H, 3)
    return x + vz[:, None] * vector(ptr + 2, H, 3)


@triton.jit
def against_point(d_x, ptr, H: tl.constexpr, stride=3):
    """P^T d_x, three of [M]."""
    gx = tl.sum(d_x * vector(ptr, H, stride), axis=1)
    gy = tl.sum(d_x * vector(ptr + 1, H, stride), axis=1)
    return gx, gy, tl.sum(d_x * vector(ptr + 2, H, stride), axis=1)


@triton.jit
def softplus(z):
    """log(1 + exp(100 z)) / 100 and its slope; beyond torch's threshold exactly z and 1."""
    decay = tl.exp(-100.0 * tl.abs(z))
    linear = 100.0 * z > 20.0
    slope = tl.where(z < 0, decay, 1.0) / (1.0 + decay)
    return tl.where(linear, z, tl.maximum(z, 0.0) + 0.01 * tl.log(1.0 + decay)), tl.where(linear, 1.0, slope)


@triton.jit
def sdf_layers(point, feature, mlp_ptr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, PREC: tl.constexpr):
    """y_l of all layers and the slopes of the activations between them, two tuples of [M, H]."""
    x = along_point(point, mlp_ptr, H) + vector(mlp_ptr + 3 * H, H)
    ys = ()
    slopes = ()
    for l in tl.static_range(LAYERS):
        at = mlp_ptr + 4 * H + l * (C + H + 2) * H
        y = times(feature, at, C, x + vector(at + C * H, H), H, PREC)
        ys = ys + (y,)
        if l < LAYERS - 1:
            z = times(y, at + (C + 1) * H, H, vector(at + (C + 1 + H) * H, H), H, PREC)
            x, slope = softplus(z)
            slopes = slopes + (slope,)
    return ys, slopes


@triton.jit
def distance(y, mlp_ptr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr):
    """[M] from the last y."""
    last = mlp_ptr + 4 * H + (LAYERS - 1) * (C + H + 2) * H + (C + 1) * H  # W of the last layer
    return tl.sum(y * vector(last, H), axis=1) + tl.load(last + (1 + H) * H)


@triton.jit
def geometry(y, mlp_ptr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, PREC: tl.constexpr):
    """[M, H] from the last y."""
    last = mlp_ptr + 4 * H + (LAYERS - 1) * (C + H + 2) * H + (C + 1) * H
    return times(y, last + H, H, vector(last + (1 + H) * H + 1, H), H, PREC)


@triton.jit
def distance_back(slopes, mlp_ptr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, PREC: tl.constexpr):
    """d distance / d y_0 [M, H] and d distance / d feature [M, C]."""
    at = mlp_ptr + 4 * H + (LAYERS - 1) * (C + H + 2) * H
    d_y = tl.broadcast_to(vector(at + (C + 1) * H, H), (slopes[0].shape[0], H))
    d_feature = times_back(d_y, at, C, tl.zeros((1, C), tl.float32), C, PREC)
    for i in tl.static_range(LAYERS - 1):
        at = mlp_ptr + 4 * H + (LAYERS - 2 - i) * (C + H + 2) * H
        d_z = d_y * slopes[LAYERS - 2 - i]
        d_y = times_back(d_z, at + (C + 1) * H, H, tl.zeros((1, H), tl.float32), H, PREC)
        d_feature = times_back(d_y, at, C, d_feature, C, PREC)
    return d_y, d_feature


@triton.jit
def rgb_layers(
    point, direction, feature, gradient, geo, mlp_ptr,
    C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """y_l of all layers, a tuple of [M, H]; which units of the layers between are on; the colour [M, COLOURS]."""
    IN: tl.constexpr = C + H + 6
    dx, dy, dz = direction
    gx, gy, gz = gradient
    x = along_point(point, mlp_ptr, H) + vector(mlp_ptr + 3 * H, H)
    ys = ()
    on = ()
    z = tl.zeros((dx.shape[0], COLOURS), tl.float32)
    for l in tl.static_range(LAYERS):
        at = mlp_ptr + 4 * H + l * (IN + H + 2) * H
        y = x + vector(at + IN * H, H)
        y += dx[:, None] * vector(at, H, IN) + dy[:, None] * vector(at + 1, H, IN) + dz[:, None] * vector(at + 2, H, IN)
        to = at + 3 + C
        y += gx[:, None] * vector(to, H, IN) + gy[:, None] * vector(to + 1, H, IN) + gz[:, None] * vector(to + 2, H, IN)
        y = times(feature, at + 3, IN, y, H, PREC)
        y = times(geo, to + 3, IN, y, H, PREC)
        ys = ys + (y,)
        w = at + (IN + 1) * H
        if l < LAYERS - 1:
            x = times(y, w, H, vector(w + H * H, H), H, PREC)
            on = on + (x > 0,)
            x = tl.maximum(x, 0.0)
        else:
            z = times(y, w, H, vector(w + COLOURS * H, COLOURS), COLOURS, PREC)
    return ys, on, 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def add_matrix(ptr, stride, value):
    """Add value [N, K] to a matrix that this program alone writes."""
    at = ptr + tl.arange(0, value.shape[0])[:, None] * stride + tl.arange(0, value.shape[1])[None, :]
    tl.store(at, tl.load(at) + value)


@triton.jit
def add_vector(ptr, value, stride=1):
    """Add value [N] to entries `stride` apart that this program alone writes."""
    at = ptr + tl.arange(0, value.shape[0]) * stride
    tl.store(at, tl.load(at) + value)


@triton.jit
def add_points(ptr, d_x, v, stride):
    """Add the gradient d_x^T v to the three columns of P [H, 3], or of C_l, that v [M] x 3 entered by."""
    vx, vy, vz = v
    add_vector(ptr, tl.sum(d_x * vx[:, None], axis=0), stride)
    add_vector(ptr + 1, tl.sum(d_x * vy[:, None], axis=0), stride)
    add_vector(ptr + 2, tl.sum(d_x * vz[:, None], axis=0), stride)


@triton.jit
def outer(a, b, out, PREC: tl.constexpr):
    """out + a^T b: [M, N], [M, K] -> [N, K]."""
    return tl.dot(tl.trans(a), b, out, input_precision=PREC)

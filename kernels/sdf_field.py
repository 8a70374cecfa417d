"""The neural field on a tile of samples, inside a kernel: what the kernels of `sdf_render` share.

Both MLPs (UniPAD's decoders) see the point p and a conditioning vector c in every layer. Multiplied out,

    z_l = W_l x_l + A_l f + G_l geometry + E_l e,   x_{l+1} = act(z_l),   x_0 = 0,   e = (p, 1, direction, gradient)

where f is the interpolated feature; the softplus MLP of the distance has no G and of e only (p, 1), the ReLU MLP of the
colour has all. The last z of the first is (distance, geometry). Softplus keeps its slope in its value:
act'(z) = 1 - exp(-100 act(z)), so no second array of activations is held.

An MLP lies in one matrix [rows, line]: a row an output unit, layer after layer; in it the columns of W, A, G and E.
Widths are powers of two from 16 on. `packed` pads with zeros, which changes no result: a padded row is met by padded
columns only.

Sizes: M samples a tile, C channels and H hidden units (padded), LAYERS of the MLP. PREC is `tl.dot`'s input precision.
"""

import torch
import torch.nn.functional as F

from kernels.backend import tl, triton
from kernels.trilinear import _corner, _four_weights, trilinear_value_ref

COLOURS = tl.constexpr(16)  # rows of the colour MLP's last layer: 3 and padding, as many as a dot must have
SEEN = tl.constexpr(16)  # columns of E: p 3, 1, direction 3, gradient 3 and padding


def folded(mlp):
    """An MLP's matrices multiplied out.

    mlp: list of P [H, 3], q [H], then C_l [H, K], d_l [H], W_l [n_l, H], b_l [n_l] of each layer, at least two, of
         x_0 = P p + q,  z_l = W_l (x_l + C_l c + d_l) + b_l.

    Returns W_l C_l [sum n_l, K], the biases [sum n_l], W_0 P [H, 3], and the list of W_l.
    """
    point, offset, *layers = mlp
    C, d, W, b = (layers[i::4] for i in range(4))
    inner = torch.stack(W[:-1])  # [L - 1, H, H]
    A = torch.cat([torch.bmm(inner, torch.stack(C[:-1])).flatten(0, 1), W[-1] @ C[-1]])
    offsets, biases = torch.stack([d[0] + offset, *d[1:-1]])[..., None], torch.stack(b[:-1])[..., None]
    bias = torch.cat([torch.baddbmm(biases, inner, offsets).flatten(), torch.addmv(b[-1], W[-1], d[-1])])
    return A, bias, W[0] @ point, W


def packed(mlp, channels, rgb):
    """An MLP as one matrix for the kernels, [rows, line]; autograd takes its gradient apart.

    mlp: as for `folded`; of the colour if `rgb`, with conditioning vector (direction, feature, gradient, geometry).
    """
    A, bias, P, W = folded(mlp)
    hidden, zeros = len(P), A.new_zeros(len(A), SEEN.value)
    C, H = padded(channels), padded(hidden)
    pieces = A.split([3, channels, 3, hidden] if rgb else [channels], dim=1)
    direction, feature, gradient, geometry = pieces if rgb else (zeros[:, :3], *pieces, zeros[:, :3], zeros[:, :0])
    columns = [
        F.pad(torch.cat(W[1:]), (0, H - hidden, hidden, 0)),
        F.pad(feature, (0, C - channels)) if C > channels else feature,
        F.pad(geometry, (0, H - hidden)) if rgb and H > hidden else geometry,
        F.pad(P, (0, 0, 0, len(A) - hidden)), bias[:, None], direction, gradient, zeros[:, :6],
    ]  # fmt: skip
    out = torch.cat(columns, dim=1)
    if H > hidden:
        layers = out.split([hidden] * (len(W) - 1) + [len(W[-1])])
        out = torch.cat([F.pad(layer, (0, 0, 0, H - hidden)) for layer in layers])
    return F.pad(out, (0, 0, 0, COLOURS.value - 3 - (H - hidden))) if rgb else out


def padded(width):
    """The width that kernels take for `width`."""
    return max(16, triton.next_power_of_2(width))


def field_ref(volume, points, directions, volume_idx, mlps, cells):
    """Distance [R, S], its gradient [R, S, 3] and colour [R, S, 3] (0 without the colour's MLP) at points [R, S, 3].

    Analytic, as the kernels are: nothing is differentiated twice. Differentiable once in `volume` and the MLPs.
    """
    sdf, rgb = (None if mlp is None else folded(mlp) for mlp in mlps)
    flat = [(*m[:3], *m[3]) for m in (sdf, rgb) if m is not None]
    geometry = points, directions, volume_idx, *cells
    return FieldRef.apply(volume, geometry, len(flat[0]), *(t for m in flat for t in m))


def values_ref(volume, points, volume_idx, sdf_mlp, cells):
    """The distance alone, [R, S] at points [R, S, 3]; not differentiable."""
    A, bias, P, W = folded(sdf_mlp)
    cells_per_unit, first_cell = cells
    feature = trilinear_value_ref(volume, points * cells_per_unit + first_cell, volume_idx).flatten(0, 1).t()
    widths = [*(len(w) for w in W[:-1]), 1]
    rows = sum(widths)  # of the last layer, only the distance
    z, *inner = torch.addmm(bias[:rows, None], A[:rows], feature).split(widths)
    z = torch.addmm(z, P, points.flatten(0, 1).t())
    for w, a in zip((*W[1:-1], W[-1][:1]), inner, strict=True):
        z = torch.addmm(a, w, _softplus(z))
    return z.view(points.shape[:2])


class FieldRef(torch.autograd.Function):
    """Samples are the columns of every matrix; hats and dots as in `sdf_render`."""

    @staticmethod
    def forward(ctx, volume, geometry, n_sdf, *mlps):
        points, directions, volume_idx, cells_per_unit, first_cell = geometry
        (R, S, _), (A, bias, P, *W) = points.shape, mlps[:n_sdf]
        rows, weights = _four_weights(volume, points * cells_per_unit + first_cell, volume_idx)
        corners = volume.flatten(0, 3).index_select(0, rows.flatten()).unflatten(0, rows.shape)  # [N, 8, C]
        feature, *slopes = torch.bmm(weights, corners).unbind(1)  # slopes: by the cell, [N, C] each
        feature = feature.t().contiguous()  # [C, N]
        point = points.flatten(0, 1).t()  # [3, N]

        widths = [len(w) for w in W]
        z, *inner = torch.addmm(bias[:, None], A, feature).split(widths)
        z = torch.addmm(z, P, point)
        xs = []
        for w, a in zip(W[1:], inner, strict=True):
            xs.append(_softplus(z))
            z = torch.addmm(a, w, xs[-1])
        decays = [torch.exp(-100 * x) for x in xs]  # 1 - act'
        inner_rows = len(A) - widths[-1]
        hats = A.new_empty(inner_rows, R * S)
        hat = hats.split(widths[:-1])
        torch.addcmul(W[-1][0][:, None], W[-1][0][:, None], decays[-1], value=-1, out=hat[-1])  # z^
        for l in range(len(xs) - 2, -1, -1):
            torch.mm(W[l + 1].t(), hat[l + 1], out=hat[l])
            hat[l].addcmul_(hat[l], decays[l], value=-1)
        hat_feature = torch.addmm(A[inner_rows][:, None], A[:inner_rows].t(), hats)  # [C, N]
        gradient = torch.stack([(s * hat_feature.t()).sum(1) for s in slopes]) * cells_per_unit[:, None]
        gradient.addmm_(P.t(), hat[0])  # [3, N]

        rgb_xs, rgb = [], points.new_zeros(3, R * S)
        if mlps[n_sdf:]:
            A, bias, P, *W = mlps[n_sdf:]
            along, *others = A.split([3, len(feature), 3, len(z) - 1], dim=1)
            y = torch.addmm(bias[:, None], others[0], feature)
            y.addmm_(others[1], gradient).addmm_(others[2], z[1:])
            y.view(-1, R, S).add_((along @ directions.t())[..., None])
            y, *inner = y.split([len(w) for w in W])
            y = torch.addmm(y, P, point)
            for w, a in zip(W[1:], inner, strict=True):
                rgb_xs.append(y.relu_())
                y = torch.addmm(a, w, rgb_xs[-1])
            rgb = y.sigmoid_()
        ctx.save_for_backward(
            volume, point, directions, rows, weights, cells_per_unit, feature, hats, hat_feature, *mlps
        )
        ctx.rgb, ctx.seen = rgb, (feature, gradient, z[1:])
        ctx.slopes, ctx.xs, ctx.decays, ctx.rgb_xs, ctx.n_sdf = slopes, xs, decays, rgb_xs, n_sdf
        return z[0].view(R, S), gradient.t().reshape(R, S, 3), rgb.t().reshape(R, S, 3)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_sdf, d_gradient, d_rgb):
        volume, point, directions, rows, weights, per_unit, feature, hats, hat_feature, *mlps = ctx.saved_tensors
        N, C = len(rows), len(feature)
        v = d_gradient.reshape(N, 3).t()
        d_z, d_feature, d_rgb_mlp = d_sdf.reshape(1, N), 0, []
        A, bias, P, *W = mlps[: ctx.n_sdf]
        if mlps[ctx.n_sdf :]:
            B, _, Q, *U = mlps[ctx.n_sdf :]
            d_y = [d_rgb.reshape(N, 3).t() * ctx.rgb * (1 - ctx.rgb)]
            for u, x in zip(U[:0:-1], ctx.rgb_xs[::-1], strict=True):
                d_y.append((u.t() @ d_y[-1]) * (x > 0))
            d_y = d_y[::-1]
            d_U = [d @ x.t() for d, x in zip(d_y[1:], ctx.rgb_xs, strict=True)]
            d_Q = d_y[0] @ point.t()
            d_y = torch.cat(d_y)
            d_along = d_y.view(len(d_y), len(directions), -1).sum(2) @ directions
            d_B = torch.cat([d_along, *(d_y @ part.t() for part in ctx.seen)], dim=1)
            d_rgb_mlp = [d_B, d_y.sum(1), d_Q, None, *d_U]
            d_feature, d_g, d_geometry = (part.t() @ d_y for part in B[:, 3:].split([C, 3, len(W[-1]) - 1], dim=1))
            v = v + d_g
            d_z = torch.cat([d_z, d_geometry])
        else:
            d_z = torch.cat([d_z, d_z.new_zeros(len(W[-1]) - 1, N)])

        v_cells = per_unit[:, None] * v
        f_dot = sum(s * x[:, None] for s, x in zip(ctx.slopes, v_cells, strict=True)).t()  # [C, N]
        widths = [len(w) for w in W]
        z_dot, *inner = (A[: -widths[-1]] @ f_dot).split(widths[:-1])
        z_dots, x_dots = [torch.addmm(z_dot, P, v)], []
        for l, decay in enumerate(ctx.decays):
            x_dots.append(torch.addcmul(z_dots[l], z_dots[l], decay, value=-1))
            if l < len(inner):
                z_dots.append(torch.addmm(inner[l], W[l + 1], x_dots[l]))

        d_zs, hat = [d_z], hats.split(widths[:-1])
        for l in range(len(W) - 2, -1, -1):
            d_x, decay = W[l + 1].t() @ d_zs[-1], ctx.decays[l]
            d_x = torch.addcmul(d_x, d_x, decay, value=-1)
            d_zs.append(d_x.addcmul_(hat[l] * decay, z_dots[l], value=100))
        d_zs = d_zs[::-1]
        d_W = [d @ x.t() for d, x in zip(d_zs[1:], ctx.xs, strict=True)]
        for d, h, x_dot in zip(d_W, hat[1:], x_dots, strict=False):
            d.addmm_(h, x_dot.t())
        d_W[-1][0] += x_dots[-1].sum(1)
        d_P = d_zs[0] @ point.t() + hat[0] @ v.t()
        d_zs = torch.cat(d_zs)
        d_A = d_zs @ feature.t()
        d_A[: len(hats)].addmm_(hats, f_dot.t())
        d_A[len(hats)] += f_dot.sum(1)
        d_feature = A.t() @ d_zs + d_feature

        along = (weights[:, 1:] * v_cells.t()[..., None]).sum(1)  # [N, 8], b . v of the corners
        both = torch.stack([d_feature.t(), hat_feature.t()], dim=1)  # [N, 2, C]
        d_corners = torch.bmm(torch.stack([weights[:, 0], along], dim=2), both)  # [N, 8, C]
        d_volume = torch.zeros_like(volume)
        d_volume.flatten(0, 3).index_add_(0, rows.flatten(), d_corners.flatten(0, 1))
        return d_volume, None, None, d_A, d_zs.sum(1), d_P, None, *d_W, *d_rgb_mlp


def _softplus(z):
    """As `softplus`, in torch."""
    x = F.threshold(-100 * z, -20, -80).clamp_(max=80)  # 80 stands for infinity: the value is exactly z
    return z.relu().sub_(x.abs_().sigmoid_().log_(), alpha=0.01)


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
    for k in range(8):
        row, row_ok, share, _, _, _ = corner(place, ok, Z, Y, X, k)
        feature += share[:, None] * rows_of(volume_ptr, row, row_ok, CHANNELS, C)
    return feature


@triton.jit
def interpolate_along(volume_ptr, place, ok, vx, vy, vz, Z, Y, X, CHANNELS, C: tl.constexpr):
    """Derivative [M, C] of the feature along v, in cells."""
    feature = tl.zeros((vx.shape[0], C), tl.float32)
    for k in range(8):
        row, row_ok, _, bx, by, bz = corner(place, ok, Z, Y, X, k)
        feature += (bx * vx + by * vy + bz * vz)[:, None] * rows_of(volume_ptr, row, row_ok, CHANNELS, C)
    return feature


@triton.jit
def slope_against(volume_ptr, place, ok, d_feature, Z, Y, X, CHANNELS, C: tl.constexpr):
    """Gradient, per cell, of d_feature [M, C] . feature by the place: three of [M]."""
    gx = tl.zeros((d_feature.shape[0],), tl.float32)
    gy, gz = gx, gx
    for k in range(8):
        row, row_ok, _, bx, by, bz = corner(place, ok, Z, Y, X, k)
        along = tl.sum(rows_of(volume_ptr, row, row_ok, CHANNELS, C) * d_feature, axis=1)
        gx += bx * along
        gy += by * along
        gz += bz * along
    return gx, gy, gz


@triton.jit
def vector(ptr, N: tl.constexpr):
    """[1, N]."""
    return tl.load(ptr + tl.arange(0, N))[None, :]


@triton.jit
def times(x, ptr, LINE: tl.constexpr, out, N: tl.constexpr, PREC: tl.constexpr):
    """out [M, N] + x [M, K] W^T, where W [N, K] are columns of a packed MLP."""
    k = tl.arange(0, x.shape[1])[:, None]
    w = tl.load(ptr + tl.arange(0, N)[None, :] * LINE + k)
    return tl.dot(x, w, tl.broadcast_to(out, (x.shape[0], N)), input_precision=PREC)


@triton.jit
def times_back(d_z, ptr, LINE: tl.constexpr, out, K: tl.constexpr, PREC: tl.constexpr):
    """out [M, K] + d_z [M, N] W, where W [N, K] are columns of a packed MLP."""
    n = tl.arange(0, d_z.shape[1])[:, None]
    w = tl.load(ptr + n * LINE + tl.arange(0, K)[None, :])
    return tl.dot(d_z, w, tl.broadcast_to(out, (d_z.shape[0], K)), input_precision=PREC)


@triton.jit
def add_outer(ptr, LINE: tl.constexpr, a, b, out, PREC: tl.constexpr):
    """Add out + a^T b ([M, N], [M, K] -> [N, K]) to columns of a packed gradient that this program alone writes."""
    out = tl.dot(tl.trans(a), b, out, input_precision=PREC)
    at = ptr + tl.arange(0, out.shape[0])[:, None] * LINE + tl.arange(0, out.shape[1])[None, :]
    tl.store(at, tl.load(at) + out)


@triton.jit
def add_row(ptr, value):
    """Add value [K] to a row of a packed gradient that this program alone writes."""
    at = ptr + tl.arange(0, value.shape[0])
    tl.store(at, tl.load(at) + value)


@triton.jit
def columns(a, at: tl.constexpr):
    """Columns at, at + 1 and at + 2 of [M, K], three of [M]."""
    k = tl.arange(0, a.shape[1])[None, :]
    x = tl.sum(tl.where(k == at, a, 0.0), axis=1)
    y = tl.sum(tl.where(k == at + 1, a, 0.0), axis=1)
    return x, y, tl.sum(tl.where(k == at + 2, a, 0.0), axis=1)


@triton.jit
def seen_by_sdf(point, one):
    """e [M, SEEN] of the distance's MLP; its tangent along `point` with one = 0."""
    k = tl.arange(0, SEEN)[None, :]
    x, y, z = point
    e = tl.where(k == 0, x[:, None], tl.where(k == 1, y[:, None], tl.where(k == 2, z[:, None], 0.0)))
    return tl.where(k == 3, one, e)


@triton.jit
def seen_by_rgb(point, direction, gradient):
    """e [M, SEEN] of the colour's MLP."""
    k = tl.arange(0, SEEN)[None, :]
    dx, dy, dz = direction
    gx, gy, gz = gradient
    e = seen_by_sdf(point, 1.0)
    e = tl.where(k == 4, dx[:, None], tl.where(k == 5, dy[:, None], tl.where(k == 6, dz[:, None], e)))
    return tl.where(k == 7, gx[:, None], tl.where(k == 8, gy[:, None], tl.where(k == 9, gz[:, None], e)))


@triton.jit
def softplus(z):
    """log(1 + exp(100 z)) / 100; beyond torch's threshold exactly z."""
    value = tl.maximum(z, 0.0) + 0.01 * tl.log(1.0 + tl.exp(-100.0 * tl.abs(z)))
    return tl.where(100.0 * z > 20.0, z, value)


@triton.jit
def bent(x):
    """act' and act'' / act' of the softplus where its value is x."""
    decay = tl.exp(-100.0 * x)
    return 1.0 - decay, 100.0 * decay


@triton.jit
def kept(ptr, l, M: tl.constexpr, H: tl.constexpr):
    """Where this program keeps x_l, [M, H]."""
    return ptr + (l * M + tl.arange(0, M)[:, None]) * H + tl.arange(0, H)[None, :]


@triton.jit
def sdf_hidden(
    e, feature, mlp_ptr, keep_ptr,
    KEEP: tl.constexpr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """What the last layer is given, [M, H]; KEEP: what each layer before it was given stays at `kept`."""
    LINE: tl.constexpr = C + H + SEEN
    M: tl.constexpr = e.shape[0]
    x = tl.zeros((M, H), tl.float32)
    for l in range(LAYERS - 1):
        at = mlp_ptr + l * H * LINE
        if KEEP:
            tl.store(kept(keep_ptr, l, M, H), x)
        z = times(e, at + C + H, LINE, tl.zeros((1, H), tl.float32), H, PREC)
        x = softplus(times(x, at, LINE, times(feature, at + H, LINE, z, H, PREC), H, PREC))
    return x


@triton.jit
def distance(x, feature, mlp_ptr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr):
    """[M] from the last x."""
    at = mlp_ptr + (LAYERS - 1) * H * (C + H + SEEN)
    sdf = tl.sum(x * vector(at, H), axis=1) + tl.sum(feature * vector(at + H, C), axis=1)
    return sdf + tl.load(at + H + C + 3)


@triton.jit
def geometry(x, feature, mlp_ptr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, PREC: tl.constexpr):
    """[M, H] from the last x."""
    LINE: tl.constexpr = C + H + SEEN
    at = mlp_ptr + ((LAYERS - 1) * H + 1) * LINE
    bias = tl.load(at + C + H + 3 + tl.arange(0, H) * LINE)[None, :]
    return times(x, at, LINE, times(feature, at + H, LINE, bias, H, PREC), H, PREC)


@triton.jit
def distance_back(
    x, mlp_ptr, keep_ptr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """After `sdf_hidden`: the distance's direct derivative by the point, three of [M], and by the feature [M, C]."""
    LINE: tl.constexpr = C + H + SEEN
    M: tl.constexpr = x.shape[0]
    at = mlp_ptr + (LAYERS - 1) * H * LINE
    d_feature = tl.broadcast_to(vector(at + H, C), (M, C))
    d_x = tl.broadcast_to(vector(at, H), (M, H))
    d_z = d_x
    for i in range(LAYERS - 1):
        l = LAYERS - 2 - i
        at = mlp_ptr + l * H * LINE
        d_z = d_x * bent(x)[0]
        d_feature = times_back(d_z, at + H, LINE, d_feature, C, PREC)
        d_x = times_back(d_z, at, LINE, tl.zeros((1, H), tl.float32), H, PREC)
        x = tl.load(kept(keep_ptr, l, M, H))
    px = tl.load(mlp_ptr + C + H + tl.arange(0, H) * LINE)[None, :]
    py = tl.load(mlp_ptr + C + H + 1 + tl.arange(0, H) * LINE)[None, :]
    pz = tl.load(mlp_ptr + C + H + 2 + tl.arange(0, H) * LINE)[None, :]
    return (tl.sum(d_z * px, axis=1), tl.sum(d_z * py, axis=1), tl.sum(d_z * pz, axis=1)), d_feature


@triton.jit
def rgb_hidden(
    e, feature, geo, mlp_ptr, keep_ptr,
    KEEP: tl.constexpr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """As `sdf_hidden`, of the colour's MLP."""
    LINE: tl.constexpr = C + 2 * H + SEEN
    M: tl.constexpr = e.shape[0]
    x = tl.zeros((M, H), tl.float32)
    for l in range(LAYERS - 1):
        at = mlp_ptr + l * H * LINE
        if KEEP:
            tl.store(kept(keep_ptr, l, M, H), x)
        z = times(e, at + C + 2 * H, LINE, tl.zeros((1, H), tl.float32), H, PREC)
        z = times(geo, at + C + H, LINE, times(feature, at + H, LINE, z, H, PREC), H, PREC)
        x = tl.maximum(times(x, at, LINE, z, H, PREC), 0.0)
    return x


@triton.jit
def colour_of(
    x, e, feature, geo, mlp_ptr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """[M, COLOURS] in [0, 1] from the last x."""
    LINE: tl.constexpr = C + 2 * H + SEEN
    at = mlp_ptr + (LAYERS - 1) * H * LINE
    z = times(e, at + C + 2 * H, LINE, tl.zeros((1, COLOURS), tl.float32), COLOURS, PREC)
    z = times(geo, at + C + H, LINE, times(feature, at + H, LINE, z, COLOURS, PREC), COLOURS, PREC)
    return 1.0 / (1.0 + tl.exp(-times(x, at, LINE, z, COLOURS, PREC)))

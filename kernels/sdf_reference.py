"""The neural field in plain PyTorch, with the gradient of the distance and all of its derivatives written out.

Formulas and names as in `sdf_render`: hats belong to the reverse pass that gives the gradient, dots to derivatives
along v = dL/dgradient. Samples are the columns of every matrix: the rows of one layer are then contiguous.

On a CPU this takes as long as the composed pieces (`unipad.model.field`), which autograd differentiates: 1.3 times at
384 rays x 56 samples, 0.9 to 1.15 times at 512 to 3072 x 96 (one thread). So CPUs keep the pieces, and this is what
the kernels answer to and what shows that nothing needs to be differentiated twice.
"""

import torch
import torch.nn.functional as F

from unipad.kernels.trilinear import _four_weights, trilinear_value_ref


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


def field_ref(volume, points, directions, volume_idx, mlps, cells):
    """Distance [R, S], its gradient [R, S, 3] and color [R, S, 3] (0 without the color's MLP) at points [R, S, 3].

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

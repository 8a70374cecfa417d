"""The neural field of `sdf_render` in plain PyTorch: a feature at a point -> signed distance, its gradient, color.

Training on a CPU uses it, and the kernels are compared with it. Both MLPs get the point p and, in every layer, a
conditioning vector c:

    x_0 = P p + q,   z_l = W_l (x_l + C_l c + d_l) + b_l,   x_{l+1} = act(z_l)

W_l C_l (stacked: A), W_0 P and the biases are multiplied out once per call, so that one GEMM A c serves all layers:

    z_0 = A_0 c + W_0 P p,   z_l = A_l c + W_l x_l      (biases likewise)

act is the softplus in the distance MLP, ReLU in the color MLP. The distance MLP has c = f, the interpolated feature,
and its last z is (distance, geometry [H]); the color MLP has c = (direction, f, gradient, geometry). The gradient of
the distance is a reverse pass written in ordinary torch operations, with z^_l = d sdf / d z_l and L layers:

    z^_{L-1} = (1, 0, ...),   z^_{l-1} = act'(z_{l-1}) * (W_l^T z^_l)
    d sdf / d f = sum_l A_l^T z^_l,   gradient = (W_0 P)^T z^_0 + sum_i (d sdf / d f_i) (d f_i / d p)

so first-order autograd trains through it: no double backward. Samples are the columns of x, z and z^: the rows of A c
that belong to one layer are then contiguous. An MLP is a list of tensors: P [H, 3], q [H], then C_l [H, K], d_l [H],
W_l [n_l, H], b_l [n_l] of each layer, at least two layers. H hidden units, K entries of c; n_l = H but in the last
layer.
"""

import torch
import torch.nn.functional as F

from unipad.kernels.trilinear import trilinear_ref, trilinear_value_ref

SHARPNESS = 100.0  # beta of the softplus; IDR's value, kept by VolSDF, NeuS and UniPAD
THRESHOLD = 20.0  # the softplus is the identity where SHARPNESS * z exceeds this, as in torch


def field_ref(volume, points, directions, volume_idx, mlps, cells):
    """Distance [R, S], its gradient [R, S, 3] and color [R, S, 3] at points [R, S, 3]; the rest as in `sdf_render`."""
    cells_per_unit, cell_offset = cells
    feature, slope = trilinear_ref(volume, points * cells_per_unit + cell_offset, volume_idx)
    return decode(feature, slope, points, directions, mlps, cells_per_unit)


@torch.no_grad()
def values_ref(volume, points, volume_idx, sdf_mlp, cells):
    """Signed distance [R, S] at points [R, S, 3]; not differentiable."""
    cells_per_unit, cell_offset = cells
    feature = trilinear_value_ref(volume, points * cells_per_unit + cell_offset, volume_idx)
    return decode_sdf(feature, points, sdf_mlp)


def decode(feature, slope, points, directions, mlps, cells_per_unit):
    """The field from the interpolated volume.

    Args:
        feature:        [R, S, C] the volume at the points.
        slope:          [R, S, 3, C] its derivative w.r.t. the grid coordinates (x, y, z).
        points:         [R, S, 3]; not differentiated.
        directions:     [R, 3] unit vectors.
        mlps:           (distance MLP, color MLP or None: the color is 0).
        cells_per_unit: [3].

    Returns:
        sdf:      [R, S].
        gradient: [R, S, 3] d sdf / d point.
        rgb:      [R, S, 3] in [0, 1].

    Differentiable once w.r.t. `feature`, `slope` and the MLPs.
    """
    (R, S, _), (sdf_mlp, rgb_mlp) = points.shape, mlps
    feature, slope = feature.flatten(0, 1), slope.flatten(0, 1)  # [N, C], [N, 3, C] with N = R * S
    points = points.flatten(0, 1).t()  # [3, N]

    A, bias, WP, W = fold(sdf_mlp)
    widths = [len(w) for w in W]
    # A_l f and the biases, by layer
    first, *inner, last = torch.addmm(bias, A, feature.t()).split(widths)
    x, act_grad = Softplus.apply(torch.addmm(first, WP, points))
    act_grads = [act_grad]
    for w, a in zip(W[1:-1], inner, strict=True):
        x, act_grad = Softplus.apply(torch.addmm(a, w, x))
        act_grads.append(act_grad)
    last = torch.addmm(last, W[-1], x)
    sdf, geometry = last[0], last[1:]

    # z^ of the layers before the last, backwards; row 0 of W_{L-1} is W_{L-1}^T (1, 0, ...)
    z_hat = [W[-1][0][:, None] * act_grads.pop()]
    for w in W[-2:0:-1]:
        z_hat.append((w.t() @ z_hat[-1]) * act_grads.pop())
    rows = sum(widths[:-1])  # of A before the last layer; A[rows] is the distance's row
    sdf_by_feature = torch.addmm(A[rows], torch.cat(z_hat[::-1]).t(), A[:rows])  # [N, C] d sdf / d f
    gradient = z_hat[-1].t() @ WP + cells_per_unit * (slope * sdf_by_feature[:, None]).sum(-1)  # [N, 3]

    if rgb_mlp is None:
        return sdf.view(R, S), gradient.view(R, S, 3), points.new_zeros(R, S, 3)
    directions = directions.t()[:, :, None].expand(3, R, S).flatten(1)
    A, out, WP, W = fold(rgb_mlp)  # out: the biases, to which the products with A are added
    conditions = [directions, feature.t(), gradient.t(), geometry]
    for a, part in zip(A.split([len(part) for part in conditions], dim=1), conditions, strict=True):
        out = torch.addmm(out, a, part)
    first, *inner = out.split([len(w) for w in W])
    x = torch.addmm(first, WP, points)
    for w, a in zip(W[1:], inner, strict=True):
        x = torch.addmm(a, w, x.relu())
    return sdf.view(R, S), gradient.view(R, S, 3), x.sigmoid().t().reshape(R, S, 3)


def decode_sdf(feature, points, sdf_mlp):
    """Signed distance [R, S] from features [R, S, C] at points [R, S, 3]; differentiable like `decode`."""
    feature, shape, points = feature.flatten(0, 1), points.shape[:2], points.flatten(0, 1).t()
    A, bias, WP, W = fold(sdf_mlp)
    widths = [*(len(w) for w in W[:-1]), 1]  # of the last layer, only the distance
    rows = sum(widths)
    first, *inner, last = torch.addmm(bias[:rows], A[:rows], feature.t()).split(widths)
    x, _ = Softplus.apply(torch.addmm(first, WP, points))
    for w, a in zip(W[1:-1], inner, strict=True):
        x, _ = Softplus.apply(torch.addmm(a, w, x))
    return torch.addmm(last, W[-1][:1], x)[0].view(shape)


def fold(mlp):
    """A [sum n_l, K], the biases [sum n_l, 1], W_0 P [H, 3] (WP in the code), and the list of W_l."""
    P, q, *layers = mlp
    C, d, W, b = (layers[i::4] for i in range(4))
    A = torch.cat([w @ c for w, c in zip(W, C, strict=True)])
    d = [d[0] + q, *d[1:]]
    bias = torch.cat([w @ d_l + b_l for w, d_l, b_l in zip(W, d, b, strict=True)])
    return A, bias[:, None], W[0] @ P, W


class Softplus(torch.autograd.Function):
    """log(1 + exp(SHARPNESS z)) / SHARPNESS and its derivative, both differentiable once w.r.t. z."""

    @staticmethod
    def forward(ctx, z):
        # 80 acts as infinity: beyond the threshold, the derivative is exactly 1 and the value exactly z, as in torch.
        # On a CPU, exp and log1p are slow where their results are near the smallest floats. So |x| is at most 80, and
        # the logarithm is that of sigmoid(|x|), which is never near 0, in place of -log1p(exp(-|x|)).
        x = F.threshold(-SHARPNESS * z, -THRESHOLD, -80, inplace=True).clamp_(max=80)  # -SHARPNESS z
        act_grad = x.neg().sigmoid_()
        ctx.save_for_backward(act_grad)
        return z.relu().sub_(x.abs_().sigmoid_().log_(), alpha=1 / SHARPNESS), act_grad

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_act_grad):
        (act_grad,) = ctx.saved_tensors
        return act_grad * (d_out + SHARPNESS * d_act_grad * (1 - act_grad))

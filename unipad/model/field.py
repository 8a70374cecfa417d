"""The neural field: a feature volume at a point -> signed distance, its spatial gradient, color.

Both decoders are MLPs that take the point p and a conditioning vector c again in every layer:

    x_0 = P p,   z_l = W_l (x_l + C_l c) + b_l,   x_{l+1} = act(z_l)

W_l C_l (stacked: A) and W_0 P are multiplied out once per call, so that one GEMM A c serves all layers:

    z_0 = A_0 c + W_0 P p,   z_l = A_l c + W_l x_l      (biases likewise)

The gradient of the distance is a reverse pass written in ordinary torch operations, with z_bar_l = d sdf / d z_l and
f the interpolated feature, which is the SDF decoder's c:

    z_bar_{L-1} = e_0,   z_bar_{l-1} = act'(z_{l-1}) * (W_l^T z_bar_l)
    d sdf / d f = sum_l A_l^T z_bar_l,   grad sdf = (W_0 P)^T z_bar_0 + sum_i (d sdf / d f_i) (d f_i / d p)

so first-order autograd trains through it, without a double backward of the interpolation.
Samples are the columns of every matrix here, so that the rows of a layer are contiguous.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipad.config import Grid, Render
from unipad.kernels.trilinear import trilinear, trilinear_value

SHARPNESS = 100.0  # beta of the softplus; IDR's value, kept by VolSDF, NeuS and UniPAD
LINEAR = 20.0  # torch's softplus is the identity where SHARPNESS * z exceeds this


class Field(nn.Module):
    """Signed distance, gradient and color at points of a feature volume.

    Points and distances are in the renderer's unit, meters * grid.scale. Parameters have the original's names, so that
    its state dict loads once the prefix `pts_bbox_head.render_model.field.` is removed.
    """

    def __init__(self, cfg: Render, grid: Grid):
        super().__init__()
        self.sdf_decoder = SdfDecoder(cfg.channels, 1 + cfg.hidden, cfg.hidden, cfg.sdf_layers)
        self.rgb_decoder = RgbDecoder(3 + cfg.channels + 3 + cfg.hidden, 3, cfg.hidden, cfg.rgb_layers)
        self.laplace_density = nn.ParameterDict({
            "beta_min": nn.Parameter(torch.full((1,), 1e-4), requires_grad=False),
            "beta": nn.Parameter(torch.full((1,), cfg.variance)),
        })  # fmt: skip
        self.deviation_network = nn.ParameterDict({"variance": nn.Parameter(torch.full((1,), cfg.variance))})
        # The first voxel's value lies at the range's lower limit, the last one's at the upper: align_corners=True.
        per_meter = [(n - 1) / (h - l) for n, l, h in zip(grid.shape, grid.low, grid.high, strict=True)]
        first = [-l * k for l, k in zip(grid.low, per_meter, strict=True)]
        self.register_buffer("cells_per_unit", torch.tensor(per_meter) / grid.scale, persistent=False)  # [3]
        self.register_buffer("first_cell", torch.tensor(first), persistent=False)  # [3]

    def forward(
        self, volume: Tensor, points: Tensor, directions: Tensor, volume_idx: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The field at samples along rays.

        Args:
            volume:     [B, Z, Y, X, C] features.
            points:     [R, S, 3] scaled meters, LiDAR frame; not differentiated.
            directions: [R, 3] unit vectors.
            volume_idx: [R] int32, the volume of each ray.

        Returns:
            sdf:      [R, S] scaled meters, positive outside.
            gradient: [R, S, 3] d sdf / d point.
            rgb:      [R, S, 3] in [0, 1].

        Differentiable once in `volume` and the parameters.
        """
        R, S, _ = points.shape
        feature, slope = trilinear(volume, self.cells(points), volume_idx)
        feature, slope = feature.flatten(0, 1), slope.flatten(0, 1)  # [R * S, C], [R * S, 3, C]
        points = points.flatten(0, 1).t()  # [3, R * S]
        sdf, geometry, d_feature, d_point = self.sdf_decoder(feature.t(), points)
        gradient = d_point + self.cells_per_unit * (slope * d_feature[:, None]).sum(-1)  # [R * S, 3]
        directions = directions.t()[:, :, None].expand(3, R, S).flatten(1)
        rgb = self.rgb_decoder([directions, feature.t(), gradient.t(), geometry], points)
        return sdf.view(R, S), gradient.view(R, S, 3), rgb.t().reshape(R, S, 3)

    def sdf(self, volume: Tensor, points: Tensor, volume_idx: Tensor) -> Tensor:
        """The signed distance alone, [R, S] at points [R, S, 3]; differentiable once in `volume` and the parameters."""
        cells = self.cells(points)
        if torch.is_grad_enabled():
            feature, _ = trilinear(volume, cells, volume_idx)
        else:
            feature = trilinear_value(volume, cells, volume_idx)
        feature = feature.flatten(0, 1)
        return self.sdf_decoder.value(feature.t(), points.flatten(0, 1).t()).view(points.shape[:2])

    def cells(self, points: Tensor) -> Tensor:
        """Scaled meters -> voxels: 0 at the center of the first, n - 1 at the center of the last."""
        return points * self.cells_per_unit + self.first_cell

    @property
    def inv_s(self) -> Tensor:
        """[1] sharpness of NeuS's logistic distribution."""
        return torch.exp(10 * self.deviation_network["variance"]).clip(1e-6, 1e6)

    @property
    def beta(self) -> Tensor:
        """[1] width of VolSDF's Laplace distribution, scaled meters."""
        return self.laplace_density["beta"].abs() + self.laplace_density["beta_min"]


class Decoder(nn.Module):
    """The parameters of both decoders: lin0.., fc_c.0.., fc_p."""

    def __init__(self, inputs: int, outputs: int, hidden: int, layers: int):
        super().__init__()
        self.widths = [hidden] * (layers - 1) + [outputs]
        for l, width in enumerate(self.widths):
            self.add_module(f"lin{l}", nn.Linear(hidden, width))
        self.fc_c = nn.ModuleList(nn.Linear(inputs, hidden) for _ in self.widths)
        self.fc_p = nn.Linear(3, hidden)

    def leaves(self) -> list[Tensor]:
        """The parameters as `unipad.kernels.sdf_render` takes them: fc_p's, then fc_c's and lin's of each layer."""
        layers = [layer for l, fc in enumerate(self.fc_c) for layer in (fc, getattr(self, f"lin{l}"))]
        return [t for layer in (self.fc_p, *layers) for t in (layer.weight, layer.bias)]

    def folded(self):
        """A [sum(widths), inputs], its bias [sum(widths), 1], W_0 P [hidden, 3], and the list of W_l."""
        lins = [getattr(self, f"lin{l}") for l in range(len(self.widths))]
        W = [lin.weight for lin in lins]
        A = torch.cat([w @ fc.weight for w, fc in zip(W, self.fc_c, strict=True)])
        inner = [fc.bias + self.fc_p.bias if l == 0 else fc.bias for l, fc in enumerate(self.fc_c)]
        bias = torch.cat([w @ b + lin.bias for w, b, lin in zip(W, inner, lins, strict=True)])
        return A, bias[:, None], W[0] @ self.fc_p.weight, W


class SdfDecoder(Decoder):
    def forward(self, feature, points):
        """feature [C, M] and points [3, M] of M samples -> distance and its derivatives w.r.t. both.

        Returns: sdf [M], geometry [outputs - 1, M], d_feature [M, C], d_point [M, 3] (the direct part only).
        """
        A, bias, P, W = self.folded()
        first, *inner, last = torch.addmm(bias, A, feature).split(self.widths)
        x, slope = Softplus.apply(torch.addmm(first, P, points))
        slopes = [slope]
        for w, a in zip(W[1:], inner, strict=False):
            x, slope = Softplus.apply(torch.addmm(a, w, x))
            slopes.append(slope)
        last = torch.addmm(last, W[-1], x)

        z_bar = [W[-1][0][:, None] * slopes.pop()]
        for w in W[-2:0:-1]:
            z_bar.append((w.t() @ z_bar[-1]) * slopes.pop())
        rows = sum(self.widths[:-1])
        d_feature = torch.addmm(A[rows], torch.cat(z_bar[::-1]).t(), A[:rows])
        return last[0], last[1:], d_feature, z_bar[-1].t() @ P

    def value(self, feature, points):
        """The signed distance alone, [M]."""
        A, bias, P, W = self.folded()
        rows = sum(self.widths[:-1]) + 1  # of the last layer, only the distance
        first, *inner, last = torch.addmm(bias[:rows], A[:rows], feature).split([*self.widths[:-1], 1])
        x, _ = Softplus.apply(torch.addmm(first, P, points))
        for w, a in zip(W[1:], inner, strict=False):
            x, _ = Softplus.apply(torch.addmm(a, w, x))
        return torch.addmm(last, W[-1][:1], x)[0]


class RgbDecoder(Decoder):
    def forward(self, inputs: list[Tensor], points: Tensor) -> Tensor:
        """inputs: list of [K, M], the rows of c in order; points [3, M] -> rgb [3, M] in [0, 1]."""
        A, out, P, W = self.folded()
        for a, part in zip(A.split([len(part) for part in inputs], dim=1), inputs, strict=True):
            out = torch.addmm(out, a, part)
        first, *inner = out.split(self.widths)
        x = torch.addmm(first, P, points)
        for w, a in zip(W[1:], inner, strict=True):
            x = torch.addmm(a, w, x.relu())
        return x.sigmoid()


class Softplus(torch.autograd.Function):
    """log(1 + exp(SHARPNESS z)) / SHARPNESS and its slope, both differentiable once in z."""

    @staticmethod
    def forward(ctx, z):
        # Beyond the threshold, 80 serves as infinity: the slope is exactly 1 and the value exactly z, as in torch.
        # log(sigmoid(|x|)), not -log1p(exp(-|x|)): exp and log1p take a slow path on a CPU where results are tiny.
        x = F.threshold(-SHARPNESS * z, -LINEAR, -80, inplace=True).clamp_(max=80)  # -SHARPNESS z
        slope = x.neg().sigmoid_()
        ctx.save_for_backward(slope)
        return z.relu().sub_(x.abs_().sigmoid_().log_(), alpha=1 / SHARPNESS), slope

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_slope):
        (slope,) = ctx.saved_tensors
        return slope * (d_out + SHARPNESS * d_slope * (1 - slope))

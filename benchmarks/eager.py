"""Peers: parts of the model with the formulas of the original (UniPAD's code), in eager PyTorch, with our parameters.

They have no kernels, no folded weights and no hand-written derivatives. Our speed and, in tests, our gradients are
compared with theirs.
"""

import torch
import torch.nn.functional as F
from torch import nn

from unipad.model.render import Rendered


def eager_lift(features, depths, lidar2image, low, cell, shape, image_size, depth_range):
    """`unipad.kernels.lift` view by view: `F.grid_sample` at visible voxels, scattered into a volume per view, summed.

    Samples in fp32, as `F.grid_sample` does under autocast.
    """
    B, N = lidar2image.shape[:2]
    (H, W), (near, far) = image_size, depth_range
    axes = [l + c * torch.arange(n, device=lidar2image.device) for l, c, n in zip(low, cell, shape, strict=True)]
    points = F.pad(torch.cartesian_prod(*axes), (0, 1), value=1.0)  # [V, 4] homogeneous, x slowest
    ud, vd, d, _ = (points @ lidar2image.flatten(0, 1).mT).unbind(-1)  # [B * N, V]
    u, v = ud / d.clamp(min=1e-5) / W, vd / d.clamp(min=1e-5) / H
    uvd = torch.stack([u, v, (d - near) / (far - near)], dim=-1) * 2 - 1
    visible = (d > 1e-5) & (uvd.abs() < 1).all(-1)
    voxels = [s.nonzero()[:, 0] for s in visible]  # of each view
    # padded to the largest number of voxels in a view
    uvd = nn.utils.rnn.pad_sequence([p[i] for p, i in zip(uvd, voxels, strict=True)], batch_first=True)
    volume = 0
    for feature, depth in zip(features, depths, strict=True):
        feature, depth = (t.flatten(0, 1).permute(0, 3, 1, 2).float() for t in (feature, depth))
        sampled = F.grid_sample(feature, uvd[:, :, None, :2], align_corners=True)[..., 0]  # [B * N, C, max voxels]
        probability = F.grid_sample(depth[:, None], uvd[:, :, None, None], align_corners=True)[:, :, :, 0, 0]
        # sampled * probability: [B * N, C, max voxels]
        views = sampled.new_zeros(B * N, len(points), feature.shape[1])
        for n, values in enumerate((sampled * probability).mT):
            views[n, voxels[n]] = values[: len(voxels[n])]
        volume = volume + views.view(B, N, *shape, -1).sum(1)
    return volume.permute(0, 3, 2, 1, 4).to(features[0].dtype)


def eager_voxel_pool(features, depths, lidar2image, low, cell, shape, stride, depth_range, truncate=False):
    """`unipad.kernels.voxel_pool` point by point: products of feature and probability, summed by voxel.

    truncate: round toward zero, as the original does, not down.
    """
    (B, N, h, w, C), D = features.shape, depths.shape[4]
    X, Y, Z = shape
    near, far = depth_range
    axes = [torch.arange(n, device=features.device, dtype=torch.float64) for n in (h, w, D)]
    v, u, d = torch.meshgrid(axes[0] * stride, axes[1] * stride, near + (far - near) / D * axes[2], indexing="ij")
    points = torch.stack([u * d, v * d, d, torch.ones_like(d)], dim=-1).flatten(0, 2)  # [h * w * D, 4]
    points = points @ torch.inverse(lidar2image.double()).mT  # [B, N, h * w * D, 4]
    coords = [(points[..., i] - low[i]) / cell[i] for i in range(3)]
    x, y, z = (c.long() if truncate else c.floor().long() for c in coords)
    inside = (x >= 0) & (x < X) & (y >= 0) & (y < Y) & (z >= 0) & (z < Z)
    sample = torch.arange(B, device=features.device)[:, None, None]
    voxel = ((sample * Z + z) * Y + y) * X + x
    products = (features[..., None, :] * depths[..., None]).view(B, N, -1, C)  # [B, N, h * w * D, C]
    volume = products.new_zeros(B * Z * Y * X, C).index_add(0, voxel[inside], products[inside])
    return volume.view(B, Z, Y, X, C)


SOFTPLUS = nn.Softplus(beta=100)  # activation of the distance MLP
TWICE_DIFFERENTIABLE = torch.__version__ >= (2, 13)  # whether `F.grid_sample` of volumes is twice differentiable


def gathered_sample(volume, grid):
    """`F.grid_sample(align_corners=True)` of a volume [C, Z, Y, X] at grid [..., 3] (x, y, z) as eight gathers.

    Returns [..., C], differentiable any number of times.
    """
    size = grid.new_tensor(volume.shape[:0:-1])  # X, Y, Z
    coord = (grid + 1) / 2 * (size - 1)
    first = coord.detach().floor()
    fraction = coord - first
    rows = volume.permute(1, 2, 3, 0).flatten(0, 2)  # [Z * Y * X, C]
    out = 0
    for corner in torch.cartesian_prod(*[torch.arange(2.0, device=grid.device)] * 3):
        at = first + corner
        inside = ((at >= 0) & (at <= size - 1)).all(dim=-1)
        x, y, z = torch.minimum(at.clamp(min=0), size - 1).long().unbind(-1)
        weight = torch.where(corner > 0, fraction, 1 - fraction).prod(dim=-1) * inside
        out = out + rows[(z * volume.shape[2] + y) * volume.shape[3] + x] * weight[..., None]
    return out


class EagerRenderer(nn.Module):
    """NeuS, one batch sample at a time: `F.grid_sample`, MLPs layer by layer, the gradient of the distance by autograd.

    Replaces the `Renderer` it is made from and shares its parameters. Training it differentiates
    `torch.autograd.grad(create_graph=True)`; before torch 2.13, the first release in which `F.grid_sample` is twice
    differentiable, `gathered_sample` replaces it.
    """

    def __init__(self, renderer):
        super().__init__()
        assert renderer.cfg.method == "neus", f"no eager peer of {renderer.cfg.method}"
        self.field, self.cfg, self.scale = renderer.field, renderer.cfg, renderer.scale
        self.jitters = 2  # random numbers per ray: for the stratified and for the importance samples
        self.low, self.high = renderer.box  # scaled meters: meters * grid.scale

    def forward(self, volume, rays, jitter=None, points=None, stop=0.0):
        """As `Renderer.forward`; ignores `points` and `stop`."""
        with torch.autocast(volume.device.type, enabled=False):
            volume = volume.to(self.field.cells_per_unit.dtype)
            rows = [(rays.volume_idx == b).nonzero()[:, 0] for b in range(len(volume))]
            parts = [
                self._render(volume[b], rays.origins[i], rays.directions[i], None if jitter is None else jitter[i])
                for b, i in enumerate(rows)
            ]
        original_order = torch.cat(rows).argsort()
        joined = {name: torch.cat([part[name] for part in parts])[original_order] for name in parts[0]}
        of_volume = (rays.volume_idx == torch.arange(len(volume), device=volume.device)[:, None]) & joined["hit"]
        return Rendered(**joined, points_sdf=None, of_volume=of_volume.to(volume), points_of_volume=None)

    def loss(self, rendered, rays, sources=None):
        """As `Renderer.loss`, one batch sample at a time; without the losses `points`, `photometric` and `features`."""
        terms = [self._loss(rendered, rays, in_sample.bool()) for in_sample in rendered.of_volume]
        return {name: torch.stack([t[name] for t in terms]).mean() for name in terms[0]}

    def _render(self, volume, origins, directions, jitter):
        cfg, dtype = self.cfg, volume.dtype
        origins, directions = origins.to(dtype) * self.scale, directions.to(dtype)
        low, high = origins.new_tensor(self.low), origins.new_tensor(self.high)
        # [2, R, 3]; 1e-6 as in the original, against directions with a component 0
        faces = torch.stack([low - origins, high - origins]) / (directions + 1e-6)
        near = faces.amin(0).amax(1, keepdim=True).clamp(min=cfg.near * self.scale)
        far = faces.amax(0).amin(1, keepdim=True)
        hit = near < far
        # where a ray misses, any interval: its samples are transparent
        near = torch.where(hit, near, cfg.near * self.scale)
        far = torch.where(hit, torch.maximum(far, near + 1e-6), near + 1)

        # x, new: stratified and importance edges, as fractions of the way from near to far
        x = torch.linspace(0, 1, cfg.samples + 1, device=volume.device, dtype=dtype).expand(len(origins), -1)
        if jitter is not None:
            middle = (x[:, 1:] + x[:, :-1]) / 2
            lower, upper = torch.cat([x[:, :1], middle], 1), torch.cat([middle, x[:, -1:]], 1)
            x = lower + (upper - lower) * jitter[:, :1]
        with torch.no_grad():
            weights = self._stratified_weights(volume, origins, directions, near + x * (far - near))
            new = _inverse_cdf(x, weights, cfg.importance, None if jitter is None else jitter[:, 1:])
        x_starts = torch.cat([x[:, :-1], new[:, :-1]], 1).sort(1).values
        edges = near + torch.cat([x_starts, torch.maximum(x[:, -1:], new[:, -1:])], 1) * (far - near)
        starts, deltas = edges[:, :-1], edges.diff(dim=1)

        points = origins[:, None] + directions[:, None] * starts[..., None]
        mlps = self.field.sdf_decoder.tensors(), self.field.rgb_decoder.tensors()
        sdf, gradient, rgb = eager_field(lambda p: self._interpolate(volume, p), points, directions, *mlps)
        slope = -F.relu(-(directions[:, None] * gradient).sum(-1))  # along the ray; at most 0
        # NeuS's CDF at the beginning and the end of each interval
        before = torch.sigmoid((sdf - slope * deltas / 2) * self.field.inv_s)
        after = torch.sigmoid((sdf + slope * deltas / 2) * self.field.inv_s)
        alpha = ((before - after + 1e-5) / (before + 1e-5)).clip(0, 1) * hit
        weights = _weights(alpha)
        depth = (weights * starts).sum(1) / (weights.sum(1) + 1e-10)
        hit_starts = starts[hit[:, 0]]
        # to the range of the samples of all rays through the volume, as in the original (see `unipad.model.render`)
        if hit_starts.numel():
            depth = depth.clip(hit_starts.min(), hit_starts.max())
        depth = torch.where(hit[:, 0], depth, 0) / self.scale
        rgb = (weights[..., None] * rgb).sum(1)
        return dict(
            rgb=rgb if self.training else rgb.clamp(0, 1), depth=depth, hit=hit[:, 0], weights=weights,
            starts=starts, sdf=sdf, gradient=gradient,
        )  # fmt: skip

    def _stratified_weights(self, volume, origins, directions, edges):
        """Weights [R, samples] of the stratified samples under NeuS with a fixed inv_s of 64; the last is 0."""
        starts, deltas = edges[:, :-1], edges.diff(dim=1)[:, :-1]
        points = origins[:, None] + directions[:, None] * starts[..., None]
        sdf = _mlp(self.field.sdf_decoder.tensors(), points, self._interpolate(volume, points), SOFTPLUS)[..., 0]
        slope = sdf.diff(dim=1) / (deltas + 1e-5)
        slope = torch.minimum(slope, F.pad(slope[:, :-1], (1, 0))).clip(-1e3, 0)
        middle = (sdf[:, 1:] + sdf[:, :-1]) / 2
        before = torch.sigmoid((middle - slope * deltas / 2) * 64)
        after = torch.sigmoid((middle + slope * deltas / 2) * 64)
        return F.pad(_weights((before - after + 1e-5) / (before + 1e-5)), (0, 1))

    def _interpolate(self, volume, points):
        """Features [R, S, C] of a volume [C, Z, Y, X] at points [R, S, 3]."""
        low, high = points.new_tensor(self.low), points.new_tensor(self.high)
        grid = (points - low) / (high - low) * 2 - 1
        if TWICE_DIFFERENTIABLE:
            return F.grid_sample(volume[None], grid[None, None], align_corners=True)[0, :, 0].permute(1, 2, 0)
        return gathered_sample(volume, grid)

    def _loss(self, rendered, rays, in_sample):
        cfg, trunc = self.cfg, self.cfg.truncation * self.scale
        target = rays.depth[in_sample, None] * self.scale
        valid = target > 0
        starts, sdf = rendered.starts[in_sample], rendered.sdf[in_sample]
        # samples more than the truncation before and behind the surface
        front, back = valid & (starts < target - trunc), valid & (starts > target + trunc)
        around = valid & ~front & ~back
        depth = rendered.depth[in_sample, None] * self.scale
        terms = {
            "rgb": _mean((rendered.rgb[in_sample] - rays.rgb[in_sample]).abs()),
            "depth": (valid * (target - depth).abs()).sum() / valid.sum().clamp(min=1),
            "free_space": (F.relu(trunc - sdf) * front).sum() / front.sum().clamp(min=1),
            "sdf": ((starts + sdf - target).abs() * around).sum() / around.sum().clamp(min=1),
            "eikonal": _mean((rendered.gradient[in_sample].norm(dim=-1) - 1) ** 2),
        }
        return {k: getattr(cfg, f"{k}_weight") * v for k, v in terms.items() if getattr(cfg, f"{k}_weight") > 0}


def eager_field(interpolate, points, directions, sdf_mlp, rgb_mlp):
    """Distance [R, S], gradient (from autograd) and color at points [R, S, 3]; differentiable any number of times.

    interpolate: gives the features [R, S, C] at points.
    sdf_mlp, rgb_mlp: as for `unipad.kernels.sdf_render`; with rgb_mlp None the color is 0.
    """
    points = points.detach().requires_grad_()
    with torch.enable_grad():
        feature = interpolate(points)
        out = _mlp(sdf_mlp, points, feature, SOFTPLUS)
        sdf, geometry = out[..., :1], out[..., 1:]  # geometry: features for the color MLP
        (gradient,) = torch.autograd.grad(sdf, points, torch.ones_like(sdf), create_graph=True)
    if rgb_mlp is None:
        return sdf[..., 0], gradient, torch.zeros_like(points)
    condition = torch.cat([directions[:, None].expand_as(points), feature, gradient, geometry], dim=-1)
    return sdf[..., 0], gradient, torch.sigmoid(_mlp(rgb_mlp, points, condition, F.relu))


def _mlp(leaves, points, condition, activation):
    """x = P p + q, then z = W (x + C c + d) + b in every layer; c: condition. See `unipad.kernels.sdf_reference`."""
    P, q, *layers = leaves
    x = F.linear(points, P, q)
    for l in range(0, len(layers), 4):
        C, d, W, b = layers[l : l + 4]
        x = F.linear(x + F.linear(condition, C, d), W, b)
        if l + 4 < len(layers):
            x = activation(x)
    return x


def _mean(values):
    """0 of no values."""
    return values.sum() / max(values.numel(), 1)


def _weights(alpha):
    """Weight of each sample [R, S] in the rendered color."""
    transmittance = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha + 1e-7], 1), 1)
    return alpha * transmittance[:, :-1]


def _inverse_cdf(x, weights, n, jitter):
    """n + 1 ascending positions [R, n + 1], drawn between the edges x [R, S + 1] in proportion to the weights [R, S].

    jitter: [R, 1] in [0, 1), shifts all positions of a ray; None: 0.5.
    """
    total = weights.sum(1, keepdim=True)
    pad = F.relu(1e-5 - total)
    cdf = F.pad(((weights + pad / weights.shape[1]) / (total + pad)).cumsum(1).clamp(max=1), (1, 0))
    u = torch.linspace(0, 1 - 1 / (n + 1), n + 1, device=x.device, dtype=x.dtype)
    u = (u + (0.5 if jitter is None else jitter) / (n + 1)).expand(len(x), -1).contiguous()
    i = torch.searchsorted(cdf, u, right=True)
    below, above = (i - 1).clamp(0, x.shape[1] - 1), i.clamp(0, x.shape[1] - 1)
    mass = cdf.gather(1, above) - cdf.gather(1, below)
    t = (u - cdf.gather(1, below)) / torch.where(mass < 1e-5, 1, mass)
    return x.gather(1, below) + t.clip(0, 1) * (x.gather(1, above) - x.gather(1, below))

"""The differentiable renderer: rays through a feature volume -> color and depth, and their losses.

    sample s has opacity alpha_s, color c_s, distance t_s;   w_s = alpha_s * prod_{i<s} (1 - alpha_i + 1e-7)
    rgb = sum_s w_s c_s  (black background),   depth = sum_s w_s t_s / (sum_s w_s + 1e-10)

Depth is clamped to the range of the samples of all rays through the same volume, as in the original; a ray whose
weights are all 0 gets the lower end of that range.

    method    where samples are placed                                     opacity from
    neus      stratified, then from weights of NeuS at a fixed sharpness   the slope-extrapolated logistic CDF
    volsdf    stratified, and from weights within VolSDF's error bound     a Laplace density
    unisurf   around the first surface crossing and by occupancy           occupancy itself

On a GPU, field, opacity and compositing of neus and volsdf are one fused op, `sdf_render`, where it supports the field;
unisurf, other fields, fp64 and CPUs run op by op.

Features of any number of channels are rendered as `features = head(sum_s w_s f_s)`, with the C channels f_s of the
volume at sample s and one linear layer, the head. Because the head is linear, this equals the sum of its outputs at all
samples, plus its bias times what the ray lets through: the bias is the features of the background, such as the sky.
Other methods decode before they sum: FeatureNeRF (arXiv 2303.12786) with an MLP at every sample; RenderOcc (arXiv
2309.09502), without a background, to class scores in every voxel.

A sample lies at the start of its interval. Rays, points, rendered depths and the settings `near` and `truncation` are
in meters; all other lengths are scaled meters, meters * grid.scale.

A ray that misses the volume renders black at depth 0 and does not count in any loss. "Sample" means a sample on a ray;
a sample of the batch is called a batch sample.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipad import config
from unipad.kernels.backend import on_triton
from unipad.kernels.composite import composite
from unipad.kernels.depth_range import depth_in_range, rows_of_volumes
from unipad.kernels.ray_features import ray_features
from unipad.kernels.ray_mean import ray_mean
from unipad.kernels.ray_sample import clip_rays
from unipad.kernels.sdf_alpha import neus_alpha, unisurf_alpha, volsdf_alpha
from unipad.kernels.sdf_pack import pack
from unipad.kernels.sdf_render import kernels_support, sdf_render, sdf_values
from unipad.model.field import Field
from unipad.model.photometric import Sources, photometric_error
from unipad.model.rays import Rays
from unipad.model.samplers import SAMPLERS


@dataclass(frozen=True)
class Rendered:
    """R rendered rays of B batch samples, S samples along each ray."""

    rgb: Tensor  # [R, 3]; clamped to [0, 1] outside training; black if the fused op runs and `rgb_weight` is 0
    depth: Tensor  # [R] meters along the ray
    hit: Tensor  # [R] bool, False for rays that do not cross the volume
    weights: Tensor  # [R, S] weight of each sample in the color
    starts: Tensor  # [R, S] scaled meters along the ray
    sdf: Tensor  # [R, S] scaled meters
    gradient: Tensor  # [R, S, 3] d sdf / d point, of length 1 for a true distance
    points_sdf: Tensor | None  # [P] scaled meters, at the points given to `forward`; None if no loss needs it
    of_volume: Tensor  # [B, R] 1 where a ray hits the volume of the batch sample, else 0
    points_of_volume: Tensor | None  # [B, P] the same for the points given to `forward`
    features: Tensor | None = None  # [R, F]; None unless the loss `features` is on and the rays have features


class Renderer(nn.Module):
    """Field, sampler and losses of one `config.Render` on one `config.Grid`.

    Computes in the parameters' dtype, even under autocast: signed distances in half precision are off by decimeters.
    """

    def __init__(self, cfg: config.Render, grid: config.Grid, feature_channels: int = 0):
        """feature_channels: F, of the features in `Rays`, for the loss `features`."""
        super().__init__()
        self.cfg = cfg
        self.exact = False  # True: the fused op multiplies with fp32 accuracy (tf32x3), not in tf32
        self.scale = grid.scale
        self.box = [[v * grid.scale for v in corner] for corner in (grid.low, grid.high)]
        if cfg.method not in SAMPLERS:
            raise ValueError(f"no renderer {cfg.method!r}: choose {', '.join(SAMPLERS)}")
        self.sampler, self.jitters = SAMPLERS[cfg.method]  # jitters: random numbers per ray
        self.field = Field(cfg, grid)
        # Freeze what is not used: DDP waits for the gradient of every parameter that requires one.
        by_weights = max(cfg.rgb_weight, cfg.depth_weight, cfg.features_weight, cfg.photometric_weight) > 0
        self.field.deviation_network.requires_grad_(by_weights and cfg.method == "neus")
        self.field.laplace_density["beta"].requires_grad_(by_weights and cfg.method == "volsdf")
        self.field.rgb_decoder.requires_grad_(cfg.rgb_weight > 0)
        self.feature_head = nn.Linear(cfg.channels, feature_channels) if cfg.features_weight > 0 else None

    def forward(
        self,
        volume: Tensor,
        rays: Rays,
        jitter: Tensor | None = None,
        points: tuple[Tensor, Tensor] | None = None,
        stop: float = 0.0,
    ) -> Rendered:
        """Render rays.

        Args:
            volume: [B, C, Z, Y, X] features, LiDAR frame; channels_last_3d saves a copy.
            rays:   R of them; depth and color are not used. If they have features, features are rendered for them.
            jitter: [R, self.jitters] uniforms in [0, 1) that jitter the samples of each ray, in training.
                    None: the same samples every time.
            points: pair of [P, 3] meters and [P] int32 volume index (-1: not used), for the loss `points`.
            stop:   transmittance below which a ray ends early, in the fused op only: for pictures and metrics, not for
                    losses.

        Without rays all tensors of rays are empty. Differentiable once w.r.t. `volume` and the parameters.

        On a GPU neither this, `loss` nor their backward synchronizes with the host, so that a CUDA graph can capture
        them; only VolSDF's sampler does, see `volsdf_edges`. With deterministic algorithms, features are rendered by
        PyTorch's `embedding_bag`, for which this is not checked.
        """
        with torch.autocast(volume.device.type, enabled=False):
            dtype = self.field.cells_per_unit.dtype
            volume = volume.permute(0, 2, 3, 4, 1).to(dtype).contiguous()
            origins, directions = rays.origins.to(dtype) * self.scale, rays.directions.to(dtype)
            bundle = origins, directions, rays.volume_idx
            near, far, hit = clip_rays(origins, directions, *self.box, self.cfg.near * self.scale)

            def along(starts):
                return origins[:, None] + directions[:, None] * starts[..., None]  # [R, S, 3]

            fused = self._fused(volume)
            cells = self.field.cells_per_unit, self.field.cell_offset
            if fused:
                rgb_mlp = self.field.rgb_decoder.tensors() if self.cfg.rgb_weight > 0 else None
                mlps = self.field.sdf_decoder.tensors(), rgb_mlp
                packed = pack(*mlps, volume.shape[4], self.exact) if len(origins) else None  # for all that follows

            def sdf_at(starts):
                if fused:
                    return sdf_values(volume, bundle, starts, mlps[0], cells, self.exact, packed)
                return self.field.sdf(volume, along(starts), rays.volume_idx)

            with torch.no_grad():
                # transposed once, since the samplers' ops take contiguous columns
                jitter = [None] * self.jitters if jitter is None else jitter.to(dtype).t().contiguous().unbind()
                beta = self.field.beta if self.cfg.method == "volsdf" else None
                edges = self.sampler(self.cfg, sdf_at, near, far, jitter, beta)  # [R, S + 1]
            starts = edges[:, :-1]
            if fused:
                density_param = self.field.inv_s if self.cfg.method == "neus" else self.field.beta
                rgb, depth, weights, sdf, gradient = sdf_render(
                    volume, (*bundle, hit), edges, mlps, density_param, cells, self.cfg.method, self.exact, stop, packed
                )
            else:
                sdf, gradient, color = self.field(volume, along(starts), directions, rays.volume_idx)
                alpha = self._alpha(sdf, gradient, directions, edges.diff(dim=1)) * hit[:, None]
                out, weights = composite(alpha, torch.cat([color, starts[..., None]], dim=-1))
                rgb, depth = out[:, :3], out[:, 3] / (weights.sum(dim=1) + 1e-10)

            rgb = rgb if self.training else rgb.clamp(0, 1)
            depth, of_volume = depth_in_range(depth, edges, rays.volume_idx, hit, len(volume), self.scale)
            points_sdf, points_of_volume = self._at_points(volume, points)
            features = None
            if self.feature_head is not None and rays.features is not None:
                features = self.feature_head(ray_features(volume, bundle, edges, weights, cells))
        return Rendered(
            rgb, depth, hit, weights, starts, sdf, gradient, points_sdf, of_volume, points_of_volume, features
        )

    def loss(self, rendered: Rendered, rays: Rays, patches: tuple[Rays, Sources] | None = None) -> dict[str, Tensor]:
        """The weighted terms whose weight in the config is above 0: name -> scalar.

        Each is a mean over what it applies to in a batch sample, then over batch samples (0 for one without any):
            rgb         |c - c*| over all rays and channels
            depth       |d - d*| over rays with a target
            free_space  relu(truncation - sdf) over samples more than the truncation before d*
            sdf         |start + sdf - d*| over samples within the truncation of d*
            eikonal     (|gradient| - 1)^2 over all samples
            points      |sdf| over the points given to `forward`
            photometric `photometric_error` over the rays that it counts; needs `patches`, those around the rays, and
                        where to look for them
            features    1 - cosine similarity over rays with features, or |f - f*| over these and all channels
        Lengths are scaled meters. Targets: rays.rgb [R, 3], rays.depth [R] meters along the ray, <= 0 for none,
        rays.features [R, F], 0 in all channels for none.
        """
        cfg = self.cfg
        hit_rays = rendered.of_volume  # [B, R] 1 or 0
        target_rays = hit_rays * (rays.depth > 0)  # [B, R] 1 or 0
        target = rays.depth[:, None] * self.scale  # [R, 1]
        sdf, starts, truncation = rendered.sdf, rendered.starts, cfg.truncation * self.scale

        def before():  # [R, S]
            return starts < target - truncation

        def around():  # [R, S]
            return ~before() & (starts <= target + truncation)

        def photometric():
            error, counted = photometric_error(rendered.depth, rendered.hit, *patches)
            return _mean(error[:, None], hit_rays, counted[:, None])

        terms = {
            "rgb": lambda: _mean((rendered.rgb - rays.rgb).abs(), hit_rays),
            "depth": lambda: _mean((rendered.depth[:, None] * self.scale - target).abs(), target_rays),
            "free_space": lambda: _mean((truncation - sdf).relu(), target_rays, before()),
            "sdf": lambda: _mean((starts + sdf - target).abs(), target_rays, around()),
            "eikonal": lambda: _mean((rendered.gradient.norm(dim=-1) - 1).square(), hit_rays),
            "points": lambda: _mean(rendered.points_sdf.abs()[:, None], rendered.points_of_volume),
            "photometric": photometric,
            "features": lambda: _mean(
                feature_distance(rendered.features, rays.features, cfg.features_loss),
                hit_rays * rays.features.any(dim=1),
            ),
        }
        weights = {name: getattr(cfg, f"{name}_weight") for name in terms}
        assert cfg.points_weight == 0 or rendered.points_sdf is not None, "the loss `points` needs points in `forward`"
        assert cfg.photometric_weight == 0 or patches is not None, "the loss `photometric` needs patches"
        with torch.autocast(sdf.device.type, enabled=False):
            return {name: weights[name] * term() for name, term in terms.items() if weights[name] > 0}

    def _fused(self, volume):
        """Whether `sdf_render` runs; else the field, the opacity and `composite` run op by op."""
        cfg = self.cfg
        layers = cfg.sdf_layers, cfg.rgb_layers if cfg.rgb_weight > 0 else 0
        return on_triton(volume) and kernels_support(cfg.method, volume.dtype, cfg.channels, cfg.hidden, *layers)

    def _alpha(self, sdf, gradient, directions, deltas):
        """Opacity of every sample, [R, S]."""
        if self.cfg.method == "neus":
            return neus_alpha(sdf, gradient, directions, deltas, self.field.inv_s)
        if self.cfg.method == "volsdf":
            return volsdf_alpha(sdf, deltas, self.field.beta)
        return unisurf_alpha(sdf)

    def _at_points(self, volume, points):
        """Signed distance [P] at points, and their [B, P] `points_of_volume`; (None, None) where no loss needs them."""
        if points is None or self.cfg.points_weight == 0:
            return None, None
        position, volume_idx = points
        position = (position.to(volume.dtype) * self.scale)[:, None]  # [P, 1, 3]
        sdf = self.field.sdf(volume, position, volume_idx.clamp(min=0))[:, 0]  # index -1: computed, but not used
        return sdf, rows_of_volumes(volume_idx, len(volume), volume.dtype)


def feature_distance(features: Tensor, target: Tensor, kind: str) -> Tensor:
    """Distance of features [R, F] from `target` [R, F]: [R, 1] 1 - cosine similarity, or for "l1" [R, F]."""
    if kind == "l1":
        return (features - target).abs()
    return 1 - F.cosine_similarity(features, target, dim=1)[:, None]


def _mean(value, of_volume, mask=None):
    """Mean of value [R, K] over each batch sample's rays (where mask [R, K], if given), then over the batch."""
    K = value.shape[1]
    value = value if mask is None else value * mask
    of_ray = value.squeeze(1) if K == 1 else value.sum(dim=1)
    return ray_mean(of_ray, of_volume, K if mask is None else mask.sum(dim=1))

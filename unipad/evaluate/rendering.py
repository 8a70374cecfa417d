"""Quality of renderings (PSNR of colors, errors of depths, distances of features), and IoU of carved occupancy."""

from collections.abc import Iterable

import torch

from unipad.batch import Batch
from unipad.errors import UserError
from unipad.model.pretrain import Pretrain
from unipad.model.rays import cast_rays, grid_of_views, lidar_rays
from unipad.model.render import feature_distance
from unipad.runtime import all_reduce_sum, generators, meet

RAYS_PER_VIEW = 256  # LiDAR rays per view that depth is measured on
PIXEL_STRIDE = 8  # pixels between the rays that color is measured on
CHUNK = 8192  # rays whose true features are read at once: those of all would take a gigabyte


@torch.no_grad()
def evaluate_rendering(
    model: Pretrain, batches: Iterable[tuple[int, Batch]], seed: int, device: torch.device, masked: bool = True
) -> dict[str, float]:
    """Render held-out frames and compare them with their images and LiDAR points.

    model:   put in eval mode here; its mode is restored afterwards.
    batches: pairs (position of the first sample among those evaluated, batch). The position seeds the masks and the
             choice of LiDAR rays, so that every evaluation of a run has the same ones.
    masked:  mask the encoder's input as in training.

    Returns dict: psnr (dB, over a grid of pixels; absent without images or where color is not learned), where features
    are learned features_cosine (mean cosine similarity over the pixels that have features) or features_l1,
    depth_abs_rel, depth_rmse (meters), depth_delta1 (fraction of rays within a factor 1.25; all three are absent
    without LiDAR points, if the model was trained without). LiDAR depth is the truth; a ray that misses the volume
    counts as black at depth 0. If no loss casts rays, none of these is computed. With the loss `occupancy`, also
    occupancy_iou_full and occupancy_iou_free: intersection over union of the cells that are full (free) and those
    predicted so, both without unknown cells. Sums run over all processes.
    """
    was_training = model.training
    model.eval()
    kind, renders = model.recipe.render.features_loss, model.recipe.render.renders
    color = torch.zeros(2, dtype=torch.float64, device=device)  # squared error, pixels
    features = torch.zeros_like(color)  # distance, pixels
    depth, cells = color.new_zeros(4), color.new_zeros(4)  # `depth_sums`, `Carving.counts`
    for position, batch in batches:
        batch = batch.to(device)
        rngs = generators(seed, step=0, positions=range(position, position + len(batch)), device=device)
        volume, _ = model.encode(batch, rngs if masked else None)
        if model.carving is not None:
            cells += model.carving.counts(volume, batch)
        if not renders:
            continue
        batch = batch.keyframe()
        for i in range(len(batch) if model.renders_color(batch) or model.renders_features(batch) else 0):
            for rays in _pixel_rays(batch, i, CHUNK if model.renders_features(batch) else None):
                rgb, predicted = model.render_pixels(volume, rays)
                if model.renders_color(batch):
                    color[0] += (rgb - rays.rgb).square().mean(1).double().sum()
                    color[1] += len(rays)
                if predicted is not None:
                    known = rays.features.any(dim=1)
                    distance = feature_distance(predicted, rays.features, kind).mean(1).double()
                    features += torch.stack([(distance * known).sum(), known.sum()])
        rays = lidar_rays(batch, model.recipe.rays, RAYS_PER_VIEW, rngs)
        depth += depth_sums(model.render(volume, rays)[1], rays.depth)
    model.train(was_training)
    meet()  # frames may differ in the time they take
    sums = all_reduce_sum(torch.cat([color, features, depth, cells])).tolist()
    squared_color, pixels, distance, known, abs_rel, squared_depth, close, ray_count, *cells = sums
    metrics = {}
    if pixels:
        metrics["psnr"] = -10 * torch.tensor(squared_color / pixels).log10().item()
    if known:
        metrics[f"features_{kind}"] = 1 - distance / known if kind == "cosine" else distance / known
    if ray_count:
        metrics |= {
            "depth_abs_rel": abs_rel / ray_count,
            "depth_rmse": (squared_depth / ray_count) ** 0.5,
            "depth_delta1": close / ray_count,
        }
    elif renders and model.recipe.data.sweeps:  # 0 sweeps: images only, as in training
        raise UserError("none of these frames has a LiDAR point in view: evaluate more frames.")
    if model.carving is not None:
        right_full, *wrong, right_free = cells
        metrics |= {
            f"occupancy_iou_{name}": right / max(right + sum(wrong), 1)
            for name, right in (("full", right_full), ("free", right_free))
        }
    return metrics


def _pixel_rays(batch, sample, count):
    """Yield the rays of `pixel_rays`, at most about `count` at once; None: all."""
    pixels, inside, _ = grid_of_views(batch, sample, PIXEL_STRIDE)
    columns = max(1, count // len(pixels)) if count else pixels.shape[1]
    for some, within in zip(pixels.split(columns, dim=1), inside.split(columns, dim=1), strict=True):
        rays = cast_rays(batch, sample, some)[within.flatten()]
        if len(rays):  # 0 in the padding
            yield rays


def depth_sums(depth: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """[4] sums over rays with LiDAR depth, `truth` > 0: |error| / truth, error^2, rays within a factor 1.25, rays."""
    known = truth > 0
    truth = torch.where(known, truth, 1.0).double()
    depth = torch.where(known, depth.double(), truth)
    ratio = torch.maximum(depth / truth, truth / depth.clamp(min=1e-6))
    per_ray = [(depth - truth).abs() / truth, (depth - truth).square(), (ratio < 1.25) & known, known]
    return torch.stack([p.double().sum() for p in per_ray])

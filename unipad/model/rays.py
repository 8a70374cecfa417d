"""Which rays are cast, and their targets: from the cameras or, where a batch has none, from the LiDAR.

A candidate for a ray is (u, v, z): a pixel and its depth along the optical axis, 0 where no LiDAR point gives one.
Choosing rays never waits for the GPU: candidates that must not be chosen are not removed, but get rank 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from unipad.batch import CAMERAS, Batch
from unipad.config import RayChoice

MIN_DEPTH = 1e-5  # meters in front of the camera; as in the original


@dataclass(frozen=True)
class Rays:
    """R rays of all samples and views of a batch; meters, LiDAR frame."""

    origins: Tensor  # [R, 3] camera centers, or the LiDAR
    directions: Tensor  # [R, 3] unit vectors
    depth: Tensor  # [R] distance along the ray to the LiDAR point, -1: unknown
    rgb: Tensor  # [R, 3] color of the pixel, in [0, 1]; 0 for rays from the LiDAR; [R, 0] in a batch without pixels
    volume_idx: Tensor  # [R] int32 the sample whose volume the ray crosses
    features: Tensor | None = None  # [R, F] of the pixel; None for rays from the LiDAR and where a batch has none

    def __len__(self) -> int:
        return len(self.depth)

    def __getitem__(self, rows) -> "Rays":
        return self.each(lambda tensor: tensor[rows])

    def each(self, function: Callable[[Tensor], Tensor]) -> "Rays":
        """The rays with `function` applied to every tensor."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return Rays(**{name: None if t is None else function(t) for name, t in named.items()})


def choose_rays(batch: Batch, cfg: RayChoice, generators: Sequence[torch.Generator]) -> Rays:
    """The rays of one training step, by `cfg.strategy`:

    depth:    at most `lidar_per_view` LiDAR points, without replacement; the rest are pixels of a grid.
    random:   pixels, uniformly with replacement.
    dilation: every `cfg.dilation`-th pixel of every `cfg.dilation`-th row, in random order.
    patch:    `per_view` squares of `cfg.patch` x `cfg.patch` pixels, `cfg.patch_step` apart, uniformly with
              replacement, below `cfg.sky` and `cfg.patch_margin` away from borders; patch after patch, each row by row.
              Unlike the others', these rays go through pixels' centers. In an image that is too small, patches are cut
              off: they repeat its last pixels. `middle_rays` are those to render.
    With random, dilation and patch, a pixel has the depth of the nearest LiDAR point that falls into it, if any.

    batch:      its `point_counts` are read on the host.
    generators: one per sample, on the batch's device. A sample's rays depend only on its own generator.

    Returns B * N * per_view rays (dilation: one per pixel of the dilated grid over the padded image; patch: patch^2
    times as many), sample after sample, view after view. In a view with fewer candidates, some rays are repeated.
    Without cameras: B * 6 * per_view rays from the LiDAR to points, as `lidar_rays`, whatever the strategy.
    Raises `UserError` for patches that fit into no image of the batch.
    """
    if not batch.images.shape[1]:
        return lidar_rays(batch, cfg, cfg.per_view, generators)
    H, W = batch.images.shape[-2:]
    parts = []
    for b, (projected, visible) in enumerate(_lidar_in_views(batch, cfg)):
        if cfg.strategy == "depth":
            pixels, inside = pixel_grid(batch.image_sizes[b], H, W, cfg.pixel_interval, cfg.sky)
            candidates = torch.cat([projected, pixels], dim=1)
            eligible = _at_most(visible, cfg.lidar_per_view, generators[b])
            rank = torch.cat([2 * eligible, 1 * inside], dim=1)  # LiDAR points before pixels
            chosen = _draw(candidates, rank, cfg.per_view, generators[b])
        elif cfg.strategy == "random":
            uniform = torch.rand(len(projected), cfg.per_view, 2, generator=generators[b], device=projected.device)
            chosen = (uniform * batch.image_sizes[b].flip(-1)[:, None]).floor()  # [N, per_view, 2] u, v
            chosen = _with_lidar_depth(chosen, projected, visible, H, W)
        elif cfg.strategy == "dilation":
            pixels, inside = pixel_grid(batch.image_sizes[b], H, W, cfg.dilation)
            chosen = _draw(pixels, 1 * inside, pixels.shape[1], generators[b])
            chosen = _with_lidar_depth(chosen[..., :2], projected, visible, H, W)
        elif cfg.strategy == "patch":
            cfg.check_room(H, W)
            chosen = _patches(batch.image_sizes[b], cfg, generators[b])
            chosen = _with_lidar_depth(chosen, projected, visible, H, W)
        else:
            raise ValueError(f"no ray strategy {cfg.strategy!r}: choose depth, random, dilation or patch")
        parts.append(cast_rays(batch, b, chosen))
    return concatenated(parts)


def rays_per_sample(batch: Batch, cfg: RayChoice) -> int:
    """Number of rays that are rendered for each sample of a batch: of patches, the middle ones."""
    _, N, _, H, W = batch.images.shape
    if N and cfg.strategy == "dilation":
        return N * -(-H // cfg.dilation) * -(-W // cfg.dilation)
    return (N or len(CAMERAS)) * cfg.per_view  # without images, the LiDAR casts as many rays as six cameras


def middle_rays(patches: Rays, cfg: RayChoice) -> Rays:
    """The middle ray of each patch that `choose_rays` has chosen by the strategy `patch`."""
    return patches[cfg.patch**2 // 2 :: cfg.patch**2]


def lidar_rays(batch: Batch, cfg: RayChoice, per_view: int, generators: Sequence[torch.Generator]) -> Rays:
    """`per_view` rays from each camera through LiDAR points; without cameras, six times as many from the LiDAR.

    In a view with fewer points, some rays are repeated; without any, the rays have unknown depth. Rays from the LiDAR
    go only to the keyframe's points, since sweeps were recorded from other positions.
    """
    if not batch.images.shape[1]:
        parts = []
        for b, points in enumerate(batch.points.split(batch.point_counts.tolist())):
            allowed = _between_radii(points, cfg) & (points[:, 4] == 0)  # time lag 0: the keyframe's
            targets = _draw(points[None, :, :3], 1 * allowed[None], len(CAMERAS) * per_view, generators[b])
            parts.append(rays_from_lidar(targets[0], b))
        return concatenated(parts)
    parts = []
    for b, (projected, visible) in enumerate(_lidar_in_views(batch, cfg)):
        parts.append(cast_rays(batch, b, _draw(projected, 1 * visible, per_view, generators[b])))
    return concatenated(parts)


def rays_from_lidar(targets: Tensor, sample: int) -> Rays:
    """Rays from the LiDAR to `targets` [K, 3] meters, with color 0; a target at the origin, which stands for no point,
    gives a ray straight ahead with unknown depth."""
    distance = targets.norm(dim=1)  # [K]
    known = distance > 0
    ahead = torch.eye(3, device=targets.device)[1]  # +y
    return Rays(
        origins=torch.zeros_like(targets),
        directions=torch.where(known[:, None], targets / distance[:, None], ahead),
        depth=distance.where(known, -1.0),
        rgb=torch.zeros_like(targets),
        volume_idx=torch.full_like(distance, sample, dtype=torch.int32),
    )


def pixel_rays(batch: Batch, sample: int, stride: int) -> Rays:
    """Rays through every `stride`-th pixel of one sample's images, view after view, row after row, without depth."""
    pixels, inside, _ = grid_of_views(batch, sample, stride)
    return cast_rays(batch, sample, pixels)[inside.flatten()]


def grid_of_views(batch: Batch, sample: int, stride: int) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """Every `stride`-th pixel of one sample's views, for `cast_rays`; all views have the grid of the largest image.

    Returns:
        pixels: [N, h * w, 3] u, v, 0; row after row.
        inside: [N, h * w] bool, False in the padding.
        shape:  (N, h, w).
    """
    H, W = batch.image_sizes[sample].amax(0).tolist()
    pixels, inside = pixel_grid(batch.image_sizes[sample], H, W, stride)
    return pixels, inside, (len(pixels), -(-H // stride), -(-W // stride))


def project_points(points: Tensor, lidar2image: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Project LiDAR points into each view.

    points:      [P, 3] meters, LiDAR frame.
    lidar2image: [N, 4, 4] LiDAR meters -> (u*d, v*d, d, 1).
    image_sizes: [N, 2] height, width before padding.

    Returns:
        projected: [N, P, 3] u, v pixels and depth along the optical axis, meters; u, v are meaningless behind a camera.
        visible:   [N, P] bool, True in front of the camera and strictly inside the image.
    """
    projected = _transform(lidar2image, points[None])
    depth = projected[..., 2]
    u, v = (projected[..., i] / depth.clamp(min=MIN_DEPTH) for i in (0, 1))
    height, width = image_sizes[..., None].unbind(1)  # [N, 1]
    visible = (depth > MIN_DEPTH) & (u > 0) & (u < width - 1) & (v > 0) & (v < height - 1)
    return torch.stack([u, v, depth], dim=-1), visible


def pixel_grid(image_sizes: Tensor, H: int, W: int, interval: int, sky: float = 0.0) -> tuple[Tensor, Tensor]:
    """Pixels `interval` apart, in the rows v >= int(sky * height) of each image.

    image_sizes: [N, 2] height, width before padding; at most H and W.

    Returns:
        pixels: [N, G, 3] u, v, 0; row after row.
        inside: [N, G] bool, False in the padding.
    """
    height, width = image_sizes[:, :, None, None].unbind(1)  # [N, 1, 1]
    top = (sky * height.double()).long()  # in double, to round as the host does
    v = top + torch.arange(0, H - int(sky * H), interval, device=height.device)[:, None]  # [N, rows, 1]
    u = torch.arange(0, W, interval, device=height.device)  # [cols]
    inside = (v < height) & (u < width)
    pixels = torch.stack([u.expand_as(inside), v.expand_as(inside), torch.zeros_like(inside)], dim=-1)
    return pixels.flatten(1, 2).float(), inside.flatten(1)


def cast_rays(batch: Batch, sample: int, chosen: Tensor) -> Rays:
    """Rays through the chosen pixels of one sample's views.

    chosen: [N, K, 3] u, v inside the image, and depth along the optical axis in meters, 0 = unknown.

    Returns N * K rays, view after view. Their color is that of the pixel at the truncated coordinates, their features,
    where the batch has some, are interpolated at the coordinates.
    """
    N, K, _ = chosen.shape
    known = chosen[..., 2] > 0
    z = chosen[..., 2:].where(known[..., None], 1.0)  # any depth gives the direction
    ends = _transform(_inverse(batch.lidar2image[sample]), torch.cat([chosen[..., :2] * z, z], dim=-1))  # [N, K, 3]
    origins = _inverse(batch.lidar2camera[sample])[:, None, :3, 3].expand_as(ends)
    distance = (ends - origins).norm(dim=-1)
    assert batch.images.is_floating_point(), "the images of a batch are divided by `Batch.to`"
    u, v = chosen[..., :2].long().unbind(-1)
    view = torch.arange(N, device=chosen.device)[:, None]
    rays = Rays(
        origins=origins,
        directions=(ends - origins) / distance[..., None],
        depth=distance.where(known, -1.0),
        rgb=batch.images[sample].permute(0, 2, 3, 1)[view, v, u],
        volume_idx=torch.full((N, K), sample, dtype=torch.int32, device=chosen.device),
        features=None if batch.features is None else features_at(batch, sample, chosen[..., :2]),
    )
    return rays.each(lambda tensor: tensor.flatten(0, 1))


def features_at(batch: Batch, sample: int, pixels: Tensor) -> Tensor:
    """Features [N, K, F] fp32 of one sample's images at pixels [N, K, 2] u, v, which need not be whole numbers.

    An image's features are those of h x w equal parts of it, each at the middle of its part: bilinear between these,
    constant beyond the outermost.
    """
    maps, view = batch.features[sample], torch.arange(len(pixels), device=pixels.device)[:, None]
    # [N, 1, 2] x, y
    sizes, image_sizes = (s[sample].flip(-1)[:, None] for s in (batch.feature_sizes, batch.image_sizes))
    at = pixels * (sizes / image_sizes) - 0.5
    low = at.floor()
    weight = (at - low)[..., None]  # [N, K, 2, 1] of the upper neighbor
    (x0, y0), (x1, y1) = (p.long().clamp(min=0).minimum(sizes - 1).unbind(-1) for p in (low, low + 1))
    top = torch.lerp(maps[view, y0, x0].float(), maps[view, y0, x1].float(), weight[:, :, 0])
    bottom = torch.lerp(maps[view, y1, x0].float(), maps[view, y1, x1].float(), weight[:, :, 0])
    return torch.lerp(top, bottom, weight[:, :, 1])


def lidar_points(batch: Batch, cfg: RayChoice) -> tuple[Tensor, Tensor]:
    """All points [P, 3] meters, and [P] int32 the sample of each, -1 for points not between the two radii of `cfg`."""
    sample = samples_of(batch.point_counts, batch.points.device)
    return batch.points[:, :3], torch.where(_between_radii(batch.points, cfg), sample, -1)


def samples_of(counts: Tensor, device: torch.device) -> Tensor:
    """[sum of counts] int32 on `device`, the sample of each point, where sample b has counts[b] of them, one sample
    after the other; counts: on the host."""
    samples = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(counts)
    return samples.to(device, non_blocking=True)


def _lidar_in_views(batch, cfg):
    """For each sample, `project_points` of its points; those not between the two radii of `cfg` count as invisible."""
    for b, points in enumerate(batch.points.split(batch.point_counts.tolist())):
        projected, visible = project_points(points[:, :3], batch.lidar2image[b], batch.image_sizes[b])
        yield projected, visible & _between_radii(points, cfg)


def _between_radii(points, cfg):
    """[P] bool: whether points [P, 5] have a horizontal distance to the LiDAR between the two radii of `cfg`."""
    radius = points[:, :2].norm(dim=1)
    return (radius > cfg.near_radius) & (radius < cfg.far_radius)


def _draw(candidates, rank, count, generator):
    """Draw `count` candidates per view without replacement: those of the highest rank first, none of rank 0.

    candidates: [N, K, 3], (u, v, z) or points; rank: [N, K] int.

    Returns [N, count, 3]. If too few candidates have a rank above 0, they are repeated cyclically; without any, zeros.
    """
    key = rank + torch.rand(rank.shape, generator=generator, device=rank.device)  # random order within a rank
    key, index = key.topk(min(count, key.shape[1]), dim=1)
    if not index.shape[1]:
        return candidates.new_zeros(len(candidates), count, 3)
    available = (key >= 1).sum(1, keepdim=True)  # [N, 1]
    cyclic = torch.arange(count, device=rank.device) % available.clamp(min=1)  # [N, count]
    index = index.gather(1, cyclic)[..., None].expand(-1, -1, 3)
    return candidates.gather(1, index).where(available[..., None] > 0, 0.0)


def _patches(image_sizes, cfg, generator):
    """[N, K * patch^2, 2] u, v of the centers of the pixels of K random patches in each of N views."""
    P, device = cfg.patch, image_sizes.device
    shape = len(image_sizes), cfg.per_view, 2
    size = image_sizes[:, None].flip(-1)  # [N, 1, 2] width, height
    # the first and the last place of a patch's corner; at least 0 in images that are too small
    last = size // cfg.patch_step * cfg.patch_step - cfg.patch_margin - cfg.patch_edge
    first = torch.full_like(last, cfg.patch_margin)
    first[..., 1] = first[..., 1].maximum((cfg.sky * size[..., 1].double()).long())
    first, last = first.minimum(last).clamp(min=0), last.clamp(min=0)
    room = last - first + 1
    corner = (torch.rand(shape, generator=generator, device=device) * room).long().minimum(room - 1) + first
    offset = torch.arange(P * P, device=device)
    offset = cfg.patch_step * torch.stack([offset % P, offset // P], dim=-1)  # [P^2, 2]
    pixels = (corner[:, :, None] + offset).minimum(size[:, None] - 1)  # [N, K, P^2, 2]
    return (pixels + 0.5).flatten(1, 2)


def _at_most(chosen, count, generator):
    """At most `count` of the True entries in each row of `chosen` [N, K] bool, at random."""
    if count >= chosen.shape[1]:
        return chosen
    key = torch.rand(chosen.shape, generator=generator, device=chosen.device).where(chosen, 2.0)
    return chosen & (key < key.topk(count + 1, dim=1, largest=False).values[:, -1:])


def _with_lidar_depth(pixels, projected, visible, H, W):
    """Pixels [N, K, 2] with the depth of the nearest visible point that falls into each, 0 = none: [N, K, 3]."""
    if not projected.shape[1]:  # as in training without LiDAR
        return torch.nn.functional.pad(pixels, (0, 1))
    pixel_of = (projected[..., 1].long() * W + projected[..., 0].long()).where(visible, 0)  # [N, P] linear index
    depth = projected[..., 2].where(visible, torch.inf)
    nearest = depth.new_full((len(projected), H * W), torch.inf).scatter_reduce(1, pixel_of, depth, "amin")
    z = nearest.gather(1, pixels[..., 1].long() * W + pixels[..., 0].long())  # [N, K]
    return torch.cat([pixels, z.where(z < torch.inf, 0.0)[..., None]], dim=-1)


def _transform(matrices, points):
    """Points [N or 1, K, 3] transformed by matrices [N, 4, 4]: [N, K, 3], before any division by depth.

    Written out, since a matmul may run in TF32 or, under autocast, in bf16, and be off by several pixels.
    """
    x, y, z = points[:, None].unbind(-1)  # [N or 1, 1, K]
    a, b, c, d = matrices[:, :3, :, None].unbind(2)  # columns, [N, 3, 1]
    return (a * x + b * y + c * z + d).transpose(1, 2)


def _inverse(matrices):
    """Inverses of [N, 4, 4], computed in double; unlike `torch.inverse`, without waiting for the GPU's error check."""
    return torch.linalg.inv_ex(matrices.double()).inverse.to(matrices.dtype)


def concatenated(parts: Sequence[Rays]) -> Rays:
    """All rays of `parts`, in their order."""
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Rays)}
    return Rays(**{name: None if tensors[0] is None else torch.cat(tensors) for name, tensors in columns.items()})

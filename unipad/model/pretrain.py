"""The whole pre-training model: mask, encode to a volume, cast rays, render, compare.

Randomness comes in as one generator a sample, so a step is a function of (weights, batch, generators).
"""

import torch
from torch import nn

from unipad.config import Recipe
from unipad.model.camera import CameraEncoder, draw_mask
from unipad.model.lidar import LidarEncoder
from unipad.model.rays import choose_rays, lidar_points
from unipad.model.render import Renderer
from unipad.model.volume import ConvNormReLU3d, GatherLift

MASK_BLOCK = 32  # pixels: the encoder's total stride, so one block is one cell of its last stage


class Pretrain(nn.Module):
    """One encoder or both; the volumes of both are summed and convolved once."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe
        encoders = [encoder for encoder in (recipe.camera, recipe.lidar) if encoder is not None]
        channels = {encoder.channels for encoder in encoders}
        assert len(channels) == 1, f"the encoders' volumes have {sorted(channels)} channels: they must be as many"
        (channels,) = channels
        if recipe.camera is not None:
            self.camera = CameraEncoder(recipe.camera)
            self.lift = GatherLift(recipe.grid, recipe.camera)
        if recipe.lidar is not None:
            self.lidar = LidarEncoder(recipe.lidar, recipe.grid)
        if len(encoders) > 1:
            self.fuse = ConvNormReLU3d(channels, channels)
        self.project = ConvNormReLU3d(channels, recipe.render.channels)
        self.renderer = Renderer(recipe.render, recipe.grid)

    def forward(self, batch, generators):
        """Losses of one training step.

        batch: a `Batch` on the model's device.
        generators: one `torch.Generator` a sample, on that device.

        Returns (losses, missed): losses maps a term's name to its weighted value, the mean over samples;
        missed is the share of rays that do not cross the volume and so count for nothing.
        """
        volume, _ = self.encode(batch, generators)
        rays = choose_rays(batch, self.recipe.rays, generators)
        shape = (len(rays) // len(batch), self.renderer.jitters)
        jitter = _per_sample(generators, lambda g: torch.rand(shape, generator=g, device=g.device))
        points = lidar_points(batch, self.recipe.rays) if self.recipe.render.points_weight > 0 else None
        rendered = self.renderer(volume, rays, jitter.flatten(0, 1), points)
        return self.renderer.loss(rendered, rays), 1 - rendered.hit.float().mean()

    def encode(self, batch, generators):
        """The volume that rays are cast through, and the masks it was seen through.

        Returns:
            volume: [B, C, Z, Y, X], LiDAR frame.
            masks:  dict with "camera", [B, N, H / 32, W / 32] bool, True where the encoder saw the image, and
                    "lidar", [M, 4] int32 (b, z, y, x) the voxels that the encoder saw; of the encoders there are.
        """
        volumes, masks = [], {}
        if self.recipe.camera is not None:
            volume, masks["camera"] = self._encode_images(batch, generators)
            volumes.append(volume)
        if self.recipe.lidar is not None:
            noise = _per_sample(generators, lambda g: torch.rand(self.lidar.mask_shape, generator=g, device=g.device))
            volume, masks["lidar"] = self.lidar(batch.points, batch.point_counts, noise)
            volumes.append(volume)
        volume = volumes[0] if len(volumes) == 1 else self.fuse(volumes[0] + volumes[1])
        return self.project(volume), masks

    def _encode_images(self, batch, generators):
        cfg = self.recipe.camera
        B, N, _, H, W = batch.images.shape
        h, w = H // MASK_BLOCK, W // MASK_BLOCK
        noise = _per_sample(generators, lambda g: torch.rand(N, h * w, generator=g, device=g.device))
        mask = draw_mask(noise.flatten(0, 1), h, w, cfg.mask_ratio)  # [B * N, 1, h, w]
        drop_noise = _per_sample(generators, lambda g: torch.rand(N, sum(cfg.depths), generator=g, device=g.device))
        features, depths = self.camera(batch.images, batch.image_sizes, mask, drop_noise.flatten(0, 1))
        return self.lift(features, depths, batch.lidar2image, (H, W)), mask.view(B, N, h, w)

    @torch.no_grad()
    def render(self, volume, rays):
        """Render rays without gradients, some at a time; returns rgb [R, 3] in [0, 1] and depth [R] metres."""
        chunk = 8192 if volume.is_cuda else 512  # what fits a CPU's caches takes two thirds of the time
        parts = [self.renderer(volume, rays[i : i + chunk]) for i in range(0, len(rays), chunk)]
        return torch.cat([p.rgb for p in parts]).clamp(0, 1), torch.cat([p.depth for p in parts])


def _per_sample(generators, draw):
    return torch.stack([draw(g) for g in generators])

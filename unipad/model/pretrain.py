"""The whole pre-training model: mask, encode to a volume, cast rays, render, compare.

Randomness comes in as one generator a sample, so a step is a function of (weights, batch, generators).
"""

import torch
import torch.nn.functional as F
from torch import nn

from unipad.batch import Batch
from unipad.config import Recipe
from unipad.model.encoder import Encoder
from unipad.model.rays import choose_rays, lidar_points
from unipad.model.render import Renderer
from unipad.model.volume import ConvNormReLU3d

STOP = 1e-4  # of a ray's light: a GPU's picture looks no further; 0.03 of 255 gray levels, 1 cm at 100 m


class Pretrain(nn.Module):
    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe
        self.encoder = Encoder(recipe)
        self.project = ConvNormReLU3d(self.encoder.channels, recipe.render.channels)
        self.renderer = Renderer(recipe.render, recipe.grid)

    def forward(self, batch, generators):
        """Losses of one training step.

        batch: a `Batch` on the model's device.
        generators: one `torch.Generator` a sample, on that device.

        Returns (losses, missed): losses maps a term's name to its weighted value, the mean over samples;
        missed is the share of rays that do not cross the volume and so count for nothing.
        """
        volume, _ = self.encode(batch, generators)
        batch = batch.keyframe()  # only what is there at its time is the truth about the volume
        rays = choose_rays(batch, self.recipe.rays, generators)
        shape = (len(rays) // len(batch), self.renderer.jitters)
        jitter = torch.stack([torch.rand(shape, generator=g, device=g.device) for g in generators])
        points = lidar_points(batch, self.recipe.rays) if self.recipe.render.points_weight > 0 else None
        rendered = self.renderer(volume, rays, jitter.flatten(0, 1), points)
        return self.renderer.loss(rendered, rays), 1 - rendered.hit.float().mean()

    def encode(self, batch, generators):
        """The volume [B, C, Z, Y, X] that rays are cast through, and the masks it was seen through, as `Encoder`'s."""
        volume, masks = self.encoder(batch, generators)
        return self.project(volume), masks

    def in_color(self, batch: Batch) -> bool:
        """Whether the model learns colors and the batch has images."""
        return self.recipe.render.rgb_weight > 0 and batch.images.shape[1] > 0

    def render(self, volume, rays):
        """Render rays without gradients, some at a time; returns rgb [R, 3] in [0, 1] and depth [R] meters."""
        return self.render_surface(volume, rays)[:2]

    @torch.no_grad()
    def render_surface(self, volume, rays):
        """`render` and the surface's normals [R, 3]: unit vectors, LiDAR frame; 0 off the volume."""
        chunk = 8192 if volume.is_cuda else 512  # what fits a CPU's caches takes two thirds of the time
        parts = []
        for i in range(0, len(rays), chunk):
            rendered = self.renderer(volume, rays[i : i + chunk], stop=STOP)
            normal = (rendered.weights[..., None] * rendered.gradient).sum(dim=1)
            parts.append((rendered.rgb.clamp(0, 1), rendered.depth, F.normalize(normal, dim=1)))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

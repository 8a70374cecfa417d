"""The whole pre-training model: mask, encode to a volume, cast rays, render, compare.

All randomness comes from one generator per sample, so a step is a function of (weights, batch, generators).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipad.batch import Batch
from unipad.config import PretrainRecipe
from unipad.model.carving import Carving
from unipad.model.encoder import Encoder
from unipad.model.photometric import sources_of
from unipad.model.rays import Rays, choose_rays, lidar_points, middle_rays
from unipad.model.render import Renderer
from unipad.model.volume import ConvNormReLU3d

# Transmittance below which a ray ends early on a GPU, in pictures and validation metrics: colors are off by at most
# 0.03 of 255 gray levels, depths by at most 1 cm on a ray of 100 m.
STOP = 1e-4


class Pretrain(nn.Module):
    """The encoder and the renderer of one `config.PretrainRecipe`: a batch to losses."""

    def __init__(self, recipe: PretrainRecipe):
        super().__init__()
        self.recipe = recipe
        self.encoder = Encoder(recipe)
        self.project = ConvNormReLU3d(self.encoder.channels, recipe.render.channels)
        self.renderer = Renderer(recipe.render, recipe.grid, recipe.data.feature_channels)
        if not recipe.render.renders:
            self.renderer.requires_grad_(False)  # DDP waits for the gradient of every parameter that requires one
        self.carving = Carving(recipe) if recipe.render.occupancy_weight > 0 else None

    def forward(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of one training step.

        batch:      on the model's device.
        generators: one per sample, on that device.

        Returns:
            losses: name of each term -> its weighted value, the mean over samples.
            missed: fraction of rays that do not cross the volume, and so do not count in the losses; scalar. 0 where no
                    loss casts rays.
        """
        volume, _ = self.encode(batch, generators)
        if self.recipe.render.renders:
            losses, missed = self._rendering_losses(volume, batch, generators)
        else:
            losses, missed = {}, volume.new_zeros(())
        if self.carving is not None:
            losses["occupancy"] = self.recipe.render.occupancy_weight * self.carving.loss(volume, batch)
        return losses, missed

    def _rendering_losses(self, volume, batch, generators):
        """What `forward` returns, without `occupancy`."""
        batch = batch.keyframe()  # the volume shows the keyframe: views of earlier frames do not match it
        rays = patches = choose_rays(batch, self.recipe.rays, generators)
        if self.recipe.rays.strategy == "patch" and batch.images.shape[1]:
            rays = middle_rays(patches, self.recipe.rays)
        shape = (len(rays) // len(batch), self.renderer.jitters)
        jitter = torch.stack([torch.rand(shape, generator=g, device=g.device) for g in generators])
        points = lidar_points(batch, self.recipe.rays) if self.recipe.render.points_weight > 0 else None
        rendered = self.renderer(volume, rays, jitter.flatten(0, 1), points)
        sought = None
        if self.recipe.render.photometric_weight > 0:
            sought = patches, sources_of(batch, self.recipe.rays)
        return self.renderer.loss(rendered, rays, sought), 1 - rendered.hit.float().mean()

    def encode(self, batch: Batch, generators: Sequence[torch.Generator] | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The volume [B, C, Z, Y, X] that rays are cast through, and what of each input is visible
        to the encoder: the masks of `encoder.Encoded`."""
        volume, masks = self.encoder(batch, generators)
        return self.project(volume), masks

    def renders_features(self, batch: Batch) -> bool:
        """Whether the model learns features and the batch has them."""
        return self.recipe.render.features_weight > 0 and batch.features is not None

    def renders_color(self, batch: Batch) -> bool:
        """Whether the model learns colors and the batch has images."""
        return self.recipe.render.rgb_weight > 0 and batch.images.shape[1] > 0

    def render(self, volume: Tensor, rays: Rays) -> tuple[Tensor, Tensor]:
        """Render rays in chunks, without gradients: rgb [R, 3] in [0, 1] and depth [R] meters."""
        return self.render_surface(volume, rays)[:2]

    def render_pixels(self, volume: Tensor, rays: Rays) -> tuple[Tensor, Tensor | None]:
        """Likewise, rgb and features [R, F]; None for features unless they are learned and `rays` have some."""
        parts = [(rendered.rgb.clamp(0, 1), rendered.features) for rendered in self._in_chunks(volume, rays)]
        rgb, features = zip(*parts, strict=True)
        return torch.cat(rgb), None if features[0] is None else torch.cat(features)

    def render_surface(self, volume: Tensor, rays: Rays) -> tuple[Tensor, Tensor, Tensor]:
        """What `render` returns, and the surface normals [R, 3]: unit vectors, LiDAR frame; 0 for rays that miss the
        volume."""
        parts = []
        for rendered in self._in_chunks(volume, rays):
            normal = (rendered.weights[..., None] * rendered.gradient).sum(dim=1)
            parts.append((rendered.rgb.clamp(0, 1), rendered.depth, F.normalize(normal, dim=1)))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def _in_chunks(self, volume, rays):
        """Yields `Rendered` of consecutive rays, without gradients."""
        chunk = 8192 if volume.is_cuda else 512  # rays; 512 fit a CPU's caches: a third less time there than with 8192
        for i in range(0, len(rays), chunk):
            with torch.no_grad():
                rendered = self.renderer(volume, rays[i : i + chunk], stop=STOP)
            yield rendered

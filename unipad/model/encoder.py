"""The encoder: images, points or both to one volume. It is what survives pre-training."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unipad import config
from unipad.model.camera import CameraEncoder
from unipad.model.lidar import LidarEncoder
from unipad.model.mask import MASK_BLOCK, draw_mask
from unipad.model.sparse import NORM
from unipad.model.unet import UnetEncoder
from unipad.model.volume import ConvNormReLU3d, FrameFusion, view_transform, volume_convs


@dataclass(frozen=True)
class Encoded:
    """What the encoders make of a batch.

    masks: "camera", [B, N, H / 32, W / 32] bool, True where the encoder saw the image (the views as in `Batch`), and
           "lidar", [M, 4] int32 (b, z, y, x) the voxels that it saw; empty where nothing is hidden.
    """

    volume: Tensor  # [B, C, Z, Y, X], LiDAR frame
    masks: dict
    depths: list | None  # per level [B, N, h, w, D] probabilities of the depth bins; None without images


class Encoder(nn.Module):
    """Images, points or both to a volume; the volumes of both are summed and convolved once.

    With camera sweeps every frame of images has a volume of its own, all of them in the keyframe's LiDAR frame, before
    `FrameFusion` makes one of them.

    It is what survives pre-training: fine-tuning starts from its weights.
    """

    def __init__(self, recipe: config.Recipe):
        super().__init__()
        self.recipe = recipe
        encoders = [encoder for encoder in (recipe.camera, recipe.lidar) if encoder is not None]
        self.channels, *other = {encoder.channels for encoder in encoders}
        assert not other, f"the encoders' volumes have {self.channels} and {other[0]} channels: they must be as many"
        if recipe.camera is not None:
            self.camera = CameraEncoder(recipe.camera)
            self.lift = view_transform(recipe.grid, recipe.camera)
            if recipe.data.camera_sweeps > 1:
                self.frame_fusion = FrameFusion(self.channels, recipe.data.camera_sweeps)
            self.lift_convs = volume_convs(self.channels, recipe.camera.volume_convs)
        if recipe.lidar is not None:
            unet = isinstance(recipe.lidar, config.UnetConfig)
            self.lidar = (UnetEncoder if unet else LidarEncoder)(recipe.lidar, recipe.grid)
            convs = 0 if unet else recipe.lidar.volume_convs
            self.lidar_convs = volume_convs(self.channels, convs, bias=False, **NORM)
        if len(encoders) > 1:
            self.fuse = ConvNormReLU3d(self.channels, self.channels)

    def set_checkpointing(self, on):
        """Whether activations of the ConvNeXt are computed again in the backward pass instead of kept."""
        if self.recipe.camera is not None:
            self.camera.backbone.checkpointing = on

    def forward(self, batch, generators, masked=True):
        """The volume and the masks of `encode`."""
        encoded = self.encode(batch, generators, masked)
        return encoded.volume, encoded.masks

    def encode(self, batch, generators, masked=True):
        """Encode a batch.

        batch:      a `Batch` on the model's device.
        generators: one `torch.Generator` a sample, on that device; None = no chance: no mask, no path is dropped.
        masked:     hide blocks of pixels and voxels, in training and in evaluation.

        Returns `Encoded`.
        """
        masked = masked and generators is not None
        volumes, masks, depths = [], {}, None
        if self.recipe.camera is not None:
            volume, depths = self._encode_images(batch, generators, masked, masks)
            volumes.append(volume)
        if self.recipe.lidar is not None:
            noise = _per_sample(generators, self.lidar.mask_shape) if masked else None
            volume, seen = self.lidar(batch.points, batch.point_counts, noise)
            volumes.append(self.lidar_convs(volume))
            masks |= {"lidar": seen} if masked else {}
        volume = volumes[0] if len(volumes) == 1 else self.fuse(volumes[0] + volumes[1])
        return Encoded(volume, masks, depths)

    def _encode_images(self, batch, generators, masked, masks):
        cfg, mask = self.recipe.camera, None
        B, N, _, H, W = batch.images.shape
        frames = self.recipe.data.camera_sweeps
        assert batch.frames == frames, f"a batch with {batch.frames} frames of images, and the recipe has {frames}"
        if masked:
            h, w = H // MASK_BLOCK, W // MASK_BLOCK
            mask = draw_mask(
                _per_sample(generators, (N, h * w)).flatten(0, 1), h, w, cfg.mask_ratio
            )  # [B * N, 1, h, w]
            masks["camera"] = mask.view(B, N, h, w)
        drop_noise = None
        if generators is not None:
            drop_noise = _per_sample(generators, (N, sum(cfg.depths))).flatten(0, 1)
        features, depths = self.camera(batch.images, batch.image_sizes, mask, drop_noise, generators)
        of_frames = [_by_frame(t, frames) for t in (features, depths, [batch.lidar2image])]
        volume = self.lift(*of_frames[:2], *of_frames[2], (H, W))
        if frames > 1:
            volume = self.frame_fusion(volume, batch.frame_lags)
        return self.lift_convs(volume), depths


def _by_frame(tensors, frames):
    """[B, frames * cameras, ...] each -> [B * frames, cameras, ...]: a view transform then takes frames for samples."""
    return [t.unflatten(1, (frames, -1)).flatten(0, 1) for t in tensors]


def _per_sample(generators, shape):
    """[B, *shape] uniform in [0, 1), each sample's from its own generator."""
    return torch.stack([torch.rand(shape, generator=g, device=g.device) for g in generators])

"""The encoder that is pre-trained: images, points or both to one volume. Fine-tuning starts from its weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unipad import config
from unipad.batch import Batch
from unipad.errors import UserError
from unipad.model.camera import CameraEncoder
from unipad.model.lidar import LidarEncoder
from unipad.model.mask import MASK_PATCH, draw_mask
from unipad.model.norm import SyncedBatchNorm
from unipad.model.sparse import NORM
from unipad.model.unet import UnetEncoder
from unipad.model.volume import ConvNormReLU3d, FrameFusion, view_transform, volume_convs


@dataclass(frozen=True)
class Encoded:
    """The output of `Encoder.encode`.

    masks: "camera", [B, N, H / 32, W / 32] bool, True = visible to the encoder, and "lidar", [M, 4] int32 (b, z, y, x)
           of the visible voxels; {} without masking.
    """

    volume: Tensor  # [B, C, Z, Y, X], LiDAR frame
    masks: dict[str, Tensor]
    depths: list[Tensor] | None  # per level [B, N, h, w, D] probabilities of the depth bins; None without images


class Encoder(nn.Module):
    """Images, points or both to one volume; with both, the two volumes are summed and convolved once.

    With camera sweeps, each camera frame is lifted to a volume of its own, in the LiDAR coordinates of the keyframe;
    `FrameFusion` merges these volumes. Fine-tuning starts from the weights of this module.
    """

    def __init__(self, recipe: config.Recipe):
        super().__init__()
        self.recipe = recipe
        cfgs = [cfg for cfg in (recipe.camera, recipe.lidar) if cfg is not None]
        self.channels, *other = {cfg.channels for cfg in cfgs}
        if other:
            raise UserError(
                f"the encoders' volumes have {recipe.camera.channels} and {recipe.lidar.channels} channels; make "
                "--camera.channels and --lidar.channels equal."
            )
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
            # the recipe's momentum replaces that of NORM
            for module in (*self.lidar.modules(), *self.lidar_convs.modules()):
                if isinstance(module, SyncedBatchNorm):
                    module.momentum = recipe.lidar.norm_momentum
        if len(cfgs) > 1:
            self.fuse = ConvNormReLU3d(self.channels, self.channels)

    def set_checkpointing(self, on: bool):
        """Whether to recompute the ConvNeXt's activations in the backward pass instead of keeping them."""
        if self.recipe.camera is not None:
            self.camera.backbone.checkpointing = on

    def forward(
        self, batch: Batch, generators: Sequence[torch.Generator] | None, masked: bool = True
    ) -> tuple[Tensor, dict]:
        """The volume and the masks of `encode`."""
        encoded = self.encode(batch, generators, masked)
        return encoded.volume, encoded.masks

    def encode(self, batch: Batch, generators: Sequence[torch.Generator] | None, masked: bool = True) -> Encoded:
        """Encode a batch.

        batch:      on the model's device.
        generators: one per sample, on that device; None: nothing random, so no mask, no drop path, no dropout.
        masked:     mask image patches and blocks of voxels, also in eval mode; without `generators` nothing is masked.
        """
        masked = masked and generators is not None
        volumes, masks, depths = [], {}, None
        if self.recipe.camera is not None:
            volume, depths = self._encode_images(batch, generators, masked, masks)
            volumes.append(volume)
        if self.recipe.lidar is not None:
            noise = _per_sample(generators, self.lidar.mask_shape) if masked else None
            volume, visible_coords = self.lidar(batch.points, batch.point_counts, noise)
            volumes.append(self.lidar_convs(volume))
            masks |= {"lidar": visible_coords} if masked else {}
        volume = volumes[0] if len(volumes) == 1 else self.fuse(volumes[0] + volumes[1])
        return Encoded(volume, masks, depths)

    def _encode_images(self, batch, generators, masked, masks):
        """The images' volume and depths, as in `Encoded`; puts the mask into `masks`."""
        cfg, mask = self.recipe.camera, None
        B, N, _, H, W = batch.images.shape
        assert batch.images.is_floating_point(), "the images of a batch are divided by `Batch.to`"
        frames = self.recipe.data.camera_sweeps
        assert batch.frames == frames, f"the batch has {batch.frames} frames of images, the recipe {frames}"
        if masked:
            h, w = H // MASK_PATCH, W // MASK_PATCH
            mask = draw_mask(
                _per_sample(generators, (N, h * w)).flatten(0, 1), h, w, cfg.mask_ratio
            )  # [B * N, 1, h, w]
            masks["camera"] = mask.view(B, N, h, w)
        drop_noise = None
        if generators is not None:
            blocks = sum(cfg.depths)  # of the ConvNeXt: here depths are numbers of blocks per stage
            drop_noise = _per_sample(generators, (N, blocks)).flatten(0, 1)  # for drop path
        features, depths = self.camera(batch.images, batch.image_sizes, mask, drop_noise, generators)
        of_frames = [_by_frame(tensors, frames) for tensors in (features, depths, [batch.lidar2image])]
        frame_features, frame_depths, (frame_lidar2image,) = of_frames
        volume = self.lift(frame_features, frame_depths, frame_lidar2image, (H, W), batch.calibration)
        if frames > 1:
            volume = self.frame_fusion(volume, batch.frame_lags)
        return self.lift_convs(volume), depths


def _by_frame(tensors, frames):
    """[B, frames * cameras, ...] each -> [B * frames, cameras, ...]: a view transform then sees frames as samples."""
    return [t.unflatten(1, (frames, -1)).flatten(0, 1) for t in tensors]


def _per_sample(generators, shape):
    """[B, *shape] uniform in [0, 1), each sample from its own generator."""
    return torch.stack([torch.rand(shape, generator=g, device=g.device) for g in generators])

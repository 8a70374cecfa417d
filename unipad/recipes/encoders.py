"""Encoders that several recipes share, and the grids, sweeps and augmentation that go with them."""

from dataclasses import replace

from unipad.config import Augment, CameraConfig, Data, Grid, LidarConfig, UnetConfig

# Range and volume of the released configs for LiDAR voxels of 0.075 m
GRID_075 = Grid(low=(-54.0, -54.0, -5.0), high=(54.0, 54.0, 3.0), cell=(0.6, 0.6, 1.6))

# Camera encoder of the final recipes: one feature level of 256 channels, pooled over depths of 1 to 60 m in 0.5 m steps
CAMERA_075 = CameraConfig(
    fpn_start=3,
    fpn_levels=1,
    channels=256,
    depth_range=(1.0, 60.0),
    depth_bins=118,
    depth="complex",
    view="pool",
)

# Camera encoder of the ablation recipes with the view transform of BEVDet (depth from one convolution) or of BEVDepth
# (from a deeper head, supervised by LiDAR in fine-tuning). The paper's ablation has BEVDet's, but no config is
# released: feature level and depth bins are those of the final recipes.
CAMERA_BEVDET = replace(CAMERA_075, channels=128, depth="simple")
CAMERA_BEVDEPTH = replace(CAMERA_075, channels=128)

# UVTR-CS (cameras with sweeps): no config is released. Three frames, as in UVTR's L2CS3-R101, whose NDS 48.8 and mAP
# 39.2 are those of the paper's baseline.
THREE_FRAMES = Data(sweeps=10, camera_sweeps=3)

# For fine-tuning detection from LiDAR, with or without cameras, and for pre-training for segmentation; angles in
# radians, lengths in meters
LIDAR_AUGMENT = Augment(
    rotation=0.785, scale=(0.9, 1.1), translation=(0.5, 0.5, 0.5), flip_x=0.5, flip_y=0.5, shuffle=True
)

# For two CPU cores and a few minutes, from scratch: a small coarse volume, few rays, and a high initial `variance`,
# which in `Render` means a sharp surface.
TINY_GRID = Grid(low=(-40.0, -40.0, -3.0), high=(40.0, 40.0, 9.0), cell=(1.25, 1.25, 2.0))
TINY_CAMERA = CameraConfig(  # a quarter of ConvNeXt-tiny's width, fewer blocks
    depths=(2, 2, 4, 2),
    widths=(24, 48, 96, 192),
    drop_path=0.0,
    frozen_stages=0,
    fpn_levels=3,
    channels=32,
)
TINY_LIDAR = LidarConfig(
    cell=(0.3125, 0.3125, 0.5),
    mask_block=2,  # about 0.6 m in x and y, as the paper's 8 voxels of 0.075 m
    widths=(16, 32, 32),
    blocks=1,
    sparse_channels=32,
    neck_widths=(32, 64),
    neck_strides=(1, 2),
    neck_layers=1,
    channels=32,
    norm_momentum=0.1,  # after 100 steps, the default 0.01 leaves a third of the initial statistics
)
TINY_UNET = UnetConfig(
    cell=0.3,
    mask_block=2,
    stem=16,
    widths=(24, 32, 48, 48, 32, 32),
    blocks=(1, 1, 1, 1, 1, 1),
    norm_momentum=0.1,
)

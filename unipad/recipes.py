"""The presets: recipes of the paper and of the released configs, and tiny ones for two CPU cores."""

import math
from dataclasses import replace
from pathlib import Path

from unipad.config import (
    Augment,
    CameraConfig,
    Data,
    Detect,
    DetectRecipe,
    Grid,
    LidarConfig,
    Occupancy,
    OccupancyRecipe,
    Optim,
    Paste,
    PretrainRecipe,
    RayChoice,
    Render,
    SegmentRecipe,
    UnetConfig,
)

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
TINY_RAYS = RayChoice(per_view=64, lidar_per_view=40, sky=0.0)  # the other 24 of a view go through pixels of a grid
TINY_RENDER = Render(samples=40, importance=16, variance=0.5)
TINY_OPTIM = Optim(lr=2e-3, backbone_lr_factor=1.0, warmup_steps=20, epochs=6.5, batch_size=1)
# Of the city with features: see `synthetic.class_features`
TINY_FEATURES = Data(image_size=(128, 224), features=Path("features"), feature_channels=16)

CAMERA_075_PRETRAIN = PretrainRecipe(
    grid=GRID_075,
    data=Data(sweeps=10),
    camera=CAMERA_075,
    rays=RayChoice(far_radius=100.0),  # through LiDAR points up to 100 m away
)

TINY_LIDAR_PRETRAIN = PretrainRecipe(
    grid=TINY_GRID,
    data=Data(image_size=(128, 224)),
    augment=Augment(rotation=0.3925, scale=(0.95, 1.05), shuffle=True),
    lidar=TINY_LIDAR,
    rays=replace(TINY_RAYS, lidar_per_view=64),
    # The default variance, not TINY_RENDER's: with the depth loss alone, a sharp surface that has vanished has no
    # gradient, and half of the runs never recovered it.
    render=replace(TINY_RENDER, rgb_weight=0.0, variance=0.3),
    optim=TINY_OPTIM,
)
# uvtr_lidar_vs0.075_pretrain
LIDAR_075_PRETRAIN = PretrainRecipe(
    grid=GRID_075,
    data=Data(sweeps=10),
    augment=Augment(rotation=0.3925, scale=(0.95, 1.05), shuffle=True),
    lidar=LidarConfig(),
    rays=RayChoice(far_radius=100.0),
    render=Render(rgb_weight=0.0, truncation=0.2),  # truncation: of the SDF losses, if they are turned on
    optim=Optim(schedule="one_cycle", lr=2e-4, start_factor=0.1, final_factor=1e-5, batch_size=16),
)


def _with_occupancy(recipe):
    """The recipe with the loss `occupancy` beside its own: not in the paper."""
    return replace(recipe, render=replace(recipe.render, occupancy_weight=1.0))


# Pre-training: modality -> name -> recipe. Comments name the released configs, such as uvtr_cam_vs0.075_pretrain.
PRETRAIN = {
    "camera": {
        "tiny": PretrainRecipe(
            grid=TINY_GRID,
            data=Data(image_size=(128, 224)),
            camera=TINY_CAMERA,
            rays=TINY_RAYS,
            render=TINY_RENDER,
            optim=replace(TINY_OPTIM, epochs=7.5),
        ),
        # The paper's final recipe for cameras (uvtr_cam_vs0.075_pretrain)
        "camera-0.075": CAMERA_075_PRETRAIN,
        "camera-0.075-sweeps": replace(CAMERA_075_PRETRAIN, data=THREE_FRAMES),
        "camera-0.1-bevdet": PretrainRecipe(camera=CAMERA_BEVDET),
        "camera-0.1-bevdepth": PretrainRecipe(camera=CAMERA_BEVDEPTH),
        # The paper's ablation recipe for cameras (uvtr_cam_vs0.1_pretrain): the defaults of `config`, images as stored
        # (in nuScenes 900 x 1600)
        "camera-0.1": PretrainRecipe(camera=CameraConfig()),
        "features-tiny": PretrainRecipe(
            grid=TINY_GRID,
            data=TINY_FEATURES,
            camera=TINY_CAMERA,
            rays=TINY_RAYS,
            render=replace(TINY_RENDER, features_weight=1.0),
            optim=replace(TINY_OPTIM, epochs=7.5),
        ),
        "images-tiny": PretrainRecipe(
            grid=TINY_GRID,
            data=Data(image_size=(128, 224), sweeps=0, sources=(-2, -1, 1, 2)),
            camera=TINY_CAMERA,
            rays=RayChoice(strategy="patch", per_view=64, patch_step=2, sky=0.0),
            # between the two other tiny recipes' variances: from 0.5, it learns far more slowly
            render=replace(TINY_RENDER, variance=0.4, depth_weight=0.0, photometric_weight=3.0),
            optim=replace(TINY_OPTIM, epochs=12),
        ),
        # camera-0.1 without LiDAR, not in the paper; the steps of a patch are as wide, in angles, as in images-tiny
        "camera-0.1-images": PretrainRecipe(
            data=Data(sweeps=0, sources=(-2, -1, 1, 2)),
            camera=CameraConfig(),
            rays=RayChoice(strategy="patch", patch_step=14),
            render=Render(depth_weight=0.0, photometric_weight=3.0),
        ),
    },
    "lidar": {
        "tiny": TINY_LIDAR_PRETRAIN,
        "tiny-occupancy": _with_occupancy(TINY_LIDAR_PRETRAIN),
        "features-tiny": PretrainRecipe(
            grid=TINY_GRID,
            data=TINY_FEATURES,
            augment=Augment(rotation=0.3925, scale=(0.95, 1.05), shuffle=True),
            lidar=TINY_LIDAR,
            rays=TINY_RAYS,  # unlike in "tiny", also through pixels without LiDAR points, such as the sky
            render=replace(TINY_RENDER, rgb_weight=0.0, variance=0.3, features_weight=1.0),
            optim=TINY_OPTIM,
        ),
        "segment-tiny": PretrainRecipe(
            grid=TINY_GRID,
            data=Data(image_size=(128, 224)),
            augment=replace(LIDAR_AUGMENT, translation=(0.0, 0.0, 0.0)),
            lidar=TINY_UNET,
            rays=replace(TINY_RAYS, lidar_per_view=64),
            render=replace(TINY_RENDER, rgb_weight=0.0, variance=0.3),
            optim=TINY_OPTIM,
        ),
        # The paper's recipe for segmentation; no config is released, so the volume is the LiDAR recipe's
        "segment": PretrainRecipe(
            grid=GRID_075,
            augment=LIDAR_AUGMENT,
            lidar=UnetConfig(),
            rays=RayChoice(far_radius=100.0),
            render=Render(rgb_weight=0.0),
            optim=Optim(schedule="one_cycle", lr=2e-4, start_factor=0.1, final_factor=1e-5, epochs=24, batch_size=16),
        ),
        "lidar-0.075-occupancy": _with_occupancy(LIDAR_075_PRETRAIN),
        "lidar-0.075": LIDAR_075_PRETRAIN,
    },
    "fusion": {
        "tiny": PretrainRecipe(
            grid=TINY_GRID,
            data=Data(image_size=(128, 224)),
            camera=TINY_CAMERA,
            lidar=TINY_LIDAR,
            rays=TINY_RAYS,
            render=TINY_RENDER,
            optim=replace(TINY_OPTIM, epochs=5.0),
        ),
        # Trains both encoders of the final recipes jointly, which the original never did: with the optimizer of the
        # camera recipe and the augmentation of the LiDAR recipe.
        "fusion-0.075": PretrainRecipe(
            grid=GRID_075,
            data=Data(sweeps=10),
            augment=Augment(rotation=0.3925, scale=(0.95, 1.05), shuffle=True),
            camera=CAMERA_075,
            lidar=LidarConfig(),
            rays=RayChoice(far_radius=100.0),
        ),
    },
}

# Fine-tuning for detection

# Head of the camera ablations: no denoising, all code weights are 1, no NMS
PLAIN_HEAD = Detect(denoising=False, code_weights=(1.0,) * 10, nms=())
LIDAR_OPTIM = Optim(
    schedule="one_cycle", lr=1e-3, start_factor=0.1, final_factor=1e-5, clip=10.0, epochs=20, batch_size=16
)
CAMERA_AUGMENT = Augment(rotation=0.3925, scale=(0.95, 1.05), photometric=True, grid_mask=0.7)
FUSION_AUGMENT = replace(LIDAR_AUGMENT, photometric=True, grid_mask=0.7)
FUSION_OPTIM = replace(LIDAR_OPTIM, lr=4e-4, encoder_lr_factor=0.1, clip=35.0, batch_size=8)

TINY_HEAD = Detect(queries=200, layers=3, heads=4, hidden=128, dropout=0.0, noise_groups=5)
TINY_DETECT_OPTIM = Optim(lr=1e-3, backbone_lr_factor=1.0, warmup_steps=50, epochs=15, batch_size=1)


def _unmasked(encoder, **others):
    """A full-size encoder as fine-tuning uses it: nothing is masked, and three convolutions on its volume are added."""
    return replace(encoder, mask_ratio=0.0, volume_convs=3, **others)


CAMERA_075_UNMASKED = _unmasked(CAMERA_075, depth_weight=1.0)  # LiDAR supervises the depth head
LIDAR_UNMASKED = _unmasked(LidarConfig())
TINY_CAMERA_UNMASKED = replace(TINY_CAMERA, mask_ratio=0.0, depth_weight=1.0)
TINY_LIDAR_UNMASKED = replace(TINY_LIDAR, mask_ratio=0.0)
CAMERA_075_DETECT = DetectRecipe(
    grid=GRID_075,
    data=Data(sweeps=10),
    augment=CAMERA_AUGMENT,
    camera=CAMERA_075_UNMASKED,
    detect=Detect(iou_in_score=False, nms=()),
    optim=Optim(epochs=24),
)
CAMERA_01_ABLATION = DetectRecipe(
    augment=CAMERA_AUGMENT, camera=_unmasked(CameraConfig()), detect=PLAIN_HEAD, label_fraction=0.5
)

# modality -> name -> recipe. The released configs state samples per GPU, but not how many GPUs: batch sizes here are
# for four GPUs. Comments name the released configs.
DETECT = {
    "camera": {
        "tiny": DetectRecipe(
            grid=TINY_GRID,
            data=Data(image_size=(128, 224)),
            augment=replace(CAMERA_AUGMENT, grid_mask=0.0),
            camera=TINY_CAMERA_UNMASKED,
            detect=TINY_HEAD,
            optim=replace(TINY_DETECT_OPTIM, epochs=12),
        ),
        # final_uvtr_cam_vs0.075_finetune
        "camera-0.075": CAMERA_075_DETECT,
        "camera-0.075-sweeps": replace(CAMERA_075_DETECT, data=THREE_FRAMES),
        "camera-0.1-bevdet": replace(CAMERA_01_ABLATION, camera=_unmasked(CAMERA_BEVDET)),
        "camera-0.1-bevdepth": replace(CAMERA_01_ABLATION, camera=_unmasked(CAMERA_BEVDEPTH, depth_weight=1.0)),
        # abl_uvtr_cam_vs0.1_finetune
        "camera-0.1": CAMERA_01_ABLATION,
    },
    "lidar": {
        "tiny": DetectRecipe(
            grid=TINY_GRID,
            data=Data(cameras=False),
            # no flips: cars would drive on the left
            augment=Augment(rotation=0.3925, scale=(0.95, 1.05), shuffle=True),
            lidar=TINY_LIDAR_UNMASKED,
            detect=TINY_HEAD,
            optim=TINY_DETECT_OPTIM,
        ),
        # abl_uvtr_lidar_vs0.075_finetune
        "lidar-0.075-ablation": DetectRecipe(
            grid=GRID_075,
            data=Data(cameras=False, sweeps=10),
            augment=LIDAR_AUGMENT,
            lidar=LIDAR_UNMASKED,
            detect=Detect(nms=()),
            optim=LIDAR_OPTIM,
            label_fraction=0.2,
        ),
        # final_uvtr_lidar_vs0.075_finetune
        "lidar-0.075": DetectRecipe(
            grid=GRID_075,
            data=Data(cameras=False, sweeps=10),
            augment=LIDAR_AUGMENT,
            lidar=LIDAR_UNMASKED,
            optim=LIDAR_OPTIM,
            balanced=True,
            paste=Paste(),
        ),
    },
    "fusion": {
        "tiny": DetectRecipe(
            grid=TINY_GRID,
            data=Data(image_size=(128, 224)),
            augment=replace(CAMERA_AUGMENT, grid_mask=0.0, shuffle=True),
            camera=TINY_CAMERA_UNMASKED,
            lidar=TINY_LIDAR_UNMASKED,
            detect=TINY_HEAD,
            optim=replace(TINY_DETECT_OPTIM, epochs=10),
        ),
        # abl_uvtr_fusion_vs0.075_finetune
        "fusion-0.075-ablation": DetectRecipe(
            grid=GRID_075,
            data=Data(sweeps=10),
            augment=FUSION_AUGMENT,
            camera=CAMERA_075_UNMASKED,
            lidar=LIDAR_UNMASKED,
            optim=replace(FUSION_OPTIM, epochs=12),
            label_fraction=0.2,
        ),
        # final_uvtr_fusion_vs0.075_finetune
        "fusion-0.075": DetectRecipe(
            grid=GRID_075,
            data=Data(sweeps=10),
            augment=FUSION_AUGMENT,
            camera=CAMERA_075_UNMASKED,
            lidar=LIDAR_UNMASKED,
            optim=FUSION_OPTIM,
            paste=Paste(),
        ),
    },
}

# Fine-tuning for segmentation

# With flips, also in the tiny recipe: the classes of points do not depend on a heading, unlike boxes
SEGMENT_AUGMENT = Augment(rotation=math.pi, scale=(0.9, 1.1), flip_x=0.5, flip_y=0.5, shuffle=True)

# modality -> name -> recipe
SEGMENT = {
    "lidar": {
        "tiny": SegmentRecipe(
            grid=TINY_GRID,
            data=Data(cameras=False),
            augment=SEGMENT_AUGMENT,
            lidar=replace(TINY_UNET, mask_ratio=0.0),
            optim=Optim(schedule="one_cycle", lr=5e-3, start_factor=0.1, final_factor=1e-3, epochs=17.5, batch_size=2),
        ),
        # Pointcept's semseg-spunet-v1m1-0-base, with which the paper fine-tunes, plus the Lovász softmax
        "segment": SegmentRecipe(
            grid=GRID_075,
            data=Data(cameras=False),
            augment=SEGMENT_AUGMENT,
            lidar=UnetConfig(cell=0.05, mask_ratio=0.0),
            optim=Optim(
                schedule="one_cycle",
                lr=2e-3,
                weight_decay=5e-3,
                start_factor=0.1,
                final_factor=1e-3,
                rise=0.04,
                momentum=0.95,
                min_momentum=0.85,
                epochs=50,
                batch_size=12,
            ),
        ),
    },
}

# Fine-tuning for occupancy. The paper has none: encoders are those of detection, and so is what moves their inputs; 24
# epochs are those of SparseOcc and FlashOcc on Occ3D-nuScenes. The loss of depth bins has a tenth of its weight there.
# No frames are drawn by the classes of their boxes, and no objects are pasted, since the labels of voxels lack them.


def _for_occupancy(camera):
    return replace(camera, depth_weight=0.1 * camera.depth_weight)


TINY_OCCUPANCY = Occupancy(max_voxels=20_000)
TINY_OCCUPANCY_OPTIM = Optim(
    schedule="one_cycle", lr=3e-3, backbone_lr_factor=1.0, start_factor=0.1, final_factor=1e-3, epochs=8, batch_size=1
)

# modality -> name -> recipe
OCCUPANCY = {
    "camera": {
        "tiny": OccupancyRecipe(
            grid=TINY_GRID,
            data=Data(image_size=(128, 224)),
            augment=replace(CAMERA_AUGMENT, grid_mask=0.0),
            camera=_for_occupancy(TINY_CAMERA_UNMASKED),
            occupancy=TINY_OCCUPANCY,
            optim=TINY_OCCUPANCY_OPTIM,
        ),
        "camera-0.075": OccupancyRecipe(
            grid=GRID_075,
            data=Data(sweeps=10),
            augment=CAMERA_AUGMENT,
            camera=_for_occupancy(CAMERA_075_UNMASKED),
            optim=Optim(epochs=24),
        ),
        "camera-0.1": OccupancyRecipe(augment=CAMERA_AUGMENT, camera=_unmasked(CameraConfig()), optim=Optim(epochs=24)),
    },
    "lidar": {
        "tiny": OccupancyRecipe(
            grid=TINY_GRID,
            data=Data(cameras=False),
            augment=Augment(rotation=0.3925, scale=(0.95, 1.05), flip_x=0.5, flip_y=0.5, shuffle=True),
            lidar=TINY_LIDAR_UNMASKED,
            occupancy=TINY_OCCUPANCY,
            optim=TINY_OCCUPANCY_OPTIM,
        ),
        "lidar-0.075": OccupancyRecipe(
            grid=GRID_075,
            data=Data(cameras=False, sweeps=10),
            augment=LIDAR_AUGMENT,
            lidar=LIDAR_UNMASKED,
            optim=replace(LIDAR_OPTIM, epochs=24),
        ),
    },
    "fusion": {
        "tiny": OccupancyRecipe(
            grid=TINY_GRID,
            data=Data(image_size=(128, 224)),
            augment=replace(CAMERA_AUGMENT, grid_mask=0.0, shuffle=True),
            camera=_for_occupancy(TINY_CAMERA_UNMASKED),
            lidar=TINY_LIDAR_UNMASKED,
            occupancy=TINY_OCCUPANCY,
            optim=replace(TINY_OCCUPANCY_OPTIM, epochs=6),
        ),
        "fusion-0.075": OccupancyRecipe(
            grid=GRID_075,
            data=Data(sweeps=10),
            augment=FUSION_AUGMENT,
            camera=_for_occupancy(CAMERA_075_UNMASKED),
            lidar=LIDAR_UNMASKED,
            optim=replace(FUSION_OPTIM, epochs=24),
        ),
    },
}

# Default presets with --data-root, by modality, or by "segment" with --task segment; on the synthetic city it is "tiny"
DEFAULT_PRESET = {"camera": "camera-0.1", "lidar": "lidar-0.075", "fusion": "fusion-0.075", "segment": "segment"}

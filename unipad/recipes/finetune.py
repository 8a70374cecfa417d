"""Recipes of fine-tuning for detection, segmentation and occupancy, by modality and name.

The released configs state samples per GPU, but not how many GPUs: batch sizes here are for four GPUs. Comments name the
released configs.
"""

import math
from dataclasses import replace

from unipad.config import (
    Augment,
    CameraConfig,
    Data,
    Detect,
    DetectRecipe,
    LidarConfig,
    Occupancy,
    OccupancyRecipe,
    Optim,
    Paste,
    SegmentRecipe,
    UnetConfig,
)
from unipad.recipes.encoders import (
    CAMERA_075,
    CAMERA_BEVDEPTH,
    CAMERA_BEVDET,
    GRID_075,
    LIDAR_AUGMENT,
    THREE_FRAMES,
    TINY_CAMERA,
    TINY_GRID,
    TINY_LIDAR,
    TINY_UNET,
)

# Detection

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

# Segmentation

# With flips, also in the tiny recipe: the classes of points do not depend on a heading, unlike boxes
SEGMENT_AUGMENT = Augment(rotation=math.pi, scale=(0.9, 1.1), flip_x=0.5, flip_y=0.5, shuffle=True)

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

# Occupancy. The paper has none: encoders are those of detection, and so is what moves their inputs; 24
# epochs are those of SparseOcc and FlashOcc on Occ3D-nuScenes. The loss of depth bins has a tenth of its weight there.
# No frames are drawn by the classes of their boxes, and no objects are pasted, since the labels of voxels lack them.


def _for_occupancy(camera):
    return replace(camera, depth_weight=0.1 * camera.depth_weight)


TINY_OCCUPANCY = Occupancy(max_voxels=20_000)
TINY_OCCUPANCY_OPTIM = Optim(
    schedule="one_cycle", lr=3e-3, backbone_lr_factor=1.0, start_factor=0.1, final_factor=1e-3, epochs=8, batch_size=1
)

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

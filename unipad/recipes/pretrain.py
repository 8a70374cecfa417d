"""Recipes of pre-training, by modality and name.

Comments name the released configs, such as uvtr_cam_vs0.075_pretrain.
"""

from dataclasses import replace
from pathlib import Path

from unipad.config import Augment, CameraConfig, Data, LidarConfig, Optim, PretrainRecipe, RayChoice, Render, UnetConfig
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
    """The recipe with the loss `occupancy` added: not in the paper."""
    return replace(recipe, render=replace(recipe.render, occupancy_weight=1.0))


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
            # the default variance, as in the LiDAR recipe: from sharper surfaces, it learns more slowly
            render=replace(TINY_RENDER, variance=0.3, depth_weight=0.0, photometric_weight=3.0),
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

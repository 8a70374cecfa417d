"""Every setting of the method as frozen dataclasses, and the recipes of the paper as PRESETS.

A recipe says what is computed. How long, where and with how many workers belongs to the scripts' flags.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Grid:
    """The feature volume [C, Z, Y, X] in the LiDAR frame; all triples are (x, y, z) in metres."""

    low: tuple[float, float, float] = (-51.2, -51.2, -5.0)
    high: tuple[float, float, float] = (51.2, 51.2, 3.0)
    cell: tuple[float, float, float] = (0.8, 0.8, 1.6)

    @property
    def shape(self):
        """Number of cells (X, Y, Z)."""
        return tuple(round((h - l) / c) for l, h, c in zip(self.low, self.high, self.cell, strict=True))

    @property
    def scale(self):
        """Metres to the renderer's unit: 1 / the largest |coordinate| of the range."""
        return 1.0 / max(abs(v) for v in (*self.low, *self.high))


@dataclass(frozen=True)
class Data:
    image_size: tuple[int, int] | None = None  # (height, width) images are resized to; None keeps the file's
    sweeps: int = 1  # LiDAR frames in one sample: the keyframe and the sweeps before it


@dataclass(frozen=True)
class Camera:
    """Masked ConvNeXt, FPN and depth head."""

    depths: tuple[int, ...] = (3, 3, 27, 3)  # blocks per stage
    widths: tuple[int, ...] = (96, 192, 384, 768)  # channels per stage
    drop_path: float = 0.2  # rate at the last block, rising linearly from 0
    frozen_stages: int = 1  # the first stages (and their down-sampling) keep their weights
    mask_ratio: float = 0.3  # share of 32-pixel blocks hidden from the encoder; 0 = no masking
    fpn_start: int = 1  # first stage the FPN takes
    fpn_levels: int = 4  # feature levels out; those beyond the stages come from stride-2 convolutions
    channels: int = 128  # of the FPN levels and of the volume
    depth_range: tuple[float, float] = (0.0, 64.0)  # metres along the optical axis
    depth_bins: int = 64


@dataclass(frozen=True)
class Lidar:
    """Voxels of the point cloud, masked; residual sparse encoder; dense neck over its output.

    The encoder halves the resolution between its stages, so `cell` is the grid's cell over 2^(stages - 1).
    """

    cell: tuple[float, float, float] = (0.075, 0.075, 0.2)  # (x, y, z) metres of the encoder's voxels
    max_points: int = 10  # of a voxel; its feature is their mean
    max_voxels: tuple[int, int] = (120_000, 160_000)  # of a sample, in training and in evaluation
    mask_ratio: float = 0.8  # share of the occupied blocks hidden from the encoder; 0 = no masking
    mask_block: int = 8  # voxels along the edge of a block
    learnable_token: bool = False  # hidden voxels stay, with a learned feature, instead of being removed
    widths: tuple[int, ...] = (16, 32, 64, 128)  # channels per stage of the encoder
    blocks: int = 2  # residual blocks per stage
    sparse_channels: int = 256  # out of the encoder
    neck_widths: tuple[int, ...] = (128, 256, 512)  # channels per branch of the neck
    neck_strides: tuple[int, ...] = (1, 2, 4)  # in x and y
    neck_layers: int = 5  # per branch, after the one that strides
    channels: int = 256  # of the volume


@dataclass(frozen=True)
class RayChoice:
    """Which rays are cast in a training step. Radii in metres, in the ground plane of the LiDAR."""

    strategy: str = "depth"  # depth: LiDAR points first; random: pixels; dilation: every `dilation`-th pixel
    per_view: int = 512
    lidar_per_view: int = 512  # at most so many of them through LiDAR points (depth)
    near_radius: float = 3.0
    far_radius: float = 50.0
    pixel_interval: int = 4  # the pixels that fill up a view lie on this grid
    dilation: int = 16
    sky: float = 0.4  # the top share of an image that fill-up pixels avoid


@dataclass(frozen=True)
class Render:
    """Field, samplers and losses of the renderer."""

    method: str = "neus"  # neus | volsdf | unisurf
    channels: int = 32  # of the rendered volume
    hidden: int = 16  # width of both decoders and of the geometry feature
    sdf_layers: int = 6
    rgb_layers: int = 4
    variance: float = 0.3  # initial value; inverse deviation = exp(10 * variance)
    near: float = 1.0  # metres from the camera where rays start
    samples: int = 72  # stratified
    importance: int = 24  # drawn where the surface seems to be
    search: int = 128  # volsdf, unisurf: samples that look for the surface first and are not rendered
    truncation: float = 0.1  # metres around the LiDAR depth, for the SDF losses
    depth_weight: float = 10.0
    rgb_weight: float = 10.0
    free_space_weight: float = 0.0
    sdf_weight: float = 0.0
    eikonal_weight: float = 0.0
    points_weight: float = 0.0  # |sdf| at the LiDAR points


@dataclass(frozen=True)
class Optim:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = 2e-4  # for `batch_size` samples a step
    backbone_lr: float = 0.1  # factor of lr for the image backbone
    weight_decay: float = 0.01
    clip: float = 35.0  # norm of the gradient
    warmup_steps: int = 500
    warmup_start: float = 1 / 3  # factor of lr at step 0
    final: float = 1e-3  # factor of lr at the last step
    epochs: float = 12
    batch_size: int = 4  # samples per step, over all processes


@dataclass(frozen=True)
class Recipe:
    """One pre-training recipe."""

    grid: Grid = field(default_factory=Grid)
    data: Data = field(default_factory=Data)
    camera: Camera = field(default_factory=Camera)
    rays: RayChoice = field(default_factory=RayChoice)
    render: Render = field(default_factory=Render)
    optim: Optim = field(default_factory=Optim)


# ConvNeXt sizes: (blocks per stage, channels per stage)
CONVNEXT = {
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
}

PRESETS = {
    # The paper's ablation recipe for cameras (uvtr_cam_vs0.1_pretrain); nuScenes at 900 x 1600.
    "camera-0.1": Recipe(),
    # Two CPU cores, a few minutes, weights from scratch: small images, a near and coarse volume, a quarter of
    # ConvNeXt-tiny's width, a surface that starts sharp, and a third of the rays for what no LiDAR point shows.
    "tiny": Recipe(
        grid=Grid(low=(-40.0, -40.0, -3.0), high=(40.0, 40.0, 9.0), cell=(1.25, 1.25, 2.0)),
        data=Data(image_size=(128, 224)),
        camera=Camera(
            depths=(2, 2, 4, 2),
            widths=(24, 48, 96, 192),
            drop_path=0.0,
            frozen_stages=0,
            fpn_levels=3,
            channels=32,
        ),
        rays=RayChoice(per_view=64, lidar_per_view=40, sky=0.0),
        render=Render(samples=40, importance=16, variance=0.5),
        optim=Optim(lr=2e-3, backbone_lr=1.0, warmup_steps=20, epochs=6.5, batch_size=1),
    ),
}

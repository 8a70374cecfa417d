"""Every setting of the method as frozen dataclasses, and the recipes of the paper as PRESETS.

A recipe says what is computed. How long, where and with how many workers belongs to the scripts' flags.
"""

from dataclasses import dataclass, field, replace


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
    cameras: bool = True  # False: no image is read, and rays start at the LiDAR
    image_size: tuple[int, int] | None = None  # (height, width) images are resized to; None keeps the file's
    sweeps: int = 1  # LiDAR frames in one sample: the keyframe and the sweeps before it


@dataclass(frozen=True)
class Augment:
    """How training samples vary."""

    rotation: float = 0.0  # radians about the vertical axis, at most so much either way
    scale: tuple[float, float] = (1.0, 1.0)  # smallest and largest factor of all lengths
    shuffle: bool = False  # points in random order: decides which of a voxel count where there are too many


@dataclass(frozen=True)
class Camera:
    """Masked ConvNeXt, FPN, depth head and view transform.

    gather: every voxel takes what the views see at its corner. Bins run from one end of the depth range to the other.
    pool:   every pixel gives to the voxels along its ray. Bins stand at their lower edges; one feature level.
    """

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
    depth: str = "simple"  # the head: simple (a 1x1 convolution) | complex (residual blocks and ASPP)
    aspp_channels: int = 96  # complex: of each scale
    depth_weight: float = 0.0  # of the loss that holds the head's depths against the LiDAR's; fine-tuning has 1
    view: str = "gather"  # gather | pool
    truncate: bool = False  # pool: count points up to a voxel below the grid in its lowest voxels, as the original does


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
class Detect:
    """The detection head that fine-tuning puts on the volume, and its losses. Classes in the order of `data.tables`."""

    denoising: bool = True  # UVTR-DN: learns from noisy ground truth too, and scores by a guessed IoU; False: UVTR
    queries: int = 900
    layers: int = 6
    heads: int = 8  # of the attention among queries
    hidden: int = 512  # of the MLP of a layer
    dropout: float = 0.1
    classes: int = 10
    focal_gamma: float = 2.0
    focal_alpha: float = 0.25
    class_weight: float = 2.0  # in the loss and in the assignment
    box_weight: float = 0.25  # in the loss and in the assignment
    code_weights: tuple[float, ...] = (2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2)  # see `model.boxes`
    iou_weight: float = 0.5
    noise_weight: float = 1.0  # of all losses of noisy ground truth
    noise_groups: int = 10  # copies of it, at most; together not more than there are queries
    noise_scale: float = 1.0  # largest shift of a centre, in halves of the box's size
    noise_split: float = 0.75  # share of that shift beyond which the copy counts as background
    kept: int = 300  # boxes of a sample, before suppression
    least_score: float = 0.0
    centre_low: tuple[float, float, float] = (-61.2, -61.2, -10.0)  # metres; boxes with a centre outside are dropped
    centre_high: tuple[float, float, float] = (61.2, 61.2, 10.0)
    # (class, IoU from above beyond which the worse box goes): barrier, motorcycle, traffic cone; none in the ablations
    nms: tuple[tuple[int, float], ...] = ((5, 0.2), (6, 0.2), (9, 0.2))


@dataclass(frozen=True)
class Optim:
    """AdamW.

    cosine:    linear warm-up times a cosine down from the first step.
    one_cycle: a cosine up, another one down; the momentum does the opposite.
    """

    schedule: str = "cosine"  # cosine | one_cycle
    lr: float = 2e-4  # the peak, for `batch_size` samples a step
    backbone_lr: float = 0.1  # factor of lr for the image backbone
    weight_decay: float = 0.01
    clip: float = 35.0  # norm of the gradient
    start: float = 1 / 3  # factor of lr at step 0
    final: float = 1e-3  # factor of lr at the last step
    warmup_steps: int = 500  # cosine
    rise: float = 0.4  # one_cycle: share of the steps to the peak
    momentum: float = 0.9  # AdamW's first beta
    least_momentum: float = 0.9 * 0.85 / 0.95  # one_cycle: at the peak of lr
    epochs: float = 12
    batch_size: int = 4  # samples per step, over all processes


@dataclass(frozen=True)
class Recipe:
    """One pre-training recipe. An encoder that is None is not there."""

    grid: Grid = field(default_factory=Grid)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    camera: Camera | None = None
    lidar: Lidar | None = None
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

# The released configs' ranges and volumes, by the size of the LiDAR voxels that they are made for
GRID_075 = Grid(low=(-54.0, -54.0, -5.0), high=(54.0, 54.0, 3.0), cell=(0.6, 0.6, 1.6))

# The final recipes' camera: one level of features, 256 channels, pooled by depths from 1 to 60 m in steps of 0.5
CAMERA_075 = Camera(
    fpn_start=3,
    fpn_levels=1,
    channels=256,
    depth_range=(1.0, 60.0),
    depth_bins=118,
    depth="complex",
    view="pool",
)

# Two CPU cores, a few minutes, weights from scratch: a near and coarse volume, few rays, a surface that starts sharp.
TINY_GRID = Grid(low=(-40.0, -40.0, -3.0), high=(40.0, 40.0, 9.0), cell=(1.25, 1.25, 2.0))
TINY_CAMERA = Camera(  # a quarter of ConvNeXt-tiny's width
    depths=(2, 2, 4, 2),
    widths=(24, 48, 96, 192),
    drop_path=0.0,
    frozen_stages=0,
    fpn_levels=3,
    channels=32,
)
TINY_LIDAR = Lidar(
    cell=(0.3125, 0.3125, 0.5),
    mask_block=2,  # as many metres as the paper's 8 voxels
    widths=(16, 32, 32),
    blocks=1,
    sparse_channels=32,
    neck_widths=(32, 64),
    neck_strides=(1, 2),
    neck_layers=1,
    channels=32,
)
TINY_RAYS = RayChoice(per_view=64, lidar_per_view=40, sky=0.0)  # a third of the rays for what no LiDAR point shows
TINY_RENDER = Render(samples=40, importance=16, variance=0.5)
TINY_OPTIM = Optim(lr=2e-3, backbone_lr=1.0, warmup_steps=20, epochs=6.5, batch_size=1)

# modality -> name -> recipe; the last of a modality is the default where there are real data
PRESETS = {
    "camera": {
        "tiny": Recipe(
            grid=TINY_GRID,
            data=Data(image_size=(128, 224)),
            camera=TINY_CAMERA,
            rays=TINY_RAYS,
            render=TINY_RENDER,
            optim=replace(TINY_OPTIM, epochs=7.5),
        ),
        # The paper's final recipe for cameras (uvtr_cam_vs0.075_pretrain)
        "camera-0.075": Recipe(
            grid=GRID_075, data=Data(sweeps=10), camera=CAMERA_075, rays=RayChoice(far_radius=100.0)
        ),
        # The paper's ablation recipe for cameras (uvtr_cam_vs0.1_pretrain); nuScenes at 900 x 1600.
        "camera-0.1": Recipe(camera=Camera()),
    },
    "lidar": {
        "tiny": Recipe(
            grid=TINY_GRID,
            data=Data(image_size=(128, 224)),
            augment=Augment(rotation=0.3925, scale=(0.95, 1.05), shuffle=True),
            lidar=TINY_LIDAR,
            rays=replace(TINY_RAYS, lidar_per_view=64),
            # Depth alone gives no gradient where a sharp surface has vanished: one run in two never found it again.
            render=replace(TINY_RENDER, rgb_weight=0.0, variance=0.3),
            optim=TINY_OPTIM,
        ),
        # uvtr_lidar_vs0.075_pretrain
        "lidar-0.075": Recipe(
            grid=GRID_075,
            data=Data(sweeps=10),
            augment=Augment(rotation=0.3925, scale=(0.95, 1.05), shuffle=True),
            lidar=Lidar(),
            rays=RayChoice(far_radius=100.0),
            render=Render(rgb_weight=0.0, truncation=0.2),
            optim=Optim(schedule="one_cycle", lr=2e-4, start=0.1, final=1e-5, batch_size=16),
        ),
    },
    "fusion": {
        "tiny": Recipe(
            grid=TINY_GRID,
            data=Data(image_size=(128, 224)),
            camera=TINY_CAMERA,
            lidar=TINY_LIDAR,
            rays=TINY_RAYS,
            render=TINY_RENDER,
            optim=replace(TINY_OPTIM, epochs=5.0),
        ),
        # Both encoders of the final recipes trained jointly, which the original never did: the optimiser is the
        # cameras', the augmentation the LiDAR's.
        "fusion-0.075": Recipe(
            grid=GRID_075,
            data=Data(sweeps=10),
            augment=Augment(rotation=0.3925, scale=(0.95, 1.05), shuffle=True),
            camera=CAMERA_075,
            lidar=Lidar(),
            rays=RayChoice(far_radius=100.0),
        ),
    },
}

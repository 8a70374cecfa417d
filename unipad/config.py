"""Every setting of the method as frozen dataclasses. `recipes` has the values that the paper used.

A recipe says what is computed. How long, where and with how many workers belongs to the scripts' flags.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Grid:
    """The feature volume [C, Z, Y, X] in the LiDAR frame; all triples are (x, y, z) in meters."""

    low: tuple[float, float, float] = (-51.2, -51.2, -5.0)
    high: tuple[float, float, float] = (51.2, 51.2, 3.0)
    cell: tuple[float, float, float] = (0.8, 0.8, 1.6)

    @property
    def shape(self):
        """Number of cells (X, Y, Z)."""
        return tuple(round((h - l) / c) for l, h, c in zip(self.low, self.high, self.cell, strict=True))

    @property
    def scale(self):
        """Meters to the renderer's unit: 1 / the largest |coordinate| of the range."""
        return 1.0 / max(abs(v) for v in (*self.low, *self.high))


@dataclass(frozen=True)
class Data:
    cameras: bool = True  # False: no image is read, and rays start at the LiDAR
    image_size: tuple[int, int] | None = None  # (height, width) images are resized to; None keeps the file's
    sweeps: int = 1  # LiDAR frames in one sample: the keyframe and the sweeps before it
    camera_sweeps: int = 1  # frames of images in one sample: the keyframe's and those before it, 6 at most
    camera_rate: float = 0.0  # Hz: a frame's time is its number over it, as in the original (12); 0: the tables' time


@dataclass(frozen=True)
class Augment:
    """How training samples vary: points, cameras and boxes together in the order rotation, scale, shift, mirror."""

    rotation: float = 0.0  # radians about the vertical axis, at most so much either way
    scale: tuple[float, float] = (1.0, 1.0)  # smallest and largest factor of all lengths
    translation: tuple[float, float, float] = (0.0, 0.0, 0.0)  # standard deviation of a shift along x, y, z, meters
    flip_x: float = 0.0  # probability that left and right change places: x changes its sign
    flip_y: float = 0.0  # probability that front and back do: y changes its sign
    shuffle: bool = False  # points in random order: decides which of a voxel count where there are too many
    photometric: bool = False  # every image's brightness, contrast, saturation, hue and order of channels
    grid_mask: float = 0.0  # probability that a grid hides parts of the images


@dataclass(frozen=True)
class Paste:
    """Cut-and-paste: objects of other training frames that fill a sample up. Classes in the order of `data.tables`."""

    counts: tuple[int, ...] = (2, 3, 7, 4, 6, 2, 6, 6, 2, 2)  # objects of each class that a sample is filled up to
    least_points: int = 5  # LiDAR points of an object, over all sweeps of its sample
    off_epochs: float = 5.0  # the last epochs, which paste nothing


@dataclass(frozen=True)
class CameraConfig:
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
    depth_range: tuple[float, float] = (0.0, 64.0)  # meters along the optical axis
    depth_bins: int = 64
    volume_convs: int = 0  # 3 x 3 x 3 convolutions of the volume; pre-training has none
    depth: str = "simple"  # the head: simple (a 1x1 convolution) | complex (residual blocks and ASPP)
    aspp_channels: int = 96  # complex: of each scale
    depth_weight: float = 0.0  # of the loss that holds the head's depths against the LiDAR's; fine-tuning has 1
    view: str = "gather"  # gather | pool
    truncate: bool = False  # pool: count points up to a voxel below the grid in its lowest voxels, as the original does


@dataclass(frozen=True)
class LidarConfig:
    """Voxels of the point cloud, masked; residual sparse encoder; dense neck over its output.

    The encoder halves the resolution between its stages, so `cell` is the grid's cell over 2^(stages - 1).
    """

    cell: tuple[float, float, float] = (0.075, 0.075, 0.2)  # (x, y, z) meters of the encoder's voxels
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
    volume_convs: int = 0  # 3 x 3 x 3 convolutions of the volume; pre-training has none


@dataclass(frozen=True)
class UnetConfig:
    """SpUNet: a sparse U-Net over one point of each voxel, with as many stages up as down.

    For pre-training the features of its points are gathered in the grid's cells; segmentation takes the points' own.
    """

    cell: float = 0.1  # meters, the voxels' edge
    mask_ratio: float = 0.8  # share of the occupied blocks hidden in pre-training; 0 = no masking
    mask_block: int = 8  # voxels along the edge of a block
    stem: int = 32  # channels of the first convolution, 5 x 5 x 5
    widths: tuple[int, ...] = (32, 64, 128, 256, 256, 128, 96, 96)  # channels per stage: down, then up again
    blocks: tuple[int, ...] = (2, 3, 4, 6, 2, 2, 2, 2)  # residual blocks per stage

    @property
    def channels(self):
        """Of the points' features."""
        return self.widths[-1]


@dataclass(frozen=True)
class RayChoice:
    """Which rays are cast in a training step. Radii in meters, in the ground plane of the LiDAR."""

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
    near: float = 1.0  # meters from the camera where rays start
    samples: int = 72  # stratified
    importance: int = 24  # drawn where the surface seems to be
    search: int = 128  # volsdf, unisurf: samples that look for the surface first and are not rendered
    truncation: float = 0.1  # meters around the LiDAR depth, for the SDF losses
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
    code_weights: tuple[float, ...] = (2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2)  # see `unipad.boxes`
    iou_weight: float = 0.5
    noise_weight: float = 1.0  # of all losses of noisy ground truth
    noise_groups: int = 10  # copies of it, at most; together not more than there are queries
    noise_scale: float = 1.0  # largest shift of a center, in halves of the box's size
    noise_split: float = 0.75  # share of that shift beyond which the copy counts as background
    kept: int = 300  # boxes of a sample, before suppression
    min_score: float = 0.0
    center_low: tuple[float, float, float] = (-61.2, -61.2, -10.0)  # meters; boxes with a center outside are dropped
    center_high: tuple[float, float, float] = (61.2, 61.2, 10.0)
    iou_in_score: bool = True  # denoising: a box's score is sqrt(p * IoU); False: p alone
    # (class, IoU from above beyond which the worse box goes): barrier, motorcycle, traffic cone
    nms: tuple[tuple[int, float], ...] = ((5, 0.2), (6, 0.2), (9, 0.2))


@dataclass(frozen=True)
class Segment:
    """What fine-tuning for segmentation puts on the points' features: a linear head, and its losses."""

    classes: int = 16  # lidarseg's 1 to 16; 0 is ignored
    cross_entropy_weight: float = 1.0
    lovasz_weight: float = 1.0


@dataclass(frozen=True)
class Optim:
    """AdamW.

    cosine:    linear warm-up times a cosine down from the first step.
    one_cycle: a cosine up, another one down; the momentum does the opposite.
    """

    schedule: str = "cosine"  # cosine | one_cycle
    lr: float = 2e-4  # the peak, for `batch_size` samples a step
    backbone_lr: float = 0.1  # factor of lr for the image backbone
    encoder_lr: float = 1.0  # factor of lr for the rest of the encoders
    weight_decay: float = 0.01
    clip: float = 35.0  # norm of the gradient
    start: float = 1 / 3  # factor of lr at step 0
    final: float = 1e-3  # factor of lr at the last step
    warmup_steps: int = 500  # cosine
    rise: float = 0.4  # one_cycle: share of the steps to the peak
    momentum: float = 0.9  # AdamW's first beta
    min_momentum: float = 0.9 * 0.85 / 0.95  # one_cycle: at the peak of lr
    epochs: float = 12
    batch_size: int = 4  # samples per step, over all processes


@dataclass(frozen=True)
class Recipe:
    """What pre-training and fine-tuning have in common. An encoder that is None is not there."""

    grid: Grid = field(default_factory=Grid)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    camera: CameraConfig | None = None
    lidar: LidarConfig | UnetConfig | None = None
    optim: Optim = field(default_factory=Optim)


@dataclass(frozen=True)
class PretrainRecipe(Recipe):
    rays: RayChoice = field(default_factory=RayChoice)
    render: Render = field(default_factory=Render)


@dataclass(frozen=True)
class FinetuneRecipe(Recipe):
    label_fraction: float = 1.0  # share of the training frames whose labels are used: every k-th frame
    balanced: bool = False  # frames drawn so that all classes have the same share (CBGS): some often, some never
    paste: Paste | None = None


@dataclass(frozen=True)
class DetectRecipe(FinetuneRecipe):
    detect: Detect = field(default_factory=Detect)


@dataclass(frozen=True)
class SegmentRecipe(FinetuneRecipe):
    segment: Segment = field(default_factory=Segment)


def recipe_kind(plain):
    """Which of the recipes' classes it was that `runtime.to_dict` made `plain` of."""
    return DetectRecipe if "detect" in plain else SegmentRecipe if "segment" in plain else PretrainRecipe


# ConvNeXt sizes: (blocks per stage, channels per stage)
CONVNEXT = {
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
}


def changed(settings, **flags):
    """`settings` with the flags that were given; None stays None."""
    given = {name: value for name, value in flags.items() if value is not None}
    return dataclasses.replace(settings, **given) if given else settings


def from_plain(kind, plain):
    """The dataclass `kind` out of what `runtime.to_dict` made of one. Raises TypeError for fields it does not have."""
    types_of = typing.get_type_hints(kind)
    return kind(**{name: _from_plain(types_of.get(name), value) for name, value in plain.items()})


def _from_plain(kind, value):
    if isinstance(value, list):
        return tuple(_from_plain(None, v) for v in value)
    if isinstance(value, dict):
        kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        kinds = [k for k in kinds if dataclasses.is_dataclass(k)]
        knows_all = (k for k in kinds if value.keys() <= k.__dataclass_fields__.keys())
        return from_plain(next(knows_all, kinds[0] if kinds else None), value)
    return value

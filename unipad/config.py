"""Every setting of the method as frozen dataclasses. `unipad.recipes` has the values of the paper and others.

A recipe says what is computed; the scripts' own flags say where, and with how many workers. Every field is also a flag
of the scripts, prefixed with its section (`--grid.cell 0.6 0.6 1.6`); the comment after it is the flag's help.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from unipad.errors import UserError


def cells_of_range(low, high, cell, flag: str) -> tuple[int, int, int]:
    """Number of cells (X, Y, Z) from `low` to `high`. Raises `UserError`, which names `flag`, if cells do not fit."""
    counts = []
    for axis, l, h, c in zip("xyz", low, high, cell, strict=True):
        if not (h > l and c > 0 and math.isfinite(h - l)):
            raise UserError(
                f"{flag} {tuple(cell)}: along {axis}, the range from {l} to {h} m cannot be cut into cells of {c} m."
            )
        count = max(1, round((h - l) / c))
        if abs(count * c - (h - l)) > 1e-6 * (h - l):
            raise UserError(
                f"{flag} {tuple(cell)}: cells of {c} m do not divide the range along {axis}, from {l} to {h} m; "
                f"{(h - l) / count:.10g} m would."
            )
        counts.append(count)
    return tuple(counts)


def check_below(lower_name: str, lower, upper_name: str, upper, equal: bool = False):
    """Raises `UserError`, with their names, unless `lower` is below `upper`, or with `equal` not above it; tuples are
    compared number by number."""
    pairs = zip(lower, upper, strict=True) if isinstance(lower, tuple) else [(lower, upper)]
    if not all(low < high or equal and low == high for low, high in pairs):
        must = "must not be above" if equal else "must be below"
        raise UserError(f"{lower_name} {lower} {must} {upper_name} {upper}.")


MAX_SOURCE = 12  # frames from a keyframe to a source of the photometric loss: a second of nuScenes' cameras


@dataclass(frozen=True)
class Grid:
    """The feature volume [C, Z, Y, X] in the LiDAR frame; triples are (x, y, z) in meters."""

    low: tuple[float, float, float] = (-51.2, -51.2, -5.0)  # lower corner
    high: tuple[float, float, float] = (51.2, 51.2, 3.0)  # upper corner
    cell: tuple[float, float, float] = (0.8, 0.8, 1.6)  # size of a cell

    def __post_init__(self):
        cells_of_range(self.low, self.high, self.cell, "--grid.cell")

    @property
    def shape(self):
        """Number of cells (X, Y, Z)."""
        return cells_of_range(self.low, self.high, self.cell, "--grid.cell")

    @property
    def scale(self):
        """The renderer's units of length per meter: 1 / the largest |coordinate| of the range."""
        return 1.0 / max(abs(v) for v in (*self.low, *self.high))


@dataclass(frozen=True)
class Data:
    """What a sample contains."""

    cameras: bool = True  # read images; without them, rays start at the LiDAR
    image_size: tuple[int, int] | None = None  # (height, width) that images are resized to; None: as stored
    sweeps: int = 1  # LiDAR frames per sample: the keyframe and the sweeps before it; 0: no LiDAR file is read
    camera_sweeps: Literal[1, 2, 3, 4, 5, 6] = 1  # camera frames per sample: the keyframe and the sweeps before it
    camera_rate: float = 0.0  # Hz: the age of camera sweep n is n / rate seconds (original: 12 Hz); 0: use timestamps
    # folder of image features, the targets of render.features_weight; absolute or below the dataset's; docs/data.md
    features: Path | None = None
    feature_channels: int = 0  # number of feature channels; 0: as in the first frame
    # frames of each camera that the photometric loss compares with, relative to the keyframe (-1: the one before)
    sources: tuple[int, ...] = ()

    def __post_init__(self):
        if len({0, *self.sources}) <= len(self.sources) or max(map(abs, self.sources), default=0) > MAX_SOURCE:
            raise UserError(
                f"--data.sources {self.sources} must be distinct frame offsets from -{MAX_SOURCE} to {MAX_SOURCE}, "
                "without 0, which is the keyframe."
            )


@dataclass(frozen=True)
class Augment:
    """Augmentation: points, cameras and boxes move together, in the order rotate, scale, shift, flip."""

    rotation: float = 0.0  # radians: largest angle about the vertical axis, uniform in both directions
    scale: tuple[float, float] = (1.0, 1.0)  # smallest and largest scale factor
    translation: tuple[float, float, float] = (0.0, 0.0, 0.0)  # standard deviation of the shift in x, y, z, meters
    flip_x: float = 0.0  # probability of swapping left and right (x changes sign)
    flip_y: float = 0.0  # probability of swapping front and back (y changes sign)
    shuffle: bool = False  # shuffle the points, which decides which of them an overfull voxel keeps
    photometric: bool = False  # jitter brightness, contrast, saturation, hue and channel order of every image
    grid_mask: float = 0.0  # probability of masking the images with a grid

    def __post_init__(self):
        if not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(f"--augment.scale {self.scale} must be the smallest and the largest factor, above 0.")


@dataclass(frozen=True)
class Paste:
    """Cut-and-paste: fill samples up with objects of other training frames. Classes in the order of `batch.CLASSES`."""

    counts: tuple[int, ...] = (2, 3, 7, 4, 6, 2, 6, 6, 2, 2)  # fill a sample up to this many objects of each class
    min_points: int = 5  # paste only objects with at least this many LiDAR points, over all sweeps of their sample
    off_epochs: float = 5.0  # epochs without pasting at the end of training


@dataclass(frozen=True)
class CameraConfig:
    """Camera encoder: masked ConvNeXt, FPN, depth head and view transform.

    View transform gather: every voxel samples the images where its lower corner projects to; the first and the last
    depth bin lie at the ends of `depth_range`. View transform pool: every pixel adds to the voxels along its ray; a bin
    lies at its near edge; the FPN has one level. The comment on a setting that only one view transform or depth head
    uses begins with its name.
    """

    depths: tuple[int, ...] = (3, 3, 27, 3)  # blocks per stage
    widths: tuple[int, ...] = (96, 192, 384, 768)  # channels per stage
    drop_path: float = 0.2  # stochastic depth rate of the last block, rising linearly from 0
    frozen_stages: int = 1  # leading stages (with their downsampling) that are not trained
    mask_ratio: float = 0.3  # fraction of 32 x 32-pixel patches that are masked; 0: no masking
    fpn_start: int = 1  # first backbone stage that the FPN reads, counted from 0
    fpn_levels: int = 4  # FPN output levels; those beyond the stages come from stride-2 convolutions
    channels: int = 128  # channels of the FPN levels and of the volume
    depth_range: tuple[float, float] = (0.0, 64.0)  # meters along the optical axis
    depth_bins: int = 64  # number of depth bins
    volume_convs: int = 0  # 3 x 3 x 3 convolutions on the volume; pre-training has none
    depth: Literal["simple", "complex"] = "simple"  # depth head: a 1 x 1 convolution, or residual blocks and ASPP
    aspp_channels: int = 96  # complex depth head: channels of each ASPP branch
    depth_weight: float = 0.0  # fine-tuning only: weight of the loss on the depth bins, supervised by LiDAR
    view: Literal["gather", "pool"] = "gather"  # view transform
    truncate: bool = False  # pool: round cell coordinates toward zero, as the original does, instead of down

    def __post_init__(self):
        stages = len(self.widths)
        if not stages == len(self.depths) > 0:
            raise UserError(
                f"--camera.depths {self.depths} and --camera.widths {self.widths} need one number per stage."
            )
        check_below("--camera.fpn-start", self.fpn_start, "the number of stages,", stages)
        check_below("--camera.frozen-stages", self.frozen_stages, "the number of stages,", stages, equal=True)


@dataclass(frozen=True)
class LidarConfig:
    """LiDAR encoder: masked voxels, a residual sparse encoder and a dense neck on its output.

    The sparse encoder halves the resolution between stages, so `cell` must be `Grid.cell` / 2^(stages - 1).
    """

    cell: tuple[float, float, float] = (0.075, 0.075, 0.2)  # voxel size in x, y, z, meters
    max_points: int = 10  # a voxel keeps at most this many points; its feature is their mean
    max_voxels: tuple[int, int] = (120_000, 160_000)  # most voxels per sample: in training, in evaluation
    mask_ratio: float = 0.8  # fraction of the occupied mask blocks whose voxels are masked; 0: no masking
    mask_block: int = 8  # voxels along the edge of a mask block
    learnable_token: bool = False  # keep masked voxels, with a learned feature, instead of removing them
    widths: tuple[int, ...] = (16, 32, 64, 128)  # channels per stage of the encoder
    blocks: int = 2  # residual blocks per stage
    sparse_channels: int = 256  # output channels of the sparse encoder
    neck_widths: tuple[int, ...] = (128, 256, 512)  # channels per branch of the neck
    neck_strides: tuple[int, ...] = (1, 2, 4)  # stride in x and y per branch of the neck
    neck_layers: int = 5  # convolutions per branch, after the strided one
    channels: int = 256  # channels of the volume
    volume_convs: int = 0  # 3 x 3 x 3 convolutions on the volume; pre-training has none
    norm_momentum: float = 0.01  # momentum of the batch norms' running statistics; short runs need a larger one

    def __post_init__(self):
        if not len(self.neck_widths) == len(self.neck_strides) > 0:
            raise UserError(
                f"--lidar.neck-widths {self.neck_widths} and --lidar.neck-strides {self.neck_strides} need one number "
                "per branch."
            )


@dataclass(frozen=True)
class UnetConfig:
    """LiDAR encoder SpUNet: a sparse U-Net on one point per voxel, with as many stages up as down.

    Pre-training gathers its points' features into the cells of the grid; segmentation uses them per point.
    """

    cell: float = 0.1  # voxel edge, meters
    mask_ratio: float = 0.8  # fraction of the occupied mask blocks whose voxels are masked; 0: no masking
    mask_block: int = 8  # voxels along the edge of a mask block
    stem: int = 32  # channels of the first convolution, 5 x 5 x 5
    widths: tuple[int, ...] = (32, 64, 128, 256, 256, 128, 96, 96)  # channels per stage: down, then up
    blocks: tuple[int, ...] = (2, 3, 4, 6, 2, 2, 2, 2)  # residual blocks per stage
    norm_momentum: float = 0.01  # momentum of the batch norms' running statistics; short runs need a larger one

    @property
    def channels(self):
        """Channels of the points' features."""
        return self.widths[-1]


@dataclass(frozen=True)
class RayChoice:
    """Which rays a training step casts. Comments on settings that only one strategy uses begin with its name."""

    # pixels that rays go through: those of LiDAR points first, random pixels, a grid of pixels, or random patches
    strategy: Literal["depth", "random", "dilation", "patch"] = "depth"
    per_view: int = 512  # rays per camera and sample; dilation has one per pixel of its grid instead
    lidar_per_view: int = 512  # depth: at most this many of the per_view rays go through LiDAR points
    near_radius: float = 3.0  # meters in the ground plane: LiDAR points nearer to the LiDAR are ignored
    far_radius: float = 50.0  # meters in the ground plane: LiDAR points farther from the LiDAR are ignored
    pixel_interval: int = 4  # depth: spacing in pixels of the grid that a view's other rays are chosen from
    dilation: int = 16  # dilation: spacing of rays in pixels
    sky: float = 0.4  # depth, patch: top fraction of an image without patches, and without the grid of pixel_interval
    patch: int = 3  # patch: pixels along the edge of a patch, an odd number; only the middle one is rendered
    patch_step: int = 1  # patch: spacing of these pixels; the photometric loss averages images over such squares

    def __post_init__(self):
        check_below("--rays.near-radius", self.near_radius, "--rays.far-radius", self.far_radius)
        if self.patch % 2 == 0:
            raise UserError(f"--rays.patch {self.patch} must be odd: the middle ray of a patch is rendered.")

    @property
    def patch_edge(self) -> int:
        """Pixels from the first to the last row of a patch, both included."""
        return (self.patch - 1) * self.patch_step + 1

    @property
    def patch_margin(self) -> int:
        """Pixels between patches and an image's borders: then the centers of four averages, over squares of
        `patch_step` pixels, lie around each pixel of a patch."""
        return (self.patch_step + 1) // 2

    def check_room(self, height: int, width: int):
        """Raises `UserError` if an image of this size has no room for a patch."""
        least = -(-(self.patch_edge + 2 * self.patch_margin) // self.patch_step) * self.patch_step
        if min(height, width) < least:
            raise UserError(
                f"images of {height} x {width} pixels have no room for a patch, which takes {least} x {least}: use a "
                "smaller --rays.patch-step or larger images."
            )


@dataclass(frozen=True)
class Render:
    """Renderer: field, samplers and loss weights."""

    method: Literal["neus", "volsdf", "unisurf"] = "neus"  # how signed distances become opacities
    channels: int = 32  # channels of the rendered volume
    hidden: int = 16  # width of both decoders and of the geometry feature
    sdf_layers: int = 6  # layers of the SDF decoder
    rgb_layers: int = 4  # layers of the color decoder
    variance: float = 0.3  # initial value: NeuS's inverse scale is exp(10 * variance), VolSDF's beta is variance
    near: float = 1.0  # distance from the camera or LiDAR at which rays start, meters
    samples: int = 72  # stratified samples per ray
    importance: int = 24  # importance samples per ray, around the estimated surface
    search: int = 128  # volsdf, unisurf: samples per ray that search for the surface and are not rendered
    truncation: float = 0.1  # SDF losses: samples within this distance of the LiDAR depth are near the surface, meters
    depth_weight: float = 10.0  # weight of the depth loss
    rgb_weight: float = 10.0  # weight of the color loss; 0: learn from depth alone
    free_space_weight: float = 0.0  # weight of the SDF loss in the free space before the surface
    sdf_weight: float = 0.0  # weight of the SDF loss near the surface
    eikonal_weight: float = 0.0  # weight of the eikonal loss
    points_weight: float = 0.0  # weight of |SDF| at the LiDAR points
    photometric_weight: float = 0.0  # weight of the loss on colors in other camera images, at the rendered depth
    features_weight: float = 0.0  # weight of the loss on image features, which are in --data.features
    features_loss: Literal["cosine", "l1"] = "cosine"  # features: 1 - cosine similarity, or L1 of every channel
    occupancy_weight: float = 0.0  # weight of the loss on free and full cells, as carved by LiDAR rays
    occupancy_window: float = 0.2  # seconds per time window; the latest window with a ray in a cell decides its state

    def __post_init__(self):
        if not self.occupancy_window > 0:
            raise UserError(f"--render.occupancy-window {self.occupancy_window} must be above 0.")

    @property
    def renders(self) -> bool:
        """Whether a loss compares renderings; `occupancy` reads the volume itself."""
        weights = {f.name for f in dataclasses.fields(self) if f.name.endswith("_weight")} - {"occupancy_weight"}
        return any(getattr(self, name) > 0 for name in weights)


@dataclass(frozen=True)
class Detect:
    """Detection head on the volume, and its losses. Classes in the order of `batch.CLASSES`, codes as in `boxes`."""

    denoising: bool = True  # UVTR-DN, which also learns from noisy ground truth and predicts IoUs; off: UVTR
    queries: int = 900  # object queries per sample
    layers: int = 6  # decoder layers
    heads: int = 8  # heads of the self-attention among queries
    hidden: int = 512  # hidden width of each layer's MLP
    dropout: float = 0.1  # dropout rate
    classes: int = 10  # number of classes
    focal_gamma: float = 2.0  # gamma of the focal loss
    focal_alpha: float = 0.25  # alpha of the focal loss
    class_weight: float = 2.0  # weight of the class term in the loss and in the assignment cost
    box_weight: float = 0.25  # weight of the box term in the loss and in the assignment cost
    code_weights: tuple[float, ...] = (2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2)  # weights of box code entries
    iou_weight: float = 0.5  # denoising: weight of the IoU loss
    noise_weight: float = 1.0  # denoising: weight of all losses on noisy ground truth
    noise_groups: int = 10  # denoising: noisy copies of the ground truth; fewer if they would outnumber the queries
    noise_scale: float = 1.0  # denoising: largest shift of a center along each axis, in half box sizes
    noise_split: float = 0.75  # denoising: a copy shifted farther than this fraction of noise_scale is background
    max_detections: int = 300  # at most this many boxes per sample, before NMS
    min_score: float = 0.0  # boxes with a lower score are dropped
    center_low: tuple[float, float, float] = (-61.2, -61.2, -10.0)  # meters: boxes with a lower center are dropped
    center_high: tuple[float, float, float] = (61.2, 61.2, 10.0)  # meters: boxes with a higher center are dropped
    iou_in_score: bool = True  # denoising: score is sqrt(p * predicted IoU) instead of p, the class's probability
    # (class, bird's-eye IoU above which the lower-scored box is dropped): barrier, motorcycle, traffic cone
    nms: tuple[tuple[int, float], ...] = ((5, 0.2), (6, 0.2), (9, 0.2))

    def __post_init__(self):
        check_below("--detect.center-low", self.center_low, "--detect.center-high", self.center_high)
        if len(self.code_weights) != 10:
            raise UserError(f"--detect.code-weights has {len(self.code_weights)} weights; a box has 10 code entries.")


@dataclass(frozen=True)
class Segment:
    """Segmentation head: linear on the points' features, and its losses."""

    classes: int = 16  # lidarseg's classes 1 to 16; 0 is ignored
    cross_entropy_weight: float = 1.0  # weight of the cross-entropy
    lovasz_weight: float = 1.0  # weight of the Lovász softmax loss


@dataclass(frozen=True)
class Occupancy:
    """Occupancy head: a small MLP on the volume's features at the center of each voxel, and its losses."""

    classes: int = 18  # number of classes: Occ3D's 0 to 16, and 17, free
    channels: int = 32  # channels of the volume that the head reads
    hidden: int = 64  # width of the MLP
    # voxels to train on: those that cameras see, which the benchmark scores; those that LiDAR scans of the scene have
    # seen; or all, with the labels in the file
    mask: Literal["camera", "lidar", "none"] = "camera"
    max_voxels: int = 0  # most voxels to train on per sample and step, drawn at random, half of them full; 0: all
    cross_entropy_weight: float = 1.0  # weight of the cross-entropy
    lovasz_weight: float = 1.0  # weight of the Lovász softmax loss


@dataclass(frozen=True)
class Optim:
    """AdamW and its schedule.

    Schedule cosine: linear warm-up times a cosine decay from the first step.
    Schedule one_cycle: a cosine up, then one down; the momentum goes down, then up.
    """

    schedule: Literal["cosine", "one_cycle"] = "cosine"  # schedule of the learning rate
    lr: Annotated[float, arg(aliases=["--lr"])] = 2e-4  # peak learning rate, for `batch_size` samples per step
    backbone_lr_factor: float = 0.1  # learning rate of the image backbone, as a factor of lr
    encoder_lr_factor: float = 1.0  # learning rate of the rest of the encoders, as a factor of lr
    weight_decay: float = 0.01  # decoupled weight decay
    clip: float = 35.0  # norm that gradients are clipped to
    start_factor: float = 1 / 3  # learning rate at step 0, as a factor of lr
    final_factor: float = 1e-3  # learning rate at the last step, as a factor of lr
    warmup_steps: int = 500  # cosine: steps of the warm-up
    rise: float = 0.4  # one_cycle: fraction of the steps before the peak
    momentum: float = 0.9  # AdamW's first beta
    min_momentum: float = 0.9 * 0.85 / 0.95  # one_cycle: momentum at the peak of lr; 0.85 / 0.95 as in mmdet3d
    epochs: Annotated[float, arg(aliases=["--epochs"])] = 12  # passes over the training frames
    batch_size: Annotated[int, arg(aliases=["--batch-size"])] = 4  # samples per step, over all processes

    def __post_init__(self):
        check_below("--optim.min-momentum", self.min_momentum, "--optim.momentum", self.momentum, equal=True)


@dataclass(frozen=True)
class Recipe:
    """What pre-training and fine-tuning have in common. `camera` or `lidar` is None if the model lacks that encoder."""

    grid: Grid = field(default_factory=Grid)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    camera: CameraConfig | None = None
    lidar: LidarConfig | UnetConfig | None = None
    optim: Optim = field(default_factory=Optim)

    @property
    def reads_pixels(self) -> bool:
        """Whether an encoder or a loss reads the pixels of training images."""
        return self.camera is not None

    @property
    def reads_points_beyond(self) -> bool:
        """Whether a loss reads the LiDAR points outside of the grid: rays to them free the cells that they cross."""
        return False


@dataclass(frozen=True)
class PretrainRecipe(Recipe):
    rays: RayChoice = field(default_factory=RayChoice)
    render: Render = field(default_factory=Render)

    @property
    def reads_pixels(self):
        return super().reads_pixels or self.render.rgb_weight > 0 or self.render.photometric_weight > 0

    @property
    def reads_points_beyond(self):
        return self.render.occupancy_weight > 0


@dataclass(frozen=True)
class FinetuneRecipe(Recipe):
    label_fraction: float = 1.0  # fraction 1/k of the training frames that is used: every k-th
    balanced: bool = False  # draw equally many frames for each class that occurs (CBGS)
    paste: Paste | None = None


@dataclass(frozen=True)
class DetectRecipe(FinetuneRecipe):
    detect: Detect = field(default_factory=Detect)


@dataclass(frozen=True)
class SegmentRecipe(FinetuneRecipe):
    segment: Segment = field(default_factory=Segment)


@dataclass(frozen=True)
class OccupancyRecipe(FinetuneRecipe):
    occupancy: Occupancy = field(default_factory=Occupancy)


AnyRecipe = PretrainRecipe | DetectRecipe | SegmentRecipe | OccupancyRecipe

# ConvNeXt sizes: (blocks per stage, channels per stage)
CONVNEXT = {
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
}

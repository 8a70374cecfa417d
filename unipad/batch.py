"""The batch: the one interface between data and model.

Coordinates: LiDAR x right, y forward, z up; camera x right, y down, z forward. Meters, seconds, pixels, radians.
A frame is what was recorded at one time, except in "LiDAR frame", which is the LiDAR's coordinate system.
Ragged fields are concatenated over the samples, with the counts in a separate field.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

# nuScenes' cameras. Other rigs have cameras of any number, name and size.
CAMERAS = (
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK_RIGHT",
    "CAM_BACK",
    "CAM_BACK_LEFT",
    "CAM_FRONT_LEFT",
)

# Detection classes 0 to 9, in the order of the original's configs (the devkit's is another)
CLASSES = (
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
)

# Classes 1 to 16 of nuScenes-lidarseg, in the order of the devkit
LIDARSEG_CLASSES = (
    "barrier",
    "bicycle",
    "bus",
    "car",
    "construction_vehicle",
    "motorcycle",
    "pedestrian",
    "traffic_cone",
    "trailer",
    "truck",
    "driveable_surface",
    "other_flat",
    "sidewalk",
    "terrain",
    "manmade",
    "vegetation",
)

# Occ3D-nuScenes (arXiv 2304.14365): classes 0 to 17 of voxels, and their grid in the ego frame of the keyframe's LiDAR
# (x forward, y left, z up), in meters. Classes 1 to 16 are those of lidarseg.
OCCUPANCY_CLASSES = ("others", *LIDARSEG_CLASSES, "free")
FREE = OCCUPANCY_CLASSES.index("free")
OCCUPANCY_SHAPE = (200, 200, 16)  # voxels along x, y, z
OCCUPANCY_LOW, OCCUPANCY_CELL = (-40.0, -40.0, -1.0), 0.4  # lower corner, edge of a voxel


@dataclass(frozen=True)
class Batch:
    """B samples of N views: the keyframe's cameras (in nuScenes in the order of `CAMERAS`), then, with camera sweeps,
    those of each camera sweep before it, the newest first. So N is S, the keyframe and its camera sweeps, times the
    number of cameras; 0 without images. Images may differ in size.

    All views are encoded and supervise the depth head; only those of `keyframe()` are rendered, compared with the
    rendering, and shown in pictures.

    As collated, images are uint8, 0 to 255, as they were decoded; models and pictures need the batch that `to` returns.
    """

    # [B, N, C, H, W] fp32 RGB in [0, 1], zero-padded at the right and bottom to a multiple of 32; in memory, C is last.
    # C = 3, or 0 where no loss reads pixels and none were decoded
    images: Tensor
    image_sizes: Tensor  # [B, N, 2] int64 height, width before padding
    lidar2image: Tensor  # [B, N, 4, 4] meters (LiDAR frame of the keyframe) -> (u*d, v*d, d, 1), pixels of `images`
    lidar2camera: Tensor  # [B, N, 4, 4] meters (LiDAR frame of the keyframe) -> meters (camera, when it took the image)
    points: Tensor  # [P, 5] x, y, z meters (LiDAR frame of the keyframe), intensity, seconds before the keyframe
    point_counts: Tensor  # [B] int64, on the host
    boxes: Tensor  # [M, 9] center x, y, z, w, l, h meters, yaw of l (from x towards y), vx, vy m/s; LiDAR frame
    labels: Tensor  # [M] int64 detection class 0-9, see `CLASSES`
    box_counts: Tensor  # [B] int64, on the host
    point_labels: Tensor | None  # [P] uint8 lidarseg class 0-16, 0 is ignored, see `LIDARSEG_CLASSES`; None: no labels
    tokens: tuple[str, ...]  # sample tokens
    frame_lags: Tensor | None = None  # [B, S] age in seconds of keyframe (0) and camera sweeps; None: no sweeps, S = 1
    features: Tensor | None = None  # [B, N / S, h, w, F] fp16 or fp32 of the keyframe's images, zero-padded; None: none
    feature_sizes: Tensor | None = None  # [B, N / S, 2] int64 height, width before padding: they cover the whole image
    cameras: tuple[str, ...] = ()  # names of the keyframe's cameras; () where the dataset does not name them
    # M sources of the photometric loss; None: no sources. The frames of `Data.sources` in their order, each with the
    # keyframe's cameras. Never the encoder's input; the images stay uint8.
    source_images: Tensor | None = None  # [B, M, C, H, W], padded and in memory as `images`
    source_sizes: Tensor | None = None  # [B, M, 2] as `image_sizes`; 0 where the scene has no such frame
    lidar2source: Tensor | None = None  # [B, M, 4, 4] meters (LiDAR frame of the keyframe) -> as `lidar2image`
    # [B, 3, X, Y, Z] uint8 in the voxels of `OCCUPANCY_SHAPE`: class 0-17, 1 where a LiDAR ray saw it, 1 where a camera
    # did; None: no such labels
    occupancy: Tensor | None = None
    ego2lidar: Tensor | None = None  # [B, 4, 4] meters (ego frame of these voxels) -> LiDAR frame; None: not needed
    # [B, S, 4] of S LiDAR sweeps, the keyframe's first: x, y, z meters of the LiDAR (LiDAR frame of the keyframe), and
    # the time in seconds that its points have, -1 where a sample has no such sweep; None: unknown, or no loss reads it
    sweep_origins: Tensor | None = None
    points_beyond: Tensor | None = None  # [Q, 5] as `points`: those outside of the grid; None: no loss reads them
    beyond_counts: Tensor | None = None  # [B] int64, on the host
    rig: tuple[Tensor, int, bytes] | None = None  # for `calibration`, set by `to`: `lidar2image`, its version and bytes

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def frames(self) -> int:
        """S: 1 + the number of camera sweeps."""
        return 1 if self.frame_lags is None else self.frame_lags.shape[1]

    @property
    def calibration(self) -> bytes | None:
        """The bytes of `lidar2image`, without waiting for the device: a key for what depends on the cameras only.

        None where the host does not know them: unless `to` has moved the batch, and `lidar2image` is still the tensor
        that it made, unchanged.
        """
        if self.rig is None:
            return None
        moved, version, content = self.rig
        return content if moved is self.lidar2image and moved._version == version else None

    def keyframe(self) -> "Batch":
        """The batch with only the keyframe's views, without a copy."""
        views = slice(self.images.shape[1] // self.frames)
        of_views = ("images", "image_sizes", "lidar2image", "lidar2camera")
        return replace(self, **{name: getattr(self, name)[:, views] for name in of_views}, frame_lags=None)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`, its images in [0, 1]; from pinned memory the copies overlap with the host's work.

        The counts stay on the host, where they are used to slice the other fields.
        """
        moved = {k: t.to(device, non_blocking=True) for k, t in self._tensors().items() if not k.endswith("_counts")}
        images = moved["images"]
        if images.dtype == torch.uint8:  # divided here, so that a pixel crosses the bus as 3 bytes, not 12
            # by a tensor: a GPU multiplies by the reciprocal of a number instead, and rounds differently
            moved["images"] = images / images.new_full((), 255, dtype=torch.float32)
        on_host = self.lidar2image.device.type == "cpu"
        moved_rig = moved["lidar2image"]
        rig = (moved_rig, moved_rig._version, self.lidar2image.numpy().tobytes()) if on_host else None
        return replace(self, **moved, rig=rig)

    def pin_memory(self) -> "Batch":
        """The batch in page-locked host memory; the `DataLoader` calls this."""
        return replace(self, **{k: t.pin_memory() for k, t in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in named.items() if isinstance(v, Tensor)}

"""The interface of a dataset: its samples, and the methods that the scripts call.

A new dataset is one file with one subclass of `DrivingDataset`, which the scripts take as
`--dataset package.module:Class`. Coordinate frames and units are those of `unipad.batch`. To resume, repeat or evaluate
a run whose class is outside `unipad.data`, give that flag again: a run's files do not decide which code is imported.
"""

import copy
import importlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from unipad.config import Augment, Data, Recipe
from unipad.data.transforms import augment_sample, photometric_distortion
from unipad.errors import UserError

DEFAULT_DATASET = "unipad.data.nuscenes:NuScenesDataset"
FRAMES_TRIED = 8  # frames of which one must be readable, to know the number of feature channels


class DataError(UserError):
    """The dataset as a whole cannot be used: one sentence with the folder or flag and, where there is one, the fix."""


class BadFrame(Exception):
    """One frame cannot be read: `path: reason`."""

    def __init__(self, path, reason):
        super().__init__(f"{path}: {reason}")


@dataclass(frozen=True)
class Sample:
    """One keyframe. Meters, seconds, radians; "LiDAR" is its LiDAR's coordinate frame: x right, y forward, z up.

    N views: the cameras of the keyframe in a fixed order (nuScenes: `batch.CAMERAS`), then, with camera sweeps, those
    of the S - 1 camera frames before it, the newest first. Any number of cameras; N and S are the same in all samples;
    N = 0 without images.

    images:       N times [h, w, 3] uint8 RGB, not padded; sizes may differ. [h, w, 0] where pixels are not read.
    lidar2image:  [N, 4, 4] float32 LiDAR -> (u*d, v*d, d, 1) in pixels of `images`, d along the optical axis.
    lidar2camera: [N, 4, 4] float32 LiDAR -> camera (x right, y down, z forward) when the image was taken; rigid as
                  loaded, but augmentation may scale and flip.
    points:       [P, 5] float32 x, y, z in LiDAR, those of sweeps too; intensity 0-255; time lag, the point's age
                  relative to the keyframe. The keyframe's points, of lag 0, are first, unless augmentation shuffles.
    point_labels: [P] uint8 class 1-16 in the order of `batch.LIDARSEG_CLASSES`, 0 for none, as in sweeps; None if the
                  dataset has no such labels.
    boxes:        [M, 9] float32 x, y, z of the center, w, l, h, yaw, vx, vy in LiDAR; yaw is the direction of l, from x
                  towards y; an unknown velocity is 0. M = 0 without boxes.
    labels:       [M] int64 class 0-9 in the order of `batch.CLASSES`.
    token:        name of the frame, unique in the split.
    frame_lags:   [S] float32 age of each camera frame relative to the keyframe, which is first, with 0; None: S = 1.
    cameras:      names of the keyframe's cameras; () if they have no names.
    features:     for each image of the keyframe, [h, w, F] float16 or float32 features of h x w equal parts of it, for
                  the loss `features`; 0 in all channels means none. None unless `Data.features` names their folder.
    occupancy:    [3, X, Y, Z] uint8 as in `Batch`; None without these labels.
    ego2lidar:    [4, 4] float32 ego frame of the voxels -> LiDAR; None where no task needs it.
    sweep_origins: [S, 4] float32 of the `Data.sweeps` LiDAR sweeps, the keyframe's first: x, y, z of the LiDAR in
                  LiDAR, and exactly the time lag of its points, -1 for sweeps that do not exist. From `load`, None
                  means that they are not known: the loss `occupancy` cannot be computed then.
    points_beyond: [Q, 5] the points that `DrivingDataset.read` leaves out of `points`, as outside of its `point_range`;
                  None if no loss reads them.

    With `Data.sources`, the M images that the photometric loss looks into: frames before and after the keyframe, in the
    order of `Data.sources`, each with the keyframe's cameras in their order:

    source_images: M times [h, w, 3] uint8 RGB; [0, 0, 3] where the scene has no such frame. None: no sources.
    lidar2source:  [M, 4, 4] float32 LiDAR of the keyframe -> as `lidar2image`.
    """

    images: list[np.ndarray]
    lidar2image: np.ndarray
    lidar2camera: np.ndarray
    points: np.ndarray
    point_labels: np.ndarray | None
    boxes: np.ndarray
    labels: np.ndarray
    token: str
    frame_lags: np.ndarray | None = None
    cameras: tuple[str, ...] = ()
    source_images: list[np.ndarray] | None = None
    lidar2source: np.ndarray | None = None
    features: list[np.ndarray] | None = None
    occupancy: np.ndarray | None = None
    ego2lidar: np.ndarray | None = None
    sweep_origins: np.ndarray | None = None
    points_beyond: np.ndarray | None = None


class DrivingDataset(torch.utils.data.Dataset):
    """The keyframes of one split of a dataset, in the order of time.

    `dataset[i]` is a `Sample` as recorded, cropped to `point_range`; `dataset.read(i, rng)` is an augmented one, for
    training.

    A subclass must define `splits`, `load` and the constructor, which finds the frames and passes on their number:

        def __init__(self, root, version, split, data, **settings):
            self.files = sorted(Path(root, version, split).glob("*.npz"))
            super().__init__(len(self.files), root, version, split, data, **settings)

    The other methods have defaults. Problems with the dataset as a whole raise `DataError`, one sentence; problems with
    one frame raise `BadFrame`: the frame is then reported and, in training, replaced by another one.
    The dataset is copied to worker processes, so it must be picklable, and should be small.
    """

    default_version = ""  # the version without --version
    # False: no loss reads pixels, so `load` may return images of [h, w, 0]; see `without_pixels`.
    pixels = True
    # True: `read` keeps `Sample.sweep_origins` and fills in `Sample.points_beyond`; see `with_points_beyond`
    keeps_beyond = False
    # What finetune.py can train and eval.py can score: "detect", "segment", "occupancy". Pre-training needs none. For
    # the first two, metrics are the nuScenes devkit's, so a dataset that names one also needs nuScenes' tables in its
    # root and an attribute `index`, a `unipad.data.index.Index`.
    tasks: tuple[str, ...] = ()

    def __init__(
        self,
        frame_count: int,
        root: str | Path,
        version: str,
        split: str,
        data: Data,
        label_fraction: float = 1.0,
        point_range: tuple | None = None,
        augment: Augment | None = None,
    ):
        """
        frame_count:    frames of the split.
        root, version:  --data-root, --version.
        split:          one of the values of `splits(root, version)`.
        data:           what `load` must read: images or none, their size, how many LiDAR and camera sweeps. A dataset
                        that does not have them raises `DataError`.
        label_fraction: 1/k keeps every k-th frame.
        point_range:    (low, high), each (x, y, z) meters: points outside are left out, and in `read` with `rng` also
                        boxes whose center is outside in x or y, since no head learns them. None keeps all.
        augment:        how `read` augments samples; None: no augmentation.
        """
        # 0.02: rounded fractions count too, such as 0.33
        if not 0 < label_fraction <= 1 or abs(round(1 / label_fraction) * label_fraction - 1) > 0.02:
            raise DataError(f"--label-fraction {label_fraction} is not 1/k; give 1, 0.5, 0.2, 0.1 or another 1/k.")
        if not frame_count:
            raise DataError(f"{Path(root) / version} has no frame of split {split}; unpack the whole dataset there.")
        self.root, self.version, self.split, self.data = Path(root), version, split, data
        self.point_range, self.augment, self.objects = point_range, augment, None
        self.frame_count = frame_count
        self.frames = np.arange(frame_count)[:: round(1 / label_fraction)]  # numbers of the frames used

    # For a subclass to define (`splits`, `load`) or to override

    @classmethod
    def splits(cls, root: str | Path, version: str) -> dict[str, str]:
        """Names of a version's splits by purpose, such as {"train": ..., "val": ...} or {"test": ...}; a split without
        a purpose by its name. Raises `DataError` for a version that does not exist."""
        raise NotImplementedError

    @classmethod
    def default_root(cls, data: Data) -> Path:
        """Folder of the dataset without --data-root."""
        raise DataError(f"--dataset {cls.__module__}:{cls.__qualname__} needs --data-root.")

    @classmethod
    def has_images(cls, root: str | Path, version: str, split: str) -> bool:
        """Whether the split has images; without them rays are cast from the LiDAR."""
        return True

    @classmethod
    def has_points(cls, root: str | Path, version: str, split: str) -> bool:
        """Whether the frames of the split have LiDAR points: a model that was trained without them is then evaluated
        on them. Override it if they may not; where `Data.sweeps` is 0, `load` returns no points."""
        return True

    def load(self, frame: int) -> Sample:
        """Read frame number `frame` of the split. Raises `BadFrame` with the path of a missing or broken file, and no
        other exception."""
        raise NotImplementedError

    def labels_of(self, frame: int) -> np.ndarray:
        """`Sample.labels` of frame number `frame`, for `balanced`; override it if labels can be read alone."""
        return self.load(frame).labels

    def scenes(self) -> dict[str, list[int]]:
        """{scene: indices of its frames in the dataset, in the order of time}; {} without scenes."""
        return {}

    def tokens(self) -> list[str]:
        """`Sample.token` of all frames of the split, missing ones too: of those without a prediction, an evaluation
        removes the file that an earlier one wrote. []: it removes none."""
        return []

    def fingerprint(self) -> str:
        """A string that changes with the dataset: caches made from the dataset are then rebuilt."""
        return ""

    def contents(self) -> str:
        """A string that says which frames these are, wherever the files lie: a run resumes only on the same ones."""
        return f"{len(self)} frames"

    def require_point_labels(self):
        """Raise `DataError` unless every frame has `point_labels`."""
        raise DataError(f"{self.root / self.version} has no labels of LiDAR points.")

    def with_occupancy(self, labels: bool = True, verbose: bool = True) -> "DrivingDataset":
        """This dataset with `ego2lidar` and, if `labels`, `occupancy` in its samples: only frames that have these
        labels remain, and if `verbose` the number of the others is reported. Raises `DataError` if there are none."""
        raise DataError(f"{self.root / self.version} has no occupancy labels.")

    def lidar_origins(self) -> dict[str, np.ndarray]:
        """{token: [K, 3] meters in its ego frame} of the frames `with_occupancy`: where the rays of RayIoU start."""
        raise DataError(f"{self.root / self.version} has no LiDAR poses.")

    # The same for every dataset

    @classmethod
    def train_val_splits(cls, root: str | Path, version: str) -> tuple[str, str]:
        """Names of the splits to train and to validate on. Raises `DataError` if the version has none."""
        splits = cls.splits(root, version)
        if not {"train", "val"} <= splits.keys():
            raise DataError(f"--version {version} has no training split: it only has {' and '.join(splits)}.")
        return splits["train"], splits["val"]

    @classmethod
    def train_and_val(
        cls, root: str | Path, version: str, recipe: Recipe, label_fraction: float, point_range: tuple | None
    ) -> tuple["DrivingDataset", "DrivingDataset"]:
        """The training set, with the recipe's augmentation, and the validation set; both as `recipe.data` says.

        If no loss of the recipe reads pixels, the training set is `without_pixels`; the pictures of a validation show
        images, so its set has them. `data.feature_channels` of both is the number found, where the recipe's is 0.

        Raises `DataError` if a camera encoder has no images, and what the constructor and `train_val_splits` raise.
        """
        train, val = cls.train_val_splits(root, version)
        settings = {"label_fraction": label_fraction, "augment": recipe.augment}
        train_set = cls(root, version, train, recipe.data, point_range=point_range, **settings)
        if recipe.camera is not None and not cls.has_images(root, version, train):
            raise DataError(f"{root} {version} has no images, which a camera encoder needs; use --modality lidar.")
        train_set.data = train_set.data_with_feature_channels()
        val_data = cls.data_to_evaluate(root, version, val, train_set.data)
        val_set = cls(root, version, val, val_data, point_range=point_range)
        if recipe.reads_points_beyond:
            train_set, val_set = train_set.with_points_beyond(), val_set.with_points_beyond()
        return train_set if recipe.reads_pixels else train_set.without_pixels(), val_set

    @classmethod
    def data_to_evaluate(cls, root: str | Path, version: str, split: str, data: Data) -> Data:
        """What evaluation reads of a split: no sources, and where training reads no LiDAR, that of the keyframe, as the
        truth of rendered depths, if the split has points."""
        truth = not data.sweeps and cls.has_points(root, version, split)
        return replace(data, sources=(), sweeps=1 if truth else data.sweeps)

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, i) -> Sample:
        return self.read(i)

    def read(self, i: int, rng: np.random.Generator | None = None, paste: bool = True) -> Sample:
        """Sample i, cropped to `point_range`; with `rng` also augmented, and, if `paste`, with objects pasted in."""
        sample = self.load(self.frames[i])
        if not self.keeps_beyond:
            sample = replace(sample, sweep_origins=None)  # no loss reads them: they need not be copied to the device
        if rng is not None:
            if self.augment is not None and self.augment.photometric:
                sample = photometric_distortion(sample, rng)  # before objects' pixels are pasted, as in the original
            if self.objects is not None and paste:
                sample = self.objects.paste_into(sample, rng)
            if self.augment is not None:
                sample = augment_sample(sample, rng, self.augment)
        if self.point_range is not None:
            sample = _crop_points(sample, *self.point_range, self.keeps_beyond)
            sample = sample if rng is None else _crop_boxes(sample, *self.point_range)
        return sample

    def without_pixels(self) -> "DrivingDataset":
        """This dataset for losses that read no pixels: `load` need not open images, only give their sizes, for rays."""
        dataset = copy.copy(self)
        dataset.pixels = False
        return dataset

    def data_with_feature_channels(self) -> Data:
        """`self.data`, with the number of channels of the first features that can be read. Raises `DataError` for
        features that cannot be read, or that `load` does not read."""
        if self.data.features is None:
            return self.data
        first_bad = None
        for frame in self.frames[:FRAMES_TRIED]:
            try:
                features = self.load(frame).features
            except BadFrame as bad:
                first_bad = first_bad or bad
                continue
            if features is None:
                raise DataError(
                    f"{type(self).__name__} reads no features: fill in Sample.features, or do without them."
                )
            if not features:
                raise DataError(f"{self.root / self.version} has no images, which --data.features needs.")
            return replace(self.data, feature_channels=features[0].shape[2])
        raise DataError(f"{first_bad}.")

    def with_points_beyond(self) -> "DrivingDataset":
        """This dataset for losses that also read the points outside of `point_range`, in `Sample.points_beyond`, and
        `Sample.sweep_origins`."""
        dataset = copy.copy(self)
        dataset.keeps_beyond = True
        return dataset

    def with_objects(self, objects) -> "DrivingDataset":
        """This dataset with a `cutpaste.Objects` from which `read` pastes objects into samples."""
        dataset = copy.copy(self)
        dataset.objects = objects
        return dataset

    def balanced(self, seed: int) -> "DrivingDataset":
        """This dataset with frames drawn with replacement, equally many for each class that occurs (CBGS).

        Those for a class are drawn from the frames that contain it. In total there are about as many as pairs of a
        frame and a class in it: the longer epoch of the original. Depends only on the seed and the labels. Raises
        `DataError` where no frame has a box.
        """
        # other random numbers than the loader's, whose seeds are [seed, epoch] and [seed, position, 1 or 3]
        rng = np.random.default_rng([seed, 0, 2])
        classes = [np.unique(self.labels_of(f)) for f in self.frames]
        class_of_pair = np.concatenate(classes)
        if not len(class_of_pair):
            raise DataError(f"no frame of {self.root / self.version} {self.split} has a box to balance the classes by.")
        frame_of_pair = np.repeat(self.frames, [len(c) for c in classes])
        present = np.unique(class_of_pair)
        per_class = len(class_of_pair) // len(present)
        dataset = copy.copy(self)
        dataset.frames = np.concatenate([rng.choice(frame_of_pair[class_of_pair == c], per_class) for c in present])
        return dataset


def dataset_class(name: str) -> type[DrivingDataset]:
    """The class that `--dataset package.module:Class` names. Raises `UserError`."""
    module_name, _, class_name = name.partition(":")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, ValueError, AttributeError) as error:
        raise UserError(
            f"--dataset {name} cannot be imported ({error}); give package.module:Class, its folder in PYTHONPATH."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, DrivingDataset)):
        raise UserError(f"--dataset {name} is not a subclass of unipad.data.dataset.DrivingDataset.")
    return cls


def check_recorded(name: str, run: Path):
    """Raises `UserError` if `name`, the dataset class recorded in `run`, is outside `unipad.data`: else whoever made
    the run could choose which code is imported here."""
    if not str(name).startswith("unipad.data."):
        raise UserError(f"{run} used --dataset {name}, which is code: repeat this flag if you want it to be imported.")


def _crop_points(sample, low, high, keep_beyond=False):
    """The sample with only the points between the corners `low` and `high`, (x, y, z) meters; with `keep_beyond`, the
    others are its `points_beyond`."""
    points, labels = sample.points, sample.point_labels
    inside = np.ones(len(points), bool)
    # column by column and with `compress`, in a seventh of the time of `all(axis=1)` and points[inside]
    for axis, above, below in zip(points.T, np.float32(low), np.float32(high), strict=False):
        inside &= (axis > above) & (axis < below)
    if keep_beyond:
        sample = replace(sample, points_beyond=points.compress(~inside, axis=0))
    points = points.compress(inside, axis=0)
    return replace(sample, points=points, point_labels=None if labels is None else labels[inside])


def _crop_boxes(sample, low, high):
    """The sample with only the boxes whose center lies between `low` and `high` in x and y."""
    center = sample.boxes[:, :2]
    inside = ((center > np.float32(low[:2])) & (center < np.float32(high[:2]))).all(axis=1)
    return replace(sample, boxes=sample.boxes[inside], labels=sample.labels[inside])

"""The dataset interface: what a dataset returns, what a script asks of it, and how samples become a batch.

Another dataset is one file with one subclass of `DrivingDataset`, which the scripts take as
`--dataset package.module:Class`. Frames and units are those of `unipad.batch`.
"""

import copy
import importlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from unipad.batch import Batch
from unipad.config import Augment, Data
from unipad.data.transforms import augment_sample, photometric_distortion
from unipad.errors import UserError

DEFAULT_DATASET = "unipad.data.nuscenes:NuScenesDataset"


class DataError(UserError):
    """The dataset as a whole cannot be used: one sentence that names the folder or flag, and the fix."""


class BadFrame(Exception):
    """One frame cannot be read: `path: reason`."""

    def __init__(self, path, reason):
        super().__init__(f"{path}: {reason}")


@dataclass(frozen=True)
class Sample:
    """One keyframe: the LiDAR frame is that of its LiDAR, x right, y forward, z up; camera frames are x right, y down,
    z forward. Meters, seconds, radians.

    N views: the cameras in the order of `CAMERAS`, of the keyframe first, then, with camera sweeps, of each of the
    S - 1 frames of images before it, the newest first. N = 0 without images. N and S are the same for all samples.
    """

    images: list[np.ndarray]  # N times [h, w, 3] uint8 RGB, not padded; sizes may differ
    lidar2image: np.ndarray  # [N, 4, 4] float32 LiDAR -> (u*d, v*d, d, 1), pixels of the image as returned
    lidar2camera: np.ndarray  # [N, 4, 4] float32 rigid, LiDAR -> camera when the image was taken
    points: (
        np.ndarray
    )  # [P, 5] float32 x, y, z in the LiDAR frame, intensity 0-255, time lag (0: the keyframe's, first)
    point_labels: (
        np.ndarray | None
    )  # [P] uint8 class 1-16 of `tables.LIDARSEG_CLASSES`, 0: none (sweeps); None: no labels
    boxes: np.ndarray  # [M, 9] float32 x, y, z center, w, l, h, yaw of l from x towards y, vx, vy; LiDAR frame
    labels: np.ndarray  # [M] int64 class 0-9 of `tables.CLASSES`; M = 0 where there are no boxes
    token: str  # names the frame; unique in the split
    frame_lags: np.ndarray | None = (
        None  # [S] float32 from each frame of images to the keyframe's, 0 first; None: S = 1
    )


class DrivingDataset(torch.utils.data.Dataset):
    """Keyframes of one split of one version of a dataset, in the order of time.

    `dataset[i]` is a `Sample`, without augmentation; `dataset.read(i, rng)` is one with it. Both raise `BadFrame` where
    the frame cannot be read: the loader names it on stderr and takes the next one.

    A subclass must have `splits`, `load` and a constructor (root, version, split, data, **settings) that finds the
    frames and hands their number to this class:

        def __init__(self, root, version, split, data, **settings):
            self.files = sorted(Path(root, version, split).glob("*.npz"))
            super().__init__(len(self.files), root, version, split, data, **settings)

    Whatever is wrong with the dataset as a whole raises `DataError`: one sentence. Readers run in worker processes, to
    which the dataset is copied: keep it small and picklable.
    """

    default_version = ""  # of --version
    tasks: tuple[str, ...] = ()
    """What finetune.py can train and eval.py can score on it: "detect", "segment" or both. The nuScenes devkit scores,
    so a dataset that names a task must also have what `NuScenesDataset` has for it: tables, `index`. Pre-training
    needs no task."""

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
        split:          one of the values of `splits(version)`.
        data:           what `load` reads: images or not, their size, how many LiDAR and camera sweeps. A dataset that
            cannot do what is asked for raises `DataError`.
        label_fraction: 1/k keeps every k-th frame.
        point_range:    (low, high), each (x, y, z) meters: points outside are left out, and in training also boxes
            whose center is outside as seen from above, since no head learns them. None keeps all.
        augment:        how `read` varies samples; None: not at all.
        """
        if not 0 < label_fraction <= 1 or abs(round(1 / label_fraction) * label_fraction - 1) > 0.02:
            raise DataError(f"--label-fraction {label_fraction} is not 1/k; give 1, 0.5, 0.2, 0.1 or the like.")
        if not frame_count:
            raise DataError(f"{Path(root) / version} has no frame of split {split}; unpack the whole dataset there.")
        self.root, self.version, self.split, self.data = Path(root), version, split, data
        self.point_range, self.augment, self.objects = point_range, augment, None
        self.frames = np.arange(frame_count)[:: round(1 / label_fraction)]  # rows of the split's frames

    # What a subclass defines

    @classmethod
    def splits(cls, version: str) -> dict[str, str]:
        """{"train": its name, "val": its name}, or {"test": its name}, of a version. Raises `DataError` for a version
        that there is not."""
        raise NotImplementedError

    @classmethod
    def default_root(cls, data: Data) -> Path:
        """Where the dataset is without --data-root; may make it there."""
        raise DataError(f"--dataset {cls.__module__}:{cls.__qualname__} needs --data-root.")

    @classmethod
    def has_images(cls, root: str | Path, version: str, split: str) -> bool:
        """Whether the images of the split are there; without them rays are cast from the LiDAR."""
        return True

    def load(self, frame: int) -> Sample:
        """Row `frame` of the split's frames as the files have it. Raises `BadFrame`, with the path of the file, where
        one is missing or broken: nothing else may come out of a bad file."""
        raise NotImplementedError

    def labels_of(self, frame: int) -> np.ndarray:
        """`Sample.labels` of row `frame`, for `balanced`; override it where they can be had without reading files."""
        return self.load(frame).labels

    def scenes(self) -> dict[str, list[int]]:
        """{scene: its frames as indices into the dataset, in the order of time}; {} where there are no scenes."""
        return {}

    def fingerprint(self) -> str:
        """A string that changes when the labels do: what was made from them and cached is then made again."""
        return ""

    def require_point_labels(self):
        """Raise `DataError` unless every frame has `point_labels`."""
        raise DataError(f"{self.root / self.version} has no labels of LiDAR points.")

    # What every dataset has

    @classmethod
    def train_val_splits(cls, version: str) -> tuple[str, str]:
        """Names of the two splits that training needs. Raises `DataError` where the version has no such."""
        splits = cls.splits(version)
        if not {"train", "val"} <= splits.keys():
            raise DataError(f"--version {version} has nothing to train on: it has split {' and '.join(splits)} alone.")
        return splits["train"], splits["val"]

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, i) -> Sample:
        return self.read(i)

    def read(self, i: int, rng: np.random.Generator | None = None, paste: bool = True) -> Sample:
        """Sample i, cropped; with `rng` augmented too, and, if `paste`, with objects pasted into it."""
        sample = self.load(self.frames[i])
        if rng is not None:
            if self.augment is not None and self.augment.photometric:
                sample = photometric_distortion(sample, rng)  # before other images' pixels come in, as in the original
            if self.objects is not None and paste:
                sample = self.objects.paste_into(sample, rng)
            if self.augment is not None:
                sample = augment_sample(sample, rng, self.augment)
        if self.point_range is not None:
            sample = _crop_points(sample, *self.point_range)
            sample = sample if rng is None else _crop_boxes(sample, *self.point_range)
        return sample

    def with_objects(self, objects):
        """The same dataset, whose `read` pastes `objects`, a `cutpaste.Objects`."""
        dataset = copy.copy(self)
        dataset.objects = objects
        return dataset

    def balanced(self, seed: int):
        """The dataset with frames drawn with replacement so that every class is as frequent as any other (CBGS).

        For each class that occurs, equally many frames of those that hold it, together as many as there are pairs of a
        frame and a class in it: the longer epoch of the original. A function of the seed and the labels.
        Raises `DataError` where no frame holds a box.
        """
        rng = np.random.default_rng([seed, 0, 2])  # the stream's own are [seed, epoch] and [seed, position, 1]
        classes = [np.unique(self.labels_of(f)) for f in self.frames]
        pairs = np.concatenate(classes)
        if not len(pairs):
            raise DataError(f"no frame of {self.root / self.version} {self.split} has a box to balance the classes by.")
        frame_of_pair = np.repeat(self.frames, [len(c) for c in classes])
        present = np.unique(pairs)
        per_class = len(pairs) // len(present)
        dataset = copy.copy(self)
        dataset.frames = np.concatenate([rng.choice(frame_of_pair[pairs == c], per_class) for c in present])
        return dataset


def dataset_class(name: str) -> type[DrivingDataset]:
    """The class that `--dataset package.module:Class` names. Raises `UserError`."""
    module_name, _, class_name = name.partition(":")
    try:
        kind = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, ValueError, AttributeError) as error:
        raise UserError(
            f"--dataset {name} cannot be imported ({error}); give package.module:Class, its folder in PYTHONPATH."
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, DrivingDataset)):
        raise UserError(f"--dataset {name} is not a subclass of unipad.data.dataset.DrivingDataset.")
    return kind


def collate(samples: list[Sample]) -> Batch:
    """Samples to a `Batch` on the CPU."""
    views = len(samples[0].images)
    sizes = [image.shape[:2] for s in samples for image in s.images]
    sizes = torch.tensor(sizes, dtype=torch.int64).view(len(samples), views, 2)
    H, W = (-(-max(sizes[..., i].flatten().tolist(), default=1) // 32) * 32 for i in range(2))
    images = torch.zeros(len(samples), views, 3, H, W)
    for sample, views in zip(samples, images, strict=True):
        for image, view in zip(sample.images, views, strict=True):
            view[:, : image.shape[0], : image.shape[1]] = torch.from_numpy(image).permute(2, 0, 1)

    def stack(name):
        return torch.from_numpy(np.stack([getattr(s, name) for s in samples]))

    def concatenate(name):
        return torch.from_numpy(np.concatenate([getattr(s, name) for s in samples]))

    labeled = all(s.point_labels is not None for s in samples)
    return Batch(
        images=images.div_(255),
        image_sizes=sizes,
        lidar2image=stack("lidar2image"),
        lidar2camera=stack("lidar2camera"),
        points=concatenate("points"),
        point_counts=torch.tensor([len(s.points) for s in samples]),
        boxes=concatenate("boxes"),
        labels=concatenate("labels"),
        box_counts=torch.tensor([len(s.boxes) for s in samples]),
        point_labels=concatenate("point_labels") if labeled else None,
        tokens=tuple(s.token for s in samples),
        frame_lags=None if samples[0].frame_lags is None else stack("frame_lags"),
    )


def _crop_points(sample, low, high):
    """Without the points that are not inside the box of corners `low` and `high`, (x, y, z) meters."""
    points, labels = sample.points, sample.point_labels
    inside = ((points[:, :3] > np.float32(low)) & (points[:, :3] < np.float32(high))).all(axis=1)
    return replace(sample, points=points[inside], point_labels=None if labels is None else labels[inside])


def _crop_boxes(sample, low, high):
    """Without the boxes whose center, seen from above, is not between `low` and `high`."""
    center = sample.boxes[:, :2]
    inside = ((center > np.float32(low[:2])) & (center < np.float32(high[:2]))).all(axis=1)
    return replace(sample, boxes=sample.boxes[inside], labels=sample.labels[inside])

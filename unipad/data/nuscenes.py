"""nuScenes files -> samples -> batch: the real set and the synthetic one through the same code.

Frames as in `unipad.batch`. What follows the original UniPAD's data pipeline:
    cameras    lidar2camera goes through the global frame, each sensor with the ego pose of its own timestamp, those of
               camera sweeps too: from the keyframe's LiDAR frame to where the camera was when it took the image
    sweeps     moved into the keyframe's LiDAR frame; time lag is keyframe time minus sweep time, 0 for the keyframe;
               points with |x| < 1 and |y| < 1 (the car itself) leave the sweeps, but not the keyframe
    intensity  as in the file, 0-255
    boxes      those with at least one LiDAR or radar point; a velocity that the tables do not give is 0
What does not: the nearest sweeps are taken (the original draws 9 of the last 10 at random), and a keyframe without
sweeps before it, at the start of a scene, stands alone (the original repeats it; images are repeated here too).
"""

import copy
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch

from unipad.batch import CAMERAS, Batch
from unipad.config import Data
from unipad.data.tables import DataError, find_root, load_camera_sweeps, load_index
from unipad.data.transforms import augmented, distorted


class BadFrame(Exception):
    """One frame cannot be read: `path: reason`."""

    def __init__(self, path, reason):
        super().__init__(f"{path}: {reason}")


@dataclass(frozen=True)
class Sample:
    """One keyframe, N views of S frames; fields as in `Batch`."""

    images: list[np.ndarray]  # N times [h, w, 3] uint8 RGB, not padded
    lidar2image: np.ndarray  # [N, 4, 4] float32
    lidar2camera: np.ndarray  # [N, 4, 4] float32
    points: np.ndarray  # [P, 5] float32, the keyframe's first
    point_labels: np.ndarray | None  # [P] uint8, 0 for points of sweeps
    boxes: np.ndarray  # [M, 9] float32
    labels: np.ndarray  # [M] int64
    token: str
    frame_lags: np.ndarray | None = None  # [S] float32


def has_images(root, version, split):
    """Whether the cameras' files of the split's first keyframe are there, any of them. Raises `DataError`."""
    root = find_root(root, version)
    files = load_index(root, version, split).image_files[:1].flatten()
    return any((root / name.decode()).is_file() for name in files)


class NuScenesDataset(torch.utils.data.Dataset):
    """Keyframes of one split in the order of time.

    root:           folder that holds samples/, sweeps/ and <version>/ (or <version>/<version>/, as OpenPCDet has it).
    label_fraction: 1/k keeps every k-th keyframe, as the paper's 50 % and 20 %.
    point_range:    (low, high), each (x, y, z) meters: points outside are left out, and boxes that are not above or
        below it from samples read with random numbers, since no head learns them. None keeps all.
    augment:        `Augment`, how samples vary that are read with random numbers; None = not at all.

    `dataset[i]` is a `Sample`; it raises `BadFrame` where a file of the frame is missing or broken.
    Raises `DataError` for what is wrong with the set as a whole.
    """

    def __init__(self, root, version, split, data: Data, label_fraction=1.0, point_range=None, augment=None):
        if not 0 < label_fraction <= 1 or abs(round(1 / label_fraction) * label_fraction - 1) > 0.02:
            raise DataError(f"--label-fraction {label_fraction} is not 1/k; give 1, 0.5, 0.2, 0.1 or the like.")
        self.root, self.version, self.split = find_root(root, version), version, split
        self.index, self.camera_sweeps = load_index(self.root, version, split), None
        if data.cameras and data.camera_sweeps > 1:
            self.camera_sweeps = load_camera_sweeps(self.root, version, split)
        self.frames = np.arange(len(self.index.tokens))[:: round(1 / label_fraction)]
        if not len(self.frames):
            raise DataError(f"{self.root / version} has no scene of split {split}; unpack the whole set there.")
        self.data, self.point_range, self.augment, self.objects = data, point_range, augment, None

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, i):
        return self.read(i)

    def pasting(self, objects):
        """The same frames, filled up with `objects`, a `cutpaste.Objects`, where they are varied."""
        dataset = copy.copy(self)
        dataset.objects = objects
        return dataset

    def balanced(self, seed):
        """Frames of these drawn with replacement so that every class is as frequent as any other (CBGS).

        For each class that there is, equally many frames of those that hold it, together as many as there are pairs
        of a frame and a class in it: the longer epoch of the original. A function of the seed and the tables.
        Raises `DataError` where no frame holds a box.
        """
        rng = np.random.default_rng([seed, 0, 2])  # the stream's own are [seed, epoch] and [seed, position, 1]
        offsets, labels = self.index.box_offsets, self.index.labels
        classes = [np.unique(labels[offsets[f] : offsets[f + 1]]) for f in self.frames]
        pairs = np.concatenate(classes)
        if not len(pairs):
            raise DataError(f"no frame of {self.root / self.version} {self.split} has a box to balance the classes by.")
        frame_of_pair = np.repeat(self.frames, [len(c) for c in classes])
        present = np.unique(pairs)
        share = len(pairs) // len(present)
        dataset = copy.copy(self)
        dataset.frames = np.concatenate([rng.choice(frame_of_pair[pairs == c], share) for c in present])
        return dataset

    def need_point_labels(self):
        """Raises `DataError` where a keyframe of the split has no lidarseg labels."""
        if not all(self.index.lidarseg_files):
            where = f"{self.root / self.version} {self.split}"
            raise DataError(f"{where} has frames without lidarseg labels; unpack nuScenes-lidarseg in {self.root}.")

    def read(self, i, rng=None, paste=True):
        """Sample i; varied, where there is a `np.random.Generator` to vary it with; `paste`: with objects pasted."""
        sample = self.whole(i)
        if rng is not None:
            if self.augment is not None and self.augment.photometric:
                sample = distorted(sample, rng)  # before other images' pixels come in, as in the original
            if self.objects is not None and paste:
                sample = self.objects.pasted(sample, rng)
            if self.augment is not None:
                sample = augmented(sample, rng, self.augment)
        if self.point_range is not None:
            sample = _cropped(sample, *self.point_range)
            sample = sample if rng is None else _learnable(sample, *self.point_range)
        return sample

    def whole(self, i):
        """Sample i as the files have it: nothing varied, nothing left out."""
        f, index = self.frames[i], self.index
        clouds = self._read_points(index.frame_lidar[f])
        points, point_labels = np.concatenate(clouds), None
        if index.lidarseg_files[f]:
            point_labels = np.zeros(len(points), np.uint8)
            point_labels[: len(clouds[0])] = self._read_labels(f, len(clouds[0]))
        files, intrinsics, lidar2camera = self._views(f)
        images, scales = [], np.empty((len(files), 4, 4))
        for view, file in enumerate(files):
            image, scales[view] = self._read_image(file)
            images.append(image)
        b = slice(index.box_offsets[f], index.box_offsets[f + 1])
        return Sample(
            images=images,
            lidar2image=(scales @ intrinsics @ lidar2camera).astype(np.float32),
            lidar2camera=lidar2camera.astype(np.float32),
            points=points,
            point_labels=point_labels,
            boxes=index.boxes[b],
            labels=index.labels[b],
            token=index.tokens[f].decode(),
            frame_lags=self._frame_lags(f),
        )

    def _views(self, f):
        """(files [N], intrinsics [N, 4, 4], lidar2camera [N, 4, 4]) of the views that keyframe f has, as in `Batch`."""
        names = ("image_files", "intrinsics", "lidar2camera")
        views = [getattr(self.index, name)[f, : len(CAMERAS) if self.data.cameras else 0] for name in names]
        if self.camera_sweeps is not None:
            before = [getattr(self.camera_sweeps, name)[f, : self.data.camera_sweeps - 1] for name in names]
            views = [np.concatenate([key, *frames]) for key, frames in zip(views, before, strict=True)]
        return views

    def _frame_lags(self, f):
        """[S] float32 seconds, 0 first; None where images are of the keyframe alone."""
        if self.camera_sweeps is None:
            return None
        rate, sweeps = self.data.camera_rate, self.camera_sweeps
        lags = sweeps.numbers[f] / rate if rate else sweeps.lags[f]
        return np.concatenate([[0], lags[: self.data.camera_sweeps - 1]]).astype(np.float32)

    def _read_points(self, key):
        """List of [P, 5]: the LiDAR frame in row `key`, then each sweep before it, as far as the scene goes back."""
        index = self.index
        points = _load_points(self._path(index.lidar_files[key]))
        points[:, 4] = 0
        clouds, sweep = [points], index.lidar_prev[key]
        while len(clouds) < self.data.sweeps and sweep >= 0:
            points = _load_points(self._path(index.lidar_files[sweep]))
            points = points[(np.abs(points[:, :2]) >= 1).any(axis=1)]
            to_key = np.linalg.inv(index.lidar2global[key]) @ index.lidar2global[sweep]
            points[:, :3] = points[:, :3] @ to_key[:3, :3].T + to_key[:3, 3]
            points[:, 4] = 1e-6 * (index.lidar_times[key] - index.lidar_times[sweep])
            clouds.append(points)
            sweep = index.lidar_prev[sweep]
        return clouds

    def _read_labels(self, f, count):
        """[count] uint8 lidarseg class 0-16 of the keyframe's points."""
        path = self._path(self.index.lidarseg_files[f])
        labels = _load_bytes(path)
        if len(labels) != count:
            raise BadFrame(path, f"has {len(labels)} labels for {count} points")
        return self.index.lidarseg_classes[labels]

    def _read_image(self, path):
        """The image as [h, w, 3] uint8 RGB at the wanted size, and the [4, 4] scaling of (u*d, v*d, d, 1) to it."""
        path = self._path(path)
        data = _load_bytes(path)
        # OpenCV fills what a truncated JPEG lacks with gray, so the end marker has to be looked for.
        if data.tobytes().rfind(b"\xff\xd9") < 0:
            raise BadFrame(path, "the JPEG is truncated")
        image = cv2.imdecode(data, cv2.IMREAD_COLOR)
        if image is None:
            raise BadFrame(path, "is not an image")
        h, w = image.shape[:2]
        H, W = self.data.image_size or (h, w)
        if (H, W) != (h, w):
            image = cv2.resize(image, (W, H), interpolation=cv2.INTER_AREA if H * W < h * w else cv2.INTER_LINEAR)
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.diag([W / w, H / h, 1, 1])

    def _path(self, name):
        return self.root / name.decode()


def _cropped(sample, low, high):
    """The sample without the points that are not inside the box of corners `low` and `high`, (x, y, z) meters."""
    points, labels = sample.points, sample.point_labels
    inside = ((points[:, :3] > np.float32(low)) & (points[:, :3] < np.float32(high))).all(axis=1)
    return replace(sample, points=points[inside], point_labels=None if labels is None else labels[inside])


def _learnable(sample, low, high):
    """The sample without the boxes whose center, seen from above, is not between `low` and `high`."""
    center = sample.boxes[:, :2]
    inside = ((center > np.float32(low[:2])) & (center < np.float32(high[:2]))).all(axis=1)
    return replace(sample, boxes=sample.boxes[inside], labels=sample.labels[inside])


def collate(samples):
    """Samples -> `Batch` on the CPU."""
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


def _load_bytes(path):
    try:
        data = np.fromfile(path, np.uint8)
    except FileNotFoundError:
        raise BadFrame(path, "is missing") from None
    except OSError as error:
        raise BadFrame(path, f"cannot be read ({error.strerror})") from None
    if not len(data):
        raise BadFrame(path, "is empty")
    return data


def _load_points(path):
    """[P, 5] float32: x, y, z meters in the sensor's frame, intensity, ring."""
    data = _load_bytes(path)
    if len(data) % 20:
        raise BadFrame(path, f"is truncated: {len(data)} bytes are not a whole number of 20-byte points")
    points = data.view(np.float32).reshape(-1, 5)
    if not np.isfinite(points).all():
        raise BadFrame(path, "holds values that are not finite")
    return points

"""Cut-and-paste: points and pixels of objects from other training frames, pasted into a sample.

As in the original's UnifiedDataBaseSampler and UnifiedObjectSample:
    objects   sampled at random, up to `Paste.counts` of each class, the sample's own objects included
    position  the LiDAR coordinates in the frame that they were cut from; an object whose box overlaps another in
              bird's-eye view is left out
    points    of all sweeps; the sample's points inside a pasted box are removed
    pixels    the rectangle around a box, far ones first; rectangles around the sample's own boxes are pasted again in
              the same order, so that near objects cover far ones; in images of camera sweeps, around the box moved by
              its velocity to the time of the image
Unlike in the original, an object has a separate picture for each camera that it was visible in (in the original, one
for all cameras), and of overlapping objects the one sampled first is pasted (in the original, the last one).
"""

import hashlib
import os
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from unipad.boxes import box_corners, footprint, points_in_boxes
from unipad.checkpoint import remove_unfinished
from unipad.config import Paste
from unipad.data.cache import cache_paths, read_arrays
from unipad.data.dataset import BadFrame, DataError, DrivingDataset, Sample
from unipad.data.loader import load_items
from unipad.kernels.rotated_iou import rotated_iou_bev


@dataclass(frozen=True)
class Objects:
    """K objects to paste and their R pictures. Boxes are in memory; points and pictures are read from `file`."""

    counts: tuple[int, ...]  # per class: objects that a sample is filled up to, if they fit in
    file: Path  # points [n, 5] float32 as in `Sample`, but x, y, z meters from the box's center; pictures as JPEG
    boxes: np.ndarray  # [K, 9] float32 as in `Batch`
    labels: np.ndarray  # [K] int64
    points: np.ndarray  # [K, 2] int64 where an object's points are in `file`: first byte, number of points
    pictures: np.ndarray  # [R, 4] int64 object (ascending), view, and the JPEG's first byte in `file`, size in bytes

    def paste_into(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with objects pasted into its images and appended to its points and boxes; pasted points have the
        point label 0, none."""
        chosen = self._chosen(sample, rng)
        if not len(chosen):
            return sample
        boxes, labels = self.boxes[chosen], self.labels[chosen]
        kept = ~points_in_boxes(sample.points, boxes).any(axis=0)  # of the sample's points
        clouds = [self._points(k) for k in chosen]
        point_labels = sample.point_labels
        if point_labels is not None:
            point_labels = np.concatenate([point_labels[kept], np.zeros(sum(map(len, clouds)), np.uint8)])
        return replace(
            sample,
            images=[self._painted(sample, view, chosen) for view in range(len(sample.images))],
            points=np.concatenate([sample.points[kept], *clouds]),
            point_labels=point_labels,
            boxes=np.concatenate([sample.boxes, boxes]),
            labels=np.concatenate([sample.labels, labels]),
        )

    def _chosen(self, sample, rng):
        """Indices of objects, sampled class by class, that overlap neither the sample's boxes nor each other."""
        candidates = []
        for label, count in enumerate(self.counts):
            of_class = np.flatnonzero(self.labels == label)
            missing = count - np.count_nonzero(sample.labels == label)
            candidates.extend(rng.choice(of_class, min(max(missing, 0), len(of_class)), replace=False))
        candidates = np.array(candidates, np.int64)
        own = len(sample.boxes)
        boxes = np.concatenate([sample.boxes, self.boxes[candidates]]).astype(np.float64)
        boxes = footprint(torch.from_numpy(boxes))
        overlap = (rotated_iou_bev(boxes[own:], boxes) > 0).numpy()  # [candidates, own + candidates]
        placed = np.zeros(len(boxes), bool)  # True: the sample's own boxes, and the candidates that fit in so far
        placed[:own] = True
        for i in range(len(candidates)):
            placed[own + i] = not (overlap[i] & placed).any()
        return candidates[placed[own:]]

    def _points(self, k):
        """[n, 5] float32 points of object k in LiDAR coordinates, as in the frame that it was cut from."""
        first, count = self.points[k]
        points = np.fromfile(self.file, np.float32, 5 * count, offset=first).reshape(-1, 5)
        points[:, :3] += self.boxes[k, :3]
        return points

    def _picture(self, k, view):
        """[h, w, 3] uint8 RGB: object k in `view`; None if it was not visible there."""
        rows = slice(*np.searchsorted(self.pictures[:, 0], [k, k + 1]))
        for _, picture_view, first, size in self.pictures[rows]:
            if picture_view == view:
                jpeg = np.fromfile(self.file, np.uint8, size, offset=first)
                return cv2.cvtColor(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        return None

    def _painted(self, sample, view, chosen):
        """The sample's image of `view` with the `chosen` objects pasted into it; as it is if it has no pixels."""
        if not sample.images[view].size:
            return sample.images[view]
        image, own = sample.images[view].copy(), len(sample.boxes)
        boxes = _at_image_time(sample, view, np.concatenate([sample.boxes, self.boxes[chosen]]))
        rows, rectangles = visible_rectangles(boxes, sample.lidar2image[view], image.shape[:2])
        for row, (left, top, right, bottom) in zip(rows, rectangles, strict=True):
            if row < own:
                picture = sample.images[view][top:bottom, left:right]
            else:
                picture = self._picture(chosen[row - own], view)
                # resized, since the rectangle differs a little: the frames' calibrations and ego motions differ
                picture = None if picture is None else cv2.resize(picture, (right - left, bottom - top))
            if picture is not None:
                image[top:bottom, left:right] = picture
        return image


def load_objects(dataset: DrivingDataset, paste: Paste, workers: int = 0) -> Objects:
    """The objects in the frames of a dataset, cut out once and cached next to the data.

    dataset: must not be `balanced`: objects would be cut out of a frame as often as it occurs.
    workers: processes that read frames; 0 reads in this one.

    Objects are cut out again when the tables, the part of the dataset that is read (sweeps, cameras, image size,
    frames) or `paste.min_points` change. Frames that cannot be read are reported on stderr and left out.
    Raises `DataError` if there is no object, or if the files can be written nowhere.
    """
    data = replace(dataset.data, cameras=dataset.data.cameras and dataset.pixels)  # without pixels, no pictures are cut
    settings = _digest(f"{FORMAT} {data} {paste.min_points} {dataset.frames.tolist()}")
    name = f"{dataset.version}-{dataset.split}-objects-{settings}"
    tables = _digest(dataset.fingerprint())
    paths = cache_paths(dataset.root, f"{name}-{tables}.npz")
    arrays, file = next(filter(None, map(_read, paths)), None) or _make_cache(dataset, paste, paths, workers)
    if not len(arrays["labels"]):
        raise DataError(
            f"no frame of {dataset.root / dataset.version} {dataset.split} has an object of {paste.min_points} LiDAR "
            "points or more that could be pasted; use a preset without cut-and-paste."
        )
    return Objects(paste.counts, file, **arrays)


FORMAT = 2  # version of the cached files, .npz and .bin; increment when the meaning of their contents changes
QUALITY = 95  # JPEG quality of the pictures, of 100: they lose little compared with the dataset's own compression


def _digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _read(path):
    """(arrays of `Objects`, its file) from the cache; None where they are missing or damaged."""
    arrays, file = read_arrays(path), path.with_suffix(".bin")
    names = ("boxes", "labels", "points", "pictures")
    if arrays is None or not {"checksum", *names} <= arrays.keys() or arrays["checksum"] != _checksum(file):
        return None
    return {name: arrays[name] for name in names}, file


def _checksum(path):
    """CRC-32 of a file; -1 where it cannot be read."""
    checksum = 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(2**24):
                checksum = zlib.crc32(chunk, checksum)
    except OSError:
        return -1
    return checksum


def _make_cache(dataset, paste, paths, workers):
    """Cut the objects out and write them to the first of `paths` where that is possible; returns what `_read` does."""
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            pattern = f"{path.stem.rpartition('-')[0]}-*"  # caches of the same settings, from any state of the tables
            remove_unfinished(path.parent, pattern)  # files that killed processes left
            arrays_and_file = _write(dataset, paste, path, workers)
            for old in path.parent.glob(pattern):
                if path.stem not in old.name:  # of an earlier state of the tables
                    old.unlink(missing_ok=True)
            return arrays_and_file
        except OSError as error:
            reason = error.strerror
    raise DataError(
        f"the objects to paste can be written neither to {paths[0].parent} nor to {paths[1].parent} ({reason}); make "
        "one of them writable, or make room there."
    )


def _write(dataset, paste, path, workers):
    """Cut the objects out, write the arrays to `path` (small) and points and pictures to a file next to it (large), and
    return what `_read` does. Each file is renamed when complete, the large one first: the small one never exists alone.
    """
    cuts_of_frames = load_items(_CutsOfFrames(dataset, paste.min_points), range(len(dataset)), workers)
    title = f"cutting objects out of {dataset.version} {dataset.split}"
    boxes, labels, points, pictures = [], [], [], []
    file = path.with_suffix(".bin")
    unfinished = {to: to.with_name(f".{to.name}.{os.getpid()}") for to in (file, path)}
    try:
        with open(unfinished[file], "wb") as large_file:
            for cuts, bad_frames in tqdm(cuts_of_frames, title, len(dataset), unit="frame"):
                for bad in bad_frames:
                    tqdm.write(f"skipped {bad}", file=sys.stderr)
                for cut in cuts:
                    points.append((large_file.tell(), len(cut.points)))
                    large_file.write(cut.points)
                    for view, jpeg in cut.pictures:
                        pictures.append((len(boxes), view, large_file.tell(), len(jpeg)))
                        large_file.write(jpeg)
                    boxes.append(cut.box)
                    labels.append(cut.label)
        arrays = {
            "boxes": np.array(boxes, np.float32).reshape(-1, 9),
            "labels": np.array(labels, np.int64),
            "points": np.array(points, np.int64).reshape(-1, 2),
            "pictures": np.array(pictures, np.int64).reshape(-1, 4),
        }
        with open(unfinished[path], "wb") as small_file:
            np.savez_compressed(small_file, checksum=_checksum(unfinished[file]), **arrays)
        for to in (file, path):
            os.replace(unfinished[to], to)
    finally:
        for left_over in unfinished.values():
            left_over.unlink(missing_ok=True)
    return arrays, file


class _CutsOfFrames(Dataset):
    """Item i: (list of the `Cut`s of the dataset's frame i, list of `path: reason` if it could not be read, else
    empty)."""

    def __init__(self, dataset, min_points):
        self.dataset, self.min_points = dataset, min_points

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        try:
            # not dataset[i], which crops the points to `point_range`
            return cut_out(self.dataset.load(self.dataset.frames[i]), self.min_points), []
        except BadFrame as bad:
            return [], [str(bad)]


@dataclass(frozen=True)
class Cut:
    """One object of a frame."""

    box: np.ndarray  # [9] float32 as in `Batch`
    label: int
    points: np.ndarray  # [n, 5] float32, x, y, z meters from the box's center
    pictures: list[tuple[int, np.ndarray]]  # view, JPEG


def cut_out(sample: Sample, min_points: int) -> list[Cut]:
    """The objects of a sample with at least `min_points` LiDAR points, with their pictures from all views."""
    pictures = [[] for _ in sample.boxes]
    inside = points_in_boxes(sample.points, sample.boxes)
    enough = inside.sum(axis=1) >= min_points
    for view, image in enumerate(sample.images):
        if not image.size:  # its pixels were not read
            continue
        boxes = _at_image_time(sample, view, sample.boxes)
        for row, (left, top, right, bottom) in zip(
            *visible_rectangles(boxes, sample.lidar2image[view], image.shape[:2]), strict=True
        ):
            if enough[row]:
                picture = cv2.cvtColor(image[top:bottom, left:right], cv2.COLOR_RGB2BGR)
                _, jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
                pictures[row].append((view, jpeg))
    cuts = []
    for row in np.flatnonzero(enough):
        points = sample.points[inside[row]]
        points[:, :3] -= sample.boxes[row, :3]
        cuts.append(Cut(sample.boxes[row], int(sample.labels[row]), points, pictures[row]))
    return cuts


def _at_image_time(sample, view, boxes):
    """[M, 9] boxes of the keyframe, moved by their velocities to where they were when the image of `view` was taken."""
    if sample.frame_lags is None:
        return boxes
    boxes = boxes.copy()
    # views are sorted by camera frame: the keyframe's, then those of each frame before it
    frame = view * len(sample.frame_lags) // len(sample.images)
    boxes[:, :2] -= sample.frame_lags[frame] * boxes[:, 7:]  # a lag is an age; columns 7, 8: velocity
    return boxes


def visible_rectangles(
    boxes: np.ndarray, lidar2image: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Rectangles around boxes [M, 9] in an image of `size` (height, width).

    Returns rows [V] of the visible boxes, far ones first, and rectangles [V, 4] int left, top, right, bottom pixels,
    the last two exclusive: around all corners, clipped (as in the original) to the image without its last row and
    column. A box is visible if it is entirely in front of the camera and its rectangle at least two pixels wide and
    high.
    """
    height, width = size
    corners = box_corners(boxes)
    corners = np.concatenate([corners, np.ones_like(corners[..., :1])], axis=-1)
    pixels = corners @ lidar2image.T.astype(np.float64)  # [M, 8, 4]
    rows = np.flatnonzero((pixels[..., 2] > 0).all(axis=1))
    depth = pixels[rows, :, 2]  # meters along the optical axis
    uv = pixels[rows, :, :2] / depth[..., None]
    ends = np.concatenate([uv.min(axis=1), uv.max(axis=1)], axis=1)
    rectangles = ends.clip(0, [width - 1, height - 1] * 2).astype(np.int64)
    large = (rectangles[:, 2:] - rectangles[:, :2] > 1).all(axis=1)
    order = np.argsort(-depth[large].mean(axis=1), kind="stable")
    return rows[large][order], rectangles[large][order]

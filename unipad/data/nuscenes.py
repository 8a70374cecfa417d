"""nuScenes files -> samples: the real dataset and the synthetic one through the same code.

As in the original UniPAD:
    cameras    lidar2camera goes through the global frame, with the ego pose at each sensor's own timestamp; also for
               camera sweeps: from the keyframe's LiDAR frame to the camera when it took the image
    sweeps     transformed into the keyframe's LiDAR frame; time lag is keyframe time minus sweep time, 0 for the
               keyframe; points with |x| < 1 and |y| < 1 (ego vehicle) are removed from sweeps, not from the keyframe
    intensity  as in the file, 0-255
    boxes      those with at least one LiDAR or radar point; a velocity that the tables do not have is 0
Unlike in the original: the nearest sweeps are taken (in the original, 9 of the last 10 at random), and at the start of
a scene a keyframe has no LiDAR sweeps (the original repeats the keyframe, as is done here for camera sweeps).
"""

import hashlib
from pathlib import Path

import cv2
import numpy as np

from unipad.batch import CAMERAS
from unipad.config import Augment, Data
from unipad.data.dataset import BadFrame, DataError, DrivingDataset, Sample
from unipad.data.synthetic import ensure_city
from unipad.data.tables import SPLITS, find_root, load_camera_sweeps, load_index, scene_tokens, tables_state


class NuScenesDataset(DrivingDataset):
    """Keyframes of one split in the order of time.

    root: folder that holds samples/, sweeps/ and <version>/ (or <version>/<version>/, as in OpenPCDet's layout).
    """

    default_version = "v1.0-mini"
    tasks = ("detect", "segment")

    def __init__(
        self,
        root: str | Path,
        version: str,
        split: str,
        data: Data,
        label_fraction: float = 1.0,
        point_range: tuple | None = None,
        augment: Augment | None = None,
    ):
        root = find_root(root, version)
        self.index, self.camera_sweeps = load_index(root, version, split), None
        if data.cameras and data.camera_sweeps > 1:
            self.camera_sweeps = load_camera_sweeps(root, version, split)
        settings = (label_fraction, point_range, augment)
        super().__init__(len(self.index.tokens), root, version, split, data, *settings)

    @classmethod
    def splits(cls, version):
        """By the version's last word: v1.0-trainval has train and val, v1.0-mini mini_train and mini_val."""
        known = SPLITS.get(version.rpartition("-")[2])
        if known is None:
            versions = ", ".join(f"v1.0-{suffix}" for suffix in SPLITS)
            raise DataError(f"--version {version} is not known; use {versions}.")
        return known

    @classmethod
    def default_root(cls, data):
        """A synthetic city, generated if it does not exist yet."""
        return ensure_city(data.camera_sweeps - 1)

    @classmethod
    def has_images(cls, root, version, split):
        """Whether any image of 16 keyframes, spread over the split, exists: some of the images may not be unpacked."""
        root = find_root(root, version)
        files = load_index(root, version, split).image_files
        files = files[:: max(1, len(files) // 16)].flatten()
        return any((root / name.decode()).is_file() for name in files)

    def labels_of(self, frame):
        return self.index.labels[slice(*self.index.box_offsets[frame : frame + 2])]

    def scenes(self):
        row_of = {self.index.tokens[f].decode(): i for i, f in enumerate(self.frames)}
        scenes = scene_tokens(self.root, self.version)
        rows = {name: [row_of[t] for t in tokens if t in row_of] for name, tokens in scenes.items()}
        return {name: of_scene for name, of_scene in rows.items() if of_scene}

    def fingerprint(self):
        return tables_state(self.root, self.version)

    def contents(self):
        exact = [array for array in vars(self.index).values() if array.dtype.kind in "iuS"]  # floats may be rounded
        return hashlib.sha256(b"".join(array.tobytes() for array in exact)).hexdigest()[:16]

    def require_point_labels(self):
        if not all(self.index.lidarseg_files):
            where = f"{self.root / self.version} {self.split}"
            raise DataError(f"{where} has frames without lidarseg labels; unpack nuScenes-lidarseg in {self.root}.")

    def load(self, frame):
        index = self.index
        clouds = self._read_points(index.frame_lidar[frame])
        points, point_labels = np.concatenate(clouds), None
        if index.lidarseg_files[frame]:
            point_labels = np.zeros(len(points), np.uint8)
            point_labels[: len(clouds[0])] = self._read_labels(frame, len(clouds[0]))
        files, intrinsics, lidar2camera = self._views(frame)
        images, scales = [], np.empty((len(files), 4, 4))
        for view, file in enumerate(files):
            image, scales[view] = self._read_image(file)
            images.append(image)
        b = slice(*index.box_offsets[frame : frame + 2])
        return Sample(
            images=images,
            lidar2image=(scales @ intrinsics @ lidar2camera).astype(np.float32),
            lidar2camera=lidar2camera.astype(np.float32),
            points=points,
            point_labels=point_labels,
            boxes=index.boxes[b],
            labels=index.labels[b],
            token=index.tokens[frame].decode(),
            frame_lags=self._frame_lags(frame),
        )

    def _views(self, frame):
        """(files [N], intrinsics [N, 4, 4], lidar2camera [N, 4, 4]) of the views of a keyframe, as in `Batch`."""
        names = ("image_files", "intrinsics", "lidar2camera")
        views = [getattr(self.index, name)[frame, : len(CAMERAS) if self.data.cameras else 0] for name in names]
        if self.camera_sweeps is not None:
            before = [getattr(self.camera_sweeps, name)[frame, : self.data.camera_sweeps - 1] for name in names]
            views = [np.concatenate([key, *frames]) for key, frames in zip(views, before, strict=True)]
        return views

    def _frame_lags(self, frame):
        """[S] float32 seconds, 0 first; None without camera sweeps."""
        if self.camera_sweeps is None:
            return None
        rate, sweeps = self.data.camera_rate, self.camera_sweeps
        lags = sweeps.numbers[frame] / rate if rate else sweeps.lags[frame]
        return np.concatenate([[0], lags[: self.data.camera_sweeps - 1]]).astype(np.float32)

    def _read_points(self, key):
        """List of [P, 5]: the LiDAR frame in row `key`, then the sweeps before it, as far as the scene goes back."""
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

    def _read_labels(self, frame, count):
        """[count] uint8 lidarseg class 0-16 of the keyframe's points."""
        path = self._path(self.index.lidarseg_files[frame])
        labels = _load_bytes(path)
        if len(labels) != count:
            raise BadFrame(path, f"has {len(labels)} labels for {count} points")
        return self.index.lidarseg_classes[labels]

    def _read_image(self, path):
        """The image as [h, w, 3] uint8 RGB, resized to `data.image_size`, and the [4, 4] scaling of pixels."""
        path = self._path(path)
        data = _load_bytes(path)
        # OpenCV fills what a truncated JPEG lacks with gray, so look for the end marker.
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
        raise BadFrame(path, "has values that are not finite")
    return points

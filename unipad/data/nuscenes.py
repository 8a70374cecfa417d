"""nuScenes files -> samples: the real dataset and the synthetic one through the same code.

As in the original UniPAD:
    cameras    lidar2camera goes through the global frame, with the ego pose at each sensor's own timestamp; also for
               camera sweeps: from the keyframe's LiDAR frame to the camera when it took the image
    sweeps     transformed into the keyframe's LiDAR frame; time lag is keyframe time minus sweep time, 0 for the
               keyframe; points with |x| and |y| < 1 m (ego vehicle) are removed from sweeps, not from the keyframe
    intensity  as in the file; 0-255 in nuScenes
    boxes      those with at least one LiDAR or radar point; a velocity that the tables do not have is 0
The rig is that of the tables: any number of cameras, of any name and size. Frames of which a file is missing are left
out from the start; a damaged file is reported when it is read. Images may be scaled copies of the tables' size: the
intrinsics, which are for the size in the tables, are scaled.
Unlike in the original: the latest sweeps before the keyframe are taken (in the original, 9 of the last 10 at random),
and a scene's first keyframe has no LiDAR sweeps (the original repeats the keyframe, as is done here for camera sweeps).
"""

import copy
import hashlib
import os
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np

from unipad.config import Augment, Data
from unipad.data.dataset import BadFrame, DataError, DrivingDataset, Sample
from unipad.data.features import feature_files, read_features
from unipad.data.files import decode_image, image_size, on_disk, read_bytes, read_points
from unipad.data.index import NO_CATEGORY
from unipad.data.occupancy import read_occupancy
from unipad.data.splits import splits_of
from unipad.data.synthetic import add_occupancy, ensure_city, is_synthetic
from unipad.data.tables import (
    find_root,
    load_camera_sweeps,
    load_index,
    load_occupancy,
    load_source_frames,
    samples_of_scenes,
    tables_state,
)

MAX_ENLARGEMENT = 2  # largest accepted ratio of an image's width to the width in the tables
MAX_LISTED = 3  # files or rows that a message lists, at most
# Fields of an index that describe views: files, sizes, matrices
VIEW_FIELDS = ("image_files", "image_sizes", "intrinsics", "lidar2camera")


class NuScenesDataset(DrivingDataset):
    """Keyframes of one split in the order of time.

    root: folder that holds samples/, sweeps/ and <version>/; or one whose subfolder <version>/ holds all these, as in
    OpenPCDet's layout. The other arguments are those of `DrivingDataset`.
    """

    default_version = "v1.0-mini"
    tasks = ("detect", "segment", "occupancy")

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
        self.index, self.camera_sweep_index = load_index(root, version, split), None
        self.occupancy_index, self.occupancy_labels = None, False  # see `with_occupancy`
        if data.cameras and data.camera_sweeps > 1:  # `Data` counts the keyframe as a sweep
            self.camera_sweep_index = load_camera_sweeps(root, version, split)
        self.source_index = load_source_frames(root, version, split, data.sources) if data.sources else None
        settings = (label_fraction, point_range, augment)
        super().__init__(len(self.index.tokens), root, version, split, data, *settings)
        self.frames = self._complete_frames()
        self._check_features()
        if len(rows := self.index.left_out):
            named = "; ".join(row.decode() for row in rows[:MAX_LISTED]) + ("; ..." if len(rows) > MAX_LISTED else "")
            _report(f"{root / version} {split}: {len(rows)} boxes of sample_annotation.json are left out: {named}")

    @classmethod
    def splits(cls, root, version):
        """nuScenes' splits of the version, such as mini_train and mini_val of v1.0-mini; or those of splits.json."""
        return splits_of(find_root(root, version), version)

    @classmethod
    def default_root(cls, data):
        """A synthetic city, generated if it does not exist yet."""
        # `Data` counts the keyframe, the city does not; 5: all frames between keyframes, so that both sides have some
        sweeps = 5 if data.sources else data.camera_sweeps - 1
        return ensure_city(sweeps, with_features=data.features is not None)

    @classmethod
    def has_images(cls, root, version, split):
        """Whether at least one keyframe has the images of all cameras on disk, even if images of others are missing."""
        root = find_root(root, version)
        files = load_index(root, version, split).image_files
        return bool(files.size) and bool(on_disk(root, files).all(axis=1).any())

    @classmethod
    def has_points(cls, root, version, split):
        """Whether all keyframes that have their images on disk have their LiDAR file too: else these images alone are
        evaluated, not the few frames that have both."""
        root = find_root(root, version)
        index = load_index(root, version, split)
        points = on_disk(root, index.lidar_files[index.frame_lidar])
        return bool(points.any() and points[on_disk(root, index.image_files).all(axis=1)].all())

    def labels_of(self, frame):
        return self.index.labels[slice(*self.index.box_offsets[frame : frame + 2])]

    def scenes(self):
        index_of = {self.index.tokens[f].decode(): i for i, f in enumerate(self.frames)}
        scenes = samples_of_scenes(self.root, self.version)
        indices = {name: [index_of[t] for t in tokens if t in index_of] for name, tokens in scenes.items()}
        return {name: of_scene for name, of_scene in indices.items() if of_scene}

    def tokens(self):
        return [token.decode() for token in self.index.tokens]

    def fingerprint(self):
        return tables_state(self.root, self.version)

    def contents(self):
        # without floats, whose rounding may differ between machines
        exact = [array for array in vars(self.index).values() if array.dtype.kind in "iuS"]
        # the index has all frames of the split, `frames` those whose files exist
        return hashlib.sha256(b"".join(array.tobytes() for array in [*exact, self.frames])).hexdigest()[:16]

    def require_point_labels(self):
        if not all(self.index.lidarseg_files):
            where = f"{self.root / self.version} {self.split}"
            raise DataError(f"{where} has frames without lidarseg labels; unpack nuScenes-lidarseg in {self.root}.")

    def with_occupancy(self, labels=True, verbose=True):
        """This dataset with occupancy labels. Those of a synthetic city without any are made first."""
        dataset = copy.copy(self)
        dataset.occupancy_index, dataset.occupancy_labels = load_occupancy(self.root, self.version, self.split), labels
        if not labels:
            return dataset
        files = dataset.occupancy_index.files[self.frames]
        present = self._are_labeled(files)
        if not present.all() and is_synthetic(self.root):
            add_occupancy(self.root)
            present = self._are_labeled(files)
        if not present.any():
            raise DataError(
                f"{self.root} has no occupancy labels, such as {files[0].decode()}; unpack gts of Occ3D-nuScenes there."
            )
        if verbose and not present.all():
            where, missing = f"{self.root / self.version} {self.split}", files[~present]
            _report(f"{where}: {len(missing)} frames are left out; without labels, such as {missing[0].decode()}")
        dataset.frames = self.frames[present]
        return dataset

    def _are_labeled(self, files):
        """Which of the occupancy labels exist, [F] bool. Each has a folder of its own: those that do not exist, as
        their parent says, are not listed."""
        present = on_disk(self.root, np.char.rpartition(files, b"/")[:, 0])
        present[present] = on_disk(self.root, files[present])
        return present

    def lidar_origins(self):
        pairs = zip(self.tokens(), self.occupancy_index.origins, strict=True)
        return {token: of_frame[~np.isnan(of_frame[:, 0])] for token, of_frame in pairs}

    def load(self, frame):
        index = self.index
        images, lidar2camera, lidar2image = self._read_views(*self._views(frame))
        source_images, lidar2source = None, None
        if self.source_index is not None:
            views = (getattr(self.source_index, name)[frame] for name in VIEW_FIELDS)
            source_images, _, lidar2source = self._read_views(*views)
        clouds, sweep_origins = self._read_points(index.frame_lidar[frame])
        points, point_labels = np.concatenate(clouds), None
        if index.lidarseg_files[frame] and self.data.sweeps:
            point_labels = np.zeros(len(points), np.uint8)
            point_labels[: len(clouds[0])] = self._read_labels(frame, len(clouds[0]))
        b = slice(*index.box_offsets[frame : frame + 2])
        occupancy, ego2lidar = None, None
        if self.occupancy_index is not None:
            ego2lidar = self.occupancy_index.ego2lidar[frame].astype(np.float32)
            if self.occupancy_labels:
                occupancy = read_occupancy(self._path(self.occupancy_index.files[frame]))
        return Sample(
            images=images,
            lidar2image=lidar2image,
            lidar2camera=lidar2camera,
            points=points,
            point_labels=point_labels,
            boxes=index.boxes[b],
            labels=index.labels[b],
            token=index.tokens[frame].decode(),
            frame_lags=self._frame_lags(frame),
            cameras=tuple(name.decode() for name in index.cameras) if self.data.cameras else (),
            source_images=source_images,
            lidar2source=lidar2source,
            features=self._read_features(frame),
            occupancy=occupancy,
            ego2lidar=ego2lidar,
            sweep_origins=sweep_origins,
        )

    def _read_features(self, frame):
        """`Sample.features`."""
        if self.data.features is None:
            return None
        folder, channels, features = self.root / self.data.features, self.data.feature_channels, []
        for file, size in zip(self.index.image_files[frame].tolist(), self.index.image_sizes[frame], strict=True):
            features.append(read_features(folder, file.decode(), size.tolist(), channels))
            channels = features[-1].shape[2]
        return features

    def _check_features(self):
        """Raises `DataError` unless the images of all `frames` have features."""
        if self.data.features is None:
            return
        folder, images = self.root / self.data.features, self.index.image_files[self.frames].ravel().tolist()
        files = np.array([[name.encode() for name in feature_files(image.decode())] for image in images])
        files = files.reshape(-1, 2)  # also without cameras
        missing = files[~on_disk(folder, files).any(axis=1), 0]
        if len(missing):
            raise DataError(
                f"{folder} has no features of {len(missing)} of {len(images)} images, such as {missing[0].decode()}; "
                "write them as docs/data.md says, name another folder with --data.features (below the dataset's, or "
                "absolute), or do without: --data.features None."
            )

    def _views(self, frame):
        """(files [N], sizes [N, 2], intrinsics [N, 4, 4], lidar2camera [N, 4, 4]) of the views of a keyframe, in
        the order of `Batch`."""
        views = [getattr(self.index, name)[frame, : None if self.data.cameras else 0] for name in VIEW_FIELDS]
        if self.camera_sweep_index is not None:
            last = self.data.camera_sweeps - 1
            before = [getattr(self.camera_sweep_index, name)[frame, :last] for name in VIEW_FIELDS]
            views = [np.concatenate([key, *frames]) for key, frames in zip(views, before, strict=True)]
        return views

    def _read_views(self, files, sizes, intrinsics, lidar2camera):
        """Images (of views without a file [0, 0, 3]), and float32 `lidar2camera` and `lidar2image`, of some views as
        `_views` returns them."""
        images, scales = [], np.tile(np.eye(4), (len(files), 1, 1))
        read = self._read_image if self.pixels else self._image_without_pixels
        for view, (file, size) in enumerate(zip(files, sizes, strict=True)):
            image = np.empty((0, 0, 3), np.uint8)
            if file:
                image, scales[view] = read(file, *size.tolist())
            images.append(image)
        return images, lidar2camera.astype(np.float32), (scales @ intrinsics @ lidar2camera).astype(np.float32)

    def _frame_lags(self, frame):
        """[S] float32 seconds, 0 first; None without camera sweeps."""
        if self.camera_sweep_index is None:
            return None
        rate, sweeps = self.data.camera_rate, self.camera_sweep_index
        lags = sweeps.numbers[frame] / rate if rate else sweeps.lags[frame]
        return np.concatenate([[0], lags[: self.data.camera_sweeps - 1]]).astype(np.float32)

    def _read_points(self, key):
        """List of [P, 5], columns as in `Batch.points`: the LiDAR scan in row `key` of the index, then the sweeps
        before it in its scene, the latest first; all in the LiDAR frame of `key`. No file is read for 0 sweeps. And
        `Sample.sweep_origins`."""
        index = self.index
        if not self.data.sweeps:
            return [np.empty((0, 5), np.float32)], None
        points = read_points(self._path(index.lidar_files[key]))
        points[:, 4] = 0  # the time lag takes the place of the ring
        clouds, sweep = [points], index.lidar_prev[key]
        origins = np.zeros((self.data.sweeps, 4), np.float32)
        origins[1:, 3] = -1  # no such sweep, unless one is read below
        while len(clouds) < self.data.sweeps and sweep >= 0:
            points = read_points(self._path(index.lidar_files[sweep]))
            x, y = np.abs(points[:, :2]).T
            points = points.compress((x >= 1) | (y >= 1), axis=0)  # without the ego vehicle
            to_key = np.linalg.inv(index.lidar2global[key]) @ index.lidar2global[sweep]
            points[:, :3] = points[:, :3] @ to_key[:3, :3].T + to_key[:3, 3]
            points[:, 4] = 1e-6 * (index.lidar_times[key] - index.lidar_times[sweep])
            origins[len(clouds)] = *to_key[:3, 3], 1e-6 * (index.lidar_times[key] - index.lidar_times[sweep])
            clouds.append(points)
            sweep = index.lidar_prev[sweep]
        return clouds, origins

    def _read_labels(self, frame, count):
        """[count] uint8 lidarseg class 0-16 of the keyframe's points."""
        path = self._path(self.index.lidarseg_files[frame])
        labels = read_bytes(path)
        if len(labels) != count:
            lidar = self._path(self.index.lidar_files[self.index.frame_lidar[frame]])
            raise BadFrame(path, f"has {len(labels)} labels for {count} points of {lidar}: one of them is damaged")
        classes = self.index.lidarseg_classes[labels]
        if (unknown := classes == NO_CATEGORY).any():
            raise BadFrame(path, f"has label {labels[unknown][0]}, which is not the index of any category")
        return classes

    def _read_image(self, name, height, width):
        """The image in file `name` as [H, W, 3] uint8 RGB, resized to `data.image_size`, and the [4, 4] matrix to its
        pixels from those of an image of the size in the tables, `height` x `width`."""
        path = self._path(name)
        data = read_bytes(path)
        h, w = image_size(path, data)
        # The aspect ratio may differ by a pixel of rounding. A damaged header must not make OpenCV allocate all memory.
        if w > MAX_ENLARGEMENT * width or abs(w * height - h * width) > max(height, width):
            raise BadFrame(path, f"is {h} x {w}, neither the {height} x {width} of the tables nor a scaled copy")
        image = decode_image(path, data)
        H, W = self.data.image_size or (h, w)
        if (H, W) != (h, w):
            image = cv2.resize(image, (W, H), interpolation=cv2.INTER_AREA if H * W < h * w else cv2.INTER_LINEAR)
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.diag([W / width, H / height, 1, 1])

    def _image_without_pixels(self, name, height, width):
        """What `_read_image` returns, but [H, W, 0], without opening the file: as if it had the size in the tables."""
        H, W = self.data.image_size or (height, width)
        return np.empty((H, W, 0), np.uint8), np.diag([W / width, H / height, 1, 1])

    def _path(self, name):
        return self.root / name.decode()

    def _complete_frames(self):
        """Those of `frames` whose files all exist; reports the others. Raises `DataError` if none is left, or if all
        sweeps are missing."""
        kinds = self._files()
        files = np.concatenate(list(kinds.values()), axis=1)
        present = on_disk(self.root, files)
        whole = present.all(axis=1)
        if whole.all():
            return self.frames
        keyframes = [self.index.lidar_files[self.index.frame_lidar], self.index.image_files.ravel()]
        for flag in ("sweeps", "camera-sweeps"):
            # without files of keyframes, which `_files` lists here too: the frame before a keyframe may be another
            # keyframe, and where the tables have no sweep, the keyframe itself is listed
            sweeps = np.setdiff1d(kinds[flag], np.concatenate(keyframes))
            if len(sweeps) and not on_disk(self.root, sweeps).any():
                raise DataError(
                    f"{self.root} has none of the sweeps, such as {sweeps[0].decode()}; unpack them, or read keyframes "
                    f"alone with --data.{flag} 1."
                )
        names = [name.decode() for name in np.unique(files[~present]) if name]
        if len(names) > MAX_LISTED:
            names = [f"{n} of {folder}" for folder, n in Counter(str(Path(name).parent) for name in names).items()]
        if self.data.cameras:
            without = (self.index.image_files[self.frames] == b"").any(axis=0)
            names += [f"{camera.decode()} in the tables" for camera in self.index.cameras[without]]
        where = f"{self.root / self.version} {self.split}"
        if not whole.any():
            raise DataError(f"no frame of {where} has all its files; unpack what is missing: {', '.join(names)}.")
        _report(f"{where}: {(~whole).sum()} of {len(whole)} frames are left out; missing: {', '.join(names)}")
        return self.frames[whole]

    def _files(self):
        """{kind: [F, number]} the files that `load` reads for each of `frames`; two kinds are named as flags of `Data`.

        Where the tables have no such sweep or labels, the keyframe's LiDAR file, needed anyway, is listed instead;
        where they have no such source, the keyframe's first image; where they have no image, an empty name.
        """
        index, frames, data = self.index, self.frames, self.data
        key = index.frame_lidar[frames]
        chain = [key]
        for _ in range(data.sweeps - 1):
            before = index.lidar_prev[chain[-1]]
            chain.append(np.where(before < 0, key, before))  # the scene goes back no further
        lidar = index.lidar_files[np.stack(chain, axis=1)]
        labels = index.lidarseg_files[frames, None]
        labels = np.where(labels == b"", lidar[:, :1], labels)
        if not data.sweeps:
            lidar, labels = lidar[:, :0], labels[:, :0]
        images = index.image_files[frames, : None if data.cameras else 0]
        sweep_images = images[:, :0]  # none
        if self.camera_sweep_index is not None:
            sweep_images = self.camera_sweep_index.image_files[frames, : data.camera_sweeps - 1]
            sweep_images = sweep_images.reshape(len(frames), -1)
        sources = images[:, :0]
        if self.source_index is not None:
            sources = self.source_index.image_files[frames]
            sources = np.where(sources == b"", images[:, :1], sources)  # the scene has no such frame
        keyframe = np.concatenate([lidar[:, :1], labels, images], axis=1)
        return {"keyframe": keyframe, "sweeps": lidar[:, 1:], "camera-sweeps": sweep_images, "sources": sources}


def _report(sentence):
    """Print `sentence` on stderr, in the main process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(sentence, file=sys.stderr)

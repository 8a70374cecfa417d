"""nuScenes tables, opened by the devkit -> `Index`, `CameraSweeps` and `OccupancyIndex`: what samples need, as arrays.

Data loading workers keep only these arrays: no devkit, no Python objects to copy.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from unipad.batch import CAMERAS, CLASSES
from unipad.boxes import boxes_from_global
from unipad.data.schema import box_fault, row_error

NO_CATEGORY = 255  # stands for a class where a label in a file is no category's index
CAMERA_SWEEPS = 5  # of each camera before a keyframe: all between two keyframes (cameras at 12 Hz, keyframes at 2 Hz)
MAX_DISTANCE = 1e4  # meters from the LiDAR along an axis: points farther away are an error, boxes are left out
MAX_SPEED = 200.0  # m/s: an object that is faster along x or y counts as one of unknown velocity; see also `MAX_OFFSET`
# meters: a pose is wrong that puts the LiDAR farther than this from a camera, or from where it was one scan earlier,
# unless it got from there to here at less than `MAX_SPEED`
MAX_OFFSET = 200.0
MAX_GAP = 1e9  # microseconds between successive frames of a scene: more, or less than 0, means a wrong timestamp
MAX_ORIGINS, ORIGIN_RANGE = 8, 39.0  # SparseOcc's: origins per keyframe, and meters in x and y that they are within
FORMAT = 3  # version of the cached index; increment when the meaning of a field changes


@dataclass(frozen=True)
class Index:
    """What the samples of one split need from the tables.

    F keyframes in the order of time, N cameras, M boxes, L LiDAR scans (those of keyframes and the sweeps between).
    Text is in bytes, paths are relative to the data root. The cameras are those of which any keyframe of the version,
    in whichever split, has an image: where a keyframe has none, the file's name is empty, and size and matrices have no
    meaning.
    """

    cameras: np.ndarray  # [N] names: nuScenes' in the order of `CAMERAS`, then others by name
    tokens: np.ndarray  # [F] sample tokens
    frame_lidar: np.ndarray  # [F] row of the keyframe's scan among the L LiDAR scans
    lidar_tokens: np.ndarray  # [F] sample_data tokens of LIDAR_TOP's keyframes
    image_files: np.ndarray  # [F, N]
    image_sizes: np.ndarray  # [F, N, 2] int64 height, width according to the tables
    intrinsics: np.ndarray  # [F, N, 4, 4] camera meters -> (u*d, v*d, d, 1), pixels of an image of `image_sizes`
    lidar2camera: np.ndarray  # [F, N, 4, 4] from the LiDAR at its own timestamp to the camera at its own
    box_offsets: np.ndarray  # [F + 1] keyframe f has boxes box_offsets[f] to box_offsets[f + 1], exclusive
    boxes: np.ndarray  # [M, 9] float32 as in `Batch`
    labels: np.ndarray  # [M] int64
    lidar_files: np.ndarray  # [L]
    lidar_times: np.ndarray  # [L] int64 microseconds
    lidar2global: np.ndarray  # [L, 4, 4]
    lidar_prev: np.ndarray  # [L] row of the previous LiDAR scan, -1 at the start of a scene
    lidarseg_files: np.ndarray  # [F] empty where a keyframe has no labels
    lidarseg_classes: np.ndarray  # [256] uint8 label in the files (a category's index) -> class 0-16, or `NO_CATEGORY`
    left_out: np.ndarray  # [K] messages "row <number>: <reason>": rows of sample_annotation that cannot be used


@dataclass(frozen=True)
class CameraSweeps:
    """The images before each keyframe of a split: a separate index, since only runs with camera sweeps need it.

    F keyframes in the order of the `Index`, W = `CAMERA_SWEEPS` frames before each, the newest first, N cameras. Among
    these frames may be earlier keyframes; where the scene does not go back that far, its first frame is repeated (the
    original never uses a scene's first frame as a sweep).
    """

    image_files: np.ndarray  # [F, W, N]
    image_sizes: np.ndarray  # [F, W, N, 2] int64 as in `Index`
    intrinsics: np.ndarray  # [F, W, N, 4, 4] float32 as in `Index`
    lidar2camera: np.ndarray  # [F, W, N, 4, 4] float32 from the LiDAR at the keyframe's time to the camera at its own
    # both for the first camera that has an image in the keyframe:
    numbers: np.ndarray  # [F, W] int64 how many frames before the keyframe: 1, 2, ...; 0 where the keyframe is repeated
    lags: np.ndarray  # [F, W] float32 how many seconds before the keyframe's image


@dataclass(frozen=True)
class SourceFrames:
    """The images before and after each keyframe of a split that the photometric loss looks into: a separate index.

    F keyframes in the order of the `Index`, M sources: for each of some offsets in frames, in their order, N cameras.
    Among these frames may be other keyframes; where the scene has no such frame, the file's name is empty.
    """

    image_files: np.ndarray  # [F, M]
    image_sizes: np.ndarray  # [F, M, 2] int64 as in `Index`
    intrinsics: np.ndarray  # [F, M, 4, 4] float32 as in `Index`
    lidar2camera: np.ndarray  # [F, M, 4, 4] float32 from the LiDAR at the keyframe's time to the camera at its own


@dataclass(frozen=True)
class OccupancyIndex:
    """What occupancy needs of each keyframe beyond the `Index`: a separate index, since only this task needs it.

    F keyframes in the order of the `Index`. The ego frame is that of the keyframe's LiDAR at its own timestamp.
    """

    files: np.ndarray  # [F] labels, as Occ3D-nuScenes names them: gts/<scene>/<sample token>/labels.npz
    ego2lidar: np.ndarray  # [F, 4, 4]
    # LiDAR's positions at keyframes of the scene, in this keyframe's ego frame: where SparseOcc (arXiv 2312.17118)
    # starts its rays; NaN after the last
    origins: np.ndarray  # [F, MAX_ORIGINS, 3] float32 meters


def build_index(nusc, split: str, scenes: set[str], verbose: bool) -> Index:
    """The index of a split from the tables.

    nusc:    the devkit's `NuScenes`, from `schema.open_tables`.
    split:   its name, for the progress bar that `verbose` shows.
    scenes:  names of its scenes.

    Raises `DataError`, naming table and row, and whatever the devkit raises.
    """
    samples, names = _samples(nusc, scenes), _camera_names(nusc)
    for sample in samples:
        if "LIDAR_TOP" not in sample["data"]:
            raise _row_error(nusc, "sample", sample, "has no keyframe of the sensor LIDAR_TOP")
    tokens = {s["token"] for s in samples}
    lidar = [r for r in nusc.sample_data if r["channel"] == "LIDAR_TOP" and r["sample_token"] in tokens]
    lidar_row = {r["token"]: i for i, r in enumerate(lidar)}
    frame_lidar = np.array([lidar_row[s["data"]["LIDAR_TOP"]] for s in samples], np.int64)
    lidar2global = _sensor2global(nusc, lidar)
    lidar_times = np.array([r["timestamp"] for r in lidar], np.int64)
    lidar_prev = np.array([lidar_row.get(r["prev"], -1) for r in lidar], np.int64)
    _check_motion(nusc, lidar, lidar2global, lidar_times, lidar_prev)
    images = [nusc.get("sample_data", s["data"][c]) if c in s["data"] else None for s in samples for c in names]
    samples_and_bar = tqdm(samples, f"indexing {nusc.version} {split}", disable=not verbose, unit="frame")
    lidarseg, classes = _lidarseg(nusc)
    return Index(
        cameras=_text(names),
        tokens=_text(s["token"] for s in samples),
        frame_lidar=frame_lidar,
        lidar_tokens=_text(s["data"]["LIDAR_TOP"] for s in samples),
        **_images(nusc, images, (len(samples), len(names)), lidar2global[frame_lidar]),
        **_boxes(nusc, samples_and_bar, lidar2global[frame_lidar]),
        lidar_files=_text(r["filename"] for r in lidar),
        lidar_times=lidar_times,
        lidar2global=lidar2global,
        lidar_prev=lidar_prev,
        lidarseg_files=_text(lidarseg.get(s["data"]["LIDAR_TOP"], "") for s in samples),
        lidarseg_classes=classes,
    )


def _check_motion(nusc, lidar, lidar2global, times, prev):
    """Raise `DataError` for a LiDAR scan too far from the previous one in time (`MAX_GAP`) or space (`MAX_OFFSET`)."""
    for i in np.flatnonzero(prev >= 0):
        gap, step = int(times[i] - times[prev[i]]), lidar2global[i, :3, 3] - lidar2global[prev[i], :3, 3]
        _check_gap(nusc, lidar[i], gap)
        if np.linalg.norm(step) > max(MAX_OFFSET, MAX_SPEED * 1e-6 * abs(gap)):
            pose = nusc.get("ego_pose", lidar[i]["ego_pose_token"])
            what = f"is {np.linalg.norm(step):.0f} m from that of the LiDAR frame before"
            raise _row_error(nusc, "ego_pose", pose, what)


def _check_gap(nusc, record, gap):
    """Raise `DataError` unless `gap`, the microseconds since a record's `prev`, is from 0 to `MAX_GAP`."""
    if not 0 <= gap <= MAX_GAP:
        raise _row_error(nusc, "sample_data", record, f"its timestamp is {1e-6 * gap:.0f} s after that of its prev")


def _boxes(nusc, samples, lidar2global):
    """`box_offsets`, `boxes`, `labels` and `left_out` of an `Index`. lidar2global: [F, 4, 4], one for each sample."""
    from nuscenes.eval.detection.utils import category_to_detection_name

    frames, annotations, velocities, labels, left_out = [], [], [], [], []

    def leave_out(annotation, reason):
        left_out.append(f"row {nusc.getind('sample_annotation', annotation['token'])}: {reason}")

    for f, sample in enumerate(samples):
        for annotation in (nusc.get("sample_annotation", token) for token in sample["anns"]):
            name = category_to_detection_name(annotation["category_name"])
            # as in the devkit's evaluation: no box without a LiDAR or radar point
            if name is None or not annotation["num_lidar_pts"] + annotation["num_radar_pts"] > 0:
                continue
            if reason := box_fault(annotation):
                leave_out(annotation, reason)
                continue
            frames.append(f)
            annotations.append(annotation)
            velocities.append(nusc.box_velocity(annotation["token"])[:2])
            labels.append(CLASSES.index(name))
    frames = np.array(frames, np.int64)
    sizes = np.array([a["size"] for a in annotations], np.float64).reshape(-1, 3)
    velocities = np.array(velocities, np.float64).reshape(-1, 2)
    velocities[~(np.abs(velocities) < MAX_SPEED).all(axis=1)] = 0  # NaN too: unknown velocities are 0 in `Sample`
    boxes = boxes_from_global(_matrices(annotations), sizes, velocities, lidar2global[frames])
    near = (np.abs(boxes[:, :3]) < MAX_DISTANCE).all(axis=1)
    for i in np.flatnonzero(~near):
        leave_out(annotations[i], f"is more than {MAX_DISTANCE:.0f} m from the LiDAR")
    return {
        "box_offsets": np.searchsorted(frames[near], np.arange(len(lidar2global) + 1)),
        "boxes": boxes[near],
        "labels": np.array(labels, np.int64)[near],
        "left_out": _text(left_out),
    }


def build_camera_sweeps(nusc, split: str, scenes: set[str], verbose: bool) -> CameraSweeps:
    """The camera sweeps of a split from the tables; arguments and errors as `build_index`."""
    samples, names = _samples(nusc, scenes), _camera_names(nusc)
    lidar2global = _sensor2global(nusc, [nusc.get("sample_data", s["data"]["LIDAR_TOP"]) for s in samples])
    chains, numbers, lags = [], [], []
    for sample in tqdm(samples, f"camera sweeps of {nusc.version} {split}", disable=not verbose, unit="frame"):
        keys = [nusc.get("sample_data", sample["data"][c]) if c in sample["data"] else None for c in names]
        of_cameras = [_chain_before(nusc, key) for key in keys]
        chains += zip(*of_cameras, strict=True)  # W tuples of N records
        key, chain = next(((k, chain) for k, chain in zip(keys, of_cameras, strict=True) if k), (None, []))
        # microseconds; 0 where the keyframe has no image
        lags.append([key["timestamp"] - record["timestamp"] for record in chain] or [0] * CAMERA_SWEEPS)
        numbers.append(np.cumsum(np.diff([0, *lags[-1]]) != 0))  # a repeated frame has the same number
    records, shape = [record for frame in chains for record in frame], (len(samples), CAMERA_SWEEPS, len(names))
    images = _images(nusc, records, shape, lidar2global)
    return CameraSweeps(
        **{k: array.astype(np.float32) if array.dtype == np.float64 else array for k, array in images.items()},
        numbers=np.array(numbers, np.int64).reshape(shape[:2]),
        lags=(1e-6 * np.array(lags).reshape(shape[:2])).astype(np.float32),
    )


def build_occupancy(nusc, split: str, scenes: set[str], verbose: bool) -> OccupancyIndex:
    """The occupancy index of a split from the tables; arguments and errors as `build_index`."""
    samples = _samples(nusc, scenes)
    lidar = [nusc.get("sample_data", s["data"]["LIDAR_TOP"]) for s in samples]
    lidar2global = _sensor2global(nusc, lidar)
    lidar2ego = _matrices([nusc.get("calibrated_sensor", r["calibrated_sensor_token"]) for r in lidar])
    names = [nusc.get("scene", s["scene_token"])["name"] for s in samples]
    rows = {name: [] for name in names}  # of each scene's keyframes, in the order of time
    for f, name in enumerate(names):
        rows[name].append(f)
    origins = np.full((len(samples), MAX_ORIGINS, 3), np.nan, np.float32)
    for f, name in enumerate(names):
        of_scene = lidar2global[rows[name], :, 3]  # [K, 4]
        here = (of_scene @ (lidar2ego[f] @ np.linalg.inv(lidar2global[f])).T)[:, :3]
        here = here[(np.abs(here[:, :2]) < ORIGIN_RANGE).all(axis=1)]
        if len(here) > MAX_ORIGINS:
            here = here[np.round(np.linspace(0, len(here) - 1, MAX_ORIGINS)).astype(int)]
        origins[f, : len(here)] = here
    return OccupancyIndex(
        files=_text(f"gts/{name}/{s['token']}/labels.npz" for name, s in zip(names, samples, strict=True)),
        ego2lidar=np.linalg.inv(lidar2ego),
        origins=origins,
    )


def _chain_before(nusc, record):
    """The `CAMERA_SWEEPS` sample_data records before `record`, the newest first, the scene's first one repeated; all
    None if `record` is None."""
    chain = []
    for _ in range(CAMERA_SWEEPS):
        if record and record["prev"]:
            newer, record = record, nusc.get("sample_data", record["prev"])
            _check_gap(nusc, newer, newer["timestamp"] - record["timestamp"])
        chain.append(record)
    return chain


def build_source_frames(nusc, split: str, scenes: set[str], verbose: bool, offsets: tuple[int, ...]) -> SourceFrames:
    """The frames at `offsets` from the keyframes of a split, negative for earlier ones; other arguments and errors as
    `build_index`."""
    samples, names = _samples(nusc, scenes), _camera_names(nusc)
    lidar2global = _sensor2global(nusc, [nusc.get("sample_data", s["data"]["LIDAR_TOP"]) for s in samples])
    # by `prev` alone, which is checked: the `next` of other converters' tables may be empty
    after = {r["prev"]: r for r in nusc.sample_data if r["prev"] and r["sensor_modality"] == "camera"}
    records = []
    for sample in tqdm(samples, f"sources of {nusc.version} {split}", disable=not verbose, unit="frame"):
        keys = [nusc.get("sample_data", sample["data"][c]) if c in sample["data"] else None for c in names]
        records += [_frame_at(nusc, after, key, offset) for offset in offsets for key in keys]
    images = _images(nusc, records, (len(samples), len(offsets) * len(names)), lidar2global)
    return SourceFrames(**{k: a.astype(np.float32) if a.dtype == np.float64 else a for k, a in images.items()})


def _frame_at(nusc, after, record, offset):
    """The sample_data record `offset` frames after `record`, before it if negative; None where the scene has none, or
    if `record` is None. after: {token: the record whose `prev` it is}."""
    for _ in range(abs(offset)):
        if record is None:
            return None
        before = nusc.get("sample_data", record["prev"]) if offset < 0 and record["prev"] else None
        other = before if offset < 0 else after.get(record["token"])
        if other is None:
            return None
        earlier, later = (record, other) if offset > 0 else (other, record)
        _check_gap(nusc, later, later["timestamp"] - earlier["timestamp"])
        record = other
    return record


def _camera_names(nusc):
    """The cameras of which any keyframe of the version has an image, in the order of `Index.cameras`."""
    cameras = {sensor["channel"] for sensor in nusc.sensor if sensor["modality"] == "camera"}
    used = cameras & {channel for sample in nusc.sample for channel in sample["data"]}
    return sorted(used, key=lambda name: (CAMERAS.index(name) if name in CAMERAS else len(CAMERAS), name))


def _images(nusc, records, shape, lidar2global):
    """`image_files`, `image_sizes`, `intrinsics` and `lidar2camera` of an index, in arrays of `shape` [F, ..., N].

    records: of sample_data, flat; None where there is no image. lidar2global: [F, 4, 4] at the times of the keyframes.
    """
    present = np.array([record is not None for record in records], bool)
    known = [record for record in records if record is not None]
    sizes = np.zeros((len(records), 2), np.int64)
    sizes[present] = np.array([_image_size(nusc, record) for record in known], np.int64).reshape(-1, 2)
    intrinsics, camera2global = (np.tile(np.eye(4), (len(records), 1, 1)) for _ in range(2))
    intrinsics[present] = _intrinsics(nusc, known)
    camera2global[present] = _sensor2global(nusc, known)
    camera2global = camera2global.reshape(*shape, 4, 4)
    lidar2global = lidar2global.reshape(-1, *(1 for _ in shape[1:]), 4, 4)
    lidar2camera = np.linalg.inv(camera2global) @ lidar2global
    apart = np.linalg.norm(lidar2camera[..., :3, 3], axis=-1).ravel()
    for i in np.flatnonzero(present & (apart > MAX_OFFSET)):
        pose = nusc.get("ego_pose", records[i]["ego_pose_token"])
        raise _row_error(nusc, "ego_pose", pose, f"puts a camera {apart[i]:.0f} m from the LiDAR")
    return {
        "image_files": _text("" if record is None else record["filename"] for record in records).reshape(shape),
        "image_sizes": sizes.reshape(*shape, 2),
        "intrinsics": intrinsics.reshape(*shape, 4, 4),
        "lidar2camera": lidar2camera,
    }


def _image_size(nusc, record):
    """Height and width, in pixels, of the image that the intrinsics of a sample_data record are for."""
    size = record.get("height"), record.get("width")
    if not all(type(side) is int and 0 < side < 2**16 for side in size):
        raise _row_error(nusc, "sample_data", record, f"height and width of an image are {size[0]} and {size[1]}")
    return size


def _samples(nusc, scenes):
    """The keyframes of the scenes of these names, in the order of time."""
    samples = [s for s in nusc.sample if nusc.get("scene", s["scene_token"])["name"] in scenes]
    return sorted(samples, key=lambda s: s["timestamp"])


def _intrinsics(nusc, records):
    """[len(records), 4, 4] of sample_data records of cameras: camera meters -> (u*d, v*d, d, 1), pixels of an
    image of the size in the tables."""
    intrinsics = np.tile(np.eye(4), (len(records), 1, 1))
    for matrix, record in zip(intrinsics, records, strict=True):
        sensor = nusc.get("calibrated_sensor", record["calibrated_sensor_token"])
        if not sensor["camera_intrinsic"]:
            raise _row_error(nusc, "calibrated_sensor", sensor, "camera_intrinsic of a camera is empty")
        matrix[:3, :3] = sensor["camera_intrinsic"]
    return intrinsics


def _sensor2global(nusc, records):
    """[len(records), 4, 4] sensor -> global of sample_data records, each at its own timestamp."""
    sensor2ego = _matrices([nusc.get("calibrated_sensor", r["calibrated_sensor_token"]) for r in records])
    return _matrices([nusc.get("ego_pose", r["ego_pose_token"]) for r in records]) @ sensor2ego


def _matrices(records):
    """[len(records), 4, 4] rigid transforms of records with a translation and a w, x, y, z rotation."""
    matrices = np.tile(np.eye(4), (len(records), 1, 1))
    if records:
        wxyz = np.array([r["rotation"] for r in records])
        matrices[:, :3, :3] = Rotation.from_quat(wxyz[:, [1, 2, 3, 0]]).as_matrix()
        matrices[:, :3, 3] = [r["translation"] for r in records]
    return matrices


def _lidarseg(nusc):
    """({LiDAR sample_data token: label file}, `Index.lidarseg_classes`); without lidarseg ({}, all `NO_CATEGORY`)."""
    from nuscenes.eval.lidarseg.utils import LidarsegClassMapper

    classes = np.full(256, NO_CATEGORY, np.uint8)
    if not hasattr(nusc, "lidarseg"):
        return {}, classes
    for label, class_ in LidarsegClassMapper(nusc).fine_idx_2_coarse_idx_mapping.items():
        classes[label] = class_
    return {r["sample_data_token"]: r["filename"] for r in nusc.lidarseg}, classes


def _text(strings):
    """An array of bytes objects, since an array of str takes four times the memory."""
    return np.array([string.encode() for string in strings], "S")


def _row_error(nusc, table, record, what):
    """The `DataError` that says what is wrong with a record."""
    return row_error(Path(nusc.table_root), table, nusc.getind(table, record["token"]), what)

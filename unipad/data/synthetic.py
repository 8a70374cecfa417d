"""Write the synthetic city in the real nuScenes on-disk format: 13 tables, lidarseg, six cameras, one LiDAR.

    python -m unipad.data.synthetic --out data/synthetic                      # 10 scenes of 5 seconds
    python -m unipad.data.synthetic --out data/full --image-size 900 1600     # the real resolution
    python -m unipad.data.synthetic --out data/sweeps --camera-sweeps 2       # images between the keyframes too

It has the version and scene names of nuScenes mini, so that every tool knows its splits; vehicle, location,
descriptions and a README.txt in its root say that it is synthetic. As in nuScenes, boxes and samples have the
LiDAR's timestamp and cameras fire a little earlier, a sweep belongs to the keyframe after it, and an ego pose has
the token of its sample_data.
"""

import json
import os
import shutil
import signal
from dataclasses import dataclass
from functools import lru_cache
from hashlib import md5
from multiprocessing import get_context
from pathlib import Path
from time import gmtime, strftime

import cv2
import numpy as np
import tyro
from pyquaternion import Quaternion
from tqdm import tqdm

from unipad.data.city import rig
from unipad.data.city.paint import Shadows, photograph
from unipad.data.city.raycast import cast
from unipad.data.city.solids import CATEGORIES, CATEGORY
from unipad.data.city.streets import PITCH, STREETS, City
from unipad.data.city.traffic import KINDS, VIEW_DISTANCE, Scene
from unipad.errors import UserError
from unipad.exit import exit_on_user_error, has_ended

VERSION = "v1.0-mini"
TRAIN = (
    "scene-0061", "scene-0553", "scene-0655", "scene-0757", "scene-0796", "scene-1077", "scene-1094", "scene-1100",
)  # fmt: skip
VAL = ("scene-0103", "scene-0916")
SCENES = sorted(TRAIN + VAL)

KEYFRAME, SWEEP, CAMERA_SWEEP = 500_000, 50_000, 83_333  # intervals in microseconds
START = 1_532_402_927_000_000  # microseconds: time at which the first scene starts
SCENE_START = 100_000_000  # microseconds between the starts of successive scenes
MAP_CELL, MAP_COARSE = 0.1, 4  # meters per pixel, as the devkit assumes; side in pixels of the blocks it is drawn in

ATTRIBUTES = (
    "vehicle.moving", "vehicle.stopped", "vehicle.parked", "cycle.with_rider", "cycle.without_rider",
    "pedestrian.sitting_lying_down", "pedestrian.standing", "pedestrian.moving",
)  # fmt: skip
VISIBILITY = ("v0-40", "v40-60", "v60-80", "v80-100")  # tokens 1 to 4

README = """Synthetic data: a procedural city, ray cast and written in the nuScenes format by unipad.data.synthetic.

It has the version and scene names of nuScenes mini, so that the same tools and splits work, but contains no
nuScenes data, and results on it say nothing about the real world.

{settings}
"""


@dataclass(frozen=True)
class Args:
    """Write a synthetic city in the nuScenes format."""

    out: Path
    """Folder to write: new, empty, or an older synthetic dataset, which is replaced."""
    scenes: int = 10
    """Scenes, 2 to 10; two are for validation (one if there are only 2), as in nuScenes mini."""
    keyframes: int = 10
    """Keyframes per scene, at 2 Hz; 2 to 400."""
    image_size: tuple[int, int] = (144, 256)
    """Height and width of the images in pixels; nuScenes has 900 1600."""
    workers: int | None = None
    """Processes (default: one per core, at most 16); they do not change the result."""
    seed: int = 0
    """Seed of the city."""
    columns: int = 360
    """LiDAR azimuths per revolution, 16 to 4096; nuScenes has about 1084."""
    sweeps: int = 9
    """LiDAR sweeps before each keyframe but the first, at 20 Hz; 0 to 9."""
    camera_sweeps: int = 0
    """Frames of images before each keyframe but the first, at 12 Hz; 0 to 5."""


class SettingError(UserError):
    """An invalid setting, in one sentence."""


def generate(
    out,
    scenes=10,
    keyframes=10,
    image_size=(144, 256),
    workers=None,
    seed=0,
    columns=360,
    sweeps=9,
    camera_sweeps=0,
    progress=True,
):
    """Write a synthetic dataset and return its root.

    The arguments are those of `Args`; `progress` shows a bar. The dataset is written to a folder next to `out` and
    renamed when complete. Workers are spawned: a script that calls this needs a `__main__` guard.
    Raises SettingError with one sentence for an invalid setting, or if `out` contains something else.
    """
    args = Args(
        Path(os.path.expanduser(out)),
        scenes,
        keyframes,
        tuple(image_size),
        workers,
        seed,
        columns,
        sweeps,
        camera_sweeps,
    )
    _check(args)
    root = args.out.resolve()
    for folder in root.parent.glob(f".{root.name}.*-*"):  # of killed processes
        state, _, process = folder.name.removeprefix(f".{root.name}.").partition("-")
        if state in ("partial", "old") and process.isdigit() and has_ended(int(process)):
            shutil.rmtree(folder, ignore_errors=True)
    partial, old = (root.with_name(f".{root.name}.{state}-{os.getpid()}") for state in ("partial", "old"))
    try:
        _write(args, partial, progress)
        if root.exists():
            root.rename(old)
        partial.rename(root)
    finally:
        if old.exists() and not root.exists():  # the second renaming failed
            old.rename(root)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return args.out


def is_synthetic(root):
    """Whether a folder contains a dataset written by this module; False if its log.json is missing or damaged."""
    log = Path(root) / VERSION / "log.json"
    try:
        return {record["vehicle"] for record in json.loads(log.read_bytes())} == {"synthetic"}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def ensure_city(camera_sweeps=0):
    """The root of the default dataset with that many `camera_sweeps`, which is generated if it does not exist yet."""
    root = Path(f"data/synthetic-{camera_sweeps}-camera-sweeps" if camera_sweeps else "data/synthetic")
    if not is_synthetic(root):
        print(f"no --data-root: generating a synthetic city in {root}, once", flush=True)
        generate(root, camera_sweeps=camera_sweeps)
    return root


def scene_names(count):
    """`count` scene names of nuScenes mini, sorted, with both validation scenes, as LidarSegEval needs; or one of 2."""
    val = min(2, count - 1)
    return sorted(VAL[:val] + TRAIN[: count - val])


def _check(args):
    limits = {
        "scenes": (2, 10),
        "keyframes": (2, 400),
        "columns": (16, 4096),
        "sweeps": (0, 9),
        "camera_sweeps": (0, 5),
        "seed": (0, 2**32 - 1),
    }
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            raise SettingError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be from {low} to {high}.")
    if min(args.image_size) < 16:
        raise SettingError(f"--image-size {args.image_size[0]} {args.image_size[1]}: both must be at least 16 pixels.")
    if args.workers is not None and args.workers < 1:
        raise SettingError(f"--workers {args.workers}: must be at least 1.")
    if args.out.exists() and not args.out.is_dir():
        raise SettingError(f"--out {args.out}: is a file; give a folder.")
    if args.out.is_dir() and any(args.out.iterdir()) and not is_synthetic(args.out):
        raise SettingError(
            f"--out {args.out}: contains something that is not a synthetic dataset; give another folder."
        )


def _write(args, root, progress):
    folders = [f"{kind}/{channel}" for kind in ("samples", "sweeps") for channel in (*rig.CAMERAS, rig.LIDAR)]
    for folder in (*folders, "maps", VERSION, f"lidarseg/{VERSION}"):
        (root / folder).mkdir(parents=True)
    names = scene_names(args.scenes)
    tasks = [(args, root, name, k) for name in names for k in range(args.keyframes)]
    workers = min(args.workers or min(16, os.cpu_count()), len(tasks))
    bar = tqdm(total=len(tasks), desc="synthetic city", unit="keyframe", disable=not progress)
    with bar:
        if workers == 1:
            counts = [_render(task, bar.update) for task in tasks]
        else:
            # Ctrl-C reaches every process of the terminal: workers ignore it, and this process ends them
            with get_context("spawn").Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
                counts = []
                for count in pool.imap(_render, tasks):
                    counts.append(count)
                    bar.update()
    counts = {name: counts[i * args.keyframes : (i + 1) * args.keyframes] for i, name in enumerate(names)}
    for name, records in _tables(args, counts).items():
        (root / VERSION / f"{name}.json").write_text(json.dumps(records, indent=0))
    _draw_map(args, root)
    settings = "\n".join(f"{name}: {value}" for name, value in vars(args).items() if name not in ("out", "workers"))
    (root / "README.txt").write_text(README.format(settings=settings))


@lru_cache(maxsize=1)
def _scene(seed, name, keyframes):
    return Scene(seed, SCENES.index(name), (keyframes - 1) * KEYFRAME / 1e6)


@lru_cache(maxsize=1)
def _shadows(scene):
    return Shadows(scene)


def _render(task, done=lambda: None):
    """Write the files of a keyframe and of the sweeps before it; returns points and visible fraction of each actor."""
    args, root, name, k = task
    scene = _scene(args.seed, name, args.keyframes)
    for channel in rig.CAMERAS:
        for stamp, is_key in _stamps(channel, args, k):
            view, solids = rig.camera_view(scene, channel, args.image_size, stamp / 1e6), scene.solids(stamp / 1e6)
            image = photograph(scene, view, solids, *cast(view, solids), _shadows(scene).at(solids))
            path = root / _filename(name, channel, stamp, is_key)
            _, jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
            path.write_bytes(jpeg)  # raises an error if the disk is full; OpenCV's and NumPy's writers do not
    for stamp, is_key in _stamps(rig.LIDAR, args, k):
        rng = np.random.default_rng([args.seed, 5, SCENES.index(name), stamp])
        scan = rig.scan(scene, stamp / 1e6, args.columns, rng)
        (root / _filename(name, rig.LIDAR, stamp, is_key)).write_bytes(scan.points.tobytes())
    (root / _lidarseg(args, name, stamp)).write_bytes(scan.category.tobytes())
    done()
    return rig.census(scene, stamp / 1e6, args.columns, scan)


def _stamps(channel, args, k):
    """(microseconds since the scene's start, is keyframe) of a channel's frames after keyframe k - 1, to keyframe k."""
    if channel in rig.CAMERAS:
        sweeps, step, early = args.camera_sweeps, CAMERA_SWEEP, round(rig.CAMERAS[channel].early * 1e6)
    else:
        sweeps, step, early = args.sweeps, SWEEP, 0
    return [(k * KEYFRAME - early - j * step, j == 0) for j in range(sweeps if k else 0, -1, -1)]


def _tables(args, counts):
    """All tables as lists of records; counts: scene name -> result of `_render` for each keyframe."""
    channels = {**dict.fromkeys(rig.CAMERAS, "camera"), rig.LIDAR: "lidar"}
    tables = {
        "category": [
            {"token": _token(args, "category", name), "name": name, "description": "", "index": index}
            for index, name in enumerate(CATEGORIES)
        ],
        "attribute": [{"token": _token(args, "attribute", a), "name": a, "description": ""} for a in ATTRIBUTES],
        "visibility": [
            {"token": str(i + 1), "level": level, "description": f"visibility of the object is {level[1:]} %"}
            for i, level in enumerate(VISIBILITY)
        ],
        "sensor": [
            {"token": _token(args, "sensor", channel), "channel": channel, "modality": modality}
            for channel, modality in channels.items()
        ],
        "map": [
            {
                "token": _token(args, "map"),
                "log_tokens": [_token(args, "log", name) for name in counts],
                "category": "semantic_prior",
                "filename": f"maps/{_token(args, 'map')}.png",
            }
        ],
    }
    for name in ("log", "scene", "sample", "calibrated_sensor", "ego_pose", "sample_data", "lidarseg", "instance"):
        tables[name] = []
    tables["sample_annotation"] = []
    for name, seen in counts.items():
        _scene_records(tables, args, name)
        for channel in channels:
            _channel_records(tables, args, name, channel)
        _actor_records(tables, args, name, seen)
    return tables


def _scene_records(tables, args, name):
    scene, samples = _scene(args.seed, name, args.keyframes), [("sample", name, k) for k in range(args.keyframes)]
    content = f"towards a crossing, then {scene.turn}; roadworks, {len(scene.actors)} objects"
    tables["log"].append(
        {
            "token": _token(args, "log", name),
            "logfile": _logfile(name),
            "vehicle": "synthetic",
            "date_captured": strftime("%Y-%m-%d", gmtime(_time(name, 0) / 1e6)),
            "location": "synthetic-city",
        }
    )
    tables["scene"].append(
        {
            "token": _token(args, "scene", name),
            "log_token": _token(args, "log", name),
            "nbr_samples": args.keyframes,
            "first_sample_token": _token(args, *samples[0]),
            "last_sample_token": _token(args, *samples[-1]),
            "name": name,
            "description": f"Synthetic city: {content}",
        }
    )
    for k, chain in enumerate(_chain(args, samples)):
        tables["sample"].append(
            {**chain, "timestamp": _time(name, k * KEYFRAME), "scene_token": _token(args, "scene", name)}
        )


def _channel_records(tables, args, name, channel):
    """Calibration, frames and ego poses of one sensor in one scene."""
    is_camera = channel in rig.CAMERAS
    rotation = rig.camera_rotation(channel) if is_camera else rig.LIDAR_ROTATION
    height, width = args.image_size if is_camera else (0, 0)
    calibration = _token(args, "calibrated_sensor", name, channel)
    tables["calibrated_sensor"].append(
        {
            "token": calibration,
            "sensor_token": _token(args, "sensor", channel),
            "translation": list(rig.CAMERAS[channel].position if is_camera else rig.LIDAR_POSITION),
            "rotation": rotation.elements.tolist(),
            "camera_intrinsic": rig.intrinsic(channel, args.image_size).tolist() if is_camera else [],
        }
    )
    scene = _scene(args.seed, name, args.keyframes)
    stamps = [frame for k in range(args.keyframes) for frame in _stamps(channel, args, k)]
    keys = [("sample_data", name, channel, stamp) for stamp, _ in stamps]
    sample = 0
    for (stamp, is_key), chain in zip(stamps, _chain(args, keys), strict=True):
        rotation, translation = rig.ego_pose(scene, stamp / 1e6)
        tables["ego_pose"].append(
            {
                "token": chain["token"],
                "timestamp": _time(name, stamp),
                "rotation": rotation.elements.tolist(),
                "translation": translation.tolist(),
            }
        )
        tables["sample_data"].append(
            {
                **chain,
                "sample_token": _token(args, "sample", name, sample),
                "ego_pose_token": chain["token"],
                "calibrated_sensor_token": calibration,
                "timestamp": _time(name, stamp),
                "fileformat": "jpg" if is_camera else "pcd",
                "is_key_frame": is_key,
                "height": height,
                "width": width,
                "filename": _filename(name, channel, stamp, is_key),
            }
        )
        if is_key and not is_camera:
            record = {"token": chain["token"], "sample_data_token": chain["token"]}
            tables["lidarseg"].append({**record, "filename": _lidarseg(args, name, stamp)})
        sample += is_key


def _actor_records(tables, args, name, seen):
    """Instances and their annotations, from the first to the last keyframe in which an actor is in sight."""
    scene = _scene(args.seed, name, args.keyframes)
    times = np.arange(args.keyframes) * KEYFRAME / 1e6
    ego = scene.ego.pose(times)
    for i, actor in enumerate(scene.actors):
        track = actor.pose(times)
        near = np.nonzero(np.hypot(*(track - ego)[:, :2].T) < VIEW_DISTANCE)[0]
        if not len(near):
            continue
        frames = range(near[0], near[-1] + 1)
        keys = [("sample_annotation", name, i, k) for k in frames]
        tables["instance"].append(
            {
                "token": _token(args, "instance", name, i),
                "category_token": _token(args, "category", KINDS[actor.kind].category),
                "nbr_annotations": len(keys),
                "first_annotation_token": _token(args, *keys[0]),
                "last_annotation_token": _token(args, *keys[-1]),
            }
        )
        for k, chain in zip(frames, _chain(args, keys), strict=True):
            x, y, yaw = track[k]
            inside, visible = (column[i] for column in seen[k])
            tables["sample_annotation"].append(
                {
                    **chain,
                    "sample_token": _token(args, "sample", name, k),
                    "instance_token": _token(args, "instance", name, i),
                    "visibility_token": str(1 + int(np.searchsorted((0.4, 0.6, 0.8), visible))),
                    "attribute_tokens": [_token(args, "attribute", actor.attribute)] if actor.attribute else [],
                    "translation": [float(x), float(y), actor.size[2] / 2],
                    "size": list(actor.size),
                    "rotation": Quaternion(axis=(0, 0, 1), radians=yaw).elements.tolist(),
                    "num_lidar_pts": int(inside),
                    "num_radar_pts": 0,
                }
            )


def _chain(args, keys):
    """Token, prev and next of consecutive records."""
    tokens = ["", *(_token(args, *key) for key in keys), ""]
    for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        yield {"token": token, "prev": before, "next": after}


def _token(args, *key):
    return md5("/".join(map(str, (args.seed, *key))).encode()).hexdigest()


def _time(name, stamp):
    return START + SCENES.index(name) * SCENE_START + stamp


def _logfile(name):
    return strftime("synthetic-%Y-%m-%d-%H-%M-%S+0000", gmtime(_time(name, 0) / 1e6))


def _filename(name, channel, stamp, is_key):
    folder, end = "samples" if is_key else "sweeps", "jpg" if channel in rig.CAMERAS else "pcd.bin"
    return f"{folder}/{channel}/{_logfile(name)}__{channel}__{_time(name, stamp)}.{end}"


def _lidarseg(args, name, stamp):
    return f"lidarseg/{VERSION}/{_token(args, 'sample_data', name, rig.LIDAR, stamp)}_lidarseg.bin"


def _draw_map(args, root):
    """The semantic prior map, white where vehicles or pedestrians may be; row 0 is the largest y."""
    count = int(STREETS * PITCH / MAP_CELL) // MAP_COARSE
    middle = ((np.arange(count) + 0.5) * MAP_CELL * MAP_COARSE).astype(np.float32)
    x, y = np.meshgrid(middle, middle[::-1])
    category, _, _ = City.of(args.seed).ground(x.ravel(), y.ravel())
    open_to = np.isin(category, [CATEGORY["flat.driveable_surface"], CATEGORY["flat.sidewalk"]]).reshape(count, count)
    image = (open_to * np.uint8(255)).repeat(MAP_COARSE, axis=0).repeat(MAP_COARSE, axis=1)
    _, png = cv2.imencode(".png", image)
    (root / f"maps/{_token(args, 'map')}.png").write_bytes(png)


def main():
    args = tyro.cli(Args)
    generate(**vars(args))
    print(f"synthetic city in {args.out}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()

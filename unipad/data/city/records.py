"""The city's records: scenes, files and tokens, and the tables of the nuScenes format that connect them.

As in nuScenes, boxes and samples have the LiDAR's timestamp and cameras fire a little earlier, a sweep belongs to the
keyframe after it, and an ego pose has the token of its sample_data.

`args` are the `Args` of unipad/data/synthetic.py; `name` is that of a scene; `k` is the number of a keyframe in its
scene; a `stamp` is the time of a frame in microseconds since keyframe 0 of its scene.
"""

from functools import lru_cache
from hashlib import md5
from time import gmtime, strftime

import numpy as np
from pyquaternion import Quaternion

from unipad.data.city import rig
from unipad.data.city.solids import CATEGORIES
from unipad.data.city.traffic import KINDS, VIEW_DISTANCE, Scene, district_of

# Up to 10 scenes have the version and the names of nuScenes mini; more are a version of their own, with a splits.json
MINI, LARGE = "v1.0-mini", "city"
VERSIONS = MINI, LARGE
# scenes of nuScenes' mini_train and mini_val
TRAIN = (
    "scene-0061", "scene-0553", "scene-0655", "scene-0757", "scene-0796", "scene-1077", "scene-1094", "scene-1100",
)  # fmt: skip
VAL = ("scene-0103", "scene-0916")
SCENES = sorted(TRAIN + VAL)

KEYFRAME, SWEEP, CAMERA_SWEEP = 500_000, 50_000, 83_333  # intervals in microseconds
START = 1_532_402_927_000_000  # microseconds since 1970: time at which the first scene starts
SCENE_INTERVAL = 100_000_000  # microseconds between the starts of successive scenes

ATTRIBUTES = (
    "vehicle.moving", "vehicle.stopped", "vehicle.parked", "cycle.with_rider", "cycle.without_rider",
    "pedestrian.sitting_lying_down", "pedestrian.standing", "pedestrian.moving",
)  # fmt: skip
VISIBILITY = ("v0-40", "v40-60", "v60-80", "v80-100")  # percent; their tokens are "1" to "4"


def is_large(args) -> bool:
    """Whether there are more scenes than in nuScenes mini."""
    return args.scenes > len(SCENES)


def version_of(args) -> str:
    return LARGE if is_large(args) else MINI


def scene_names(args) -> list[str]:
    """Names of the scenes, sorted.

    A city of up to 10 scenes always has both validation scenes of nuScenes mini, or one if there are only two scenes:
    the devkit's LidarSegEval requires every scene of the split that it evaluates.
    """
    if is_large(args):
        return [f"city-{number:04d}" for number in range(args.scenes)]
    val = min(2, args.scenes - 1)
    return sorted(VAL[:val] + TRAIN[: args.scenes - val])


def splits_of(args) -> dict[str, list[str]]:
    """The splits.json of a large city: the last fifth of the scenes for validation, the tenth before them for choosing
    settings, the others for training."""
    names = scene_names(args)
    dev, val = round(0.7 * len(names)), round(0.8 * len(names))
    return {"city_train": names[:dev], "city_dev": names[dev:val], "city_val": names[val:]}


def scene_number(name: str) -> int:
    """The number of the scene of this name, from 0."""
    return SCENES.index(name) if name in SCENES else int(name.removeprefix("city-"))


def scene_of(args, name: str) -> Scene:
    """The scene of this name, which lasts until its last keyframe."""
    return _cached_scene(args.seed, scene_number(name), (args.keyframes - 1) * KEYFRAME / 1e6, is_large(args))


_cached_scene = lru_cache(maxsize=1)(Scene)  # making a scene takes longer than making a record of it


def frames_of(args, channel: str, k: int) -> list[tuple[int, bool]]:
    """(stamp, is keyframe) of each frame of a channel after its keyframe k - 1, up to and with keyframe k."""
    if channel in rig.CAMERAS:
        sweeps, step, early = args.camera_sweeps, CAMERA_SWEEP, round(rig.CAMERAS[channel].early * 1e6)
    else:
        sweeps, step, early = args.sweeps, SWEEP, 0
    return [(k * KEYFRAME - early - j * step, j == 0) for j in range(sweeps if k else 0, -1, -1)]


def data_file(name: str, channel: str, stamp: int, is_key: bool) -> str:
    """Path below the dataset's root of an image or of LiDAR points."""
    folder, end = "samples" if is_key else "sweeps", "jpg" if channel in rig.CAMERAS else "pcd.bin"
    return f"{folder}/{channel}/{_logfile(name)}__{channel}__{_time(name, stamp)}.{end}"


def labels_file(args, name: str, stamp: int) -> str:
    """Path below the dataset's root of the lidarseg labels of a keyframe."""
    return f"lidarseg/{version_of(args)}/{_token(args, 'sample_data', name, rig.LIDAR, stamp)}_lidarseg.bin"


def occupancy_file(args, name: str, k: int) -> str:
    """Path below the dataset's root of the occupancy labels of a keyframe, as in Occ3D-nuScenes."""
    return f"gts/{name}/{_token(args, 'sample', name, k)}/labels.npz"


def map_file(args, district: int) -> str:
    """Path below the dataset's root of the map of a district."""
    return f"maps/{_token(args, 'map', district)}.png"


def districts_of(args) -> list[int]:
    """Numbers of the districts in which the scenes are."""
    return sorted({district_of(scene_number(name), is_large(args)) for name in scene_names(args)})


def make_tables(args, censuses: dict[str, list]) -> dict[str, list[dict]]:
    """All tables as lists of records.

    censuses: for each scene, the result of `rig.census` at each keyframe.
    """
    channels = {**dict.fromkeys(rig.CAMERAS, "camera"), rig.LIDAR: "lidar"}
    tables = {
        "category": [
            {"token": _token(args, "category", category), "name": category, "description": "", "index": index}
            for index, category in enumerate(CATEGORIES)
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
                "token": _token(args, "map", district),
                "log_tokens": [
                    _token(args, "log", name)
                    for name in censuses
                    if district_of(scene_number(name), is_large(args)) == district
                ],
                "category": "semantic_prior",
                "filename": map_file(args, district),
            }
            for district in districts_of(args)
        ],
    }
    for table in ("log", "scene", "sample", "calibrated_sensor", "ego_pose", "sample_data", "lidarseg", "instance"):
        tables[table] = []
    tables["sample_annotation"] = []
    for name, of_scene in censuses.items():
        _scene_records(tables, args, name)
        for channel in channels:
            _channel_records(tables, args, name, channel)
        _actor_records(tables, args, name, of_scene)
    return tables


def _scene_records(tables, args, name):
    scene, ids = scene_of(args, name), [("sample", name, k) for k in range(args.keyframes)]
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
            "first_sample_token": _token(args, *ids[0]),
            "last_sample_token": _token(args, *ids[-1]),
            "name": name,
            "description": f"Synthetic city: {content}",
        }
    )
    for k, chain in enumerate(_chain(args, ids)):
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
    scene = scene_of(args, name)
    frames = [frame for k in range(args.keyframes) for frame in frames_of(args, channel, k)]
    ids = [("sample_data", name, channel, stamp) for stamp, _ in frames]
    k = 0  # keyframe that the frame belongs to: itself, or the next one
    for (stamp, is_key), chain in zip(frames, _chain(args, ids), strict=True):
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
                "sample_token": _token(args, "sample", name, k),
                "ego_pose_token": chain["token"],
                "calibrated_sensor_token": calibration,
                "timestamp": _time(name, stamp),
                "fileformat": "jpg" if is_camera else "pcd",
                "is_key_frame": is_key,
                "height": height,
                "width": width,
                "filename": data_file(name, channel, stamp, is_key),
            }
        )
        if is_key and not is_camera:
            record = {"token": chain["token"], "sample_data_token": chain["token"]}
            tables["lidarseg"].append({**record, "filename": labels_file(args, name, stamp)})
        k += is_key


def _actor_records(tables, args, name, censuses):
    """Instances and their annotations, from the first to the last keyframe in which an actor is within VIEW_DISTANCE
    of the ego vehicle.

    censuses: the result of `rig.census` at each keyframe of this scene.
    """
    scene = scene_of(args, name)
    times = np.arange(args.keyframes) * KEYFRAME / 1e6
    ego = scene.ego.pose(times)
    for i, actor in enumerate(scene.actors):
        track = actor.pose(times)
        near = np.nonzero(np.hypot(*(track - ego)[:, :2].T) < VIEW_DISTANCE)[0]
        if not len(near):
            continue
        keyframes = range(near[0], near[-1] + 1)
        ids = [("sample_annotation", name, i, k) for k in keyframes]
        tables["instance"].append(
            {
                "token": _token(args, "instance", name, i),
                "category_token": _token(args, "category", KINDS[actor.kind].category),
                "nbr_annotations": len(ids),
                "first_annotation_token": _token(args, *ids[0]),
                "last_annotation_token": _token(args, *ids[-1]),
            }
        )
        for k, chain in zip(keyframes, _chain(args, ids), strict=True):
            x, y, yaw = track[k]
            inside, visible = (of_actors[i] for of_actors in censuses[k])
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


def _chain(args, ids):
    """Yield the fields token, prev and next of consecutive records, whose tokens `_token` makes from `ids`."""
    tokens = ["", *(_token(args, *id_) for id_ in ids), ""]
    for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        yield {"token": token, "prev": before, "next": after}


def _token(args, *id_):
    """The token of the record that `id_` identifies: the kind of record, and which one."""
    return md5("/".join(map(str, (args.seed, *id_))).encode()).hexdigest()


def _time(name, stamp):
    """Microseconds since 1970 at which the frame with this `stamp` was taken."""
    return START + scene_number(name) * SCENE_INTERVAL + stamp


def _logfile(name):
    return strftime("synthetic-%Y-%m-%d-%H-%M-%S+0000", gmtime(_time(name, 0) / 1e6))

"""The sensors on the ego vehicle: six cameras and a spinning LiDAR, as on the real nuScenes cars.

Frames: ego x forward, y left, z up, at the middle of the rear axle on the ground; LiDAR x right, y forward,
z up; camera x right, y down, z forward. Meters, seconds; the center of the first pixel is at (0.5, 0.5).
"""

from dataclasses import dataclass

import numpy as np
from pyquaternion import Quaternion

from unipad.data.city.paint import intensity
from unipad.data.city.raycast import CameraView, LidarView, cast, crossings
from unipad.data.city.solids import SOLID, solid, to_local


@dataclass(frozen=True)
class Camera:
    """A camera of nuScenes, with rounded calibration."""

    position: tuple[float, float, float]  # ego frame
    yaw: float  # degrees to the left of straight ahead
    pitch: float  # degrees up
    focal: float  # pixels at 900 x 1600, like the principal point
    principal: tuple[float, float]  # u, v
    early: float  # seconds by which it fires before the LiDAR's timestamp: the LiDAR's beams trigger it in passing


CAMERAS = {
    "CAM_FRONT": Camera((1.70, 0.02, 1.51), 0.3, -0.3, 1266.4, (816.3, 491.5), 0.0355),
    "CAM_FRONT_RIGHT": Camera((1.55, -0.49, 1.50), -56.4, 0.1, 1260.8, (808.0, 495.3), 0.0275),
    "CAM_BACK_RIGHT": Camera((1.01, -0.48, 1.56), -110.8, -0.9, 1259.5, (807.3, 501.2), 0.0198),
    "CAM_BACK": Camera((0.03, 0.00, 1.58), 179.9, 1.0, 809.2, (829.2, 481.8), 0.0104),
    "CAM_BACK_LEFT": Camera((1.04, 0.48, 1.59), 108.6, -0.9, 1256.7, (792.1, 492.8), 0.0005),
    "CAM_FRONT_LEFT": Camera((1.52, 0.49, 1.51), 55.2, 0.1, 1272.6, (826.6, 479.8), 0.0431),
}
FULL_SIZE = (900, 1600)  # height and width of nuScenes' images
CAMERA_AXES = Quaternion(0.5, -0.5, 0.5, -0.5)  # camera -> ego, looking ahead

LIDAR = "LIDAR_TOP"
LIDAR_POSITION = (0.94, 0.0, 1.84)  # ego frame
LIDAR_ROTATION = Quaternion(axis=(0, 0, 1), degrees=-90)  # LiDAR -> ego
BEAMS = np.radians(np.linspace(-30.67, 10.67, 32))  # elevations in radians, ring 0 first
LIDAR_RANGE = 70.0  # meters; beams that hit nothing nearer than this return nothing
RANGE_NOISE, INTENSITY_NOISE = 0.01, 2.0  # standard deviations, in meters and on the scale 0-255
DROPOUT = 0.02  # fraction of beams that return nothing although they hit something in range

# The ego vehicle in its own frame. Only `scan` adds it to the solids of a scene: the cameras look outwards.
# Arguments of `solid`: center of the bottom, yaw, size, material, color, category, taper.
EGO = np.array(
    [
        solid((1.39, 0, 0.2), 0.0, (4.08, 1.73, 0.7), "body", (0.9,) * 3, "vehicle.ego"),
        solid((0.8, 0, 0.9), 0.0, (2.7, 1.6, 0.5), "cabin", (0.9,) * 3, "vehicle.ego", (1.2, 0.8, 0.5)),
    ],
    dtype=SOLID,
)


def ego_pose(scene, t):
    """Ego -> world at time t: rotation (a quaternion), translation [3]."""
    x, y, yaw = scene.ego.pose(t)
    return Quaternion(axis=(0, 0, 1), radians=yaw), np.array([x, y, 0.0])


def camera_rotation(channel):
    """Camera -> ego, a quaternion."""
    camera = CAMERAS[channel]
    rotation = Quaternion(axis=(0, 0, 1), degrees=camera.yaw) * Quaternion(axis=(0, 1, 0), degrees=-camera.pitch)
    return rotation * CAMERA_AXES


def intrinsic(channel, size):
    """[3, 3] camera frame, meters -> pixels of images of `size` (height, width)."""
    camera, (sy, sx) = CAMERAS[channel], np.divide(size, FULL_SIZE)
    (u, v), f = camera.principal, camera.focal
    return np.array([[f * sx, 0, u * sx], [0, f * sy, v * sy], [0, 0, 1]])


def camera_view(scene, channel, size, t):
    """The rays of a camera at time t; size: (height, width)."""
    rotation, translation = ego_pose(scene, t)
    origin = rotation.rotate(np.array(CAMERAS[channel].position)) + translation
    return CameraView(origin, (rotation * camera_rotation(channel)).rotation_matrix, intrinsic(channel, size), size)


def lidar_view(scene, columns, t):
    """The beams of the LiDAR at time t; columns: number of azimuths, of which the first is the LiDAR's x axis."""
    rotation, translation = ego_pose(scene, t)
    origin = rotation.rotate(np.array(LIDAR_POSITION)) + translation
    return LidarView(origin, scene.ego.pose(t)[2] - np.pi / 2, BEAMS, columns)


def ego_solids(scene, t):
    """The ego vehicle at time t, a SOLID array."""
    rotation, translation = ego_pose(scene, t)
    ego = EGO.copy()
    ego["center"] = [rotation.rotate(c) + translation for c in EGO["center"]]
    ego["yaw"] = scene.ego.pose(t)[2]
    return ego


@dataclass(frozen=True)
class Scan:
    """One LiDAR revolution: n returns in the order of a real LiDAR, all rings of an azimuth, then the next azimuth."""

    points: np.ndarray  # [n, 5] float32 x, y, z meters (LiDAR frame), intensity 0-255, ring
    category: np.ndarray  # [n] uint8 lidarseg index
    owner: np.ndarray  # [n] index of the actor that was hit, -1 for anything else
    hits: np.ndarray  # [actors] number of beams that hit each actor, including those that returned nothing


def scan(scene, t, columns, rng):
    """Scan the scene at time t: unlike a real LiDAR, all beams fire at that time, so nothing moves meanwhile.

    columns: number of azimuths; rng: for noise and dropout.
    """
    view = lidar_view(scene, columns, t)
    solids = np.concatenate([scene.solids(t), ego_solids(scene, t)])
    distance, hit = cast(view, solids)
    intensities, category = intensity(scene.city, view, solids, distance, hit)
    owner = np.where(hit >= 0, solids["owner"][hit], -1)
    hits = np.bincount(owner[owner >= 0], minlength=len(scene.actors))

    n = len(hit)
    returned = (rng.random(n) > DROPOUT) & (distance < LIDAR_RANGE)
    # 0 instead of inf, without effect: only beams that returned are kept below
    ranges = np.where(returned, distance, 0) + rng.normal(0, RANGE_NOISE, n)
    intensities = (intensities + rng.normal(0, INTENSITY_NOISE, n)).clip(0, 255)
    azimuth = view.step * np.arange(columns)
    horizontal, up = np.cos(BEAMS)[:, None], np.sin(BEAMS)[:, None] + 0 * azimuth  # `up` for every azimuth too
    x, y, z = (axis.ravel() * ranges for axis in (horizontal * np.cos(azimuth), horizontal * np.sin(azimuth), up))
    ring = np.repeat(np.arange(len(BEAMS)), columns)
    order = np.arange(n).reshape(view.shape).T.ravel()  # azimuth by azimuth instead of ring by ring
    order = order[returned[order]]
    points = np.stack([x, y, z, intensities, ring], axis=1)[order].astype(np.float32)
    return Scan(points, category[order], owner[order], hits)


def census(scene, t, columns, scan):
    """The number of returns from each actor in a scan, and how visible the actor is.

    scan: the `Scan` of `scene` at time `t` with this number of `columns`.

    Returns:
        inside:  [actors] int64 number of returns from the actor that lie inside its annotation box.
        visible: [actors] fraction of the beams towards it that are not occluded; 0 if no beam points at it.
    """
    of_actors = np.nonzero(scan.owner >= 0)[0]
    owner, (x, y, z) = scan.owner[of_actors], scan.points[of_actors, :3].astype(np.float64).T
    ahead, left = y + LIDAR_POSITION[0], LIDAR_POSITION[1] - x  # LiDAR -> ego: LIDAR_ROTATION, written out
    ego_x, ego_y, heading = scene.ego.pose(t)
    c, s = np.cos(heading), np.sin(heading)
    world = np.stack([ego_x + c * ahead - s * left, ego_y + s * ahead + c * left, z + LIDAR_POSITION[2]], axis=1)
    boxes = scene.boxes(t)[owner]
    within = (np.abs(to_local(boxes, world)) <= boxes["half"]).all(axis=1)
    inside = np.bincount(owner[within], minlength=len(scene.actors))

    solids = scene.solids(t)
    pieces = solids[solids["owner"] >= 0]
    view = lidar_view(scene, columns, t)
    n = view.directions.shape[1]
    # rays that would hit each actor if nothing else were there, as owner * n + ray; `unique`: a ray may hit two pieces
    alone = [pieces["owner"][piece] * np.int64(n) + ray for ray, piece, _ in crossings(view, pieces)]
    possible = np.bincount(np.unique(np.concatenate([np.empty(0, np.int64), *alone])) // n, minlength=len(inside))
    return inside, scan.hits / np.maximum(possible, 1)

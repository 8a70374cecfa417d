"""Occupancy labels of the city in the format of Occ3D-nuScenes: which voxels are full, and which of them sensors saw.

A voxel that a solid overlaps is full and has the solid's class; if several solids overlap it, the last one decides, and
road users come after houses and trees. The other voxels at z = 0 have the class of the ground at their center; voxels
below the ground, and those of the ego vehicle, are free. Overlaps with upright boxes (by separating axes) and
ellipsoids (by the nearest point) are exact; for a tapered box, a voxel that almost touches an edge may count too.

Occ3D's `mask_lidar` is what LiDAR scans of the whole scene saw. Here these are at most `SCANS` scans, taken from the
LiDAR's positions at keyframes of the scene; `mask_camera` is the part of it that the cameras of the keyframe see.
Everything stands still as at the time of the labels. A ray sees the voxels from its sensor to the surface that it hits;
a LiDAR beam that hits nothing within its range sees none, since it returns nothing.
"""

import numpy as np
import torch

from unipad.batch import FREE, OCCUPANCY_CELL, OCCUPANCY_CLASSES, OCCUPANCY_LOW, OCCUPANCY_SHAPE
from unipad.data.city import rig
from unipad.data.city.raycast import cast
from unipad.data.city.solids import CATEGORIES, to_local
from unipad.kernels.carve import UNKNOWN, carve_ref

SCANS = 10  # LiDAR scans, spread evenly over the keyframes near this one
COLUMNS = 360  # azimuths of a scan
IMAGE_SIZE = (90, 160)  # height and width of the images whose pixels have a ray: a voxel 40 m away is a pixel wide
REACH = 39.0  # meters in x and y from the ego vehicle: scans farther away are not used
DEEPER = 0.01  # meters from where a ray hits a surface to where it ends, within the solid
FAR = 120.0  # meters after which a ray ends that hits nothing: beyond the voxels
LOW, CELL, HALF = np.array(OCCUPANCY_LOW), OCCUPANCY_CELL, OCCUPANCY_CELL / 2
# Class of each of CATEGORIES, as the devkit merges them for lidarseg; 0, "others", for those that it ignores
MERGED = {
    "movable_object.barrier": "barrier", "vehicle.bicycle": "bicycle", "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus", "vehicle.car": "car", "vehicle.construction": "construction_vehicle",
    "vehicle.motorcycle": "motorcycle", "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian", "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian", "movable_object.trafficcone": "traffic_cone",
    "vehicle.trailer": "trailer", "vehicle.truck": "truck", "flat.driveable_surface": "driveable_surface",
    "flat.other": "other_flat", "flat.sidewalk": "sidewalk", "flat.terrain": "terrain", "static.manmade": "manmade",
    "static.vegetation": "vegetation",
}  # fmt: skip
CLASS_OF = np.array([OCCUPANCY_CLASSES.index(MERGED.get(name, "others")) for name in CATEGORIES], np.uint8)


def occupancy_labels(scene, t, keyframe_times, camera_times):
    """The arrays of a labels.npz at time t: {name: [200, 200, 16] uint8}.

    keyframe_times: [K] seconds at which the LiDAR scans, t among them. camera_times: {channel: seconds}.
    """
    solids = scene.solids(t)
    cameras = [rig.camera_view(scene, channel, IMAGE_SIZE, time) for channel, time in camera_times.items()]
    seen_by_cameras = _seen(scene, t, [_rays(view, solids) for view in cameras])
    scans = []
    for time in _scan_times(scene, t, keyframe_times):
        view, vehicle = rig.lidar_view(scene, COLUMNS, time), rig.ego_solids(scene, time)
        scans.append(_rays(view, np.concatenate([solids, vehicle]), without=len(vehicle), reach=rig.LIDAR_RANGE))
    seen_by_lidar = _seen(scene, t, scans)
    return {
        "semantics": full_voxels(scene, t, solids),
        "mask_lidar": seen_by_lidar.astype(np.uint8),
        "mask_camera": (seen_by_lidar & seen_by_cameras).astype(np.uint8),
    }


def full_voxels(scene, t, solids):
    """[200, 200, 16] uint8 classes of the voxels at time t."""
    x, y, heading = scene.ego.pose(t)
    centers = [LOW[i] + CELL * (np.arange(n) + 0.5) for i, n in enumerate(OCCUPANCY_SHAPE)]  # along each axis
    classes = np.full(OCCUPANCY_SHAPE, FREE, np.uint8)
    c, s = np.cos(heading), np.sin(heading)
    u, v = (axis.ravel() for axis in np.meshgrid(centers[0], centers[1], indexing="ij"))
    ground, _, _ = scene.city.ground((x + c * u - s * v).astype(np.float32), (y + s * u + c * v).astype(np.float32))
    at_ground = int((0 - LOW[2]) / CELL)  # its voxels reach from -0.2 to 0.2 m
    classes[:, :, at_ground] = CLASS_OF[ground].reshape(OCCUPANCY_SHAPE[:2])
    ego = np.zeros(len(solids), solids.dtype)  # the frame of the voxels, once for each solid
    ego["center"], ego["yaw"] = (x, y, 0), heading
    for solid, center in zip(solids, to_local(ego, solids["center"]), strict=True):
        yaw = solid["yaw"] - heading
        cos, sin = np.cos(yaw), np.sin(yaw)
        length, width, height = solid["half"].astype(np.float64)
        # half of the solid's extent along the axes of the voxels
        extent = np.array([length * abs(cos) + width * abs(sin), length * abs(sin) + width * abs(cos), height])
        begin = np.maximum(np.floor((center - extent - LOW) / CELL + 1e-6).astype(int), 0)
        end = np.minimum(np.ceil((center + extent - LOW) / CELL - 1e-6).astype(int), OCCUPANCY_SHAPE)
        if (end <= begin).any():
            continue
        du, dv, dz = (centers[i][begin[i] : end[i]] - center[i] for i in range(3))
        along = cos * du[:, None] + sin * dv  # [u, v] of the voxels' centers, in the axes of the solid
        across = cos * dv - sin * du[:, None]
        if solid["round"]:
            flat = _nearest_in_square(along, across, cos, sin, length, width)
            inside = flat[..., None] + (np.maximum(np.abs(dz) - HALF, 0) / height) ** 2 < 1
        else:
            inside = _in_tapered_box(along, across, dz, HALF * (abs(cos) + abs(sin)), solid)
        part = classes[tuple(slice(b, e) for b, e in zip(begin, end, strict=True))]
        part[inside] = CLASS_OF[solid["category"]]
    return classes


def _in_tapered_box(along, across, dz, reach, solid):
    """[u, v, z] bool: no face of the box separates it from the voxels; reach: meters from a voxel's center to its
    farthest point along the box's axes."""
    length, width, height = solid["half"].astype(np.float64)
    front, back, side = solid["taper"].astype(np.float64)
    above = np.maximum(dz + height - HALF, 0)  # [z] meters from the bottom of the box to that of the voxel
    along, across = along[..., None], np.abs(across)[..., None]
    inside = (along - reach < length - front * above) & (-along - reach < length - back * above)
    return inside & (across - reach < width - side * above) & (np.abs(dz) - HALF < height)


def _nearest_in_square(along, across, cos, sin, length, width):
    """[u, v] squared distance, in semi-axes, from the center of an ellipse to the nearest point of each voxel's square.

    A convex function of the offset (p, q) from the voxel's center, along the axes of the voxels: it is minimized along
    each of them in turn, which converges quickly.
    """
    p = q = np.zeros_like(along)
    a, b = 1 / length**2, 1 / width**2
    pp, pq, qq = a * cos * cos + b * sin * sin, (a - b) * cos * sin, a * sin * sin + b * cos * cos
    gp, gq = a * along * cos - b * across * sin, a * along * sin + b * across * cos  # half the gradient at the center
    for _ in range(12):
        p = np.clip(-(gp + pq * q) / pp, -HALF, HALF)
        q = np.clip(-(gq + pq * p) / qq, -HALF, HALF)
    return a * (along + cos * p + sin * q) ** 2 + b * (across - sin * p + cos * q) ** 2


def _scan_times(scene, t, times):
    """Those of `times` at which the ego vehicle is near where it is at time t, at most `SCANS` of them."""
    x, y, heading = scene.ego.pose(t)
    c, s = np.cos(heading), np.sin(heading)
    offset = scene.ego.pose(np.asarray(times))[:, :2] - (x, y)
    ahead, left = offset @ (c, s), offset @ (-s, c)
    near = np.asarray(times)[(np.abs(ahead) < REACH) & (np.abs(left) < REACH)]
    return near[np.round(np.linspace(0, len(near) - 1, min(len(near), SCANS))).astype(int)].tolist()


def _rays(view, solids, without=0, reach=np.inf):
    """(origins, ends) of the rays of a view, each [n, 3] in the world; without those that hit one of the last `without`
    solids, or hit nothing nearer than `reach` meters."""
    distance, hit = cast(view, solids)
    ends = view.origin + view.directions.T * np.minimum(distance + DEEPER, FAR)[:, None]
    ends = ends[(hit < len(solids) - without) & (distance <= reach)]
    return np.broadcast_to(view.origin, ends.shape), ends


def _seen(scene, t, rays):
    """[200, 200, 16] bool: voxels that a ray passes through or ends in. rays: list of what `_rays` returns."""
    x, y, heading = scene.ego.pose(t)
    c, s = np.cos(heading), np.sin(heading)
    to_ego = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    origins, ends = (
        torch.from_numpy(((np.concatenate(parts) - (x, y, 0)) @ to_ego.T).astype(np.float32))
        for parts in zip(*rays, strict=True)
    )
    one_volume = torch.zeros(len(ends), dtype=torch.int32)
    state = carve_ref(origins, ends, one_volume, OCCUPANCY_LOW, (CELL,) * 3, OCCUPANCY_SHAPE[::-1], B=1)
    return state[0].permute(2, 1, 0).numpy() != UNKNOWN

"""Exact ray casting of upright convex solids on flat ground, in numpy.

A solid is a tapered box {p : n_i . p <= h_i} of six planes, or an ellipsoid. A ray o + t d enters the box at
the largest t = (h_i - n_i . o) / (n_i . d) over the planes with n_i . d < 0, and leaves it at the smallest t
over the others. The rays of a view form a grid, and those that may hit a solid lie in a rectangle of it: all
(ray, solid) pairs of these rectangles are tested at once and the nearest hit of every ray is kept.

World frame: x, y in the ground plane, z up, ground at z = 0; meters. Element-wise arithmetic only (no BLAS),
so results do not depend on the number of threads.
"""

import numpy as np

from unipad.data.city.solids import EDGES, corners, to_local

GROUND, SKY = -1, -2  # values of `hit` where a ray hits no solid
NEAR = 0.05  # meters from the rays' origin; no solid nearer than this is hit


class CameraView:
    """The rays of a pinhole camera, one through the center of each pixel."""

    def __init__(self, origin, rotation, intrinsic, size):
        """origin: [3] and rotation: [3, 3] camera -> world; intrinsic: [3, 3] pixels; size: (height, width)."""
        self.origin, self.rotation, self.intrinsic, self.shape = origin, rotation, intrinsic, size
        v, u = np.mgrid[: size[0], : size[1]].astype(np.float32).reshape(2, -1) + np.float32(0.5)
        x, y = (u - intrinsic[0, 2]) / intrinsic[0, 0], (v - intrinsic[1, 2]) / intrinsic[1, 1]
        norm = np.sqrt(x * x + y * y + 1)
        self.cosine = (1 / norm).astype(np.float32)  # [n] meters along the optical axis per meter of ray
        r = rotation
        self.directions = np.stack([(r[i, 0] * x + r[i, 1] * y + r[i, 2]) / norm for i in range(3)]).astype(np.float32)

    def windows(self, solids):
        """Rectangles of pixels that may see a solid: (solid's index, row begin, end, column begin, end), each [k]; ends
        are exclusive."""
        corner = np.einsum("nkj,ji->nki", corners(solids) - self.origin, self.rotation)  # [n, 8, 3] in the camera frame
        a, b = corner[:, EDGES[0]], corner[:, EDGES[1]]  # both ends of each edge, [n, 12, 3]
        za, zb = a[..., 2:], b[..., 2:]
        with np.errstate(divide="ignore", invalid="ignore"):
            s = (NEAR - za) / (zb - za)  # where an edge crosses the near plane z = NEAR, as a fraction of the edge
            a, b = np.where(za < NEAR, a + s * (b - a), a), np.where(zb < NEAR, a + s * (b - a), b)
            p = np.concatenate([a, b], axis=1)  # [n, 24, 3]
            u = self.intrinsic[0, 0] * p[..., 0] / p[..., 2] + self.intrinsic[0, 2]
            v = self.intrinsic[1, 1] * p[..., 1] / p[..., 2] + self.intrinsic[1, 2]
        # [n, 24] both ends of edges that lie entirely behind the near plane
        hidden = np.concatenate([(za < NEAR) & (zb < NEAR)] * 2, axis=1)[..., 0]
        h, w = self.shape
        # [2, n]: rows and columns of pixels
        low, high = np.where(hidden, np.inf, (v, u)).min(axis=2), np.where(hidden, -np.inf, (v, u)).max(axis=2)
        limit = np.array([[h], [w]])
        begin = np.clip(np.floor(low), 0, limit).astype(np.int64)
        end = np.clip(np.ceil(high), 0, limit).astype(np.int64)
        visible = np.nonzero((end > begin).all(axis=0))[0]
        return visible, begin[0, visible], end[0, visible], begin[1, visible], end[1, visible]


class LidarView:
    """The beams of an upright spinning LiDAR: one row per ring, one column per azimuth, counter-clockwise."""

    def __init__(self, origin, yaw, elevations, columns):
        """origin: [3]; yaw: radians of column 0 in the world; elevations: [rings] radians, ascending."""
        self.origin, self.yaw, self.elevations = origin, yaw, elevations
        self.shape = (len(elevations), columns)
        self.step = 2 * np.pi / columns  # radians
        azimuth = yaw + self.step * np.arange(columns)
        horizontal, vertical = np.cos(elevations)[:, None], np.sin(elevations)[:, None] + np.zeros(columns)
        directions = np.stack([horizontal * np.cos(azimuth), horizontal * np.sin(azimuth), vertical])
        self.directions = directions.reshape(3, -1).astype(np.float32)

    def windows(self, solids):
        """Rectangles of beams that may hit a solid, as in `CameraView.windows`."""
        corner = corners(solids) - self.origin
        # azimuths of the solid's center, and of its corners relative to the center's
        middle = np.arctan2(solids["center"][:, 1] - self.origin[1], solids["center"][:, 0] - self.origin[0])
        angle = np.arctan2(corner[..., 1], corner[..., 0]) - middle[:, None]
        angle = (angle + np.pi) % (2 * np.pi) - np.pi
        # bounds of its elevations, from its smallest and largest horizontal distance
        lidar = to_local(solids, self.origin)[:, :2]  # the LiDAR's position in the axes of each solid
        smallest = np.hypot(*np.maximum(np.abs(lidar) - solids["half"][:, :2], 0).T)
        largest = np.hypot(corner[..., 0], corner[..., 1]).max(axis=1)
        top, bottom = corner[..., 2].max(axis=1), corner[..., 2].min(axis=1)  # meters above the LiDAR
        highest = np.arctan2(top, np.where(top > 0, np.maximum(smallest, 1e-3), largest))
        lowest = np.arctan2(bottom, np.where(bottom > 0, largest, np.maximum(smallest, 1e-3)))
        margin = 1e-4  # radians, far above the rounding of the directions
        row0 = np.searchsorted(self.elevations, lowest - margin)
        row1 = np.searchsorted(self.elevations, highest + margin)
        columns = self.shape[1]
        around = smallest == 0  # the LiDAR is above, below or inside the solid, which may lie in all directions
        col0 = np.floor((middle + angle.min(axis=1) - self.yaw - margin) / self.step).astype(np.int64)
        col1 = np.ceil((middle + angle.max(axis=1) - self.yaw + margin) / self.step).astype(np.int64) + 1
        begin = np.where(around, 0, col0 % columns)
        end = begin + np.where(around, columns, np.minimum(col1 - col0, columns))
        # a rectangle across the last column becomes two: up to that column, and from column 0 on
        index = np.tile(np.arange(len(solids)), 2)
        begin = np.concatenate([begin, np.zeros_like(begin)])
        end = np.concatenate([np.minimum(end, columns), end - columns])
        row0, row1 = np.tile(row0, 2), np.tile(row1, 2)
        visible = (end > begin) & (row1 > row0)
        return index[visible], row0[visible], row1[visible], begin[visible], end[visible]


def cast(view, solids):
    """The nearest surface along each ray of `view`.

    Returns:
        distance: [n] float32 meters along the ray, inf for sky.
        hit:      [n] int64 index into `solids`, GROUND or SKY.
    """
    n = view.directions.shape[1]
    with np.errstate(divide="ignore"):
        to_ground = -np.float32(view.origin[2]) / view.directions[2]
    to_ground = np.where(to_ground > 0, to_ground, np.float32(np.inf))
    nearest = _key(to_ground, np.full(n, len(solids), np.uint64))  # the ground has the index len(solids)
    for ray, solid, distance in crossings(view, solids):
        np.minimum.at(nearest, ray, _key(distance, solid.astype(np.uint64)))
    distance = (nearest >> np.uint64(32)).astype(np.uint32).view(np.float32)
    hit = (nearest & np.uint64(0xFFFFFFFF)).astype(np.int64)
    hit[hit == len(solids)] = GROUND
    hit[np.isinf(distance)] = SKY
    return distance, hit


def crossings(view, solids):
    """Yields, chunk by chunk, (ray, solid, distance), each [k], of all hits, also those behind other solids."""
    solid, row0, row1, col0, col1 = view.windows(solids)
    area = (row1 - row0) * (col1 - col0)
    for is_round, entry in ((False, _box_entry), (True, _ellipsoid_entry)):
        chosen = np.nonzero(solids["round"][solid] == is_round)[0]
        chunk = np.cumsum(area[chosen]) // CHUNK
        for part in np.split(chosen, np.nonzero(np.diff(chunk))[0] + 1):
            if len(part):
                ray = _rays(row0[part], row1[part], col0[part], col1[part], view.shape[1])
                d = [axis[ray] for axis in view.directions]
                distance = entry(solids[solid[part]], view.origin, d, area[part])
                hit = np.nonzero(np.isfinite(distance))[0]
                yield ray[hit], np.repeat(solid[part], area[part])[hit], distance[hit]


# About how many (ray, solid) pairs are tested at once, and how many rays `paint` colors at once: so small that
# temporaries stay in the CPU's caches
CHUNK = 1 << 16


def surface(solids, hit, points):
    """Positions and normals of points on the surface of solids, in the axes of their solid.

    Args:
        solids: [n] of dtype `SOLID`.
        hit:    [k] index into `solids` of each point's solid.
        points: [k, 3] world.

    Returns:
        local:  [k, 3] float32 from the solid's center, x along its heading.
        normal: [k, 3] float32 outward, unit, in the solid's axes.
    """
    c, s = (f(solids["yaw"]).astype(np.float32)[hit] for f in (np.cos, np.sin))
    x, y, z = (points - solids["center"][hit]).astype(np.float32).T
    local = np.stack([c * x + s * y, c * y - s * x, z], axis=1)
    half, taper, ball = (solids[field][hit] for field in ("half", "taper", "round"))
    height = local[:, 2] + half[:, 2]
    front, back, side = taper.T
    slack = np.stack(  # how far inside each plane a point is, in meters; 0, up to rounding, for the face that it is on
        [
            half[:, 0] - front * height - local[:, 0],
            half[:, 0] - back * height + local[:, 0],
            half[:, 1] - side * height - np.abs(local[:, 1]),
            half[:, 2] - np.abs(local[:, 2]),
        ]
    )
    face = np.abs(slack).argmin(axis=0)
    sign = np.sign(local)
    normal = np.zeros_like(local)
    normal[:, 0] = np.select([face == 0, face == 1], [1, -1], 0)
    normal[:, 1] = np.where(face == 2, sign[:, 1], 0)
    normal[:, 2] = np.select([face == 0, face == 1, face == 2], [front, back, side], sign[:, 2])
    normal[ball] = local[ball] / half[ball] ** 2
    return local, normal / np.maximum(np.sqrt((normal * normal).sum(axis=1, keepdims=True)), 1e-9)


def _key(distance, index):
    """[n] uint64 that are ordered by distance, then by index: positive floats are ordered as their bits are."""
    return (distance.astype(np.float32).view(np.uint32).astype(np.uint64) << np.uint64(32)) | index


def _rays(row0, row1, col0, col1, width):
    """Indices of the rays in all rectangles, rectangle by rectangle and row by row. width: columns of the view."""
    rows = row1 - row0
    row = np.arange(rows.sum()) + np.repeat(row0 - np.cumsum(rows) + rows, rows)
    length = np.repeat(col1 - col0, rows)
    begin = row * width + np.repeat(col0, rows)
    return np.arange(length.sum()) + np.repeat(begin - np.cumsum(length) + length, length)


def _local_rays(solids, d, count):
    """x, y, z, each [n], of the directions `d` in the axes of each ray's solid; arguments as of `_box_entry`."""
    c, s = (np.repeat(f(solids["yaw"]).astype(np.float32), count) for f in (np.cos, np.sin))
    return c * d[0] + s * d[1], c * d[1] - s * d[0], d[2]


def _box_entry(solids, origin, d, count):
    """[n] distances at which rays enter tapered boxes; inf: a miss.

    Each ray is tested against one solid: the first count[0] against solids[0], the next count[1] against solids[1].

    solids: [k] of dtype `SOLID`.
    d:      directions of the rays: world x, y, z, each [n].
    count:  [k], with the sum n.
    """
    o, half = to_local(solids, origin), solids["half"]
    height = o[:, 2] + half[:, 2]
    front, back, side = solids["taper"].T
    dx, dy, dz = _local_rays(solids, d, count)
    enter = np.full(len(dx), NEAR, np.float32)
    leave = np.full(len(dx), np.inf, np.float32)
    # of each plane n . p <= h: n . d without the taper, the taper, and h - n . o
    for along, taper, slack in (
        (dx, front, half[:, 0] - front * height - o[:, 0]),
        (-dx, back, half[:, 0] - back * height + o[:, 0]),
        (dy, side, half[:, 1] - side * height - o[:, 1]),
        (-dy, side, half[:, 1] - side * height + o[:, 1]),
        (dz, None, half[:, 2] - o[:, 2]),
        (-dz, None, half[:, 2] + o[:, 2]),
    ):
        if taper is not None and taper.any():
            along = along + np.repeat(taper.astype(np.float32), count) * dz
        # a ray parallel to the plane crosses it at plus or minus infinity, depending on its side of the plane
        along = np.where(np.abs(along) < 1e-12, np.float32(1e-12), along)
        t = np.repeat(slack.astype(np.float32), count) / along
        entering = along < 0
        np.maximum(enter, t, out=enter, where=entering)
        np.minimum(leave, t, out=leave, where=~entering)
    # enter is still NEAR where a ray starts inside the box: that is no hit
    return np.where((enter < leave) & (enter > NEAR), enter, np.float32(np.inf))


def _ellipsoid_entry(solids, origin, d, count):
    """As `_box_entry`, for ellipsoids."""
    half = solids["half"]
    # origin q and direction v, scaled so that the ellipsoid is the unit sphere: |q + t v|^2 - 1 = a t^2 + 2 b t + c = 0
    q = to_local(solids, origin) / half
    v = [axis / np.repeat(half[:, i], count) for i, axis in enumerate(_local_rays(solids, d, count))]
    q_i = [np.repeat(q[:, i].astype(np.float32), count) for i in range(3)]
    a = v[0] * v[0] + v[1] * v[1] + v[2] * v[2]
    b = v[0] * q_i[0] + v[1] * q_i[1] + v[2] * q_i[2]
    c = np.repeat(((q * q).sum(axis=1) - 1).astype(np.float32), count)
    discriminant = b * b - a * c
    t = (-b - np.sqrt(np.maximum(discriminant, 0))) / a
    return np.where((discriminant > 0) & (t > NEAR), t, np.float32(np.inf))

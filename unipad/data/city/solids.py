"""Tapered boxes and ellipsoids, rotated about z only: the primitives of the city, as rows of a structured array."""

import numpy as np

# One solid. `taper`: how far the front face, the back face and each side face lean inwards, in meters per meter of
# height above the bottom; length and width of the bottom are those in `half`, doubled.
SOLID = np.dtype(
    [
        ("center", "f8", 3),  # world, meters
        ("yaw", "f8"),  # radians, x towards y
        ("half", "f4", 3),  # half of length (along the heading), width, height; meters
        ("taper", "f4", 3),
        ("round", "?"),  # an ellipsoid with semi-axes `half` instead of a box
        ("material", "u1"),  # index into MATERIALS
        ("color", "f4", 3),  # RGB in [0, 1]
        ("category", "u1"),  # index into CATEGORIES
        ("owner", "i4"),  # actor that the solid is part of, -1 for the static city
    ]
)

# How a surface is painted: paint.py has the textures
MATERIALS = ("plain", "facade", "foliage", "signal", "body", "cabin", "coach", "cargo", "stripes")

# lidarseg's categories, by index
CATEGORIES = (
    "noise", "animal", "human.pedestrian.adult", "human.pedestrian.child",
    "human.pedestrian.construction_worker", "human.pedestrian.personal_mobility",
    "human.pedestrian.police_officer", "human.pedestrian.stroller", "human.pedestrian.wheelchair",
    "movable_object.barrier", "movable_object.debris", "movable_object.pushable_pullable",
    "movable_object.trafficcone", "static_object.bicycle_rack", "vehicle.bicycle", "vehicle.bus.bendy",
    "vehicle.bus.rigid", "vehicle.car", "vehicle.construction", "vehicle.emergency.ambulance",
    "vehicle.emergency.police", "vehicle.motorcycle", "vehicle.trailer", "vehicle.truck",
    "flat.driveable_surface", "flat.other", "flat.sidewalk", "flat.terrain", "static.manmade",
    "static.other", "static.vegetation", "vehicle.ego",
)  # fmt: skip
CATEGORY = {name: index for index, name in enumerate(CATEGORIES)}


def solid(base, yaw, size, material, color, category, taper=(0, 0, 0), is_round=False, owner=-1):
    """A row of a SOLID array, as a tuple. base: x, y, z of the center of the bottom; size: length, width, height
    (unlike `Actor.size`, which is width, length, height, as in nuScenes); taper: of front, back and sides."""
    x, y, z = base
    half = tuple(v / 2 for v in size)
    index = MATERIALS.index(material)
    return (x, y, z + half[2]), yaw, half, taper, is_round, index, color, CATEGORY[category], owner


def corners(solids):
    """[n, 8, 3] world corners of the boxes around the solids; `taper` is ignored."""
    c, s = np.cos(solids["yaw"])[:, None], np.sin(solids["yaw"])[:, None]
    p = solids["half"][:, None] * CORNERS
    rotated = np.stack([c * p[..., 0] - s * p[..., 1], s * p[..., 0] + c * p[..., 1], p[..., 2]], axis=-1)
    return rotated + solids["center"][:, None]


CORNERS = np.array([(x, y, z) for x in (-1.0, 1) for y in (-1, 1) for z in (-1, 1)])
# Edges join corners that differ in one axis
EDGES = np.array([(i, i + k) for k in (1, 2, 4) for i in range(8) if not i & k]).T  # [2, 12] corner indices


def to_local(solids, points):
    """[n, 3] coordinates relative to the center of each of n solids, x along its heading, of one world point [3] or of
    one for each solid [n, 3]."""
    p = points - solids["center"]
    c, s = np.cos(solids["yaw"]), np.sin(solids["yaw"])
    return np.stack([c * p[:, 0] + s * p[:, 1], c * p[:, 1] - s * p[:, 0], p[:, 2]], axis=1)

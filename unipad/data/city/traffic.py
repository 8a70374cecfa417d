"""Road users, and `Scene`: a drive through the city in traffic.

Every scene has all ten detection classes near its start: the large ones parked along the curb on both sides,
a construction site with cones and barriers, people on the sidewalks and moving traffic. Nothing ever collides:
an actor that would collide is not added.

World frame: x, y in the ground plane, z up, ground at z = 0; meters, seconds, radians.
"""

from dataclasses import dataclass

import numpy as np

from unipad.data.city.solids import SOLID, solid
from unipad.data.city.streets import AXES, CROSSWALK, DRIVING_LINE, HALF_ROAD, PITCH, STREETS, City
from unipad.data.city.weather import Weather

# meters from the ego vehicle up to which the sensors see houses, and all other solids
HOUSE_VIEW_DISTANCE, VIEW_DISTANCE = 140.0, 90.0


@dataclass(frozen=True)
class Kind:
    """A kind of road user. Its annotation box is filled with pieces, which span ranges of x, y and z: fractions of the
    box's length and width, from its center, and of its height, from the ground."""

    category: str
    size: tuple[float, float, float]  # width, length, height; meters, mean: actors differ by up to 6 %
    colors: tuple  # RGB in [0, 1]; each actor gets one of them
    pieces: tuple  # of (x range, y range, z range, material, color or None for the actor's own, taper, is round)
    moving: str = ""  # nuScenes attribute when it moves
    still: str = ""  # and when it stands still


BLACK, GRAY, WHITE, RED, ORANGE = (0.08,) * 3, (0.45,) * 3, (0.85,) * 3, (0.62, 0.12, 0.10), (0.92, 0.42, 0.08)
SKIN, DENIM = (0.75, 0.57, 0.46), (0.18, 0.22, 0.35)
PAINTS = (WHITE, GRAY, BLACK, RED, (0.16, 0.27, 0.50), (0.60, 0.60, 0.62), (0.22, 0.32, 0.26), (0.70, 0.66, 0.55))
CLOTHES = (RED, (0.20, 0.30, 0.55), (0.85, 0.80, 0.70), (0.15, 0.15, 0.18), (0.75, 0.55, 0.15), (0.25, 0.45, 0.35))
FULL, NO_TAPER = (-0.5, 0.5), (0, 0, 0)

WHEELS = (
    ((-0.5, -0.16), (-0.22, 0.22), (0, 0.52), "plain", BLACK, NO_TAPER, True),
    ((0.16, 0.5), (-0.22, 0.22), (0, 0.52), "plain", BLACK, NO_TAPER, True),
)
RIDER = (
    ((-0.14, 0.10), (-0.45, 0.45), (0.42, 0.86), "plain", None, NO_TAPER, True),
    ((-0.05, 0.09), (-0.22, 0.22), (0.84, 1), "plain", SKIN, NO_TAPER, True),
    ((-0.08, 0.06), (-0.30, 0.30), (0.10, 0.50), "plain", DENIM, NO_TAPER, False),
)
BICYCLE = (
    ((-0.5, -0.12), (-0.08, 0.08), (0, 0.60), "plain", BLACK, NO_TAPER, True),
    ((0.12, 0.5), (-0.08, 0.08), (0, 0.60), "plain", BLACK, NO_TAPER, True),
    ((-0.28, 0.30), (-0.09, 0.09), (0.44, 0.60), "plain", None, NO_TAPER, False),
    ((0.24, 0.30), (-0.5, 0.5), (0.82, 0.92), "plain", GRAY, NO_TAPER, False),
    ((0.25, 0.30), (-0.06, 0.06), (0.50, 0.90), "plain", GRAY, NO_TAPER, False),
    ((-0.28, -0.12), (-0.2, 0.2), (0.72, 0.82), "plain", BLACK, NO_TAPER, False),
    ((-0.22, -0.18), (-0.06, 0.06), (0.55, 0.75), "plain", GRAY, NO_TAPER, False),
)
MOTORCYCLE = (
    *WHEELS,
    ((-0.40, 0.30), (-0.3, 0.3), (0.32, 0.68), "plain", None, (0.8, 0.2, 0.1), False),
    ((-0.46, 0.02), (-0.28, 0.28), (0.64, 0.78), "plain", BLACK, NO_TAPER, False),
    ((0.18, 0.26), (-0.5, 0.5), (0.84, 1.0), "plain", GRAY, NO_TAPER, False),
    ((0.20, 0.34), (-0.2, 0.2), (0.50, 0.88), "plain", None, NO_TAPER, False),
)
PEDESTRIAN = (
    ((-0.16, 0.16), (-0.34, 0.34), (0, 0.50), "plain", DENIM, NO_TAPER, False),
    ((-0.22, 0.22), (-0.37, 0.37), (0.40, 0.88), "plain", None, NO_TAPER, True),
    ((-0.24, 0.24), (-0.48, 0.48), (0.55, 0.75), "plain", None, (0.5, 0.5, 0.7), False),
    ((-0.16, 0.18), (-0.17, 0.17), (0.85, 1), "plain", SKIN, NO_TAPER, True),
)


def lowered(pieces, fraction):
    """Pieces squeezed into the lower `fraction` of the box, to make room for a rider."""
    return tuple((x, y, (z[0] * fraction, z[1] * fraction), *rest) for x, y, z, *rest in pieces)


# nuScenes attributes, as the original UniPAD assigns them to detections: a stationary bus is at its stop
# (vehicle.stopped), other vehicles are parked.
VEHICLE = {"moving": "vehicle.moving", "still": "vehicle.parked"}
RIDDEN = {"moving": "cycle.with_rider", "still": "cycle.with_rider"}
RIDERLESS = {"moving": "cycle.without_rider", "still": "cycle.without_rider"}

KINDS = {
    "car": Kind(
        "vehicle.car", (1.9, 4.6, 1.65), PAINTS,
        (
            (FULL, FULL, (0.10, 0.57), "body", None, (0.15, 0.10, 0.04), False),
            ((-0.44, 0.22), (-0.46, 0.46), (0.57, 1), "cabin", None, (1.0, 0.5, 0.25), False),
        ), **VEHICLE,
    ),
    "truck": Kind(
        "vehicle.truck", (2.5, 7.2, 3.1), (WHITE, (0.16, 0.27, 0.50), (0.72, 0.62, 0.20), (0.30, 0.42, 0.34)),
        (
            ((-0.5, 0.5), (-0.46, 0.46), (0.06, 0.26), "body", BLACK, NO_TAPER, False),
            ((0.24, 0.5), (-0.48, 0.48), (0.26, 0.84), "cabin", None, (0.12, 0, 0.03), False),
            ((-0.5, 0.21), FULL, (0.26, 1), "cargo", None, NO_TAPER, False),
        ), **VEHICLE,
    ),
    "bus": Kind(
        "vehicle.bus.rigid", (2.8, 11.0, 3.4), (RED, (0.20, 0.42, 0.62), (0.80, 0.72, 0.25)),
        ((FULL, FULL, (0.07, 1), "coach", None, NO_TAPER, False),), "vehicle.moving", "vehicle.stopped",
    ),
    "trailer": Kind(
        "vehicle.trailer", (2.5, 9.0, 3.6), (WHITE, (0.58, 0.60, 0.62)),
        (
            ((-0.48, 0.1), (-0.45, 0.45), (0.05, 0.30), "body", BLACK, NO_TAPER, False),
            (FULL, FULL, (0.30, 1), "cargo", None, NO_TAPER, False),
            ((0.30, 0.34), (-0.3, 0.3), (0, 0.30), "plain", GRAY, NO_TAPER, False),
        ), **VEHICLE,
    ),
    "construction": Kind(
        "vehicle.construction", (2.6, 6.2, 3.1), ((0.88, 0.66, 0.10), (0.86, 0.58, 0.12)),
        (
            ((-0.5, 0.1), (-0.5, -0.26), (0, 0.28), "plain", BLACK, (0.3, 0.3, 0), False),
            ((-0.5, 0.1), (0.26, 0.5), (0, 0.28), "plain", BLACK, (0.3, 0.3, 0), False),
            ((-0.48, 0.06), (-0.44, 0.44), (0.28, 0.60), "plain", None, NO_TAPER, False),
            ((-0.16, 0.08), (-0.44, 0.04), (0.60, 0.96), "cabin", None, (0.1, 0, 0), False),
            ((0.02, 0.42), (0.10, 0.24), (0.80, 1), "plain", None, (0.4, 0, 0), False),
            ((0.36, 0.42), (0.10, 0.24), (0.22, 0.84), "plain", None, NO_TAPER, False),
            ((0.32, 0.50), (0.0, 0.34), (0.02, 0.26), "plain", GRAY, (0, 0.4, 0), False),
        ), **VEHICLE,
    ),
    "pedestrian": Kind(
        "human.pedestrian.adult", (0.7, 0.7, 1.75), CLOTHES, PEDESTRIAN, "pedestrian.moving", "pedestrian.standing",
    ),
    "motorcyclist": Kind(
        "vehicle.motorcycle", (0.8, 2.1, 1.65), (RED, BLACK, (0.16, 0.27, 0.50)),
        lowered(MOTORCYCLE, 0.72) + RIDER, **RIDDEN,
    ),
    "motorcycle": Kind("vehicle.motorcycle", (0.8, 2.1, 1.25), (RED, BLACK, GRAY), MOTORCYCLE, **RIDERLESS),
    "cyclist": Kind("vehicle.bicycle", (0.65, 1.75, 1.75), CLOTHES, lowered(BICYCLE, 0.62) + RIDER, **RIDDEN),
    "bicycle": Kind("vehicle.bicycle", (0.6, 1.75, 1.1), (RED, (0.2, 0.4, 0.6), GRAY), BICYCLE, **RIDERLESS),
    "cone": Kind(
        "movable_object.trafficcone", (0.45, 0.45, 0.9), (ORANGE,),
        (
            (FULL, FULL, (0, 0.06), "plain", BLACK, NO_TAPER, False),
            ((-0.36, 0.36), (-0.36, 0.36), (0.06, 1), "stripes", None, (0.15, 0.15, 0.15), False),
        ),
    ),
    "barrier": Kind(
        "movable_object.barrier", (2.2, 0.5, 1.0), (ORANGE,),
        (
            ((-0.5, 0.5), FULL, (0, 0.2), "plain", GRAY, NO_TAPER, False),
            ((-0.2, 0.2), FULL, (0.2, 1), "stripes", None, NO_TAPER, False),
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Actor:
    """An object with an annotation box: it follows `path` from `start` meters along it, at `speed` m/s (0: at rest)."""

    kind: str  # a key of KINDS
    size: tuple[float, float, float]  # width, length, height; meters
    color: tuple[float, float, float]
    path: "Path"
    start: float
    speed: float

    def pose(self, t):
        """[..., 3] x, y, yaw at times t."""
        return self.path.at(self.start + self.speed * np.asarray(t))

    @property
    def attribute(self):
        """Name of its nuScenes attribute; "" if its kind has none."""
        return KINDS[self.kind].moving if self.speed else KINDS[self.kind].still

    def solids(self, owner):
        """Rows of a SOLID array, relative to the center of the box's bottom. owner: index of the actor in its scene."""
        (width, length, height), kind = self.size, KINDS[self.kind]
        for *ranges, material, color, taper, is_round in kind.pieces:
            begin, end = np.array(ranges).T * (length, width, height)
            x, y, _ = (begin + end) / 2
            color = color or self.color
            size = tuple(end - begin)
            yield solid((x, y, begin[2]), 0.0, size, material, color, kind.category, taper, is_round, owner)


class Path:
    """A polyline parameterized by arc length; points: [n, 2]. An actor that reaches its end stands still there."""

    def __init__(self, points):
        step = np.diff(points, axis=0)
        self.points = points
        self.arc_lengths = np.append(0, np.hypot(*step.T).cumsum())  # [n], of `points`
        self.middles = (self.arc_lengths[1:] + self.arc_lengths[:-1]) / 2  # [n - 1] arc lengths, of the segments
        self.yaw = np.unwrap(np.arctan2(step[:, 1], step[:, 0]))

    def at(self, s):
        """[..., 3] x, y, yaw at arc lengths `s`, meters."""
        x, y = (np.interp(s, self.arc_lengths, self.points[:, i]) for i in range(2))
        return np.stack([x, y, np.interp(s, self.middles, self.yaw)], axis=-1)


def district_of(index, varied):
    """Number of the district of scene `index`: 0 or, if `varied`, a new one after every 16 scenes, so that each scene
    has an intersection of its own: (STREETS - 3)^2 = 16 of a district's are away from the border of the map."""
    return index // (STREETS - 3) ** 2 if varied else 0


class Scene:
    """A drive through the city, with the traffic around it."""

    weather: Weather
    track: np.ndarray  # [n, 2] positions of the ego vehicle, meters
    fixed: np.ndarray  # [n] SOLID, the solids of the static city near `track`

    def __init__(self, seed, index, duration, varied=False):
        """index: number of the scene in its dataset, from 0; duration: seconds it lasts.

        varied: every 16 scenes are in another district, and each has weather of its own; otherwise, sunny days in one
        district.
        """
        self.city, self.index, self.duration = City.of(seed, district_of(index, varied)), index, duration
        self.rng = rng = np.random.default_rng([seed, 3, index])
        # every scene has its own intersection, away from the border of the map, as long as there are enough
        inner = STREETS - 3
        order = np.random.default_rng([seed, 4]).permutation(inner * inner)
        # the center of the scene's intersection: grid x, y in meters
        self.node = (np.array(divmod(order[index % len(order)], inner)) + 2) * PITCH
        self.heading = int(rng.integers(4))  # in which the ego vehicle arrives at the intersection: index into AXES
        self.turn = ("straight", "left", "right")[index % 3]
        # after the first turn always right, so that a long scene circles a block instead of leaving the city
        turns = [self.turn] + ["right"] * (2 + int(duration * 8 / PITCH))  # two more than blocks passed at 8 m/s
        speed = rng.uniform(6.5, 8.5) if self.turn == "straight" else rng.uniform(5.5, 6.5)
        self.approach = rng.uniform(26, 32)  # meters from the start to the center of the intersection
        path = self._lane_path(self.heading, turns)
        # the path begins PITCH before the intersection
        self.ego = Actor("car", (1.73, 4.08, 1.56), WHITE, path, PITCH - self.approach, speed)

        self._times = np.arange(0, duration + 0.25, 0.25)  # at which `_add` looks for collisions
        self._taken = [self._discs(self.ego)]  # for the ego vehicle and every actor: where it is at each of `_times`
        self.actors = []
        self._add_parked()
        self._add_people()
        self._add_traffic()

        self._start_poses = np.array([a.pose(0.0) for a in self.actors])
        self._movers = [i for i, a in enumerate(self.actors) if a.speed]
        # the actors' solids, relative to their actors, which `owner` numbers
        self._pieces = np.array([row for i, a in enumerate(self.actors) for row in a.solids(i)], dtype=SOLID)
        self.track = self.ego.pose(np.linspace(0, duration, 50))[:, :2]
        offsets = range(-2, 3)  # two blocks more on every side: 144 m, above HOUSE_VIEW_DISTANCE
        blocks = {tuple(b) for b in np.floor(self.track / PITCH).astype(int)}
        blocks = sorted({(i + di, j + dj) for i, j in blocks for di in offsets for dj in offsets})
        self.fixed = np.concatenate([self.city.block(*b) for b in blocks])
        self.weather = Weather.draw(rng, varied)

    def poses(self, t):
        """[actors, 3] x, y, yaw at time t. As in all methods, the ego vehicle is not one of the actors."""
        poses = self._start_poses.copy()
        for i in self._movers:
            poses[i] = self.actors[i].pose(t)
        return poses

    def boxes(self, t):
        """The actors' annotation boxes at time t, a SOLID array."""
        rows = [
            solid((x, y, 0), yaw, (a.size[1], a.size[0], a.size[2]), "plain", a.color, KINDS[a.kind].category)
            for a, (x, y, yaw) in zip(self.actors, self.poses(t), strict=True)
        ]
        return np.array(rows, dtype=SOLID)

    def solids(self, t):
        """All solids within view distance at time t except the ego vehicle, a SOLID array."""
        here = self.ego.pose(t)[:2]
        distance = np.hypot(*(self.fixed["center"][:, :2] - here).T)
        # houses: only they are longer, wider or higher than 8 m
        limit = np.where(self.fixed["half"].max(axis=1) > 4, HOUSE_VIEW_DISTANCE, VIEW_DISTANCE)
        pieces = self._pieces.copy()
        x, y, yaw = self.poses(t)[pieces["owner"]].T
        local = self._pieces["center"]
        c, s = np.cos(yaw), np.sin(yaw)
        pieces["center"][:, 0] = x + c * local[:, 0] - s * local[:, 1]
        pieces["center"][:, 1] = y + s * local[:, 0] + c * local[:, 1]
        pieces["yaw"] = yaw
        near = np.hypot(*(pieces["center"][:, :2] - here).T) < VIEW_DISTANCE
        return np.concatenate([self.fixed[distance < limit], pieces[near]])

    def _add_parked(self):
        """Park along the curbs: where the ego vehicle starts, the large kinds (two on each side, among cars); in all
        streets that leave the intersection, a random mix."""
        rng = self.rng
        # side: -1 right, 1 left
        for side, kinds in ((-1, ["site", "truck"]), (1, ["bus", "trailer"])):
            # meters ahead of the intersection: from 18 m behind the start to 1.5 m before the crosswalk; a construction
            # site takes 12.5 m: 11 m and a gap
            begin, end = -self.approach - 18, -HALF_ROAD - CROSSWALK[1] - 1.5
            room = end - begin - sum(12.5 if k == "site" else KINDS[k].size[1] + 2 for k in kinds)
            kinds += ["car"] * int(room / (KINDS["car"].size[1] + 1.5))
            for kind in rng.permutation(kinds):
                if kind == "site":
                    self._add_construction_site(begin, side)
                    begin += 12.5
                else:
                    begin = self._park_at_curb(kind, self.heading, begin, side) + rng.uniform(0.8, 1.4)
        for direction in range(4):  # of the streets that leave the intersection: index into AXES
            for side in (-1, 1):
                begin = HALF_ROAD + 11
                while begin < PITCH - 24:
                    kind = rng.choice(["car", "truck", "motorcycle", "none"], p=[0.55, 0.06, 0.07, 0.32])
                    begin = (
                        begin + 5
                        if kind == "none"
                        else self._park_at_curb(kind, direction, begin, side) + rng.uniform(0.8, 3)
                    )

    def _park_at_curb(self, kind, heading, begin, side):
        """Park an actor at the curb on one side (1 left, -1 right) of a street, from `begin` meters ahead of the
        intersection on; it faces as the traffic on that side does. heading: of the street, index into AXES. Returns
        where it ends or, where it would collide and is left out, would end."""
        width, length, _ = KINDS[kind].size
        spot = self._point_path(
            begin + length / 2, side * (HALF_ROAD - width / 2 - 0.3), heading, 0.0 if side < 0 else np.pi
        )
        self._add(kind, spot)
        return begin + length

    def _add_construction_site(self, begin, side):
        """A construction site on 11 m of the parking lane: an excavator between barriers, cones towards the traffic.
        begin, side: as for `_park_at_curb`."""
        rotation = 0.0 if side < 0 else np.pi
        for ahead in (0.4, 10.8):
            self._add("barrier", self._point_path(begin + ahead, side * (HALF_ROAD - 1.4), rotation=rotation))
        self._add("construction", self._point_path(begin + 5.6, side * (HALF_ROAD - 1.5), rotation=rotation))
        for ahead in (0.6, 3.2, 5.8, 8.4, 10.6):
            self._add("cone", self._point_path(begin + ahead, side * (HALF_ROAD - 3.1)), gap=0.0)

    def _add_people(self):
        """Add people and riderless cycles on the sidewalks, people on the crosswalks."""
        rng = self.rng
        start_ahead = -self.approach  # of the ego vehicle, meters ahead of the intersection
        for kind in ("bicycle", "bicycle", "motorcycle"):
            self._add_at_random(
                kind, lambda: self._point_path(rng.uniform(start_ahead, -15), rng.choice([-1, 1]) * (HALF_ROAD + 0.7))
            )
        self._add_at_random(
            "pedestrian",
            lambda: self._point_path(rng.uniform(start_ahead, -12), -HALF_ROAD - 1.6, rotation=rng.uniform(0, 6)),
        )
        for _ in range(7):
            left = rng.choice([-1, 1]) * (HALF_ROAD + rng.uniform(1.1, 2.2))
            ends = rng.permutation([(-58, left), (-12, left)])
            self._add_at_random("pedestrian", lambda ends=ends: self._straight_path(*ends), start=46, speed=(0.8, 1.6))
        for ahead in (-12.5, -12.5, 12.5):  # on crosswalks, which are 11.5 to 14.5 m from the intersection's center
            ends = rng.permutation([(ahead, -9), (ahead, 9)])
            self._add_at_random("pedestrian", lambda ends=ends: self._straight_path(*ends), start=12, speed=(0.7, 1.5))

    def _add_traffic(self):
        """Add traffic: a car ahead of the ego vehicle, a motorcyclist behind it, a cyclist, and others from all
        directions."""
        rng, ego = self.rng, self.ego
        self._add("car", ego.path, ego.start + rng.uniform(13, 18), ego.speed)
        self._add("motorcyclist", ego.path, ego.start - rng.uniform(8, 11), ego.speed)
        edge = self._lane_path(self.heading, ["straight"] * 3, left=-DRIVING_LINE - 1.45)
        self._add_at_random("cyclist", lambda: edge, start=(ego.start + 4, ego.start + 18), speed=(3.0, 5.0), gap=0.3)
        for _ in range(9):
            kind = rng.choice(["car", "truck", "bus", "motorcyclist"], p=[0.7, 0.1, 0.07, 0.13])
            turns = [rng.choice(["straight", "left", "right"], p=[0.6, 0.2, 0.2])]
            turns += ["straight"] * (1 + int(self.duration * 9 / PITCH))
            path = self._lane_path(int(rng.integers(4)), turns)
            self._add_at_random(kind, lambda path=path: path, start=1.6 * PITCH, speed=(4.0, 9.0), gap=2.0, tries=4)

    def _add_at_random(self, kind, make_path, start=0.0, speed=(0.0, 0.0), gap=0.8, tries=12):
        """Add an actor where it collides with no other. Each try draws a path, a start on it (from 0 to `start`
        meters, or from the range `start`) and a speed from the range `speed`."""
        begin, end = start if isinstance(start, tuple) else (0.0, start)
        for _ in range(tries):
            if self._add(kind, make_path(), self.rng.uniform(begin, end), self.rng.uniform(*speed), gap):
                break

    def _lane_path(self, heading, turns, left=-DRIVING_LINE):
        """Path along a lane, `left` meters to the left of the street's center line, that begins PITCH meters before the
        scene's intersection and makes one of `turns` at each intersection, 9.5 m before to 9.5 m after its center.
        heading: at the beginning, index into AXES."""
        node, k, points = self.node.astype(float), heading, []  # k: heading on arrival at `node`
        points.append((node - PITCH * AXES[k] + left * AXES[(k + 1) % 4])[None])
        for turn in turns:
            enter = node - 9.5 * AXES[k] + left * AXES[(k + 1) % 4]
            out = (k + {"straight": 0, "left": 1, "right": -1}[turn]) % 4
            leave = node + 9.5 * AXES[out] + left * AXES[(out + 1) % 4]
            # a quadratic Bezier curve between the lanes; its control point is where they cross
            apex = (enter + leave) / 2 if out == k else node + left * (AXES[(k + 1) % 4] + AXES[(out + 1) % 4])
            u = np.linspace(0, 1, 20)[:, None]
            points.append((1 - u) ** 2 * enter + 2 * u * (1 - u) * apex + u**2 * leave)
            node, k = node + PITCH * AXES[out], out
        points.append((node + left * AXES[(k + 1) % 4])[None])
        return self._warped_path(np.concatenate(points))

    def _warped_path(self, corners):
        """Path through `corners`, grid points, warped like the streets."""
        corners = np.asarray(corners, float)
        arc_lengths = np.append(0, np.hypot(*np.diff(corners, axis=0).T).cumsum())
        s = np.arange(0, arc_lengths[-1], 0.5)
        grid = np.stack([np.interp(s, arc_lengths, corners[:, i]) for i in range(2)], axis=1)
        return Path(self.city.to_world(grid))

    def _straight_path(self, begin, end):
        """Path between two points (ahead, left), in meters from the intersection, in the axes of the street
        in which the ego vehicle arrives."""
        axes = AXES[[self.heading, (self.heading + 1) % 4]]
        return self._warped_path(self.node + np.array([begin, end]) @ axes)

    def _point_path(self, ahead, left, heading=None, rotation=0.0):
        """Path for an actor at rest, `ahead` meters ahead of the intersection and `left` meters to the
        left of the center line. heading: of the street, index into AXES (default: that in which the ego vehicle
        arrives); rotation: of the actor relative to the street, radians."""
        x, y, yaw = self.city.street_pose(self.node, self.heading if heading is None else heading, ahead, left)
        yaw += rotation
        return Path(np.array([(x, y), (x + 0.1 * np.cos(yaw), y + 0.1 * np.sin(yaw))]))

    def _add(self, kind, path, start=0.0, speed=0.0, gap=0.3):
        """Add an actor unless it ever comes within `gap` meters of another; returns whether it was added."""
        rng = self.rng
        size = tuple(float(v * rng.uniform(0.94, 1.06)) for v in KINDS[kind].size)
        colors = KINDS[kind].colors
        actor = Actor(kind, size, colors[rng.integers(len(colors))], path, start, speed)
        discs, radius = self._discs(actor)
        for other, other_radius in self._taken:
            distance = np.linalg.norm(discs[:, :, None] - other[:, None], axis=-1)  # [times, discs, discs]
            if distance.min() < radius + other_radius + gap:
                return False
        self._taken.append((discs, radius))
        self.actors.append(actor)
        return True

    def _discs(self, actor):
        """Discs over an actor's footprint but for its corners at each of `_times`: centers [times, 5, 2], radius."""
        width, length, _ = actor.size
        if length < width:  # a barrier
            width, length, across = length, width, np.pi / 2
        else:
            across = 0.0
        x, y, yaw = actor.pose(self._times).T
        along = np.linspace(-1, 1, 5) * (length - width) / 2
        dx, dy = np.cos(yaw + across), np.sin(yaw + across)
        return np.stack([x[:, None] + dx[:, None] * along, y[:, None] + dy[:, None] * along], axis=-1), width / 2

"""The static city: ground, houses, trees.

Streets form a square grid under a smooth warp, so that no street is quite straight:

    grid = world + BEND * sin(2 pi * (y, x) / BEND_LENGTH + phase)

World frame: x, y in the ground plane, z up, ground at z = 0; meters and radians.
"""

from functools import cache, lru_cache

import numpy as np

from unipad.data.city.solids import CATEGORY, SOLID, solid

PITCH = 72.0  # meters from street to street
STREETS = 7  # streets in each direction on the map; the city continues beyond, but no scene gets there
ROAD = 7.0  # meters from the center line of a street to its curb: a lane of 4.2 m and a parking lane
LANE = 1.9  # meters from the center line of the street to the middle of a vehicle in its lane
CURB_RADIUS = 4.0  # meters, at the corners of intersections
WALK = 3.5  # meters of sidewalk
CROSSWALK = (4.5, 7.5)  # meters from the edge of the intersection, ROAD from its center: where it begins and ends
BEND, BEND_LENGTH = 6.0, 190.0  # meters: amplitude and wavelength of the warp

NO_MARK, WHITE, YELLOW, CURB = range(4)
AXES = np.array([(1.0, 0.0), (0, 1), (-1, 0), (0, -1)])  # the four directions of a street, counter-clockwise


class City:
    """The city of a seed."""

    @classmethod
    @lru_cache(maxsize=1)
    def of(cls, seed):
        """The city of a seed, built once and shared by all scenes."""
        return cls(seed)

    def __init__(self, seed):
        self.seed = seed
        self.phase = np.random.default_rng([seed, 1]).uniform(0, 2 * np.pi, 2)

    def to_grid(self, x, y):
        """World x, y ([n] each) to grid x, y, where streets are straight; meters."""
        k = np.float32(2 * np.pi / BEND_LENGTH)
        p, q = self.phase.astype(np.float32)
        return x + np.float32(BEND) * np.sin(k * y + p), y + np.float32(BEND) * np.sin(k * x + q)

    def to_world(self, grid):
        """[n, 2] grid to world: the inverse of `to_grid`, by fixed-point iteration."""
        k = 2 * np.pi / BEND_LENGTH
        world = grid
        for _ in range(10):  # the error shrinks by a factor BEND * k = 0.2 per iteration
            world = grid - BEND * np.sin(k * world[:, ::-1] + self.phase)
        return world

    def street_pose(self, origin, direction, ahead, left):
        """World x, y and heading of the point `ahead` meters along a street from `origin` (grid) and `left` meters to
        the left of its center line."""
        grid = np.asarray(origin) + ahead * AXES[direction] + left * AXES[(direction + 1) % 4]
        tail, here, nose = self.to_world(grid + np.array([[-0.5], [0], [0.5]]) * AXES[direction])
        return *here, np.arctan2(*(nose - tail)[::-1])

    def ground(self, x, y):
        """The ground at world points x, y: [n] float32.

        Returns:
            category: [n] uint8 lidarseg index.
            mark:     [n] uint8 NO_MARK, WHITE, YELLOW or CURB.
            depth:    [n] meters from the curb into the block, negative on the road.
        """
        gx, gy = self.to_grid(x, y)
        # meters from the center lines of the nearest streets (a, b) and from their curbs (ea, eb)
        a, b = (g - np.float32(PITCH) * np.round(g / np.float32(PITCH)) for g in (gx, gy))
        ea, eb = np.abs(a) - np.float32(ROAD), np.abs(b) - np.float32(ROAD)
        r = np.float32(CURB_RADIUS)
        depth = np.where((ea < r) & (eb < r), r - np.hypot(r - ea, r - eb), np.minimum(ea, eb))
        paved = (np.floor(gx / 13) + np.floor(gy / 13)) % 3 == 0  # a third of the squares of 13 m behind the sidewalks
        lot = np.where(paved, CATEGORY["flat.other"], CATEGORY["flat.terrain"])
        category = np.where(depth > WALK, lot, CATEGORY["flat.sidewalk"])
        category = np.where(depth < 0, CATEGORY["flat.driveable_surface"], category).astype(np.uint8)

        along_y = np.abs(a) < np.abs(b)
        across, ahead = np.where(along_y, a, b), np.maximum(ea, eb)
        wide = np.abs(across)  # meters from the center line; `ahead`: meters from the edge of the intersection
        arriving = (a * b < 0) == along_y  # traffic keeps right
        # crosswalk of stripes; stop line across the lane; line between lane and parking lane; double center line
        zebra = (ahead > CROSSWALK[0]) & (ahead < CROSSWALK[1]) & (across % 1.2 < 0.6) & (wide < ROAD - 0.4)
        stop = (np.abs(ahead - 8.7) < 0.25) & arriving & (wide < 4.2)
        edge = (ahead > 9.5) & (np.abs(wide - 4.3) < 0.08)
        middle = (ahead > 9.5) & (np.abs(wide - 0.18) < 0.08)
        mark = np.select([depth > 0.3, depth > 0, zebra | stop | edge, middle], [NO_MARK, CURB, WHITE, YELLOW], NO_MARK)
        return category, mark.astype(np.uint8), depth

    @cache  # noqa: B019 (a process holds one city)
    def block(self, column, row):
        """SOLID array of the block between streets `column`, `column` + 1 and `row`, `row` + 1."""
        rng = np.random.default_rng([self.seed, 2, column + 99, row + 99])  # + 99, since seeds must not be negative
        solids = []
        park = rng.random() < 0.15
        brick = rng.integers(len(WALLS))  # neighboring houses look alike
        for side in range(4):  # counter-clockwise, with the block on the left of the street
            origin = (np.array([column, row]) + [(0, 0), (1, 0), (1, 1), (0, 1)][side]) * PITCH
            solids += self._furniture(rng, origin, side)
            if park:
                for _ in range(5):
                    spot = self.street_pose(origin, side, rng.uniform(16, PITCH - 16), ROAD + rng.uniform(6, 22))
                    solids += tree(rng, spot)
                continue
            along = ROAD + WALK + 4
            # 38 m: the next side's houses reach up to 27.5 m from its street's center line; 10.5 m: about one house
            while along < PITCH - 38:
                width, deep = rng.uniform(9, 15), rng.uniform(9, 12)
                front = ROAD + WALK + rng.uniform(3.5, 5)
                spot = self.street_pose(origin, side, along + width / 2, front + deep / 2)
                wall = WALLS[brick if rng.random() < 0.5 else rng.integers(len(WALLS))]
                solids += house(rng, spot, (width, deep), wall)
                along += width + rng.uniform(1, 5)
        return np.array(solids, dtype=SOLID)

    def _furniture(self, rng, origin, side):
        """Trees, lamps, hedges and the traffic light along one side of a block."""
        solids = []  # `along`: meters from the center of the intersection at `origin`
        for along in np.arange(ROAD + 9, PITCH - ROAD - 9, 9.0):  # trees on the sidewalk, hedges behind it
            if rng.random() < 0.7:
                solids += tree(rng, self.street_pose(origin, side, along + rng.uniform(-2, 2), ROAD + 2.9))
            if rng.random() < 0.5:
                x, y, yaw = self.street_pose(origin, side, along + rng.uniform(-4, 4), ROAD + WALK + 1.2)
                size = (rng.uniform(1, 6), 0.9, rng.uniform(0.7, 1.3))
                solids.append(solid((x, y, 0), yaw, size, "foliage", HEDGE, "static.vegetation"))
        for along in (ROAD + 12, PITCH - ROAD - 16):  # lamps: a pole at the curb, an arm over the road
            x, y, yaw = self.street_pose(origin, side, along, ROAD + 0.6)
            solids.append(solid((x, y, 0), yaw, (0.14, 0.14, 6.5), "plain", STEEL, "static.manmade"))
            x, y, yaw = self.street_pose(origin, side, along, ROAD - 0.2)
            solids.append(solid((x, y, 6.4), yaw, (0.3, 1.8, 0.15), "plain", STEEL, "static.manmade"))
        x, y, yaw = self.street_pose(origin, side, ROAD + 2.2, ROAD + 2.2)  # traffic light on the corner: pole and head
        solids.append(solid((x, y, 0), yaw, (0.16, 0.16, 3.0), "plain", STEEL, "static.manmade"))
        solids.append(solid((x, y, 2.6), yaw, (0.35, 0.35, 0.95), "signal", (0.1, 0.1, 0.1), "static.manmade"))
        return solids


WALLS = ((0.56, 0.30, 0.24), (0.72, 0.62, 0.47), (0.66, 0.66, 0.66), (0.78, 0.74, 0.66), (0.50, 0.44, 0.42))
ROOFS = ((0.42, 0.20, 0.16), (0.30, 0.30, 0.33), (0.36, 0.27, 0.22))
LEAVES = ((0.20, 0.38, 0.13), (0.28, 0.42, 0.14), (0.15, 0.32, 0.15))
HEDGE, BARK, STEEL = (0.18, 0.33, 0.13), (0.30, 0.22, 0.16), (0.42, 0.44, 0.46)


def tree(rng, spot):
    """The solids of a tree, rows of a SOLID array, at `spot`: x, y, heading."""
    x, y, yaw = spot
    leaves = LEAVES[rng.integers(len(LEAVES))]
    trunk = rng.uniform(2.2, 3.2)
    stem = solid((x, y, 0), yaw, (0.35, 0.35, trunk + 1), "plain", BARK, "static.vegetation", (0.02, 0.02, 0.02))
    if rng.random() < 0.25:  # a conifer
        wide, high = rng.uniform(2.2, 3.2), rng.uniform(5, 8)
        lean = (wide / 2 / high,) * 3
        return [stem, solid((x, y, 0.9), yaw, (wide, wide, high), "foliage", LEAVES[2], "static.vegetation", lean)]
    size = (rng.uniform(2.6, 4.4), rng.uniform(2.6, 4.4), rng.uniform(3, 5))
    return [stem, solid((x, y, trunk), yaw, size, "foliage", leaves, "static.vegetation", is_round=True)]


def house(rng, spot, footprint, wall):
    """The solids of a house, rows of a SOLID array.

    spot: x, y, heading; footprint: length along the heading, width.
    """
    x, y, yaw = spot
    wall = tuple(c * rng.uniform(0.85, 1.1) for c in wall)
    gabled = rng.random() < 0.45
    floors = rng.integers(1, 4) if gabled else rng.integers(3, 8)
    height = 3.1 * floors + 0.6
    walls = solid((x, y, 0), yaw, (*footprint, height), "facade", wall, "static.manmade")
    roof = ROOFS[rng.integers(len(ROOFS))]
    if gabled:
        rise = footprint[1] * 0.4
        size, lean = (footprint[0] + 0.6, footprint[1] + 0.8, rise), (0, 0, (footprint[1] + 0.8) / 2 / rise)
    else:
        size, lean = (footprint[0] + 0.4, footprint[1] + 0.4, 0.5), (0, 0, 0)
    return [walls, solid((x, y, height), yaw, size, "plain", roof, "static.manmade", lean)]

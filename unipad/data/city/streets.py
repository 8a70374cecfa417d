"""The static city: ground, houses, trees.

Streets form a square grid under a smooth warp, so that no street is quite straight:

    grid = world + BEND * sin(2 pi * (y, x) / BEND_LENGTH + phase)

World frame: x, y in the ground plane, z up, ground at z = 0; meters and radians.
"""

from functools import cache, lru_cache

import numpy as np

from unipad.data.city.solids import CATEGORY, SOLID, solid

PITCH = 72.0  # meters from street to street
STREETS = 7  # along x, and as many along y, on the map image (`synthetic._draw_map`); no scene gets to the others
HALF_ROAD = 7.0  # meters from the center line of a street to its curb: a lane of 4.2 m and a parking lane
DRIVING_LINE = 1.9  # meters from the center line of the street to the middle of a vehicle in its lane
CURB_RADIUS = 4.0  # meters, at the corners of intersections
SIDEWALK = 3.5  # meters, its width
CROSSWALK = (4.5, 7.5)  # begin and end, meters from the edge of the intersection, which is HALF_ROAD from its center
BEND, BEND_LENGTH = 6.0, 190.0  # meters: amplitude and wavelength of the warp

NO_MARK, WHITE, YELLOW, CURB = range(4)  # values of `mark` in `City.ground`
AXES = np.array([(1.0, 0.0), (0, 1), (-1, 0), (0, -1)])  # the four directions of streets in the grid, counter-clockwise


class City:
    """One district of the city that a seed gives: a street grid of its own, unconnected to the others.

    Small datasets have district 0 only; large ones have a district for every 16 scenes, see `traffic.district_of`.
    """

    @classmethod
    @lru_cache(maxsize=1)
    def of(cls, seed, district=0):
        """A district, built once and shared by its scenes."""
        return cls(seed, district)

    def __init__(self, seed, district=0):
        self.seed = (seed, district) if district else (seed,)  # what the seeds of all random generators begin with
        rng = np.random.default_rng([*self.seed, 1])  # 1, and 2 in `block`: numbers of the random streams
        self.phase = rng.uniform(0, 2 * np.pi, 2)
        # fraction of blocks that are parks; of places for a tree that have one; factor of the number of floors
        self.park_fraction, self.tree_fraction, self.floors_factor = 0.15, 0.7, 1.0
        if district:
            self.park_fraction, self.tree_fraction = rng.uniform(0, 0.4), rng.uniform(0.2, 1)
            self.floors_factor = rng.uniform(0.5, 2)

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
        the left of its center line; direction: of the street, index into AXES."""
        grid = np.asarray(origin) + ahead * AXES[direction] + left * AXES[(direction + 1) % 4]
        tail, here, nose = self.to_world(grid + np.array([[-0.5], [0], [0.5]]) * AXES[direction])
        return *here, np.arctan2(*(nose - tail)[::-1])

    def ground(self, x, y):
        """The ground at world points x, y: [n] float32.

        Returns:
            category:    [n] uint8 index into `solids.CATEGORIES`.
            mark:        [n] uint8 NO_MARK, WHITE, YELLOW or CURB.
            behind_curb: [n] meters from the curb into the block, negative on the road.
        """
        gx, gy = self.to_grid(x, y)
        # signed meters from the center lines of the nearest street along y (a) and along x (b); meters from their curbs
        # (ea, eb), negative on the road
        a, b = (g - np.float32(PITCH) * np.round(g / np.float32(PITCH)) for g in (gx, gy))
        ea, eb = np.abs(a) - np.float32(HALF_ROAD), np.abs(b) - np.float32(HALF_ROAD)
        r = np.float32(CURB_RADIUS)
        behind_curb = np.where((ea < r) & (eb < r), r - np.hypot(r - ea, r - eb), np.minimum(ea, eb))
        paved = (np.floor(gx / 13) + np.floor(gy / 13)) % 3 == 0  # a third of the squares of 13 m behind the sidewalks
        lot = np.where(paved, CATEGORY["flat.other"], CATEGORY["flat.terrain"])
        category = np.where(behind_curb > SIDEWALK, lot, CATEGORY["flat.sidewalk"])
        category = np.where(behind_curb < 0, CATEGORY["flat.driveable_surface"], category).astype(np.uint8)

        along_y = np.abs(a) < np.abs(b)  # the nearest street runs along y
        across = np.where(along_y, a, b)  # signed meters from its center line
        off_center, beyond = np.abs(across), np.maximum(ea, eb)  # beyond: meters from the edge of the intersection
        arriving = (a * b < 0) == along_y  # on the lane towards the intersection: traffic keeps right
        # crosswalk of stripes; stop line across the lane; line between lane and parking lane; double center line
        crosswalk = (beyond > CROSSWALK[0]) & (beyond < CROSSWALK[1]) & (off_center < HALF_ROAD - 0.4)
        zebra = crosswalk & (across % 1.2 < 0.6)
        stop_line = (np.abs(beyond - 8.7) < 0.25) & arriving & (off_center < 4.2)
        lane_line = (beyond > 9.5) & (np.abs(off_center - 4.3) < 0.08)
        center_line = (beyond > 9.5) & (np.abs(off_center - 0.18) < 0.08)
        white = zebra | stop_line | lane_line
        # where two hold, the first counts
        conditions = [behind_curb > 0.3, behind_curb > 0, white, center_line]
        mark = np.select(conditions, [NO_MARK, CURB, WHITE, YELLOW], NO_MARK)
        return category, mark.astype(np.uint8), behind_curb

    @cache  # noqa: B019 (a process makes blocks of few districts, so it may keep them)
    def block(self, column, row):
        """The solids (an array of dtype SOLID) of the block from street `column` to the next, and `row` to the next."""
        rng = np.random.default_rng([*self.seed, 2, column + 99, row + 99])  # + 99, since seeds must not be negative
        solids = []
        is_park = rng.random() < self.park_fraction
        usual_wall = rng.integers(len(WALLS))  # the color of most houses: neighbors look alike
        for side in range(4):  # counter-clockwise, with the block on the left of the street
            origin = (np.array([column, row]) + [(0, 0), (1, 0), (1, 1), (0, 1)][side]) * PITCH
            solids += self._furniture(rng, origin, side)
            if is_park:
                for _ in range(5):
                    spot = self.street_pose(origin, side, rng.uniform(16, PITCH - 16), HALF_ROAD + rng.uniform(6, 22))
                    solids += tree(rng, spot)
                continue
            along = HALF_ROAD + SIDEWALK + 4  # meters from `origin` to the near end of the next house
            # Houses begin at least 38 m before the next side's street: that side's houses reach at most 27.5 m from its
            # center line, so that 10.5 m are left for the last house; a longer one may overlap a house of that side.
            while along < PITCH - 38:
                length, width = rng.uniform(9, 15), rng.uniform(9, 12)  # along the street, and away from it
                front = HALF_ROAD + SIDEWALK + rng.uniform(3.5, 5)
                spot = self.street_pose(origin, side, along + length / 2, front + width / 2)
                wall = WALLS[usual_wall if rng.random() < 0.5 else rng.integers(len(WALLS))]
                solids += house(rng, spot, (length, width), wall, self.floors_factor)
                along += length + rng.uniform(1, 5)
        return np.array(solids, dtype=SOLID)

    def _furniture(self, rng, origin, side):
        """Trees, lamps, hedges and the traffic light along one side of a block."""
        solids = []
        # `along`: meters from the center of the intersection at `origin`
        for along in np.arange(HALF_ROAD + 9, PITCH - HALF_ROAD - 9, 9.0):  # trees on the sidewalk, hedges behind it
            if rng.random() < self.tree_fraction:
                solids += tree(rng, self.street_pose(origin, side, along + rng.uniform(-2, 2), HALF_ROAD + 2.9))
            if rng.random() < 0.5:
                x, y, yaw = self.street_pose(origin, side, along + rng.uniform(-4, 4), HALF_ROAD + SIDEWALK + 1.2)
                size = (rng.uniform(1, 6), 0.9, rng.uniform(0.7, 1.3))
                solids.append(solid((x, y, 0), yaw, size, "foliage", HEDGE, "static.vegetation"))
        for along in (HALF_ROAD + 12, PITCH - HALF_ROAD - 16):  # lamps: a pole at the curb, an arm over the road
            x, y, yaw = self.street_pose(origin, side, along, HALF_ROAD + 0.6)
            solids.append(solid((x, y, 0), yaw, (0.14, 0.14, 6.5), "plain", STEEL, "static.manmade"))
            x, y, yaw = self.street_pose(origin, side, along, HALF_ROAD - 0.2)
            solids.append(solid((x, y, 6.4), yaw, (0.3, 1.8, 0.15), "plain", STEEL, "static.manmade"))
        # traffic light on the corner: pole and head
        x, y, yaw = self.street_pose(origin, side, HALF_ROAD + 2.2, HALF_ROAD + 2.2)
        solids.append(solid((x, y, 0), yaw, (0.16, 0.16, 3.0), "plain", STEEL, "static.manmade"))
        solids.append(solid((x, y, 2.6), yaw, (0.35, 0.35, 0.95), "signal", (0.1, 0.1, 0.1), "static.manmade"))
        return solids


# RGB in [0, 1]
WALLS = ((0.56, 0.30, 0.24), (0.72, 0.62, 0.47), (0.66, 0.66, 0.66), (0.78, 0.74, 0.66), (0.50, 0.44, 0.42))
ROOFS = ((0.42, 0.20, 0.16), (0.30, 0.30, 0.33), (0.36, 0.27, 0.22))
LEAVES = ((0.20, 0.38, 0.13), (0.28, 0.42, 0.14), (0.15, 0.32, 0.15))
HEDGE, BARK, STEEL = (0.18, 0.33, 0.13), (0.30, 0.22, 0.16), (0.42, 0.44, 0.46)


def tree(rng, spot):
    """The solids of a tree, rows of a SOLID array, at `spot`: x, y, heading."""
    # taper, here and in `house`: of the front, back and side faces, meters inwards per meter of height
    x, y, yaw = spot
    leaf_color = LEAVES[rng.integers(len(LEAVES))]
    trunk_height = rng.uniform(2.2, 3.2)
    stem = solid((x, y, 0), yaw, (0.35, 0.35, trunk_height + 1), "plain", BARK, "static.vegetation", taper=(0.02,) * 3)
    if rng.random() < 0.25:  # a conifer
        wide, high = rng.uniform(2.2, 3.2), rng.uniform(5, 8)
        taper = (wide / 2 / high,) * 3  # to a point
        size = (wide, wide, high)
        return [stem, solid((x, y, 0.9), yaw, size, "foliage", LEAVES[2], "static.vegetation", taper=taper)]
    size = (rng.uniform(2.6, 4.4), rng.uniform(2.6, 4.4), rng.uniform(3, 5))
    return [stem, solid((x, y, trunk_height), yaw, size, "foliage", leaf_color, "static.vegetation", is_round=True)]


def house(rng, spot, footprint, wall, floors_factor):
    """The solids of a house, rows of a SOLID array.

    spot: x, y, heading; footprint: length along the heading, width; wall: color; floors_factor: multiplies the
    number of floors.
    """
    x, y, yaw = spot
    wall = tuple(c * rng.uniform(0.85, 1.1) for c in wall)
    gabled = rng.random() < 0.45
    floors = max(1, round(floors_factor * (rng.integers(1, 4) if gabled else rng.integers(3, 8))))
    height = 3.1 * floors + 0.6  # 3.1 m per floor, as the windows in `paint._facade`
    walls = solid((x, y, 0), yaw, (*footprint, height), "facade", wall, "static.manmade")
    roof = ROOFS[rng.integers(len(ROOFS))]
    if gabled:  # the side faces meet in a ridge
        rise = footprint[1] * 0.4
        size, taper = (footprint[0] + 0.6, footprint[1] + 0.8, rise), (0, 0, (footprint[1] + 0.8) / 2 / rise)
    else:
        size, taper = (footprint[0] + 0.4, footprint[1] + 0.4, 0.5), (0, 0, 0)
    return [walls, solid((x, y, height), yaw, size, "plain", roof, "static.manmade", taper=taper)]

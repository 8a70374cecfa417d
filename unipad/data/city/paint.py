"""Appearance of the city: colors and textures, sun with shadows on the ground, sky.

Colors are RGB in [0, 1]. Light = sky light from above + sun by Lambert's law; distant surfaces fade into haze. Shadows
fall on the ground only, not on solids.
"""

import cv2
import numpy as np

from unipad.data.city.raycast import CHUNK, GROUND, SKY, surface
from unipad.data.city.solids import CATEGORY, MATERIALS, corners
from unipad.data.city.streets import CURB, NO_MARK, WHITE, YELLOW

HAZE = np.array([0.76, 0.82, 0.88], np.float32)  # color of the horizon and of very distant surfaces
ZENITH = np.array([0.32, 0.52, 0.82], np.float32)  # color of the sky above
OVERCAST = np.array([0.66, 0.69, 0.72], np.float32)  # color of the sky above under clouds
GROUND_COLORS = {  # without texture
    "flat.driveable_surface": (0.34, 0.34, 0.36),
    "flat.other": (0.60, 0.47, 0.40),
    "flat.sidewalk": (0.63, 0.61, 0.57),
    "flat.terrain": (0.33, 0.43, 0.19),
}
# colors of road markings and curbs, by `mark` of `City.ground`
MARK_COLORS = {WHITE: (0.92, 0.92, 0.90), YELLOW: (0.85, 0.66, 0.18), CURB: (0.74, 0.73, 0.70)}
GLASS = np.array([0.13, 0.17, 0.21], np.float32)


def photograph(scene, view, solids, distance, hit, shadow):
    """The view's [h, w, 3] uint8 RGB image. distance, hit: from `cast`; shadow: `Shadows.at(solids)`."""
    image = np.empty((len(hit), 3), np.uint8)
    for begin in range(0, len(hit), CHUNK):
        part = slice(begin, begin + CHUNK)
        rgb = _ray_colors(scene, view.origin, view.directions[:, part], solids, distance[part], hit[part], shadow)
        image[part] = (rgb.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return image.reshape(*view.shape, 3)


def _ray_colors(scene, origin, directions, solids, distance, hit, shadow):
    """[n, 3] colors of the n rays from `origin`; directions: [3, n]."""
    rgb = np.empty((len(hit), 3), np.float32)
    # indices of the rays that hit nothing, the ground and solids
    to_sky, to_ground, to_solid = (np.nonzero(chosen)[0] for chosen in (hit == SKY, hit == GROUND, hit >= 0))
    weather = scene.weather
    sunlight, skylight = np.float32(weather.sunlight), np.float32(weather.skylight)
    rgb[to_sky] = sky(directions[:, to_sky], weather)

    x, y = (np.float32(origin[i]) + directions[i, to_ground] * distance[to_ground] for i in range(2))
    light = skylight + sunlight * np.float32(weather.sun[2]) * (1 - shadow(x, y))
    rgb[to_ground] = ground_color(scene.city, x, y, distance[to_ground]) * light[:, None]

    points = origin + (directions[:, to_solid] * distance[to_solid]).T  # [k, 3]
    solid = hit[to_solid]
    local, normal = surface(solids, solid, points)
    c, s = np.cos(solids["yaw"]), np.sin(solids["yaw"])
    # [3, number of solids]: direction of the sun in each solid's axes
    x, y, z = weather.sun
    sun = np.stack([c * x + s * y, c * y - s * x, z + 0 * c])  # 0 * c: the same z for every solid
    cosine = sum(normal[:, i] * sun[i].astype(np.float32)[solid] for i in range(3))  # of the angle normal - sun
    # points below 1 m and surfaces that face down get less sky light; 1.25: an upright wall gets about `skylight`
    open_sky = (0.75 + 0.25 * normal[:, 2]) * np.clip(0.65 + 0.35 * points[:, 2].astype(np.float32), 0, 1)
    light = skylight * 1.25 * open_sky + sunlight * np.maximum(cosine, 0)
    rgb[to_solid] = solid_color(solids, solid, local, normal) * light[:, None]

    not_sky = np.nonzero(hit != SKY)[0]
    transmittance = np.exp(-distance[not_sky] / np.float32(weather.haze_length))[:, None]
    rgb[not_sky] = rgb[not_sky] * transmittance + HAZE * (1 - transmittance)
    return rgb


def sky(directions, weather):
    """[n, 3] float32 colors of the sky: haze at the horizon, blue above, light clouds, a glow around the sun. All of it
    fades into uniform gray as `weather.clouds` goes from 0 to 1 (overcast).

    directions: [3, n] unit vectors of the rays.
    """
    sun = weather.sun
    up = np.maximum(directions[2], 0.02)  # not 0, which would put the clouds at the horizon infinitely far away
    rgb = HAZE + (ZENITH - HAZE) * np.minimum(up * 1.6, 1)[:, None]
    x, y = 3 * directions[0] / up, 3 * directions[1] / up  # on a horizontal layer of clouds
    cloud = noise(x, y) + noise(3 * x, 3 * y) / 2
    rgb += (np.clip(cloud - 0.25, 0, 0.5) * np.minimum(up * 4, 1))[:, None] * (1 - rgb)
    glow = np.maximum(directions[0] * sun[0] + directions[1] * sun[1] + directions[2] * sun[2], 0) ** 24
    rgb = (rgb + 0.35 * glow[:, None]).astype(np.float32)
    return rgb + np.float32(weather.clouds) * (OVERCAST - rgb) if weather.clouds else rgb


def ground_color(city, x, y, distance):
    """[n, 3] colors of the ground at world x, y ([n] float32 meters); fine texture fades
    with `distance` ([n] meters from the camera)."""
    category, mark, behind_curb = city.ground(x, y)
    rgb = GROUND_TABLE[category]
    grass, sidewalk = category == CATEGORY["flat.terrain"], category == CATEGORY["flat.sidewalk"]
    # texture of two scales; the finer one fades beyond 9 m
    grain = noise(x * 24, y * 24) * np.minimum(9 / np.maximum(distance, 1), 1)
    rough = np.where(grass, 0.22, 0.10) * grain + np.where(grass, 0.16, 0.07) * noise(x * 2, y * 2)
    rgb = rgb * (1 + rough)[:, None]
    # joints between the slabs of a sidewalk, parallel to the curb and diagonal; a checkerboard of 0.5 m on paved lots
    joint = sidewalk & ((behind_curb % 1.2 < 0.05) | ((x + y) % 1.7 < 0.05)) & (distance < 25)
    rgb[joint] *= 0.8
    tile = (category == CATEGORY["flat.other"]) & (((x % 1.0) < 0.5) == ((y % 1.0) < 0.5)) & (distance < 40)
    rgb[tile] *= 0.9
    painted = mark != NO_MARK  # road markings and curbs
    wear = 1 + 0.5 * rough[painted]
    rgb[painted] = MARK_TABLE[mark[painted]] * wear[:, None]
    return rgb.astype(np.float32)


def solid_color(solids, hit, local, normal):
    """[n, 3] textured colors of points, the i-th on `solids[hit[i]]`; local, normal: [n, 3] from `surface`."""
    x, y, z = local.T
    rgb = solids["color"][hit] * (1 + np.float32(0.06) * noise(x * 9 + z * 7, y * 9 + z * 5))[:, None]
    material = solids["material"][hit]
    for index, name in enumerate(MATERIALS):
        if name in TEXTURES:
            chosen = np.nonzero(material == index)[0]
            half = solids["half"][hit[chosen]]
            rgb[chosen] = TEXTURES[name](rgb[chosen], local[chosen], normal[chosen], half)
    return rgb


# Textures: arguments and results are described at `TEXTURES` below


def _facade(rgb, p, normal, half):
    """Windows in stories of 3.1 m and bays of 2.7 m, of different brightness; shop windows at the bottom."""
    story_height, bay_width = 3.1, 2.7  # meters, as all lengths below; `streets.house` has stories of 3.1 m, too
    along_y = np.abs(normal[:, 0]) > 0.5  # front and back wall run along y, the others along x
    along, half_width = np.where(along_y, p[:, 1], p[:, 0]), np.where(along_y, half[:, 1], half[:, 0])
    z = p[:, 2] + half[:, 2]  # above the ground
    story, bay = z // story_height, (along + half_width) // bay_width
    u, v = (along + half_width) % bay_width, z % story_height  # from the edge of the bay and the floor of the story
    off_center = np.abs(u - bay_width / 2)
    shop = story == 0
    bottom, top = np.where(shop, 0.5, 0.9), np.where(shop, 2.6, 2.4)  # of a window, above the floor of its story
    half_window = np.where(shop, 1.05, 0.6)
    window = (v > bottom) & (v < top) & (off_center < half_window)
    window &= (z < 2 * half[:, 2] - 0.6) & (half_width - np.abs(along) > 0.4)  # none near the roof and the corners
    bars = window & ((off_center < 0.05) | (np.abs(v - 1.7) < 0.04))  # of each window: a vertical and a horizontal one
    tint = noise(bay * 37 + half[:, 0] * 91, story * 53 + half[:, 1] * 77)  # the same for all points of a window
    glass = GLASS * 1.3 + (0.18 + 0.22 * tint)[:, None] * np.array([0.9, 1.0, 1.1], np.float32)
    ledge = (v < 0.12) & ~shop
    rgb = rgb * np.where(ledge, 0.85, 1)[:, None]
    rgb[window] = glass[window]
    rgb[bars] = 0.8
    return rgb


def _foliage(rgb, p, normal, half):
    """Leaves, as noise of two scales; lighter towards the top."""
    x, y, z = p.T
    leaves = noise(x * 7 + z * 5, y * 7 - z * 6) + noise(x * 19, z * 19 + y * 17)
    return rgb * (0.95 + 0.25 * z / half[:, 2] + 0.28 * leaves)[:, None]


def _signal(rgb, p, normal, half):
    """Three lamps, the lowest lit."""
    # coordinates on a face, in [-1, 1]; the head is square, so half[:, 0] is half the width of every face
    z = p[:, 2] / half[:, 2]
    lateral = np.where(np.abs(normal[:, 0]) > 0.5, p[:, 1], p[:, 0]) / half[:, 0]
    # z of the center, color: red and yellow, off, and green, lit
    lamps = ((0.62, (0.35, 0.08, 0.06)), (0.0, (0.35, 0.26, 0.06)), (-0.62, (0.15, 0.85, 0.35)))
    for center, color in lamps:
        rgb[(z - center) ** 2 * 7 + lateral**2 * 2 < 0.7] = color
    return rgb


def _body(rgb, p, normal, half):
    """The lower half of a vehicle: wheels, sill, head and tail lights, license plates. Lengths in meters."""
    side = np.abs(normal[:, 1]) > 0.5
    z = p[:, 2] + half[:, 2]  # above the bottom of the body
    rgb[z < 0.14] = 0.08  # sill
    axle_height, tire_radius, rim_radius = 0.20, 0.36, 0.17
    for axle in (-0.62, 0.62):  # rear and front, as fractions of half the length
        squared_distance = (p[:, 0] - axle * half[:, 0]) ** 2 + (z - axle_height) ** 2
        rgb[side & (squared_distance < tire_radius**2)] = 0.06
        rgb[side & (squared_distance < rim_radius**2)] = 0.55
    front, back = normal[:, 0] > 0.5, normal[:, 0] < -0.5
    # head and tail lights: the outer 40 % of the width, in a band mostly above the middle
    lamps = (np.abs(p[:, 1]) > 0.6 * half[:, 1]) & (np.abs(p[:, 2] - 0.25 * half[:, 2]) < 0.35 * half[:, 2])
    rgb[front & lamps] = (0.95, 0.95, 0.88)
    rgb[back & lamps] = (0.75, 0.06, 0.05)
    # 0.54 m x 0.14 m, a little below the middle
    plate = (np.abs(p[:, 1]) < 0.27) & (np.abs(p[:, 2] + 0.2 * half[:, 2]) < 0.07)
    rgb[(front | back) & plate] = 0.85
    return rgb


def _cabin(rgb, p, normal, half):
    """Glass all round between pillars, under a painted roof."""
    side, roof = np.abs(normal[:, 1]) > 0.5, normal[:, 2] >= 0.95
    glass = ~roof & (np.abs(p[:, 2]) < 0.78 * half[:, 2])
    middle_pillar, end_pillars = np.abs(p[:, 0]) < 0.05, np.abs(p[:, 0]) > 0.9 * half[:, 0]
    glass &= ~(side & (middle_pillar | end_pillars))
    shine = 0.25 * np.clip(normal[:, 2] + 0.3 * noise(p[:, 0] * 3, p[:, 1] * 3 + p[:, 2] * 4), 0, 1)
    rgb[glass] = GLASS + shine[glass, None]
    return rgb


def _coach(rgb, p, normal, half):
    """A bus: a band of windows, a white stripe, wheels and lights."""
    rgb = _body(rgb, p, normal, half)
    level = (p[:, 2] + half[:, 2]) / (2 * half[:, 2])  # fraction of the height
    side, wall = np.abs(normal[:, 1]) > 0.5, normal[:, 2] < 0.5  # wall: not the roof
    # a side has a window every 1.45 m with pillars of 0.12 m; front and back have one, 0.15 m from the sides
    between_pillars = np.where(side, p[:, 0] % 1.45 > 0.12, np.abs(p[:, 1]) < half[:, 1] - 0.15)
    window = wall & (level > 0.44) & (level < 0.84) & between_pillars
    stripe = wall & (level > 0.34) & (level < 0.39)
    rgb[stripe] = 0.9
    rgb[window] = GLASS + 0.06
    return rgb


def _cargo(rgb, p, normal, half):
    """Corrugated sheet with a dark frame."""
    side = np.abs(normal[:, 1]) > 0.5
    rib = np.where(side, p[:, 0], p[:, 1]) % 0.6 < 0.12  # every 0.6 m, as wide as the frame: 0.12 m
    frame = (half[:, 2] - np.abs(p[:, 2]) < 0.12) | (side & (half[:, 0] - np.abs(p[:, 0]) < 0.12))
    rgb = rgb * np.where(rib, 0.85, 1)[:, None]
    rgb[frame & (normal[:, 2] < 0.5)] *= 0.6
    return rgb


def _stripes(rgb, p, normal, half):
    """Reflective white bands, horizontal on a cone and slanted on a barrier."""
    barrier = half[:, 1] > 0.6  # cones are narrower
    period, band = np.where(barrier, 0.5, 0.4), np.where(barrier, 0.25, 0.16)  # meters
    phase = np.where(barrier, p[:, 1] + p[:, 2], p[:, 2]) % period
    rgb[phase < band] = 0.92
    return rgb


# Material -> function of the points' colors, positions (meters from the center) and normals in their solid's axes (x
# ahead), and of their solid's half sizes, all [n, 3], that returns the textured colors
TEXTURES = {
    "facade": _facade, "foliage": _foliage, "signal": _signal, "body": _body,
    "cabin": _cabin, "coach": _coach, "cargo": _cargo, "stripes": _stripes,
}  # fmt: skip


def _table(colors, length):
    """[length, 3] float32: row `index` has `colors[index]`, or 0 if there is none."""
    table = np.zeros((length, 3), np.float32)
    for index, color in colors.items():
        table[index] = color
    return table


GROUND_TABLE = _table({CATEGORY[name]: color for name, color in GROUND_COLORS.items()}, len(CATEGORY))
MARK_TABLE = _table(MARK_COLORS, len(MARK_COLORS) + 1)  # row NO_MARK = 0 is not used


def _noise_table():
    """[256, 256] smooth periodic noise in [-1, 1], with an amplitude of about 1 / frequency."""
    rng = np.random.default_rng(7)
    spectrum = np.fft.rfft2(rng.normal(size=(256, 256)))
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)[None])
    field = np.fft.irfft2(spectrum / (frequency + 0.02), s=(256, 256))
    return (field / (2 * field.std())).clip(-1, 1).astype(np.float32)


NOISE = _noise_table()


def noise(x, y):
    """[n] noise in [-1, 1] at x, y: [n], counted in cells of the periodic table `NOISE`: noise(24 * x, ...) has cells
    of 1/24 of the unit of x."""
    return NOISE[np.floor(x).astype(np.int64) & 255, np.floor(y).astype(np.int64) & 255]


def intensity(city, view, solids, distance, hit):
    """LiDAR intensity and category along each ray, both 0 for the sky. distance, hit: from `cast`.

    Returns:
        [n] float32 intensity on the scale 0-255, at most 70, from the surface's color without texture.
        [n] uint8 lidarseg index.
    """
    category = np.zeros(len(hit), np.uint8)
    brightness = np.zeros(len(hit), np.float32)
    to_ground, to_solid = np.nonzero(hit == GROUND)[0], np.nonzero(hit >= 0)[0]
    x, y = (np.float32(view.origin[i]) + view.directions[i, to_ground] * distance[to_ground] for i in range(2))
    category[to_ground], mark, _ = city.ground(x, y)
    rgb = np.where((mark != NO_MARK)[:, None], MARK_TABLE[mark], GROUND_TABLE[category[to_ground]])
    brightness[to_ground] = rgb.mean(axis=1)
    category[to_solid] = solids["category"][hit[to_solid]]
    brightness[to_solid] = solids["color"][hit[to_solid]].mean(axis=1)
    return 70 * brightness**1.5, category


class Shadows:
    """Shadows on the ground, on a raster around the ego vehicle's path in a scene."""

    CELL = 0.125  # meters per pixel of the raster
    MARGIN = 60.0  # meters around the path; no shadows beyond

    def __init__(self, scene):
        self.sun = scene.weather.sun
        track = scene.track
        self.low = track.min(axis=0) - self.MARGIN  # world x, y of the raster's corner
        width, height = np.ceil((track.max(axis=0) + self.MARGIN - self.low) / self.CELL).astype(int)
        raster = np.zeros((height, width), np.uint8)
        self._draw(raster, scene.fixed)
        self.static_raster = cv2.GaussianBlur(raster, (5, 5), 1.2)  # soft edges

    def at(self, solids):
        """A function: world x, y ([n] meters) -> shadow [n], from 0 to 1 (full shadow), of the static solids and of the
        actors in `solids`."""
        raster = self.static_raster.copy()
        self._draw(raster, solids[solids["owner"] >= 0])  # the actors; not blurred
        height, width = raster.shape

        def shade(x, y):
            column = ((x - self.low[0]) / self.CELL).astype(np.int64)
            row = ((y - self.low[1]) / self.CELL).astype(np.int64)
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            value = raster[row.clip(0, height - 1), column.clip(0, width - 1)]
            return np.where(inside, value, 0).astype(np.float32) / 255

        return shade

    def _draw(self, raster, solids):
        """Set `raster` to 255 in the shadows of `solids`."""
        for outline in self._outlines(solids):
            cv2.fillConvexPoly(raster, cv2.convexHull(outline), 255, shift=4)

    def _outlines(self, solids):
        """[n, 8, 2] int32 corners of each solid, projected onto the ground away from the sun, in 1/16 of a cell
        (`shift=4`)."""
        p = corners(solids)  # [n, 8, 3]
        top = p[..., 2:] > solids["center"][:, None, 2:]
        # an ellipsoid counts as a box of roughly equal shadow area, a tapered box is narrowed at the top
        narrowing = solids["taper"].mean(axis=1) * 2 * solids["half"][:, 2] / solids["half"][:, :2].max(axis=1)
        shrink = np.where(solids["round"], 0.78, 1)[:, None, None]
        width = np.where(top, 1 - narrowing.clip(0, 1)[:, None, None], 1)
        middle = solids["center"][:, None]
        p = middle + (p - middle) * shrink * np.concatenate([width, width, np.ones_like(width)], axis=-1)
        projected = p[..., :2] - p[..., 2:] * (self.sun[:2] / self.sun[2])
        return ((projected - self.low) / self.CELL * 16).round().astype(np.int32)

"""A synthetic street seen by a 32-beam LiDAR, ten sweeps accumulated, with voxel statistics like those of nuScenes.

The cost of a sparse convolution depends on the number of neighbors per voxel. Random voxels have too few and voxels on
spheres too many; here rays hit ground, walls, cars and shrubs, and the sensor moves between sweeps.

    python -m benchmarks.lidar_scene      prints voxels and neighbors of each stage next to those of nuScenes
"""

import math

import torch

# Grid of the LiDAR recipe: lower corner and size of a cell, (x, y, z) in meters; cells (Z, Y, X)
LOW, CELL, SHAPE = (-54.0, -54.0, -5.0), (0.075, 0.075, 0.2), (41, 1440, 1440)
# Convolutions between the four stages of its sparse encoder: (kernel, stride, padding, dilation), each (z, y, x)
DOWNSAMPLES = [((3, 3, 3), (2, 2, 2), p, (1, 1, 1)) for p in ((1, 1, 1), (1, 1, 1), (0, 1, 1))]
# One nuScenes frame: voxels of stages 1 to 4, and how many of the 27 cells of a voxel's 3 x 3 x 3 neighborhood, its own
# included, are occupied on average
NUSCENES = [(79.7e3, 7.4), (69.3e3, 14.0), (29.7e3, 16.3), (10.3e3, 16.6)]

BEAMS, AZIMUTHS, SWEEPS = 32, 1084, 10  # a sweep has BEAMS x AZIMUTHS rays
HEIGHT = 1.84  # meters, of the sensor above the ground
SPEED = 0.6  # meters between sweeps: 12 m/s at 20 Hz
# Numbers and sizes of objects, RETURNED and PENETRATION are tuned to match NUSCENES.
HOUSES, CARS, SHRUBS = 12, 40, 160
RETURNED = 0.75  # of the rays that hit something in range, the fraction that gives a point
PENETRATION = 0.7  # mean distance in meters that a ray travels inside a shrub before it hits


def scene(seed=0, device="cpu"):
    """Points [P, 5]: x, y, z in meters, intensity, time lag in seconds; in the LiDAR frame of sweep 0, the newest."""
    gen = torch.Generator().manual_seed(seed)

    def uniform(n, low, high):
        return torch.rand(n, generator=gen) * (high - low) + low

    houses = _boxes(uniform, HOUSES, size=(5, 25), height=12, far=70)
    cars = _boxes(uniform, CARS, size=(1.7, 4.5), height=1.7, far=30)
    solid, shrubs = torch.cat([houses, cars]), _boxes(uniform, SHRUBS, size=(0.3, 2), height=4, far=60)
    elevation = torch.linspace(-30.67, 10.67, BEAMS).deg2rad()[:, None]  # as of the HDL-32E, nuScenes' LiDAR
    azimuth = torch.arange(AZIMUTHS) * (2 * math.pi / AZIMUTHS)
    sweeps = []
    for sweep in range(SWEEPS):
        rotated = azimuth + uniform(1, 0, 2 * math.pi / AZIMUTHS)
        ray = torch.stack(
            [elevation.cos() * rotated.cos(), elevation.cos() * rotated.sin(), elevation.sin().expand(-1, AZIMUTHS)], -1
        ).flatten(0, 1)  # [R, 3]
        origin = torch.tensor([0.0, -SPEED * sweep, 0.0])
        ground = torch.where(ray[:, 2] < 0, -HEIGHT / ray[:, 2], math.inf)
        shrub = _distance(origin, ray, shrubs) - PENETRATION * uniform(len(ray), 0, 1).log()
        t = torch.minimum(ground, torch.minimum(shrub, _distance(origin, ray, solid)))
        t = t + 0.02 * torch.randn(t.shape, generator=gen)  # range noise of the sensor
        hit = (t > 2) & (t < 70) & (uniform(len(t), 0, 1) < RETURNED)  # in range: from 2 to 70 m
        point = origin + ray[hit] * t[hit, None]
        rest = torch.stack([uniform(len(point), 0, 1), torch.full((len(point),), 0.05 * sweep)], dim=1)
        sweeps.append(torch.cat([point, rest], dim=1))
    return torch.cat(sweeps).to(device)


def _boxes(uniform, n, size, height, far):
    """[n, 6] lower and upper corners of boxes on the ground, up to `far` meters from the sensor.

    uniform: draws random numbers, as in `scene`.
    size: (smallest, largest) length and width in meters. height: largest height in meters.
    """
    angle, distance = uniform(n, 0, 2 * math.pi), uniform(n, 6, far)
    center = torch.stack([angle.cos() * distance, angle.sin() * distance], dim=1)
    half = torch.stack([uniform(n, *size), uniform(n, *size)], dim=1) / 2
    # keep boxes 3 m away from the sensor's path, the y axis
    center[:, 0] += torch.where(center[:, 0] < 0, -1, 1) * (half[:, 0] + 3 - center[:, 0].abs()).clamp(min=0)
    top = uniform(n, 0.3, 1) * height - HEIGHT
    ground = torch.full((n, 1), -HEIGHT)
    return torch.cat([center - half, ground, center + half, top[:, None]], dim=1)


def _distance(origin, ray, boxes):
    """[R] distance in meters along each ray to the first box; infinite where there is none."""
    # distances to the faces: lower and upper ones along each axis
    lower, upper = (((corner - origin) / ray[:, None]) for corner in (boxes[:, :3], boxes[:, 3:]))  # [R, n, 3]
    enter, leave = torch.minimum(lower, upper).amax(dim=2), torch.maximum(lower, upper).amin(dim=2)
    return torch.where((enter < leave) & (enter > 0), enter, math.inf).amin(dim=1)


def voxels(batch=1, device="cpu"):
    """Voxels [N, 4] int32 (b, z, y, x) of `batch` scenes, as the first stage of the encoder gets them."""
    from unipad.kernels.voxelize import voxelize

    scenes = [scene(seed, device) for seed in range(batch)]
    counts = [len(points) for points in scenes]
    shape = (SHAPE[0] - 1, *SHAPE[1:])  # SHAPE has an empty slice above the range, as in SECOND
    _, coords = voxelize(torch.cat(scenes), counts, LOW, CELL, shape, max_points=10, max_voxels=120000)
    return coords


if __name__ == "__main__":
    from unipad.kernels.sparse_map import strided_map, submanifold_map
    from unipad.kernels.sparse_outputs import out_shape
    from unipad.kernels.voxel_keys import sort_voxels

    coords, shape = voxels(), SHAPE
    print("| stage | voxels | nuScenes | neighbors of 27 | nuScenes |\n|---|---|---|---|---|")
    for stage, (N, neighbors) in enumerate(NUSCENES):
        if stage:
            geometry = DOWNSAMPLES[stage - 1]
            coords, shape = strided_map(coords, shape, *geometry)[0], out_shape(shape, *geometry)
        table = submanifold_map(coords, *sort_voxels(coords, shape), shape, (3, 3, 3), (1, 1, 1))
        measured = (table >= 0).sum() / len(coords)
        print(f"| {stage + 1} | {len(coords)} | {N:.0f} | {measured:.1f} | {neighbors} |")

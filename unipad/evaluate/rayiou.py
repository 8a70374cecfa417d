"""RayIoU of SparseOcc (arXiv 2312.17118): IoU of what rays hit first, with SparseOcc's rays, origins and thresholds.

    RayIoU of class c at a threshold = TP / (true + predicted - TP)        true, predicted: rays that hit class c
                                                                           TP: those of both, at distances that differ
                                                                           by less than the threshold
Only rays whose true hit is not free count. A distance is measured to where the ray leaves the full voxel that it hits
or, if it hits none, the grid; a ray without a hit has the class free.

Two rare cases differ from SparseOcc's code. There, a ray that never enters the grid has the class of the grid's first
voxel; here it is free. There, an origin less than a voxel below the grid along an axis (z = -1 m, say) is moved into
the first voxel; here the ray enters the grid where it meets it.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from unipad.batch import FREE, OCCUPANCY_CELL, OCCUPANCY_CLASSES, OCCUPANCY_LOW

THRESHOLDS = (1.0, 2.0, 4.0)  # meters
MAX_STEPS = 1000  # cells that a ray may pass, also before it enters the grid


@dataclass(frozen=True)
class RayCounts:
    """Numbers of rays; those of several frames are added."""

    hits: np.ndarray  # [thresholds, classes] int64 TP
    true: np.ndarray  # [classes] int64
    predicted: np.ndarray  # [classes] int64

    def __add__(self, other: "RayCounts") -> "RayCounts":
        return RayCounts(self.hits + other.hits, self.true + other.true, self.predicted + other.predicted)

    def ious(self) -> np.ndarray:
        """[thresholds, classes without free] RayIoU; NaN for a class that no ray has."""
        union = self.true + self.predicted - self.hits
        ious = np.divide(self.hits, union, out=np.full(union.shape, np.nan), where=union > 0)
        return ious[:, :FREE]


def count_rays(predicted: Tensor, true: Tensor, origins: np.ndarray) -> RayCounts:
    """`RayCounts` of one frame.

    predicted, true: [X, Y, Z] classes. origins: [K, 3] meters in the ego frame.
    """
    directions = torch.from_numpy(lidar_directions()).to(true.device)
    starts = torch.from_numpy(origins).to(true.device, torch.float64).repeat_interleave(len(directions), dim=0)
    directions = directions.repeat(len(origins), 1)
    (class_, distance), (true_class, true_distance) = (
        first_hits(classes, starts, directions) for classes in (predicted, true)
    )
    counts = len(OCCUPANCY_CLASSES)
    valid = true_class != FREE
    class_, true_class, apart = class_[valid], true_class[valid], (distance - true_distance)[valid].abs()
    same = class_ == true_class
    hits = [torch.bincount(true_class[same & (apart < most)], minlength=counts) for most in THRESHOLDS]
    of_true, of_predicted = (torch.bincount(c, minlength=counts) for c in (true_class, class_))
    return RayCounts(torch.stack(hits).cpu().numpy(), of_true.cpu().numpy(), of_predicted.cpu().numpy())


@cache
def lidar_directions() -> np.ndarray:
    """[D, 3] unit vectors: 360 azimuths of each pitch; those below look at the ground 1 to 10 times as far ahead as the
    LiDAR is high, those above go on in the last step up to 12 degrees."""
    pitches = [math.atan(k) - math.pi / 2 for k in range(1, 11)]
    while pitches[-1] < 0.21:
        pitches.append(pitches[-1] + (pitches[-1] - pitches[-2]))
    pitch, azimuth = np.array(pitches)[:, None], np.radians(np.arange(360))
    directions = [np.cos(pitch) * np.cos(azimuth), np.cos(pitch) * np.sin(azimuth), np.sin(pitch) + 0 * azimuth]
    return np.stack(directions, axis=-1).reshape(-1, 3)


def first_hits(classes: Tensor, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """What rays hit first in a grid of classes.

    classes:             [X, Y, Z]; a voxel whose class is not free is full.
    origins, directions: [R, 3] fp64, ego frame: meters, unit vectors.

    Returns class [R] int64, `FREE` without a hit, and the distance [R] in meters at which the ray leaves the voxel that
    it hits; without a hit, at which it leaves the grid, and 0 if it misses the grid.
    """
    sizes, flat = classes.shape, classes.flatten()
    hit = torch.full((len(origins),), FREE, dtype=torch.int64, device=classes.device)
    distance = torch.zeros_like(origins[:, 0])
    ray = torch.arange(len(origins), device=classes.device)
    last, entered = distance, torch.zeros_like(ray, dtype=torch.bool)  # where the ray left the cell before this one
    at, step, leaves, per_cell = [], [], [], []  # along x, y, z: cell; 1 or -1; where the ray leaves it; cells' length
    for origin, direction, low in zip(origins.unbind(1), directions.unbind(1), OCCUPANCY_LOW, strict=True):
        start = (origin - low) / OCCUPANCY_CELL
        at.append(start.floor().long())
        step.append(torch.where(direction >= 0, 1, -1))
        border = at[-1] + (direction >= 0)
        leaves.append(((border - start) / direction).masked_fill(direction == 0, torch.inf))
        per_cell.append((1 / direction).abs())
    for _ in range(MAX_STEPS):
        if not len(ray):
            break
        x, y, z = leaves
        along = [(x < y) & (x < z), ~(x < y) & (y < z)]
        along.append(~(along[0] | along[1]))
        leave = torch.where(along[0], x, torch.where(along[1], y, z))
        inside = torch.ones_like(entered)
        for index, size in zip(at, sizes, strict=True):
            inside &= (index >= 0) & (index < size)
        row = (at[0] * sizes[1] + at[1]) * sizes[2] + at[2]
        found = flat[row.where(inside, 0)].long().where(inside, FREE)
        ends = (found != FREE) | (entered & ~inside)
        hit[ray[ends]], distance[ray[ends]] = found[ends], leave.where(inside, last)[ends]
        goes = ~ends
        at = [(i + s * a)[goes] for i, s, a in zip(at, step, along, strict=True)]
        leaves = [torch.where(a, t + p, t)[goes] for t, p, a in zip(leaves, per_cell, along, strict=True)]
        step, per_cell = [s[goes] for s in step], [p[goes] for p in per_cell]
        ray, last, entered = ray[goes], leave[goes], (entered | inside)[goes]
    return hit, distance * OCCUPANCY_CELL

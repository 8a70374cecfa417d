"""The surface of a pre-trained model as a mesh: where its signed distance is zero."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import torch

from unipad.config import Grid
from unipad.errors import UserError, check_memory
from unipad.model.pretrain import Pretrain

CHUNK = 2**18  # points per evaluation of the SDF, but at least one slice of equal x


def check_mesh(grid: Grid, cell: float):
    """Raises `UserError` if a mesh sampled every `cell` meters cannot be made."""
    most = min(h - l for l, h in zip(grid.low, grid.high, strict=True)) / 2
    if cell > most:
        raise UserError(
            f"--mesh-cell {cell} is too coarse for a volume whose shortest side is {2 * most} m; use at most {most}."
        )
    points = math.prod((h - l) / cell for l, h in zip(grid.low, grid.high, strict=True))
    check_memory(12 * points, f"a mesh with --mesh-cell {cell}")  # bytes per point: its distance, and marching cubes
    if importlib.util.find_spec("skimage") is None:
        raise UserError("--mesh needs scikit-image: pip install -e '.[mesh]'.")


@torch.no_grad()
def distances(model: Pretrain, volume: torch.Tensor, cell: float) -> torch.Tensor:
    """Signed distance, [nx, ny, nz] meters, at points `cell` meters apart, starting at the grid's lower corner.

    volume: [1, C, Z, Y, X] from `Pretrain.encode`; its cells are those of the grid, not of the mesh.
    """
    renderer, grid = model.renderer, model.recipe.grid
    with torch.autocast(volume.device.type, enabled=False):
        volume = volume.permute(0, 2, 3, 4, 1).to(renderer.field.cells_per_unit.dtype).contiguous()
        x, y, z = (torch.arange(l, h, cell, device=volume.device) for l, h in zip(grid.low, grid.high, strict=True))
        parts = []
        for x_part in x.split(max(1, CHUNK // (len(y) * len(z)))):
            points = torch.cartesian_prod(x_part, y, z).to(volume.dtype) * renderer.scale  # the renderer's unit
            volume_idx = torch.zeros(len(points), dtype=torch.int32, device=volume.device)  # there is one volume
            parts.append(renderer.field.sdf(volume, points[:, None], volume_idx)[:, 0].float() / renderer.scale)
    return torch.cat(parts).view(len(x), len(y), len(z))


def surface(values: np.ndarray, low: tuple, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """The zero level set by marching cubes (the variant of Lewiner et al., 2003).

    values: [nx, ny, nz] signed distances, positive outside, from `distances`; low: (x, y, z) meters of the first one.

    Returns vertices [V, 3] float32 meters and triangles [T, 3] int32, counter-clockwise seen from outside; both empty
    where the sign never changes.
    """
    from skimage.measure import marching_cubes

    if not values.min() < 0 < values.max():
        return np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32)
    vertices, triangles, _, _ = marching_cubes(values, 0.0, spacing=(cell,) * 3)
    return (vertices + low).astype(np.float32), triangles.astype(np.int32)


def write_ply(file: Path, vertices: np.ndarray, triangles: np.ndarray):
    """Write a mesh as a binary PLY file."""
    header = f"""ply
format binary_little_endian 1.0
comment meters, LiDAR frame: x right, y forward, z up
element vertex {len(vertices)}
property float x
property float y
property float z
element face {len(triangles)}
property list uchar int vertex_indices
end_header
"""
    faces = np.empty(len(triangles), dtype=[("count", "u1"), ("vertices", "<i4", 3)])
    faces["count"], faces["vertices"] = 3, triangles
    file.write_bytes(header.encode() + vertices.astype("<f4").tobytes() + faces.tobytes())

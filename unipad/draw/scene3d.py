"""The 3D view in TensorBoard: LiDAR points, boxes and the rendered surface as one colored triangle mesh.

A `Mesh` is in the LiDAR frame: x right, y forward, z up, meters. So the initial view is from above, forward at the top.
"""

from dataclasses import dataclass

import matplotlib
import numpy as np
import torch

from unipad.batch import FREE, Batch
from unipad.boxes import box_corners
from unipad.draw.boxes import COLORS as BOX_COLORS
from unipad.draw.boxes import SKELETON
from unipad.draw.segments import COLORS as POINT_COLORS
from unipad.draw.views import FAR, PANORAMA, panorama_rays
from unipad.model.detect import Detections
from unipad.model.occupancy import voxel_centers
from unipad.model.pretrain import Pretrain

MAX_POINTS = 20_000  # per 3D view; of more points, every k-th is drawn
POINT_SIZE, EDGE_SIZE = 0.12, 0.1  # meters by which `TRIANGLE` is scaled, for points and for edges of boxes
JUMP = 1.2  # largest ratio, farthest to nearest, of the depths of neighboring rays whose ends the surface connects
# Colors of ground-truth boxes and of points, on TensorBoard's white background
TRUTH, GRAY = (0.0, 0.0, 0.0), (0.35, 0.35, 0.35)
# The vertices of the triangle drawn for a point, before scaling: tilted, so visible from above and from all sides
TRIANGLE = np.eye(3) - 1 / 3
# A box edge is drawn as a bar: an open prism between two such triangles. Its three sides have two triangles each, here
# as indices of vertices: 0 to 2 at one end of the bar, 3 to 5 at the other
BAR = np.array([[i, j, i + 3, j, j + 3, i + 3] for i, j in ((0, 1), (1, 2), (2, 0))]).reshape(6, 3)


@dataclass(frozen=True)
class Mesh:
    vertices: np.ndarray  # [V, 3] float32 meters
    colors: np.ndarray  # [V, 3] uint8
    faces: np.ndarray  # [F, 3] int32 rows of `vertices`

    @classmethod
    def of(cls, vertices, colors, faces):
        """From arrays of any type, colors in [0, 1]."""
        return cls(vertices.astype(np.float32), (255 * colors).astype(np.uint8), faces.astype(np.int32))


@torch.no_grad()
def rendered_scene(model: Pretrain, batch: Batch, generators: list[torch.Generator], stride: int = 1) -> Mesh:
    """The first sample's surface as rendered from the LiDAR, its points (gray) and its boxes (black); without the
    surface if no loss casts rays.

    generators: one per sample, for the masks of the encoder's input.
    stride:     degrees between rendered rays.
    """
    seen = point_mesh(batch), box_mesh(batch.boxes[: batch.box_counts[0]], TRUTH)
    if not model.recipe.render.renders:
        return joined(*seen)
    was_training = model.training
    model.eval()
    volume, _ = model.encode(batch, generators)
    rays = panorama_rays(volume.device, stride)
    _, depth = model.render(volume, rays)
    model.train(was_training)
    ends = rays.origins + rays.directions * depth[:, None]
    strip = surface_mesh(ends.cpu().numpy(), columns=-(-PANORAMA[1] // stride))
    return joined(strip, *seen)


def detected_scene(batch: Batch, detections: Detections, min_score: float = 0.3) -> Mesh:
    """The first sample's points, ground-truth boxes (black) and detections (in the color of their class)."""
    shown = detections.scores >= min_score
    colors = [BOX_COLORS[label] for label in detections.labels[shown].tolist()]
    truth = batch.boxes[: batch.box_counts[0]]
    return joined(point_mesh(batch), box_mesh(truth, TRUTH), box_mesh(detections.boxes[shown], colors))


def segmented_scene(batch: Batch, classes: torch.Tensor) -> Mesh:
    """The keyframe's points of the first sample in the colors of their predicted `classes` [K]."""
    return point_mesh(batch, POINT_COLORS[classes.cpu().numpy()])


def occupied_scene(batch: Batch, classes: torch.Tensor) -> Mesh:
    """The full voxels of predicted `classes` [X, Y, Z] of the first sample in their colors, in the LiDAR frame."""
    full = (classes.flatten() != FREE).nonzero()[:, 0]
    matrix = batch.ego2lidar[0].to(full.device)
    centers = torch.stack(voxel_centers(full), dim=1) @ matrix[:3, :3].T + matrix[:3, 3]
    return triangles(centers.cpu().numpy(), POINT_COLORS[classes.flatten()[full].cpu().numpy()])


def point_mesh(batch: Batch, colors: np.ndarray | None = None) -> Mesh:
    """The keyframe's LiDAR points of the first sample, a small triangle each. colors: [K, 3] in [0, 1]; None: gray."""
    points = batch.points[: batch.point_counts[0]]
    points = points[points[:, 4] == 0, :3].cpu().numpy()  # [K, 3] without points of sweeps, which have a time lag
    return triangles(points, np.full(points.shape, GRAY) if colors is None else colors)


def triangles(points: np.ndarray, colors: np.ndarray) -> Mesh:
    """Points [K, 3], a small triangle each, in `colors` [K, 3] in [0, 1]; thinned to at most `MAX_POINTS`."""
    thinned = slice(None, None, -(-len(points) // MAX_POINTS) or 1)
    points, colors = points[thinned], colors[thinned]
    vertices = points[:, None] + POINT_SIZE * TRIANGLE  # [K, 3, 3]
    return Mesh.of(vertices.reshape(-1, 3), colors.repeat(3, axis=0), np.arange(3 * len(points)).reshape(-1, 3))


def box_mesh(boxes: torch.Tensor, colors) -> Mesh:
    """The edges of boxes [M, 9] as thin bars. colors: [M, 3] in [0, 1], or one for all."""
    edges = [edge for path in SKELETON for edge in zip(path, path[1:], strict=False)]  # 12 pairs of corners
    ends = box_corners(boxes.float().cpu().numpy())[:, edges]  # [M, 12, 2, 3]
    vertices = ends[:, :, :, None] + EDGE_SIZE * TRIANGLE  # [M, 12, 2, 3, 3]: a triangle at each end
    color_of_box = np.broadcast_to(np.reshape(colors, (-1, 3)), (len(boxes), 3))
    first = 6 * np.arange(12 * len(boxes))[:, None, None]  # first vertex of each bar: a bar has 6, a box 12 bars
    return Mesh.of(vertices.reshape(-1, 3), color_of_box.repeat(12 * 6, axis=0), (first + BAR).reshape(-1, 3))


def surface_mesh(ends: np.ndarray, columns: int = PANORAMA[1]) -> Mesh:
    """The ends [rows * columns, 3] of a panorama's rays as a strip around the LiDAR, in the depth colors of views.py.

    Rays that miss the volume have depth 0 and are not connected.
    """
    depth = np.linalg.norm(ends, axis=1)
    left = np.arange(len(ends)).reshape(-1, columns)
    right = np.roll(left, -1, axis=1)
    quads = np.stack([left[:-1], left[1:], right[:-1], right[1:]], axis=-1).reshape(-1, 4)
    near, far = depth[quads].min(axis=1), depth[quads].max(axis=1)
    quads = quads[far < JUMP * near]  # a larger jump: one object in front of another
    colors = matplotlib.colormaps["turbo_r"](depth / FAR)[:, :3]
    return Mesh.of(ends, colors, np.concatenate([quads[:, :3], quads[:, 1:]]))


def joined(*meshes: Mesh) -> Mesh:
    """Several meshes as one."""
    starts = np.cumsum([0] + [len(mesh.vertices) for mesh in meshes])
    return Mesh(
        np.concatenate([mesh.vertices for mesh in meshes]),
        np.concatenate([mesh.colors for mesh in meshes]),
        np.concatenate([mesh.faces + np.int32(start) for mesh, start in zip(meshes, starts, strict=False)]),
    )

"""Pictures of voxels in the colors of their classes: from above, and as seen through the pixels of the cameras.

Ground truth is on top.
"""

import numpy as np
import torch

from unipad.batch import FREE, OCCUPANCY_CELL, OCCUPANCY_LOW, OCCUPANCY_SHAPE, Batch
from unipad.draw.segments import COLORS, rows_of_views
from unipad.evaluate.rayiou import first_hits

UNSEEN = (0.16, 0.16, 0.16)  # color of a column without a voxel that a camera sees
MAX_COLUMNS = 160  # rays per row of an image, at most


def occupancy_views(batch: Batch, predicted: torch.Tensor, width: int = 300) -> np.ndarray:
    """The batch's first sample from above, and in its cameras if it has any: [H, W, 3] uint8.

    predicted: [X, Y, Z] classes, from `OccupancyModel.predict`.
    width:     of each camera's picture, in pixels.

    From above, of the voxels that cameras see (those that the benchmark scores) the highest full one of each column is
    shown. A batch without labels shows all predictions.
    """
    batch = batch.keyframe()
    ego2lidar = batch.ego2lidar[0].double().cpu()
    rows, seen = {"predicted": predicted.cpu()}, torch.ones(OCCUPANCY_SHAPE, dtype=torch.bool)
    if batch.occupancy is not None:
        truth, _, by_cameras = batch.occupancy[0].cpu()
        rows, seen = {"true": truth, **rows}, by_cameras > 0

    def from_above(axis, classes, name):
        _from_above(axis, classes.numpy(), seen.numpy(), name)

    def in_camera(axis, image, lidar2image, classes):
        _in_camera(axis, image, torch.from_numpy(lidar2image).double() @ ego2lidar, classes)

    return rows_of_views(batch, rows, from_above, in_camera, width)


def highest(classes: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """[X, Y, 3] colors of the highest full voxel that is seen in each column; black if all that are seen are free."""
    full = (classes != FREE) & seen  # [X, Y, Z]
    top = full.shape[2] - 1 - full[..., ::-1].argmax(axis=2)
    class_ = np.take_along_axis(classes, top[..., None], axis=2)[..., 0]
    colors = np.where(full.any(axis=2)[..., None], COLORS[np.minimum(class_, FREE - 1)], 0)
    return np.where(seen.any(axis=2)[..., None], colors, UNSEEN)


def _from_above(axis, classes, seen, name):
    """The view from above, forward at the top, with the `name` of the row."""
    low, high = OCCUPANCY_LOW[0], OCCUPANCY_LOW[0] + OCCUPANCY_CELL * OCCUPANCY_SHAPE[0]
    # rows of the picture: x, forward, downwards; its columns: y, left, to the right; so both are turned around
    axis.imshow(highest(classes, seen)[::-1, ::-1], extent=(high, low, low, high))
    axis.set(xticks=[], yticks=[], facecolor="black")
    axis.plot(0, 0, "w+")
    axis.spines[:].set_color("0.4")
    axis.text(0.02, 0.96, name, color="white", transform=axis.transAxes, va="top")


def _in_camera(axis, image, ego2image, classes):
    """One camera's `image` [h, w, 3], darkened, under the first voxel that the ray through each pixel hits; ego2image:
    [4, 4] fp64."""
    height, width = image.shape[:2]
    axis.imshow(image * 0.3, extent=(0, width, height, 0))
    axis.set(xticks=[], yticks=[])
    stride = -(-width // MAX_COLUMNS)
    v, u = torch.meshgrid(
        torch.arange(stride / 2, height, stride), torch.arange(stride / 2, width, stride), indexing="ij"
    )
    pixels = torch.stack([u, v, torch.ones_like(u)], dim=-1).double().flatten(0, 1)
    inverse = torch.linalg.inv(ego2image)  # (u*d, v*d, d, 1) -> ego
    directions = torch.nn.functional.normalize(pixels @ inverse[:3, :3].T, dim=1)
    hit, _ = first_hits(classes, inverse[:3, 3].expand_as(directions), directions)
    hit = hit.view(u.shape).numpy()
    layer = np.concatenate([COLORS[np.minimum(hit, FREE - 1)], 0.85 * (hit != FREE)[..., None]], axis=-1)
    axis.imshow(layer, extent=(0, stride * u.shape[1], stride * u.shape[0], 0), interpolation="nearest")
    axis.set(xlim=(0, width), ylim=(height, 0))

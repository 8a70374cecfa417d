"""Pictures of what a model renders beside what is really there."""

import math

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from unipad.batch import CAMERAS
from unipad.evaluate import in_colour
from unipad.model.camera import MASK_BLOCK
from unipad.model.rays import pixel_rays, project_points, rays_from_lidar

FAR = 60.0  # metres at the far end of the colour scale
PANORAMA = (42, 360)  # rows and columns, a degree each; all around, x forward of the middle by a quarter
TOP = 11.0  # degrees above the horizon of a panorama's first row: nuScenes' LiDAR sees from -30.7 to 10.7


@torch.no_grad()
def rendered_views(model, batch, generators, stride=2):
    """A sheet of the batch's first sample: what the encoders saw, what is there and what is rendered, one above the
    other. Six cameras stand side by side; without cameras, one panorama from the LiDAR. Returns [H, W, 3] uint8.

    stride: pixels between rendered rays of a camera.
    """
    was_training = model.training
    model.eval()
    volume, masks = model.encode(batch, generators)
    cameras = batch.images.shape[1] > 0
    rays, shape = pixel_rays(batch, 0, stride) if cameras else (_panorama_rays(volume.device), (1, *PANORAMA))
    rgb, depth = model.render(volume, rays)
    model.train(was_training)

    rows = {}
    project = _onto_views if cameras else _onto_panorama
    if cameras:
        H, W = batch.image_sizes[0, 0].tolist()
        images = batch.images[0, ..., :H, :W]  # [N, 3, H, W]
        rows["image"] = images.permute(0, 2, 3, 1)
    if "camera" in masks:
        visible = F.interpolate(masks["camera"][0, :, None].float(), scale_factor=MASK_BLOCK)[..., :H, :W]
        rows["image, as the encoder sees it"] = (images * visible).permute(0, 2, 3, 1)
    if cameras and in_colour(model, batch):
        rows["rendered"] = rgb.unflatten(0, shape)
    points = batch.points[: batch.point_counts[0]]
    rows["LiDAR depth"] = project(batch, points[points[:, 4] == 0, :3])
    if "lidar" in masks:
        rows["voxels, as the encoder sees them"] = project(batch, _centres(model.recipe, masks["lidar"]))
    rows["rendered depth"] = depth.unflatten(0, shape)
    return _sheet({name: row.float().cpu().numpy() for name, row in rows.items()})


def _panorama_rays(device):
    rows, columns = PANORAMA
    up = torch.deg2rad(TOP - torch.arange(rows, device=device))[:, None]  # [rows, 1]
    around = math.pi - torch.deg2rad(torch.arange(columns, device=device) + 0.5)  # [columns], clockwise as images run
    aims = torch.stack([up.cos() * around.cos(), up.cos() * around.sin(), up.sin().expand(rows, columns)], dim=-1)
    return rays_from_lidar(aims.flatten(0, 1), 0)


def _centres(recipe, voxels):
    """[P, 3] metres, the centres of those `voxels` ([M, 4]) that are the first sample's."""
    low, cell = (torch.tensor(t, device=voxels.device) for t in (recipe.grid.low, recipe.lidar.cell))
    return low + (voxels[voxels[:, 0] == 0, 1:].flip(-1) + 0.5) * cell


def _onto_panorama(_, points):
    """[1, rows, columns] metres from the LiDAR to `points` [P, 3], NaN where none falls."""
    depth = points.norm(dim=1)
    up = torch.rad2deg(torch.asin(points[:, 2] / depth.clamp(min=1e-3)))
    around = torch.rad2deg(math.pi - torch.atan2(points[:, 1], points[:, 0])) % 360
    rows, columns = PANORAMA
    pixels = torch.stack([around.clamp(max=columns - 1), (TOP - up).round()], dim=-1)[None]  # [1, P, 2]
    visible = (pixels[0, :, 1] >= 0) & (pixels[0, :, 1] < rows)
    return _painted(pixels, visible[None], depth[None], rows, columns, thick=0)


def _onto_views(batch, points):
    """[N, H, W] metres along the first sample's rays to `points` [P, 3], NaN where none falls."""
    H, W = batch.image_sizes[0, 0].tolist()
    pixels, visible = project_points(points, batch.lidar2image[0], batch.image_sizes[0])  # [N, P, 3], [N, P]
    centres = torch.linalg.inv(batch.lidar2camera[0])[:, :3, 3]  # [N, 3]
    depth = (points[None] - centres[:, None]).norm(dim=-1)  # [N, P]
    return _painted(pixels, visible, depth, H, W, thick=1)


def _painted(pixels, visible, depth, H, W, thick):
    """[N, H, W]: every visible point paints its depth onto its pixel and `thick` more around; the nearest is on top."""
    pixels, visible, depth = pixels.cpu(), visible.cpu(), depth.cpu()
    canvas = torch.full((len(pixels), H, W), torch.nan)
    for view in range(len(pixels)):
        seen = visible[view].nonzero()[:, 0]
        near_last = seen[depth[view, seen].argsort(descending=True)]
        u, v, d = pixels[view, near_last, 0].long(), pixels[view, near_last, 1].long(), depth[view, near_last]
        for dv in range(-thick, thick + 1):
            for du in range(-thick, thick + 1):
                canvas[view, (v + dv).clamp(0, H - 1), (u + du).clamp(0, W - 1)] = d
    return canvas


def _sheet(rows):
    views, height, width = next(iter(rows.values())).shape[:3]
    across = 18.0 / views  # inches
    figure = Figure(figsize=(18.0, across * height / width * len(rows) + 0.5), dpi=80, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), views, squeeze=False)
    colours = matplotlib.colormaps["turbo_r"].copy()
    colours.set_bad("black")
    for line, (name, row) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel("\n".join(name.split(", ")))
        for axis, view in zip(line, row, strict=True):
            shown = axis.imshow(view.clip(0, 1)) if view.ndim == 3 else axis.imshow(view, colours, vmin=0, vmax=FAR)
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[0], CAMERAS if views > 1 else ["all around the LiDAR"], strict=True):
        axis.set_title(name)
    figure.colorbar(shown, ax=axes[-1], label="metres", fraction=0.02)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()

"""Pictures of a model's renderings, next to images and LiDAR depth, and videos. A picture is [H, W, 3] uint8."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from unipad.batch import Batch
from unipad.draw.carving import carved_figure
from unipad.errors import UserError
from unipad.model.mask import MASK_PATCH
from unipad.model.pretrain import Pretrain
from unipad.model.rays import cast_rays, grid_of_views, project_points, rays_from_lidar

FAR = 60.0  # meters at the far end of the color scale
PANORAMA = (43, 360)  # rows and columns of one degree each, clockwise around the LiDAR; forward is column 90
TOP = 11.0  # elevation of a panorama's first row, degrees; the last row's is -31. nuScenes' LiDAR covers -30.7 to 10.7
CHUNK = 2**18  # rays cast at once, over all views; those of six full images would take gigabytes
DPI = 80


@torch.no_grad()
def rendered_views(
    model: Pretrain, batch: Batch, generators: list | None, stride: int = 2, normals: bool = False, width: int = 240
) -> np.ndarray:
    """The batch's first sample in rows: images, their unmasked patches, rendered color, LiDAR depth, unmasked voxels,
    rendered depth and, on request, normals. One column per camera; without cameras, one panorama from the LiDAR. If no
    loss casts rays, nothing is rendered. Below, with the loss `occupancy`, `carved_figure`.

    generators: one per sample, for the masks of the encoder's input; None: no masking.
    stride:     pixels between rendered rays of a camera.
    normals:    render surface normals too, as colors: red right, green forward, blue up.
    width:      of each camera's picture, in pixels; a single picture in a row is six times as wide.
    """
    was_training = model.training
    model.eval()
    volume, masks = model.encode(batch, generators)
    batch = replace(batch.keyframe(), features=None)  # not drawn: they would be read at every pixel
    has_images, renders = batch.images.shape[1] > 0, model.recipe.render.renders
    if renders:
        rendered = _rendered(model, volume, batch, stride) if has_images else _rendered_panorama(model, volume)
        rgb, depth, normal = rendered
    model.train(was_training)

    sizes, project = [PANORAMA], _onto_panorama
    if has_images:
        sizes, project = batch.image_sizes[0].tolist(), onto_views
    rows = {}

    def add(name, pictures, step=1):
        """pictures: [N, h, w] or [N, h, w, 3], of every `step`-th row and column; their padding is cut off."""
        pictures = pictures.float().cpu().numpy()
        rows[name] = [p[: -(-h // step), : -(-w // step)] for p, (h, w) in zip(pictures, sizes, strict=True)]

    step = stride if has_images else 1
    images = batch.images[0]  # [N, 3, H, W]
    if has_images:
        add("image", images.permute(0, 2, 3, 1))
    if "camera" in masks:
        unmasked = masks["camera"][0, : len(images), None].float()  # the keyframe's views come first
        unmasked = F.interpolate(unmasked, scale_factor=MASK_PATCH)
        add("image, as the encoder sees it", (images * unmasked).permute(0, 2, 3, 1))
    if model.renders_color(batch):
        add("rendered", rgb, step)
    points = batch.points[: batch.point_counts[0]]
    if len(points) or not renders:  # without renderings, the picture's color bar is this row's
        add("LiDAR depth", project(batch, points[points[:, 4] == 0, :3]))  # of the keyframe, not of sweeps
    if "lidar" in masks:
        add("voxels, as the encoder sees them", project(batch, _centers(model.recipe, masks["lidar"])))
    if renders:
        add("rendered depth", depth, step)
    if renders and normals:
        add("rendered normals", (normal + 1) / 2 * (normal.norm(dim=-1, keepdim=True) > 0), step)
    sheet = _sheet(rows, camera_names(batch) if has_images else ["all around the LiDAR"], width)
    if model.carving is None:
        return sheet
    return np.concatenate([sheet, picture_of(carved_figure(model.carving, volume, batch, sheet.shape[1] / DPI, DPI))])


def camera_names(batch: Batch) -> Sequence[str]:
    """The names of a keyframe's cameras."""
    return batch.cameras or [f"camera {i}" for i in range(batch.images.shape[1])]


def _rendered(model, volume, batch, stride):
    """rgb [N, h, w, 3], depth [N, h, w] meters and normals [N, h, w, 3] of the first sample's views."""
    pixels, _, shape = grid_of_views(batch, 0, stride)
    chunks = pixels.split(CHUNK // len(pixels), dim=1)  # [N, K, 3] each
    rendered = [model.render_surface(volume, cast_rays(batch, 0, chunk)) for chunk in chunks]  # tensors of [N * K, ...]
    of_views = [[t.unflatten(0, (len(pixels), -1)) for t in tensors] for tensors in rendered]  # [N, K, ...]
    return [torch.cat(parts, dim=1).unflatten(1, shape[1:]) for parts in zip(*of_views, strict=True)]


def _rendered_panorama(model, volume):
    """As `_rendered`, with one panorama from the LiDAR in place of the views."""
    return [t.unflatten(0, (1, *PANORAMA)) for t in model.render_surface(volume, panorama_rays(volume.device))]


def panorama_rays(device, stride: int = 1):
    """Rays from the LiDAR, row by row, `stride` degrees apart."""
    rows, columns = PANORAMA
    elevation = torch.deg2rad(TOP - torch.arange(0, rows, stride, device=device))[:, None]  # [rows, 1]
    azimuth = math.pi - torch.deg2rad(torch.arange(0, columns, stride, device=device) + 0.5)  # [columns], clockwise
    x, y = elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin()
    z = elevation.sin().expand(x.shape)
    return rays_from_lidar(torch.stack([x, y, z], dim=-1).flatten(0, 1), 0)


def _centers(recipe, voxels):
    """[P, 3] meters, the centers of those `voxels` [M, 4] (b, z, y, x) that belong to the first sample."""
    low, cell = (torch.tensor(t, device=voxels.device) for t in (recipe.grid.low, recipe.lidar.cell))
    return low + (voxels[voxels[:, 0] == 0, 1:].flip(-1) + 0.5) * cell


def _onto_panorama(_, points):
    """As `onto_views`, without its batch: [1, rows, columns] meters from the LiDAR to `points` [P, 3]; NaN in pixels
    without a point."""
    depth = points.norm(dim=1)
    elevation = torch.rad2deg(torch.asin(points[:, 2] / depth.clamp(min=1e-3)))
    azimuth = torch.rad2deg(math.pi - torch.atan2(points[:, 1], points[:, 0])) % 360  # clockwise
    rows, columns = PANORAMA
    # `_painted` truncates to whole columns; `% 360` may round up to 360, beyond the last one
    pixels = torch.stack([azimuth.clamp(max=columns - 1), (TOP - elevation).round()], dim=-1)[None]  # [1, P, 2]
    visible = (pixels[0, :, 1] >= 0) & (pixels[0, :, 1] < rows)
    return _painted(pixels, visible[None], depth[None], rows, columns, thick=0)


def onto_views(batch, points):
    """[N, H, W] meters along the first sample's rays to `points` [P, 3]; NaN in pixels without a point. H and W are
    those of the largest image."""
    H, W = batch.image_sizes[0].amax(0).tolist()
    pixels, visible = project_points(points, batch.lidar2image[0], batch.image_sizes[0])  # [N, P, 3], [N, P]
    centers = torch.linalg.inv(batch.lidar2camera[0])[:, :3, 3]  # [N, 3]
    depth = (points[None] - centers[:, None]).norm(dim=-1)  # [N, P]
    return _painted(pixels, visible, depth, H, W, thick=1)


def _painted(pixels, visible, depth, H, W, thick):
    """[N, H, W]: visible points paint their depths onto the pixels up to `thick` away, the nearest on top."""
    pixels, visible, depth = pixels.cpu(), visible.cpu(), depth.cpu()
    canvas = torch.full((len(pixels), H * W), torch.inf)
    for painted, uv, d, mask in zip(canvas, pixels, depth, visible, strict=True):
        u, v = uv[mask, 0].long(), uv[mask, 1].long()
        for dv in range(-thick, thick + 1):
            for du in range(-thick, thick + 1):
                at = (v + dv).clamp(0, H - 1) * W + (u + du).clamp(0, W - 1)
                painted.scatter_reduce_(0, at, d[mask], "amin")
    return canvas.where(canvas.isfinite(), torch.nan).view(-1, H, W)


def _sheet(rows, titles, width):
    """One picture of named rows of pictures, with titles of the N columns.

    rows: name -> N pictures, [h, w, 3] colors or [h, w] meters, NaN where unknown.
    """
    shapes = [picture.shape for picture in next(iter(rows.values()))]
    views = len(shapes)
    width = width if views > 1 else 6 * width  # one view is as wide as six
    heights = [round(width * shape[0] / shape[1]) for shape in shapes]
    height = max(heights)
    left, top, right, gap = 44, 24, 76, 6  # pixels for row names, titles, color bar; between pictures
    W, H = left + views * (width + gap) + right, top + len(rows) * (height + gap)
    xs = [left + i * (width + gap) for i in range(views)]
    ys = [top + i * (height + gap) for i in range(len(rows))]
    colors = matplotlib.colormaps["turbo_r"].with_extremes(bad="black")

    # one image for all: separate axes for each picture would take a second to lay out
    sheet = np.full((H, W, 3), 255, np.uint8)
    for y, row in zip(ys, rows.values(), strict=True):
        for x, view, high in zip(xs, row, heights, strict=True):
            picture = view.clip(0, 1) if view.ndim == 3 else colors(view / FAR)[..., :3]
            smooth = view.ndim == 3 and view.shape[1] > width  # depths are not averaged across edges
            interpolation = cv2.INTER_AREA if smooth else cv2.INTER_NEAREST
            picture = cv2.resize(np.float32(picture), (width, high), interpolation=interpolation)
            sheet[y : y + high, x : x + width] = np.rint(255 * picture)

    figure = Figure(figsize=(W / DPI, H / DPI), dpi=DPI)
    figure.figimage(sheet, zorder=-1)
    for y, name in zip(ys, rows, strict=True):
        lines, middle = "\n".join(name.split(", ")), 1 - (y + height / 2) / H
        figure.text((left - 6) / W, middle, lines, rotation=90, ha="right", va="center")
    for x, title in zip(xs, titles, strict=True):
        figure.text((x + width / 2) / W, 1 - top / 2 / H, title, ha="center", va="center")
    y = ys[list(rows).index("rendered depth" if "rendered depth" in rows else "LiDAR depth")]
    bar = figure.add_axes((1 - (right - 6) / W, 1 - (y + height) / H, 12 / W, height / H))
    figure.colorbar(ScalarMappable(Normalize(0, FAR), colors), bar, label="meters")
    return picture_of(figure)


def picture_of(figure: Figure) -> np.ndarray:
    """A matplotlib figure as a picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_video(pictures: list[Path], file: Path, fps: float):
    """Join picture files into a GIF, or an MP4 with OpenCV, at `fps` frames per second.

    Raises `UserError` if this OpenCV cannot write MP4, or the disk has no room for the whole MP4.
    """
    first = Image.open(pictures[0]).convert("RGB")
    if file.suffix == ".gif":
        others = (Image.open(picture).convert("RGB") for picture in pictures[1:])
        first.save(file, save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
        return
    width, height = (side // 2 * 2 for side in first.size)  # MP4 halves the resolution of color, so sides are even
    video = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"mp4v"), fps, (width, height))
    if not video.isOpened():
        raise UserError(f"OpenCV cannot write {file} on this machine; use --video gif.")
    for picture in pictures:
        video.write(cv2.imread(str(picture))[:height, :width])
    video.release()
    # OpenCV does not report a full disk
    if cv2.VideoCapture(str(file)).get(cv2.CAP_PROP_FRAME_COUNT) != len(pictures):
        raise UserError(f"{file} could not be written completely; make room on the disk.")

"""Pictures of what a model renders beside what is really there."""

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from unipad.batch import CAMERAS
from unipad.model.pretrain import MASK_BLOCK
from unipad.model.rays import pixel_rays, project_points

FAR = 60.0  # metres at the far end of the colour scale


@torch.no_grad()
def rendered_views(model, batch, generators, stride=2):
    """A sheet of the batch's first sample: six cameras across; what the encoder saw, the image, the rendered
    image, LiDAR depth and rendered depth down. Returns [H, W, 3] uint8.

    stride: pixels between rendered rays.
    """
    was_training = model.training
    model.eval()
    volume, mask = model.encode(batch, generators)
    rays, (views, h, w) = pixel_rays(batch, 0, stride)
    rgb, depth = model.render(volume, rays)
    model.train(was_training)

    images = batch.images[0]  # [N, 3, H, W]
    H, W = batch.image_sizes[0, 0].tolist()
    seen = images * F.interpolate(mask[0, :, None].float(), scale_factor=MASK_BLOCK)
    rows = {
        "seen by the encoder": seen[..., :H, :W].permute(0, 2, 3, 1),
        "image": images[..., :H, :W].permute(0, 2, 3, 1),
        "rendered": rgb.view(views, h, w, 3),
        "LiDAR depth": _lidar_depth(batch, H, W),
        "rendered depth": depth.view(views, h, w),
    }
    return _sheet({name: row.float().cpu().numpy() for name, row in rows.items()})


def _lidar_depth(batch, H, W):
    """[N, H, W] metres along the ray, NaN where no point of the first sample falls; points drawn 3 pixels wide."""
    points = batch.points[: batch.point_counts[0], :3]
    pixels, visible = project_points(points, batch.lidar2image[0], batch.image_sizes[0])  # [N, P, 3], [N, P]
    centres = torch.linalg.inv(batch.lidar2camera[0])[:, :3, 3]  # [N, 3]
    depth = (points[None] - centres[:, None]).norm(dim=-1)  # [N, P]
    pixels, visible, depth = pixels.cpu(), visible.cpu(), depth.cpu()
    canvas = torch.full((len(pixels), H, W), torch.nan)
    for view in range(len(pixels)):
        seen = visible[view].nonzero()[:, 0]
        near_last = seen[depth[view, seen].argsort(descending=True)]
        u, v, d = pixels[view, near_last, 0].long(), pixels[view, near_last, 1].long(), depth[view, near_last]
        for dv in (-1, 0, 1):
            for du in (-1, 0, 1):
                canvas[view, (v + dv).clamp(0, H - 1), (u + du).clamp(0, W - 1)] = d
    return canvas


def _sheet(rows):
    views, height, width = next(iter(rows.values())).shape[:3]
    figure = Figure(figsize=(3.0 * views, 3.0 * height / width * len(rows) + 0.5), dpi=80, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), views, squeeze=False)
    colours = matplotlib.colormaps["turbo_r"].copy()
    colours.set_bad("black")
    for line, (name, row) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name)
        for axis, view in zip(line, row, strict=True):
            shown = axis.imshow(view.clip(0, 1)) if view.ndim == 3 else axis.imshow(view, colours, vmin=0, vmax=FAR)
            axis.set(xticks=[], yticks=[])
    for axis, camera in zip(axes[0], CAMERAS, strict=True):
        axis.set_title(camera)
    figure.colorbar(shown, ax=axes[-1], label="metres", fraction=0.02)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()

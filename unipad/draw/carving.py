"""Pictures of the free and full cells of the volume from above: as carved by LiDAR rays, and as predicted."""

import matplotlib
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from unipad.batch import Batch
from unipad.kernels.carve import FREE, FULL, UNKNOWN
from unipad.model.carving import Carving

UNKNOWN_COLOR, FREE_COLOR = (0.0, 0.0, 0.0), (0.75, 0.75, 0.75)


@torch.no_grad()
def carved_figure(carving: Carving, volume: Tensor, batch: Batch, width: float, dpi: int) -> Figure:
    """The first sample's cells from above, forward at the top: as LiDAR carves them, as predicted where LiDAR has been,
    and as predicted everywhere. A column of cells has the color of its highest full cell; without one, it is gray if
    one of its cells is free, else black.

    volume: [B, C, Z, Y, X] that the model learns occupancy from.
    width:  inches.
    """
    truth = carving.target(batch)[0]
    predicted = torch.where(carving(volume)[0] > 0, FULL, FREE)
    known = torch.where(truth == UNKNOWN, UNKNOWN, predicted)
    panels = {"cells from above, LiDAR": truth, "predicted where known": known, "predicted": predicted}

    grid = carving.recipe.grid
    heights = Normalize(grid.low[2], grid.high[2])
    colors = matplotlib.colormaps["turbo"]
    figure = Figure(figsize=(width, 0.3 * width), dpi=dpi, layout="constrained")
    axes = figure.subplots(1, len(panels))
    for ax, (name, state) in zip(axes, panels.items(), strict=True):
        ax.imshow(_from_above(state.cpu().numpy(), grid, heights, colors), origin="lower", interpolation="nearest")
        ax.set_title(name, fontsize="medium")
        ax.set_axis_off()
    figure.colorbar(ScalarMappable(heights, colors), ax=axes, label="highest full cell, meters above LiDAR")
    return figure


def _from_above(state, grid, heights, colors):
    """[Y, X, 3] colors of the columns of a state [Z, Y, X]."""
    full = state == FULL
    highest = len(state) - 1 - full[::-1].argmax(axis=0)  # [Y, X]
    shown = colors(heights(grid.low[2] + (highest + 0.5) * grid.cell[2]))[..., :3]
    empty = np.where((state == FREE).any(axis=0)[..., None], FREE_COLOR, UNKNOWN_COLOR)
    return np.where(full.any(axis=0)[..., None], shown, empty)

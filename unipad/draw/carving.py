"""Free and full cells of the volume from above, carved by LiDAR and predicted. A picture is [H, W, 3] uint8."""

import matplotlib
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from unipad.batch import Batch
from unipad.draw.views import DPI, picture_of
from unipad.kernels.carve import FREE, FULL, UNKNOWN
from unipad.model.pretrain import Pretrain

UNKNOWN_COLOR, FREE_COLOR = (0.0, 0.0, 0.0), (0.75, 0.75, 0.75)
WIDTH = 420  # pixels of a panel


@torch.no_grad()
def carved_cells(model: Pretrain, batch: Batch, generators: list | None) -> np.ndarray:
    """The first sample's cells from above, forward at the top: as LiDAR carves them, as predicted where LiDAR has been,
    and as predicted everywhere. A column of cells has the color of its highest full cell; without one, it is gray if
    one of its cells is free, else black.

    generators: one per sample, for the masks of the encoder's input; None: no masking.
    """
    was_training = model.training
    model.eval()
    volume, _ = model.encode(batch, generators)
    truth = model.carving.target(batch)[0]
    predicted = torch.where(model.carving(volume)[0] > 0, FULL, FREE)
    model.train(was_training)
    known = torch.where(truth == UNKNOWN, UNKNOWN, predicted)
    panels = {"LiDAR": truth, "predicted where known": known, "predicted": predicted}

    grid = model.recipe.grid
    heights = Normalize(grid.low[2], grid.high[2])
    colors = matplotlib.colormaps["turbo"]
    figure = Figure(figsize=((len(panels) * WIDTH + 90) / DPI, (WIDTH + 40) / DPI), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(panels))
    for ax, (name, state) in zip(axes, panels.items(), strict=True):
        ax.imshow(_from_above(state.cpu().numpy(), grid, heights, colors), origin="lower", interpolation="nearest")
        ax.set_title(name, fontsize="medium")
        ax.set_axis_off()
    figure.colorbar(ScalarMappable(heights, colors), ax=axes, label="meters above the LiDAR, highest full cell")
    return picture_of(figure)


def _from_above(state, grid, heights, colors):
    """[Y, X, 3] colors of the columns of a state [Z, Y, X]."""
    full = state == FULL
    highest = len(state) - 1 - full[::-1].argmax(axis=0)  # [Y, X]
    shown = colors(heights(grid.low[2] + (highest + 0.5) * grid.cell[2]))[..., :3]
    empty = np.where((state == FREE).any(axis=0)[..., None], FREE_COLOR, UNKNOWN_COLOR)
    return np.where(full.any(axis=0)[..., None], shown, empty)

"""The loss `occupancy`: which cells of the volume are free and which are full, as carved by LiDAR rays.

    target   a ray ends in every LiDAR point of the keyframe and its sweeps, and starts where the LiDAR was then: cells
             that the ray crosses are free, its last cell is full, cells without a ray are unknown (`kernels/carve.py`)
    motion   in each cell, the latest window of `occupancy_window` seconds with a ray decides; within a window, full
             beats free. So a moving object leaves almost no trail: newer rays cross the cells of its older points. One
             window for all sweeps would leave trails; windows of one sweep would free cells of static surfaces, where
             new rays pass over what an older sweep has hit (`python -m benchmarks.carve_windows`).
    logits   one linear layer, a 1 x 1 x 1 convolution, on the features that rays are cast through
    loss     binary cross-entropy, with half of the weight on a sample's full cells and half on its free ones

The encoder sees masked points or images; the target is made from all points. Occupancy-MAE (arXiv 2206.09900) does this
with masked voxels, UniScene (2305.18829) with cameras; in both, cells without points are empty. Here such cells are
unknown unless a ray crosses them, as in UnO (2406.08691) and ALSO (2212.05867), which learn free and full at points
along rays.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipad import config
from unipad.batch import Batch
from unipad.errors import UserError
from unipad.kernels.carve import FREE, FULL, carve
from unipad.model.rays import samples_of

NEWEST = 2**20  # rank of the latest window; no sweep is that many windows old


class Carving(nn.Module):
    """Logits of full cells, and their target and loss."""

    def __init__(self, recipe: config.PretrainRecipe):
        super().__init__()
        self.recipe = recipe
        self.linear = nn.Linear(recipe.render.channels, 1)

    def forward(self, volume: Tensor) -> Tensor:
        """volume: [B, C, Z, Y, X] features. Returns [B, Z, Y, X] logits of a cell being full, in the parameters' dtype
        even under autocast."""
        with torch.autocast(volume.device.type, enabled=False):
            return self.linear(volume.permute(0, 2, 3, 4, 1).to(self.linear.weight.dtype)).squeeze(-1)

    def loss(self, volume: Tensor, batch: Batch) -> Tensor:
        """The loss, not weighted: the mean over batch samples of (mean over full cells + mean over free cells) / 2,
        where a mean over no cells is 0."""
        state = self.target(batch)
        full, free = state == FULL, state == FREE
        counts = [t.flatten(1).sum(dim=1).clamp(min=1)[:, None, None, None] for t in (full, free)]  # [B, 1, 1, 1]
        weight = (full / counts[0] + free / counts[1]) / (2 * len(batch))
        logits = self(volume)
        with torch.autocast(logits.device.type, enabled=False):
            return F.binary_cross_entropy_with_logits(logits, full.to(logits), weight.to(logits), reduction="sum")

    def target(self, batch: Batch) -> Tensor:
        """State of every cell, [B, Z, Y, X] uint8 as `carve` returns it.

        Points nearer to their LiDAR than `rays.near_radius`, in the ground plane, are not used: they are on the ego
        vehicle. Deterministic; nothing waits for the device. Raises `UserError` if the batch has no `sweep_origins`.
        """
        grid, points, lidars = self.recipe.grid, batch.points, batch.sweep_origins
        if lidars is None:
            raise UserError(
                "this dataset does not say where the LiDAR was in each sweep, which --render.occupancy-weight needs; "
                "return Sample.sweep_origins from its `load`."
            )
        sample = samples_of(batch.point_counts, points.device)  # [P]
        if batch.points_beyond is not None:
            points = torch.cat([points, batch.points_beyond])
            sample = torch.cat([sample, samples_of(batch.beyond_counts, points.device)])
        of_sweep = lidars[sample, :, 3] == points[:, 4:]  # [P, S]: the sweep with the time of the point
        origins = lidars[sample, of_sweep.byte().argmax(dim=1), :3]
        distance = (points[:, :2] - origins[:, :2]).norm(dim=1)
        used = of_sweep.any(dim=1) & (distance > self.recipe.rays.near_radius)
        # divided by a tensor, since a GPU multiplies by the reciprocal of a number and rounds differently
        age = (points[:, 4] / points.new_full((), self.recipe.render.occupancy_window)).floor()  # in windows
        return carve(
            origins,
            points[:, :3],
            torch.where(used, sample, -1),
            grid.low,
            grid.cell,
            grid.shape[::-1],
            len(batch),
            rank=(NEWEST - age).clamp(min=0).int(),
        )

    def counts(self, volume: Tensor, batch: Batch) -> Tensor:
        """[4] numbers of cells: full and predicted so, full but predicted free, free but predicted full, free and
        predicted so. fp64, for sums over many batches."""
        state, predicted = self.target(batch), self(volume) > 0
        pairs = [(true, right) for true in (FULL, FREE) for right in (True, False)]
        return torch.stack([((state == true) & (predicted == right)).sum().double() for true, right in pairs])

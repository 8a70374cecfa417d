"""Occupancy of voxels in Occ3D's grid, which is in the ego frame: an MLP on the volume at the center of each voxel.

    logits of voxel x = MLP(V(T x) + e(height of x))        V: the volume, read trilinearly; T: ego -> LiDAR frame

So a voxel is smaller than a cell of the volume, as for the renderer, whose field is such an MLP too; e, an embedding
for each of the grid's layers, tells it how high it is above the road. Where `T x` lies beyond the centers of the
outermost cells, it is moved to the border that they form.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipad import config
from unipad.batch import FREE, OCCUPANCY_CELL, OCCUPANCY_LOW, OCCUPANCY_SHAPE, Batch
from unipad.kernels.backend import host_wait
from unipad.kernels.trilinear import trilinear, trilinear_value
from unipad.model.depth import depth_loss
from unipad.model.encoder import Encoder
from unipad.model.segment import lovasz_softmax
from unipad.model.volume import ConvNormReLU3d

CHUNK = 2**16  # voxels read at once without gradients
MASKS = {"lidar": 1, "camera": 2}  # channels of `Batch.occupancy`


class OccupancyModel(nn.Module):
    """The encoder and the head of one `config.OccupancyRecipe`: a batch to the classes of voxels."""

    def __init__(self, recipe: config.OccupancyRecipe):
        super().__init__()
        self.recipe = recipe
        self.encoder = Encoder(recipe)
        # nothing is masked here, so it gets no gradient
        if isinstance(recipe.lidar, config.LidarConfig) and recipe.lidar.learnable_token:
            self.encoder.lidar.mask_token.requires_grad_(False)
        self.head = Head(recipe.occupancy, recipe.grid, self.encoder.channels)

    def forward(self, batch: Batch, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Losses of one training step: name -> weighted value, those of `losses` and, with cameras, `depth`.

        batch: with occupancy labels, on the model's device; generators: one per sample, on that device.
        """
        encoded = self.encoder.encode(batch, generators, masked=False)
        cfg = self.recipe.occupancy
        sample, voxel, cells, shift = learned_voxels(batch, cfg, self.recipe.grid, generators)
        logits = self.head(encoded.volume, sample, voxel, cells)
        logits = logits + F.pad(shift[:, None], (FREE, 0))  # free is the last class
        values = losses(cfg, logits, batch.occupancy[:, 0].flatten(1)[sample, voxel].long())
        camera = self.recipe.camera
        if camera is not None and camera.depth_weight > 0:
            values["depth"] = depth_loss(encoded.depths, batch, camera)
        return values

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Tensor]:
        """Per sample, the class of every voxel, [X, Y, Z] uint8. Put the model in eval mode first."""
        volume, _ = self.encoder(batch, generators=None)
        return self.head.classes(volume, batch.ego2lidar)


class Head(nn.Module):
    """Volumes of `channels` over one `config.Grid` to logits of voxels.

    Computes in the parameters' dtype, even under autocast, except for its convolution.
    """

    def __init__(self, cfg: config.Occupancy, grid: config.Grid, channels: int):
        super().__init__()
        self.grid = grid
        self.project = ConvNormReLU3d(channels, cfg.channels)
        self.height = nn.Embedding(OCCUPANCY_SHAPE[2], cfg.channels)
        nn.init.normal_(self.height.weight, std=0.1)
        self.mlp = nn.Sequential(
            nn.Linear(cfg.channels, cfg.hidden), nn.ReLU(inplace=True),
            nn.Linear(cfg.hidden, cfg.hidden), nn.ReLU(inplace=True),
            nn.Linear(cfg.hidden, cfg.classes),
        )  # fmt: skip

    def forward(self, volume: Tensor, sample: Tensor, voxel: Tensor, cells: Tensor) -> Tensor:
        """Logits [N, classes] of N voxels. Differentiable once.

        volume: [B, C, Z, Y, X], LiDAR frame.
        sample: [N] int64, the volume that a voxel reads. voxel: [N] int64, its index in [X, Y, Z].
        cells:  [N, 3] where it is in the volume, from `in_cells`.
        """
        volume = self._projected(volume)
        with torch.autocast(volume.device.type, enabled=False):
            value, _ = trilinear(volume, self._clamped(cells)[:, None], sample.to(torch.int32))
            return self._decoded(value[:, 0], voxel)

    def classes(self, volume: Tensor, ego2lidar: Tensor) -> list[Tensor]:
        """Per volume, the class of every voxel, [X, Y, Z] uint8, without gradients; ego2lidar: [B, 4, 4] meters."""
        found, volume = [], self._projected(volume)
        with torch.autocast(volume.device.type, enabled=False):
            for of_sample, matrix in zip(volume.split(1), ego2lidar, strict=True):
                parts = []
                for voxel in all_voxels(volume.device).split(CHUNK):
                    cells = self._clamped(in_cells(voxel, matrix, self.grid))
                    value = trilinear_value(of_sample, cells[None], torch.zeros_like(voxel[:1], dtype=torch.int32))
                    parts.append(self._decoded(value[0], voxel).argmax(dim=1).to(torch.uint8))
                found.append(torch.cat(parts).view(OCCUPANCY_SHAPE))
        return found

    def _clamped(self, cells):
        """Coordinates as `trilinear` takes them, 0 at the center of the first cell, moved between those of the first
        and the last one."""
        axes = zip(cells.unbind(-1), self.grid.shape, strict=True)
        return torch.stack([(at - 0.5).clamp(0, size - 1) for at, size in axes], dim=-1)

    def _projected(self, volume):
        """[B, Z, Y, X, channels] in the parameters' dtype."""
        return self.project(volume).permute(0, 2, 3, 4, 1).to(self.height.weight.dtype).contiguous()

    def _decoded(self, value, voxel):
        return self.mlp(value + self.height(voxel % OCCUPANCY_SHAPE[2]))


def all_voxels(device: torch.device) -> Tensor:
    """[X * Y * Z] int64 indices of all voxels."""
    return torch.arange(math.prod(OCCUPANCY_SHAPE), device=device)


def voxel_centers(voxel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, y, z in the ego frame, [N] meters each, of the centers of the voxels with these indices [N] in [X, Y, Z]."""
    _, Y, Z = OCCUPANCY_SHAPE
    steps = zip((voxel // (Y * Z), voxel // Z % Y, voxel % Z), OCCUPANCY_LOW, strict=True)
    return tuple(low + OCCUPANCY_CELL * (index + 0.5) for index, low in steps)


def in_cells(voxel: Tensor, ego2lidar: Tensor, grid: config.Grid) -> Tensor:
    """[N, 3] (x, y, z) of voxels' centers in the cells of a grid, 0 at its lower corner.

    voxel: [N] indices in [X, Y, Z]. ego2lidar: [4, 4] meters.
    """
    x, y, z = voxel_centers(voxel)
    rows = zip(ego2lidar, grid.low, grid.cell, strict=False)  # the matrix's fourth row is left out
    return torch.stack([(m[0] * x + m[1] * y + m[2] * z + m[3] - low) / cell for m, low, cell in rows], dim=-1)


def learned_voxels(
    batch: Batch, cfg: config.Occupancy, grid: config.Grid, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The N voxels that a step learns: (sample [N] int64, voxel [N] int64, `in_cells` [N, 3], shift [N] fp32).

    They are those in `cfg.mask`, without those more than a cell outside of the volume, where augmentation may have
    moved them. At most `cfg.max_voxels` per sample: half of them full, if there are so many, since most are free.
    `shift`, to be added to the logits of free, corrects for that: the logarithm of the fraction of the free voxels that
    is drawn over that of the full ones (logit adjustment, arXiv 2007.07314).
    """
    chosen = []
    voxel = all_voxels(batch.occupancy.device)
    for b, (labels, matrix, generator) in enumerate(zip(batch.occupancy, batch.ego2lidar, generators, strict=True)):
        cells = in_cells(voxel, matrix, grid)
        learned = torch.ones_like(voxel, dtype=torch.bool)
        for at, size in zip(cells.unbind(-1), grid.shape, strict=True):
            learned &= (at > -1) & (at < size + 1)
        if cfg.mask in MASKS:
            learned &= labels[MASKS[cfg.mask]].flatten() > 0
        shift = 0.0
        if cfg.max_voxels:
            is_full = labels[0].flatten() != FREE
            with host_wait("indices of the labeled voxels"):
                full, free = ((learned & kind).nonzero()[:, 0] for kind in (is_full, ~is_full))
            some_full = _some(full, max(cfg.max_voxels // 2, cfg.max_voxels - len(free)), generator)
            some_free = _some(free, cfg.max_voxels - len(some_full), generator)
            rows = torch.cat([some_full, some_free])
            if len(some_full) and len(some_free):
                shift = math.log(len(some_free) / len(free) * len(full) / len(some_full))
        else:
            with host_wait("indices of the labeled voxels"):
                rows = learned.nonzero()[:, 0]
        chosen.append((torch.full_like(rows, b), rows, cells[rows], torch.full_like(cells[rows, 0], shift)))
    return tuple(torch.cat(parts) for parts in zip(*chosen, strict=True))


def _some(rows, most, generator):
    """At most that many of `rows` [K], drawn at random."""
    return rows[torch.rand(len(rows), generator=generator, device=rows.device).argsort()[:most]]


def losses(cfg: config.Occupancy, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """`cross_entropy`, the mean over voxels, and `lovasz`, over all of them at once, each times its weight.

    logits: [N, classes]; labels: [N] int64 classes. Without voxels both are 0. Means are over this process's voxels.
    """
    cross_entropy = F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)
    lovasz = lovasz_softmax(logits.softmax(dim=1), labels)
    return {"cross_entropy": cfg.cross_entropy_weight * cross_entropy, "lovasz": cfg.lovasz_weight * lovasz}

"""The neural field: features at a point of the volume -> signed distance, its spatial gradient, color.

This module has the parameters, under the original's names; `unipad.kernels.sdf_reference` has the formulas.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipad.config import Grid, Render
from unipad.kernels.sdf_reference import decode, decode_sdf
from unipad.kernels.trilinear import trilinear, trilinear_value


class Field(nn.Module):
    """Signed distance, gradient and color at points of a feature volume.

    Points and distances are in the renderer's unit, meters * grid.scale. Parameters have the original's names: the
    original's state dict loads once the prefix `pts_bbox_head.render_model.field.` is removed.
    """

    def __init__(self, cfg: Render, grid: Grid):
        super().__init__()
        # point and c = feature -> signed distance, geometry feature; c: see `Decoder`
        self.sdf_decoder = Decoder(cfg.channels, 1 + cfg.hidden, hidden=cfg.hidden, layers=cfg.sdf_layers)
        # point and c = (direction, feature, gradient, geometry feature) -> color
        self.rgb_decoder = Decoder(3 + cfg.channels + 3 + cfg.hidden, 3, hidden=cfg.hidden, layers=cfg.rgb_layers)
        # for `beta` (VolSDF) and `inv_s` (NeuS) below; one setting initializes both, as in the original
        self.laplace_density = nn.ParameterDict({
            "beta_min": nn.Parameter(torch.full((1,), 1e-4), requires_grad=False),
            "beta": nn.Parameter(torch.full((1,), cfg.variance)),
        })  # fmt: skip
        self.deviation_network = nn.ParameterDict({"variance": nn.Parameter(torch.full((1,), cfg.variance))})
        # The centers of the first and last voxel lie on grid.low and grid.high, as with align_corners=True, so the
        # spacing of voxels is a little more than grid.cell.
        per_meter = [(n - 1) / (h - l) for n, l, h in zip(grid.shape, grid.low, grid.high, strict=True)]
        at_zero = [-l * k for l, k in zip(grid.low, per_meter, strict=True)]  # voxel coordinates of the origin
        self.register_buffer("cells_per_unit", torch.tensor(per_meter) / grid.scale, persistent=False)  # [3] x, y, z
        self.register_buffer("cell_offset", torch.tensor(at_zero), persistent=False)  # [3]

    def forward(
        self, volume: Tensor, points: Tensor, directions: Tensor, volume_idx: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The field at samples along rays.

        Args:
            volume:     [B, Z, Y, X, C] features.
            points:     [R, S, 3] scaled meters, LiDAR frame; not differentiated.
            directions: [R, 3] unit vectors.
            volume_idx: [R] int32, the volume of each ray.

        Returns:
            sdf:      [R, S] scaled meters, positive outside.
            gradient: [R, S, 3] d sdf / d point.
            rgb:      [R, S, 3] in [0, 1].

        Differentiable once w.r.t. `volume` and the parameters.
        """
        feature, slope = trilinear(volume, self.cells(points), volume_idx)  # slope: d feature / d voxel coordinates
        mlps = self.sdf_decoder.tensors(), self.rgb_decoder.tensors()
        return decode(feature, slope, points, directions, mlps, self.cells_per_unit)

    def sdf(self, volume: Tensor, points: Tensor, volume_idx: Tensor) -> Tensor:
        """The signed distance [R, S] at points [R, S, 3]; differentiable once w.r.t. `volume` and the parameters."""
        cells = self.cells(points)
        if torch.is_grad_enabled():
            feature, _ = trilinear(volume, cells, volume_idx)
        else:
            feature = trilinear_value(volume, cells, volume_idx)  # not differentiable, and cheaper
        return decode_sdf(feature, points, self.sdf_decoder.tensors())

    def cells(self, points: Tensor) -> Tensor:
        """Scaled meters -> voxel coordinates: 0 at the center of the first voxel, n - 1 at that of the last."""
        return points * self.cells_per_unit + self.cell_offset

    @property
    def inv_s(self) -> Tensor:
        """[1] inverse scale (sharpness) of NeuS's logistic distribution, 1 / scaled meters."""
        # as clip(1e-6, 1e6), which has four more operators in its backward
        return F.hardtanh(torch.exp(10 * self.deviation_network["variance"]), 1e-6, 1e6)

    @property
    def beta(self) -> Tensor:
        """[1] width of VolSDF's Laplace distribution, scaled meters."""
        return self.laplace_density["beta"].abs() + self.laplace_density["beta_min"]


class Decoder(nn.Module):
    """The parameters of one MLP, under the original's names: lin0, lin1, ..; fc_c.0, fc_c.1, ..; fc_p. Never called:
    the ops compute with `tensors()`.

    lin0, lin1, .. are the layers. The input of lin0 is fc_p(point) + fc_c.0(c), where c is a vector of `inputs`
    numbers; fc_c.l(c) is added to the input of each later lin l.
    """

    def __init__(self, inputs: int, outputs: int, hidden: int, layers: int):
        super().__init__()
        for l in range(layers):
            self.add_module(f"lin{l}", nn.Linear(hidden, outputs if l == layers - 1 else hidden))
        self.fc_c = nn.ModuleList(nn.Linear(inputs, hidden) for _ in range(layers))
        self.fc_p = nn.Linear(3, hidden)

    def tensors(self) -> list[Tensor]:
        """The parameters as `unipad.kernels.sdf_render` takes them: fc_p's, then fc_c's and lin's of each layer."""
        # from the dictionaries: of a module, reading an attribute that is a parameter takes a microsecond
        own = self._modules
        layers = [layer for l, fc in enumerate(own["fc_c"]) for layer in (fc, own[f"lin{l}"])]
        parameters = [layer._parameters for layer in (own["fc_p"], *layers)]
        return [t for of_layer in parameters for t in (of_layer["weight"], of_layer["bias"])]

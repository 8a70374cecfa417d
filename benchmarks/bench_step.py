"""A whole training step: ours, and the same model built from UniPAD's formulas.   python -m benchmarks.bench_step

The eager model has the same weights, image encoder, rays and random numbers; its lift fills a dense volume per view,
its convolution before the renderer is a plain `nn.Conv3d`, its renderer differentiates twice through autograd. Ours is
timed only if the two models' losses agree. A step is forward, backward and optimizer without autocast, on random data.
The column "fwd ms" is the whole step; "of copy" means nothing here. The row "reference" is the eager model.
"""

from copy import deepcopy
from typing import Literal

import torch
import tyro

from benchmarks.eager import EagerRenderer, eager_lift
from benchmarks.harness import DEVICE, Case, compare
from unipad.batch import Batch
from unipad.model.pretrain import Pretrain
from unipad.recipes import PRETRAIN
from unipad.runtime import generators

HEIGHT = 1.5  # meters above ground, of the LiDAR and the cameras
FOCAL = 0.8  # focal length / image width
POINTS = 12_000  # of the LiDAR
# `eager_lift` is the peer of the view transform "gather" only
# those whose batch is made of images and points alone
PRESETS = tuple(
    name
    for name, recipe in PRETRAIN["camera"].items()
    if recipe.camera.view == "gather" and not recipe.data.sources and not recipe.data.features
)


def random_batch(recipe):
    """One sample: six images of noise, from cameras at the LiDAR's position, and LiDAR points on flat ground."""
    H, W = recipe.data.image_size or (900, 1600)
    padded = [-(-s // 32) * 32 for s in (H, W)]  # as `Batch.images` is
    images = torch.zeros(1, 6, 3, *padded)
    images[..., :H, :W] = torch.rand(1, 6, 3, H, W)
    # yaw of each camera, counter-clockwise from ahead (y); negative, since they are numbered clockwise
    yaw = torch.arange(6) * (-torch.pi / 3)
    right = torch.stack([yaw.cos(), yaw.sin(), 0 * yaw], dim=1)
    ahead = torch.stack([-yaw.sin(), yaw.cos(), 0 * yaw], dim=1)
    down = torch.tensor([0.0, 0, -1]).expand(6, 3)
    lidar2camera = torch.eye(4).repeat(6, 1, 1)
    lidar2camera[:, :3, :3] = torch.stack([right, down, ahead], dim=1)
    pinhole = torch.eye(4)
    pinhole[:3, :3] = torch.tensor([[FOCAL * W, 0, W / 2], [0, FOCAL * W, H / 2], [0, 0, 1]])
    azimuth, radius = 2 * torch.pi * torch.rand(POINTS), 4 + 30 * torch.rand(POINTS)
    ground, zeros = torch.full((POINTS,), -HEIGHT), torch.zeros(POINTS)  # zeros: intensity and time lag
    points = torch.stack([radius * azimuth.cos(), radius * azimuth.sin(), ground, zeros, zeros], dim=1)
    return Batch(
        images=images,
        image_sizes=torch.tensor([H, W]).expand(1, 6, 2),
        lidar2image=(pinhole @ lidar2camera)[None],
        lidar2camera=lidar2camera[None],
        points=points,
        point_counts=torch.tensor([POINTS]),
        boxes=torch.zeros(0, 9),
        labels=torch.zeros(0, dtype=torch.int64),
        box_counts=torch.tensor([0]),
        point_labels=None,
        tokens=("random",),
    ).to(DEVICE)


class EagerLift(torch.nn.Module):
    """`eager_lift` as a module that replaces the model's `GatherLift`."""

    def __init__(self, lift):
        super().__init__()
        self.grid, self.depth_range = lift.grid, lift.depth_range

    def forward(self, features, depths, lidar2image, image_size, calibration=None):
        grid = self.grid
        volume = eager_lift(
            features, depths, lidar2image, grid.low, grid.cell, grid.shape, image_size, self.depth_range
        )
        return volume.permute(0, 4, 1, 2, 3)


def eager_twin(net):
    """A copy of the model that computes UniPAD's formulas."""
    twin = deepcopy(net)
    twin.encoder.lift = EagerLift(twin.encoder.lift)
    conv = twin.project[0]
    twin.project[0] = torch.nn.Conv3d(conv.in_channels, conv.out_channels, 3, padding=1)
    twin.project[0].load_state_dict(conv.state_dict())
    twin.renderer = EagerRenderer(twin.renderer)
    return twin.to(DEVICE)


def step_of(net, batch):
    """A function that runs one training step and returns its loss; every call draws the same random numbers."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0)  # 0: the same weights at every call

    def step():
        losses, _ = net(batch, generators(seed=0, step=0, positions=[0], device=DEVICE))
        loss = sum(losses.values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm=35.0)  # `Optim.clip` of the camera recipes
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def main(preset: Literal[PRESETS] = "tiny"):
    recipe = PRETRAIN["camera"][preset]
    torch.manual_seed(0)
    batch, net = random_batch(recipe), Pretrain(recipe).to(DEVICE)
    steps = {"ours": step_of(net, batch), "eager": step_of(eager_twin(net), batch)}
    case = Case(f"{recipe.rays.per_view} rays per view", inputs=(), fwd_bytes=batch.images.nbytes)
    peers = {"ours": steps["ours"]} if DEVICE == "cpu" else {}  # `compare` runs the op itself on a GPU only
    compare("step", steps["eager"], steps["ours"], peers, [case])


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)

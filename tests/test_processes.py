"""A training step in two processes has the loss and the gradients of one process, and ends where one has no data.

Gradients are compared in fp64: in fp32 the untrained network amplifies rounding errors of 1e-7 to 1 % of the gradients'
norm.
"""

import sys
from dataclasses import replace

import pytest
import torch

from tests import scripts

MODALITIES = "camera", "lidar", "fusion"


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(city, tmp_path):
    results = []
    for run in (scripts.run, scripts.run_two):
        done = run(__file__, city, tmp_path / "gradients.pt")
        assert done.returncode == 0, done.stderr[-4000:]
        results.append(torch.load(tmp_path / "gradients.pt", weights_only=True))
    for modality in MODALITIES:
        (grads_of_one, loss_of_one, fp32_loss_of_one), of_two = (result[modality] for result in results)
        grads_of_two, loss_of_two, fp32_loss_of_two = of_two
        assert loss_of_two == pytest.approx(loss_of_one, rel=1e-9)
        assert fp32_loss_of_two == pytest.approx(fp32_loss_of_one, rel=2e-5)
        assert grads_of_one.keys() == grads_of_two.keys()
        total_norm = torch.stack([grad.norm() for grad in grads_of_one.values()]).norm()
        for name, grad in grads_of_one.items():
            assert (grad - grads_of_two[name]).norm() <= 1e-7 * total_norm, name
        not_zero = sum(grad.norm() > 1e-4 * total_norm for grad in grads_of_one.values())
        assert not_zero > 50, "almost all gradients are zero"


WITHOUT = ["detect", "segment", "occupancy", "pretrain camera", "pretrain lidar", "pretrain fusion"]
WITHOUT += ["pretrain carving", "pretrain features", "pretrain images"]


@pytest.mark.parametrize("case", WITHOUT)
def test_a_process_without_boxes_or_points_does_not_stop_the_other(case):
    """Process 1 has no boxes in detection, no points elsewhere, no labeled voxels, no image features and no frames
    before and after its images. Both end, with equal finite gradients."""
    done = scripts.run_two(
        "-c", "import sys; from tests import test_processes as t; t.steps_without(sys.argv[1])", case
    )
    assert done.returncode == 0, done.stderr[-4000:]


def steps_without(case):
    """Two training steps of a tiny model in this process."""
    import torch.distributed as dist

    from unipad.batch import OCCUPANCY_SHAPE
    from unipad.model.detect import Detector
    from unipad.model.occupancy import OccupancyModel
    from unipad.model.pretrain import Pretrain
    from unipad.model.segment import Segmenter
    from unipad.recipes import DETECT, OCCUPANCY, PRETRAIN, SEGMENT
    from unipad.runtime import generators, start

    task, _, modality = case.partition(" ")
    models = {"detect": Detector, "segment": Segmenter, "occupancy": OccupancyModel, "pretrain": Pretrain}
    model = models[task]
    presets = {"detect": DETECT, "segment": SEGMENT, "occupancy": OCCUPANCY, "pretrain": PRETRAIN}[task]
    carving = PRETRAIN["lidar"]["tiny-occupancy"]
    named = {
        "pretrain carving": replace(carving, render=replace(carving.render, depth_weight=0.0)),  # no loss casts rays
        "pretrain features": PRETRAIN["camera"]["features-tiny"],
        "pretrain images": PRETRAIN["camera"]["images-tiny"],
    }
    recipe = named.get(case) or presets[modality or "lidar"]["tiny"]
    with start("cpu", deterministic=False) as world:
        batch = small_batch(points=0 if world.rank and task != "detect" else 2000, boxes=0 if world.rank else 3)
        if task == "occupancy":
            voxels = torch.full((len(batch), 3, *OCCUPANCY_SHAPE), 1 - world.rank, dtype=torch.uint8)
            batch = replace(batch, occupancy=voxels, ego2lidar=torch.eye(4).expand(len(batch), 4, 4))
        if case == "pretrain carving":
            batch = replace(batch, sweep_origins=torch.zeros(len(batch), 1, 4))
        if case == "pretrain features":
            features = torch.full((len(batch), 2, 6, 9, recipe.data.feature_channels), 1.0 - world.rank)
            batch = replace(batch, features=features, feature_sizes=torch.tensor([6, 9]).expand(len(batch), 2, 2))
        if case == "pretrain images":
            aside = batch.lidar2image @ torch.tensor([[1.0, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
            shown = (255 * batch.images).to(torch.uint8).flip(-1)
            sizes = batch.image_sizes * (1 - world.rank)
            batch = replace(batch, source_images=shown, source_sizes=sizes, lidar2source=aside)
        torch.manual_seed(0)
        net = torch.nn.parallel.DistributedDataParallel(model(recipe))
        for step in range(2):
            losses = net(batch, generators(0, step, [world.rank], "cpu"))
            losses = losses[0] if task == "pretrain" else losses  # (losses, missed rays)
            sum(losses.values()).backward()
        gradients = torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad])
        of_main = gradients.clone()
        dist.broadcast(of_main, 0)
        assert gradients.isfinite().all() and gradients.any() and torch.equal(gradients, of_main)


def small_batch(points, boxes):
    """One sample with two views and that many random points, with labels, and boxes."""
    from tests.test_rays import make_batch, point_cloud

    batch = make_batch([point_cloud(points)], size=(64, 96), unpadded=(60, 90))
    rows = torch.tensor([0, 0, -1, 2, 4, 1.5, 0.3, 0, 0]).repeat(boxes, 1)
    rows[:, :2] = torch.linspace(-8, 8, boxes)[:, None]
    return replace(
        batch,
        boxes=rows,
        labels=torch.arange(boxes),
        box_counts=torch.tensor([boxes]),
        point_labels=torch.arange(points, dtype=torch.uint8) % 17,
    )


def save_gradients(city, file):
    """Run a `step` of each modality on this process's part of two samples; the main process saves the results."""
    from unipad.runtime import start

    with start("cpu", deterministic=False) as world:
        results = {modality: step(modality, city, world) for modality in MODALITIES}
        if world.is_main:
            torch.save(results, file)


def step(modality, city, world):
    """Forward and backward pass; returns means over processes: {parameter: gradient} and loss in fp64, loss in fp32."""
    from unipad.data.loader import step_batches
    from unipad.data.nuscenes import NuScenesDataset
    from unipad.model.pretrain import Pretrain
    from unipad.recipes import PRETRAIN
    from unipad.runtime import generators, mean_over_processes

    recipe = PRETRAIN[modality]["tiny"]
    recipe = replace(recipe, rays=replace(recipe.rays, per_view=8))
    point_range = (recipe.grid.low, recipe.grid.high)
    dataset = NuScenesDataset(city, "v1.0-mini", "mini_train", recipe.data, point_range=point_range)
    samples = 2 // world.size
    batch, _ = next(step_batches(dataset, samples, rank=world.rank, world=world.size))
    batch, first = batch.to("cpu"), world.rank * samples
    losses = {}
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        net = Pretrain(recipe).to(dtype)
        model = torch.nn.parallel.DistributedDataParallel(net) if world.size > 1 else net
        rngs = generators(seed=0, step=0, positions=range(first, first + samples), device=world.device)
        terms, _ = model(replace(batch, images=batch.images.to(dtype)), rngs)
        losses[str(dtype)] = sum(terms.values())
    losses["torch.float64"].backward()  # of the last `net`, in fp64
    losses = mean_over_processes(losses)
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return gradients, losses["torch.float64"], losses["torch.float32"]


if __name__ == "__main__":
    save_gradients(*sys.argv[1:])

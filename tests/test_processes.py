"""Two processes compute the gradients of one, over a whole step.

In fp64: in fp32 the untrained network amplifies rounding errors of 1e-7 to 1 % of the gradient's norm.
"""

import sys
from dataclasses import replace

import torch

from tests import scripts

MODALITIES = "camera", "fusion"


def test_two_processes_have_the_gradients_of_one(city, tmp_path):
    found = []
    for run in (scripts.run, scripts.run_two):
        done = run(__file__, city, tmp_path / "gradients.pt")
        assert done.returncode == 0, done.stderr[-4000:]
        found.append(torch.load(tmp_path / "gradients.pt", weights_only=True))
    for modality in MODALITIES:
        one, two = (grads[modality] for grads in found)
        assert one.keys() == two.keys()
        whole = torch.stack([grad.norm() for grad in one.values()]).norm()
        for name, grad in one.items():
            assert (grad - two[name]).norm() <= 1e-7 * whole, name
        assert sum(grad.norm() > 1e-4 * whole for grad in one.values()) > 50, "most are zero"


def save_gradients(city, file):
    """Run a step of each modality on this process's part of two samples; the main process saves the mean gradients."""
    from unipad.runtime import start

    with start("cpu", deterministic=False) as world:
        gradients = {modality: step(modality, city, world) for modality in MODALITIES}
        if world.is_main:
            torch.save(gradients, file)


def step(modality, city, world):
    """The gradients of one step: {parameter: gradient}."""
    from unipad.data.loader import step_batches
    from unipad.data.nuscenes import NuScenesDataset
    from unipad.model.pretrain import Pretrain
    from unipad.recipes import PRETRAIN
    from unipad.runtime import generators

    recipe = PRETRAIN[modality]["tiny"]
    recipe = replace(recipe, rays=replace(recipe.rays, per_view=8))
    box = (recipe.grid.low, recipe.grid.high)
    dataset = NuScenesDataset(city, "v1.0-mini", "mini_train", recipe.data, point_range=box)
    torch.manual_seed(0)
    net = Pretrain(recipe).double()
    model = torch.nn.parallel.DistributedDataParallel(net) if world.size > 1 else net
    samples = 2 // world.size
    batch, _ = next(step_batches(dataset, samples, rank=world.rank, world=world.size))
    first = world.rank * samples
    draws = generators(0, 0, range(first, first + samples), world.device)
    losses, _ = model(replace(batch, images=batch.images.double()), draws)
    sum(losses.values()).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


if __name__ == "__main__":
    save_gradients(*sys.argv[1:])

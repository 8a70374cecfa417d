"""--compile: parts of the model under torch.compile compute what they compute without it, in graphs without a break,
and are not compiled again and again as sizes change.

The backend `aot_eager` traces and differentiates as Inductor does, but runs PyTorch's operators: its results are equal
bit by bit. Inductor's are compared in fp64, since the untrained network amplifies rounding errors of fp32.
"""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.utils import counters

from tests import scripts
from tests.test_rays import make_batch, point_cloud, seeded_generators
from unipad import config, recipes
from unipad.compile import PARTS, compile_parts, parts_of, uncompiled
from unipad.data.collate import collate
from unipad.data.nuscenes import NuScenesDataset
from unipad.errors import UserError
from unipad.kernels import sparse_reference
from unipad.model.camera import Block, LayerNorm2d
from unipad.model.detect import Detector
from unipad.model.norm import SyncedBatchNorm
from unipad.model.occupancy import OccupancyModel
from unipad.model.pretrain import Pretrain
from unipad.model.segment import Segmenter
from unipad.runtime import World

GRID = config.Grid(low=(-8.0, -8.0, -2.0), high=(8.0, 8.0, 2.0), cell=(1.0, 2.0, 2.0))
CELLS = {"detect lidar": dict(cell=(0.5, 1.0, 1.0)), "segment": {}}  # of the voxels, for `GRID`
ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def small(recipe):
    """The recipe with fewer layers and rays, but with everything random that full-size recipes have."""
    if recipe.camera is not None:
        camera = replace(recipe.camera, depths=(1, 2, 1, 1), drop_path=0.5, frozen_stages=1)
        recipe = replace(recipe, camera=camera, data=replace(recipe.data, image_size=(64, 96)))
    if isinstance(recipe.lidar, config.UnetConfig):
        recipe = replace(recipe, lidar=replace(recipe.lidar, stem=8, widths=(8, 12, 12, 8), blocks=(1, 1, 1, 1)))
    elif recipe.lidar is not None:
        cell = tuple(c / 2 for c in recipe.grid.cell)
        recipe = replace(recipe, lidar=replace(recipe.lidar, cell=cell, widths=(8, 16)))
    if isinstance(recipe, config.PretrainRecipe):
        return replace(recipe, rays=replace(recipe.rays, per_view=8, lidar_per_view=8))
    if isinstance(recipe, config.DetectRecipe):
        return replace(recipe, detect=replace(recipe.detect, queries=20, layers=2, hidden=16, dropout=0.1))
    return recipe


def pooled(recipe):
    """The camera recipe with the view transform and the depth head of the final recipes."""
    camera = replace(recipe.camera, fpn_start=3, fpn_levels=1, view="pool", depth="complex", aspp_channels=8)
    return replace(recipe, camera=replace(camera, volume_convs=1))


SWEEPS = config.Data(image_size=(64, 96), camera_sweeps=2)
CASES = {
    **{f"train {name}": (Pretrain, small(presets["tiny"])) for name, presets in recipes.PRETRAIN.items()},
    "train sweeps": (Pretrain, replace(small(recipes.PRETRAIN["camera"]["tiny"]), data=SWEEPS)),
    "train segment": (Pretrain, small(recipes.PRETRAIN["lidar"]["segment-tiny"])),
    **{f"detect {name}": (Detector, small(presets["tiny"])) for name, presets in recipes.DETECT.items()},
    "detect pool": (Detector, pooled(small(recipes.DETECT["camera"]["tiny"]))),
    "segment": (Segmenter, small(recipes.SEGMENT["lidar"]["tiny"])),
    "occupancy": (OccupancyModel, small(recipes.OCCUPANCY["lidar"]["tiny"])),
}
QUICK = "detect pool", "segment"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def twins(model, recipe, dtype=torch.float32, backend="aot_eager"):
    """An eager model and a compiled one of the same weights."""
    eager, compiled = model(recipe).to(dtype), model(recipe).to(dtype)
    compiled.load_state_dict(eager.state_dict())
    compile_parts(compiled, ALONE, backend)
    return eager, compiled


def step(net, batch, seed, autocast=None):
    """Losses, gradients and buffers (such as statistics of batch norms) after one step, by name."""
    net.zero_grad()
    with autocast or nullcontext():
        losses = net(batch, seeded_generators(seed))
    losses, *_ = losses if isinstance(losses, tuple) else (losses,)
    sum(losses.values()).backward()
    gradients = {f"grad of {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {**losses, **gradients, **{name: b.clone() for name, b in net.named_buffers()}}


def batches_of(city, model, recipe, dtype=torch.float32):
    """Two batches of one sample each, of different numbers of points."""
    point_range = None if model is Segmenter else (recipe.grid.low, recipe.grid.high)
    dataset = NuScenesDataset(city, "v1.0-mini", "mini_train", recipe.data, point_range=point_range)
    dataset = dataset.with_occupancy() if model is OccupancyModel else dataset
    batches = [collate([dataset[i]]).to("cpu") for i in (0, 1)]
    return [replace(batch, images=batch.images.to(dtype), boxes=batch.boxes.to(dtype)) for batch in batches]


def graphs():
    """The number of graphs compiled so far in this test."""
    return counters["stats"]["unique_graphs"]


def test_the_cases_have_every_part():
    parts = {type(part) for model, recipe in CASES.values() for part in parts_of(model(recipe), processes=1)}
    assert parts == PARTS.keys()


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_a_compiled_step_is_bit_equal(case, request, monkeypatch):
    """A part that cannot be one graph raises, since parts are compiled with `fullgraph`. In compiled steps too, layers
    and their gradients share the layouts of neighbor tables."""
    model, recipe = CASES[case]
    city = request.getfixturevalue("labeled" if model is OccupancyModel else "city")
    layouts, make = [], sparse_reference._chunk
    monkeypatch.setattr(sparse_reference, "_chunk", lambda *args: layouts.append(None) or make(*args))
    eager, compiled = twins(model, recipe)
    assert eager.state_dict().keys() == compiled.state_dict().keys()
    for seed, batch in enumerate(batches_of(city, model, recipe)):
        expected, made = step(eager, batch, seed), len(layouts)
        result = step(compiled, batch, seed)
        assert len(layouts) == 2 * made
        layouts.clear()
        assert expected.keys() == result.keys()
        assert [name for name in expected if not torch.equal(expected[name], result[name])] == []
    assert graphs() > 0 and not counters["graph_break"]


def test_a_frozen_encoder_gives_the_same_bits(city):
    model, recipe = CASES["detect pool"]
    nets = twins(model, recipe)
    for net in nets:
        net.encoder.requires_grad_(False)
    for seed, batch in enumerate(batches_of(city, model, recipe)):
        expected, result = (step(net, batch, seed) for net in nets)
        assert expected.keys() == result.keys() and "grad of encoder" not in " ".join(result)
        assert all(torch.equal(expected[name], result[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["train fusion", "detect fusion", "segment"])
def test_inductor_has_the_results_of_eager_mode(case, city):
    """In fp64, gradients by the norm of all of them."""
    model, recipe = CASES[case]
    eager, compiled = twins(model, recipe, torch.float64, "inductor")
    for seed, batch in enumerate(batches_of(city, model, recipe, torch.float64)):
        expected, result = step(eager, batch, seed), step(compiled, batch, seed)
        assert expected.keys() == result.keys()
        total_norm = torch.stack([v.norm() for name, v in expected.items() if name.startswith("grad of")]).norm()
        for name, value in expected.items():
            scale = total_norm if name.startswith("grad of") else value.double().norm()
            assert (result[name] - value).double().norm() <= 1e-9 * scale, name


@pytest.mark.slow
def test_under_autocast_and_with_recomputation(city):
    """bf16 is rounded at other places than in eager mode: only the losses are compared."""
    model, recipe = CASES["train camera"]
    eager, compiled = twins(model, recipe, backend="inductor")
    compiled.encoder.set_checkpointing(True)
    for seed, batch in enumerate(batches_of(city, model, recipe)):
        expected, result = (step(net, batch, seed, torch.autocast("cpu", torch.bfloat16)) for net in (eager, compiled))
        for name in ("rgb", "depth"):
            assert result[name].item() == pytest.approx(expected[name].item(), rel=1e-2)


def scenes(count, seed=0):
    """Random scenes of one sample each: batches with up to 400 points and up to 4 boxes, for `GRID`."""
    rng = torch.Generator().manual_seed(seed)
    for i in range(count):
        points, boxes = (int(torch.randint(1, most, (), generator=rng)) for most in (400, 5))
        boxes = 0 if i == 0 else boxes  # the first scene has none
        center = torch.rand(boxes, 3, generator=rng) * 10 - 5
        yield replace(
            make_batch([point_cloud(points, seed=i)]),
            boxes=torch.cat([center, torch.ones(boxes, 6)], dim=1),
            labels=torch.randint(10, (boxes,), generator=rng),
            box_counts=torch.tensor([boxes]),
            point_labels=torch.randint(17, (points,), generator=rng, dtype=torch.uint8),
        )


@pytest.mark.parametrize(
    "case, backend, most",
    [
        ("detect lidar", "aot_eager", 6),
        pytest.param("detect lidar", "inductor", 6, marks=pytest.mark.slow),
        pytest.param("segment", "inductor", 3, marks=pytest.mark.slow),
    ],
)
def test_a_hundred_scenes_need_few_graphs(case, backend, most):
    """Numbers of points, voxels, boxes and noisy queries differ in every scene. One graph of a sparse encoder fits all
    of them; a second one is for a single voxel, and another if two stages of the first scene had equally many."""
    model, recipe = CASES[case]
    net, sizes = model(replace(recipe, grid=GRID, lidar=replace(recipe.lidar, **CELLS[case]))), set()
    compile_parts(net, ALONE, backend)
    for i, batch in enumerate(scenes(100)):
        losses = net(batch, seeded_generators(i))
        sum(losses.values()).backward()
        sizes.add(len(batch.points))
    assert len(sizes) > 50 and graphs() <= most


def test_every_image_size_and_width_has_a_graph_and_classes_share_none():
    """The limit of graphs is one per class: many sizes would end the run if all classes shared it."""
    narrow = torch.nn.Sequential(Block(8), Block(8), LayerNorm2d(8))
    wide = torch.nn.Sequential(Block(16), LayerNorm2d(16))
    for net in (narrow, wide):
        compile_parts(net, ALONE, "aot_eager")
    for _ in range(2):
        for height, width in ((4, 6), (6, 4), (10, 12)):
            narrow(torch.randn(2, 8, height, width, requires_grad=True))
        wide(torch.randn(2, 16, 4, 6, requires_grad=True))
    of_class = [_debug_get_cache_entry_list(c.forward.__code__) for c in (Block, LayerNorm2d)]
    assert [len(graphs_of) for graphs_of in of_class] == [4, 4] and graphs() == 8


@pytest.mark.slow
def test_statistics_of_compiled_norms():
    """On a CPU, Inductor adds up rows one by one in fp32, which `SyncedBatchNorm` avoids in eager mode."""
    x = 3 + 0.5 * torch.randn(500_000, 16)
    norms = SyncedBatchNorm(16).double(), SyncedBatchNorm(16), SyncedBatchNorm(16)
    norms[2].forward = torch.compile(norms[2].forward, fullgraph=True)
    exact, eager, compiled = norms[0](x.double()), norms[1](x), norms[2](x)
    largest = exact.abs().max()
    assert (eager - exact).abs().max() < 1e-6 * largest and (compiled - exact).abs().max() < 5e-4 * largest


def test_norms_over_several_processes_are_not_compiled():
    for model, recipe in CASES.values():
        net = model(recipe)
        parts = parts_of(net, processes=2)
        modules = [module for part in parts for module in part.modules()]
        assert len(set(modules)) == len(modules), "a part is inside another"
        assert not any(isinstance(module, SyncedBatchNorm) for module in modules)
        assert bool(parts) == (recipe.camera is not None or model is Detector)


def test_hooks_of_parts_and_inside_them_are_called():
    """Hooks inside a part must be registered before it first runs."""
    net, calls = torch.nn.Sequential(Block(8)), []
    net[0].norm.register_forward_hook(lambda *_: calls.append("inside"))
    compile_parts(net, ALONE, "aot_eager")
    x = torch.randn(1, 8, 4, 4)
    net(x)
    net[0].register_forward_hook(lambda *_: calls.append("part"))
    net(x)
    assert calls == ["inside", "inside", "part"]


def test_validation_runs_uncompiled():
    net = torch.nn.Sequential(Block(8))
    compile_parts(net, ALONE, "aot_eager")
    with uncompiled(True):
        net(torch.randn(1, 8, 4, 4))
    assert graphs() == 0
    with uncompiled(False):
        net(torch.randn(1, 8, 4, 4))
    assert graphs() == 1


def test_a_missing_compiler_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(UserError, match=r"--compile needs a C\+\+ compiler on a CPU"):
        compile_parts(torch.nn.Sequential(Block(8)), ALONE)


FLAGS = ["--preset", "tiny", "--device", "cpu", "--workers", 0, "--log-every", 1, "--save-every", 99]
FEW_RAYS = ["--rays.per-view", 8, "--render.samples", 12, "--render.importance", 4]
FEW_RAYS += ["--val-samples", 1, "--picture-stride", 16]
RUNS = {  # name -> script and flags
    "train camera": ("train.py", "--modality", "camera", *FEW_RAYS),
    "train lidar": ("train.py", "--modality", "lidar", *FEW_RAYS),
    "segment": ("finetune.py", "--task", "segment", "--batch-size", 1),
}


def losses_of(run):
    """{step: loss} of a run's folder."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


def launch(name, city, run, *flags, processes=1):
    """Four steps of the run `name`, whose learning rate hardly changes the weights; returns {step: loss}."""
    script, *others = RUNS[name]
    flags = [script, *FLAGS, *others, "--data-root", city, "--steps", 4, "--lr", 1e-6, "--out", run, *flags]
    done = (scripts.run if processes == 1 else scripts.run_two)(*flags, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert ("--compile: " in done.stdout) == ("--compile" in flags)
    return losses_of(run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train lidar", "segment"])
def test_a_compiled_run_resumes_an_eager_one_and_the_reverse(name, city, tmp_path):
    eager = launch(name, city, tmp_path / "eager", "--val-every", 0)
    for first, second in ((["--compile"], ["--no-compile"]), ([], ["--compile"])):
        run = tmp_path / ("first" if first else "second")
        launch(name, city, run, "--val-every", 0, "--stop-at", 2, *first)
        resumed = launch(name, city, run, "--val-every", 4, "--resume", run, *second)
        assert resumed == pytest.approx(eager, rel=2e-3)
    files = [tmp_path / folder / "checkpoints" / "last.pt" for folder in ("eager", "first", "second")]
    keys = [torch.load(file, weights_only=True)["model"].keys() for file in files]
    assert keys[0] == keys[1] == keys[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train camera"])
def test_two_compiled_processes_have_the_losses_of_two_eager_ones(name, city, tmp_path):
    """With micro-batches, recomputation, and a validation."""
    flags = ["--batch-size", 4, "--accumulate", 2, "--checkpointing", "--val-every", 4]
    eager = launch(name, city, tmp_path / "eager", *flags, processes=2)
    compiled = launch(name, city, tmp_path / "compiled", *flags, "--compile", processes=2)
    assert compiled == pytest.approx(eager, rel=2e-3)

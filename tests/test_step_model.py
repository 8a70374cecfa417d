"""`python -m benchmarks.step_model`: its FLOPs against PyTorch's own on a CPU, and what it prints."""

import csv
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests import scripts

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from benchmarks import harness, step_counts, step_model
from benchmarks.bench_step import eager_twin, random_batch
from benchmarks.lidar_scene import scene
from unipad.errors import UserError
from unipad.kernels.sdf_reference import decode, decode_sdf
from unipad.kernels.sparse_conv import sparse_conv
from unipad.kernels.sparse_map import inverse_map, strided_map
from unipad.model.field import Decoder
from unipad.recipes import PRETRAIN
from unipad.runtime import generators

aten = torch.ops.aten


def flop_counter():
    """A FlopCounterMode that knows `addmm_` too, with which the reference of `sparse_conv` sums."""
    addmm = {aten.addmm_: lambda out, a, b, out_shape=None, **_: 2 * a[0] * a[1] * b[1]}
    return FlopCounterMode(display=False, custom_mapping=addmm)


def flops_on_cpu(recipe):
    """FLOPs that FlopCounterMode counts in a real step of one sample on a CPU, whose ops are the references."""
    torch.manual_seed(0)
    net, batch = step_counts.MODELS[type(recipe)](recipe), random_batch(recipe)
    if recipe.camera is None:  # the points that `step_counts.voxel_counts` takes
        points = scene()
        points = points[points[:, 4] == 0]
        batch = replace(batch, points=points, point_counts=torch.tensor([len(points)]))
        batch = replace(batch, point_labels=torch.ones(len(points), dtype=torch.uint8))
    with flop_counter() as counter:
        losses = net(batch, generators(seed=0, step=0, positions=[0], device="cpu"))
        sum((losses[0] if isinstance(losses, tuple) else losses).values()).backward()
    by_module = counter.get_flop_counts()
    flops = sum(by_module["Global"].values())
    flops -= by_module["Global"].get(aten.bmm, 0)  # the reference interpolates by matrix products, the kernels do not
    for name, by_operator in by_module.items():
        if name.endswith(".dwconv"):  # the gradient of a depthwise weight is counted as that of a full one
            twice = 2 * by_operator[aten.convolution]
            flops -= by_operator.get(aten.convolution_backward, twice) - twice
    return flops


def print_counts(recipe):
    """Print as JSON: FLOPs on a CPU, in the model, and by the model's parts; and invalid entries of the model."""
    recipe = replace(recipe, optim=replace(recipe.optim, batch_size=1))
    counts, by_part = step_counts.count(recipe), Counter()
    for w in counts.work:
        by_part[w.part] += w.flops
    invalid = [w for w in counts.work if w.bytes < 0 or w.flops < 0 or w.part not in step_counts.PARTS]
    model = sum(w.flops for w in counts.work)
    print(json.dumps({"cpu": flops_on_cpu(recipe), "model": model, "parts": by_part, "invalid": invalid}))


def counts_of(preset):
    """What `print_counts` prints of a recipe, given as a Python expression; in a process of its own, since a `DryRun`
    does not work with Triton's interpreter, in which tests run without a GPU."""
    code = f"from tests.test_step_model import *; from unipad.recipes import SEGMENT; print_counts({preset})"
    done = scripts.run("-c", code)
    assert done.returncode == 0, done.stderr[-4000:]
    step = json.loads(done.stdout)
    assert sum(step["parts"].values()) == step["model"] and not step["invalid"]
    return step


def test_flops_of_a_camera_step_are_those_of_pytorchs_counter():
    """The tiny recipe with one block per stage, in a dry run and on a CPU."""
    step = counts_of("shallow(PRETRAIN['camera']['tiny'])")
    # the renderer's backward is counted as twice its forward, but the points, an input, have no gradient
    assert step["model"] == pytest.approx(step["cpu"], rel=2e-3)
    of_camera = {"batch", "image encoder", "neck", "view transform", "sampler", "render", "losses", "optimizer"}
    assert step["parts"].keys() == of_camera
    assert all(step["parts"][part] for part in of_camera - {"batch", "losses", "optimizer"})


@pytest.mark.slow
def test_flops_of_a_segmentation_step_are_those_of_pytorchs_counter():
    step = counts_of("SEGMENT['lidar']['tiny']")
    assert step["model"] == step["cpu"]
    assert step["parts"].keys() == {"batch", "LiDAR encoder", "head", "losses", "optimizer"}


def shallow(recipe):
    return replace(recipe, camera=replace(recipe.camera, depths=(1, 1, 1, 1)))


def test_products_of_a_sparse_convolution():
    """Forward and both gradients, of a strided convolution, against its reference."""
    coords = torch.randint(0, 9, (200, 3)).unique(dim=0).int()
    coords = torch.nn.functional.pad(coords, (1, 0))
    out_coords, idx = strided_map(coords, (9, 9, 9), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1))
    (K, M), N, n = idx.shape, len(coords), int((idx >= 0).sum())
    x, weight = torch.randn(N, 8, requires_grad=True), torch.randn(16, 3, 3, 3, 8, requires_grad=True)
    with flop_counter() as counter:
        out = sparse_conv(x, weight, idx, inverse_map(idx, N))
        out.sum().backward()
    pairs = {(K, N, M): n, (K, M, N): n}
    launches = {
        "_gather_gemm_kernel": [dict(K=K, I=8, O=16, features_ptr=x, out_ptr=out),
                                dict(K=K, I=16, O=8, features_ptr=out, out_ptr=x)],
        "_d_weight_kernel": [dict(I=8, O=16, features_ptrs=(x,), d_out_ptrs=(out,), read_idx_ptr=torch.empty(K * M))],
    }  # fmt: skip
    flops = [step_counts.launch_flops(name, given, pairs) for name, calls in launches.items() for given in calls]
    assert {unit for _, unit in flops} == {"fp32"}
    assert sum(f for f, _ in flops) == counter.get_total_flops() == 3 * 2 * n * 8 * 16


@pytest.mark.parametrize("rgb_layers", [4, 0])
def test_products_of_the_field(rgb_layers):
    """Per sample: FlopCounterMode's count for 8 samples minus that for 7, without the products of weights alone."""
    C, H, layers, flops = 8, 16, 5, {}
    rgb_mlp = Decoder(6 + C + H, 3, H, rgb_layers).tensors() if rgb_layers else None
    mlps = Decoder(C, 1 + H, H, layers).tensors(), rgb_mlp
    for S in (7, 8):
        feature, slope = torch.randn(1, S, C), torch.randn(1, S, 3, C)
        points, direction = torch.randn(1, S, 3), torch.randn(1, 3)
        for name, run in {
            "values": lambda f=feature, p=points: decode_sdf(f, p, mlps[0]),
            "field": lambda f=feature, s=slope, p=points, d=direction: decode(f, s, p, d, mlps, torch.ones(3)),
        }.items():
            with FlopCounterMode(display=False) as counter:
                run()
            flops[name, S] = counter.get_total_flops()
    assert flops["values", 8] - flops["values", 7] == 2 * step_counts.sdf_products(C, H, layers, outputs=1)
    assert flops["field", 8] - flops["field", 7] == 2 * sum(step_counts.field_products(C, H, layers, rgb_layers))


def test_operators_by_hand():
    """A 3 x 3 convolution of 4 channels on 5 x 6 pixels, full and depthwise, in fp32: FLOPs, unit and bytes."""
    work = {}

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            moved = step_counts.operator_bytes(name, args, kwargs or {}, out)
            work[name] = *step_counts.operator_flops(func, args, kwargs or {}, out), moved
            return out

    for groups, unit in ((1, "tf32"), (4, "fp32")):
        conv = nn.Conv2d(4, 4, 3, padding=1, groups=groups, bias=False)
        x = torch.randn(1, 4, 5, 6, requires_grad=True)
        with Recorder():
            conv(x).sum().backward()
        forward, weights = 2 * 30 * 9 * 4 * (4 // groups), 9 * 4 * (4 // groups)
        assert work["convolution"] == (forward, unit, 4 * (120 + weights + 120))
        # reads the gradient, which is expanded from one number, the images and the weights; writes two gradients
        assert work["convolution_backward"] == (2 * forward, unit, 4 * (1 + 120 + weights + 120 + weights))
    table, rows = torch.zeros(1000, 8), torch.tensor([1, 2])
    with Recorder():
        table[rows]
        table.index_copy_(0, rows, torch.ones(2, 8))
    assert work["index"] == (0, "fp32", 2 * 4 * 16 + 16)  # two rows read, two written, and the indices
    assert work["index_copy_"][2] == 3 * 4 * 16 + 16  # two rows read, two written, their values, and the indices


def test_the_bound_of_a_part():
    """The host, if it takes longer than the GPU, which takes the longer of compute and memory operator by operator."""
    assert step_model.Times(compute=5, memory=4, gpu=8, host=7).bound == "compute"
    assert step_model.Times(compute=4, memory=5, gpu=8, host=7).bound == "memory"
    assert step_model.Times(compute=5, memory=4, gpu=8, host=9).bound == "host"


def test_runs_of_several_gpus(monkeypatch, capsys):
    """By hand: 3 ms of GPU time per sample and 1 ms per step; one call by Python per step and two per sample."""

    def counts(recipe, *_, **__):
        n = recipe.optim.batch_size
        gpu = step_counts.Work("render", "mm", True, flops=(3 * n + 1) * 10**9, unit="fp32", bytes=0)
        calls = [step_counts.Work("head", "add", True, 0, "fp32", 0)] * (2 * n)
        return step_counts.Counts([gpu, *calls], batch_bytes=n * 10**6, gradient_bytes=10**9)

    monkeypatch.setattr(step_model, "count", counts)
    machine = step_model.Machine(fp32_tflops=1, host_us=1000, pcie_gb_s=1, nvlink_gb_s=1000, image_ms=1, sweep_ms=2)
    recipe = PRETRAIN["camera"]["camera-0.1"]  # 4 samples per step, 12 epochs; 6 images and a sweep per sample
    step_model.main(step_model.Args(preset="camera-0.1", samples=1000, machine=machine, gpus=(1, 3, 4)))
    out = capsys.readouterr().out
    assert recipe.optim.batch_size == 4 and "3000 steps of 4 samples" in out
    # GPU 13 ms; 9 calls; (6 + 2) / 4 ms per sample; 4 MB; gradients sent 2 * 3 / 4 times
    assert "| 1 | 4 | 13.0 | 9.0 | 8.0 | 4.0 | 0.0 | GPU | 308 | 0.0 | 0.0 |" in out
    assert "| 4 | 1 | 4.0 | 3.0 | 2.0 | 1.0 | 1.5 | GPU | 1000 | 0.0 | 0.0 |" in out
    assert "\n| 3 |" not in out  # does not divide 4
    assert "| render | 4.0 | 0 | 1 | 0 | 4.00 | 0.00 | 4.00 | 1.00 | compute |" in out
    assert "measured" not in out  # on another machine


def test_the_newest_measured_step_stands_beside_the_model(monkeypatch, tmp_path, capsys):
    """Of the recipe's rows by our kernels, the last one that has the column; a CPU's has no GPU time."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results.csv")
    row = {"op": "step of train/lidar/tiny", "impl": "triton", "device": "H200", "commit": "abc"}
    rows = [
        row | {"gpu_ms": "5", "both_ms": "9", "commit": "old"},
        row | {"gpu_ms": "4", "both_ms": "8"},
        row | {"gpu_ms": "", "both_ms": "10", "device": "CPU", "commit": "new"},
        row | {"gpu_ms": "1", "both_ms": "1", "impl": "eager"},
        row | {"gpu_ms": "1", "both_ms": "1", "op": "step of train/lidar/other"},
    ]
    with harness.RESULTS.open("w", newline="") as f:
        writer = csv.DictWriter(f, ["op", "impl", "device", "commit", "gpu_ms", "both_ms"])
        writer.writeheader()
        writer.writerows(rows)
    step_model.print_measured("train/lidar/tiny", step_model.Times(compute=1, memory=1, gpu=2, host=3))
    assert capsys.readouterr().out.splitlines() == [
        "GPU: model 2.0 ms, measured 4.0 ms (H200, abc), model / measured 0.50",
        "step: model 3.0 ms, measured 10.0 ms (CPU, new), model / measured 0.30",
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"preset": "tiny"}, "several modalities"),
        ({"preset": "camera-0.2"}, "train/camera/camera-0.1"),
        ({"batch_size": 0}, "--batch-size 0 must be above 0"),
        ({"gpus": (4, 0)}, "--gpus 0"),
        ({"machine": step_model.Machine(gb_s=-1)}, "--gb-s -1"),
    ],
)
def test_arguments_that_make_no_sense(given, said):
    with pytest.raises(UserError, match=said):
        step_model.main(step_model.Args(**given))


@pytest.mark.parametrize("task", step_model.TASKS)
def test_every_preset_can_be_chosen(task):
    presets, _ = step_model.TASKS[task]
    assert step_model.find(step_model.Args(task))[1] in [r for named in presets.values() for r in named.values()]
    for modality, named in presets.items():
        for name, recipe in named.items():
            assert step_model.find(step_model.Args(task, name, modality)) == (f"{task}/{modality}/{name}", recipe)


def test_the_eager_step_of_bench_step_has_the_same_losses():
    recipe = PRETRAIN["camera"]["tiny"]
    torch.manual_seed(0)
    net, batch = step_counts.MODELS[type(recipe)](recipe), random_batch(recipe)
    with torch.no_grad():
        ours, eager = (
            model(batch, generators(seed=0, step=0, positions=[0], device="cpu"))[0] for model in (net, eager_twin(net))
        )
    assert ours.keys() == eager.keys()
    for name, loss in ours.items():
        assert loss.item() == pytest.approx(eager[name].item(), rel=1e-3), name

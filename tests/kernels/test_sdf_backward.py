"""The fused renderer's backward: what its kernels may cost, its gradient under strict determinism, training steps.

test_sdf_render.py compares its gradients with autograd's.
"""

import pytest
import torch
import torch.nn.functional as F

from tests.check import NoFloatCumsum, WaitRecorder, launches
from tests.conftest import HAS_GPU
from tests.golden import assert_close_to_max
from tests.kernels.test_sdf_render import (
    AMD,
    DEVICE,
    EXACT,
    FEWER,
    HOPPER,
    IEEE,
    NO_RGB,
    NVIDIA,
    ONE_VOXEL,
    RGB,
    SHALLOW,
    TILE,
    VOLSDF,
    WIDE,
    WIDE_EXACT,
    adapted,
    assert_tiles_are_as_chosen,
    formulas,
    launch,
    make_inputs,
    results,
)
from unipad.config import Grid, Render
from unipad.kernels.sdf_field import WIDE_WARPS, programs_for
from unipad.kernels.sdf_render import sdf_render
from unipad.model.rays import Rays
from unipad.model.render import Renderer

# the volume's gradient: by atomic adds, or summed by `cell_sum` under strict determinism
ADD, BY_CELL = dict(SCATTER=True), dict(SCATTER=False)
WIDE_SHALLOW = WIDE_EXACT | SHALLOW
# checked by tests/test_compiles.py; columns, constexprs and the reason for the stacks: see test_sdf_render.py
LAUNCHES = [
    launch("_sdf_render_bwd_rgb_kernel", RGB | TILE, NVIDIA, 255, 8192, 100, "HMMA"),
    launch("_sdf_render_bwd_rgb_kernel", NO_RGB | TILE, NVIDIA, 80, 256),
    launch("_sdf_render_bwd_rgb_kernel", EXACT | TILE, NVIDIA, 255, 8192, 500, "HMMA"),
    launch("_sdf_render_bwd_rgb_kernel", WIDE | TILE, HOPPER, 255, 53248, 368, "HMMA", WIDE_WARPS),
    launch("_sdf_render_bwd_rgb_kernel", RGB | TILE | IEEE, AMD),
    launch("_sdf_render_bwd_rgb_kernel", NO_RGB | TILE | IEEE, AMD),
    launch("_sdf_render_bwd_sdf_kernel", RGB | TILE | ADD, NVIDIA, 255, 8192, 100, "HMMA"),
    launch("_sdf_render_bwd_sdf_kernel", NO_RGB | TILE | ADD, NVIDIA, 255, 8192, 100, "HMMA"),
    launch("_sdf_render_bwd_sdf_kernel", RGB | TILE | BY_CELL, HOPPER, 255, 8192, 100, "HMMA"),
    # 488 on sm_80; 240 on sm_90 and sm_120
    launch("_sdf_render_bwd_sdf_kernel", EXACT | TILE | ADD, NVIDIA, 255, 8192, 488, "HMMA"),
    launch("_sdf_render_bwd_sdf_kernel", WIDE | TILE | ADD, HOPPER, 255, 33792, 200, "HMMA", WIDE_WARPS),
    launch("_sdf_render_bwd_sdf_kernel", RGB | TILE | ADD | IEEE, AMD),
    launch("_sdf_render_bwd_sdf_kernel", NO_RGB | TILE | ADD | IEEE, AMD),
    launch("_sdf_render_bwd_sdf_kernel", RGB | TILE | BY_CELL | IEEE, AMD),
    # fields that no preset has; with all layers, WIDE_EXACT compiles for minutes
    launch("_sdf_render_bwd_rgb_kernel", RGB | TILE | VOLSDF, HOPPER, 255, 8192, 100, "HMMA"),
    launch("_sdf_render_bwd_rgb_kernel", NO_RGB | TILE | VOLSDF, HOPPER, 80, 256),
    launch("_sdf_render_bwd_rgb_kernel", RGB | TILE | FEWER, HOPPER, 255, 8192, 100, "HMMA"),
    # 12 bytes more than with several voxels may have: the compiler's choice of what to spill, for a volume of no use
    launch("_sdf_render_bwd_rgb_kernel", RGB | TILE | ONE_VOXEL, HOPPER, 255, 8192, 112, "HMMA"),
    launch("_sdf_render_bwd_rgb_kernel", WIDE_SHALLOW | TILE, HOPPER, 255, 16384, 2584, "HMMA", WIDE_WARPS),
    launch("_sdf_render_bwd_rgb_kernel", WIDE | TILE | IEEE, AMD, warps=WIDE_WARPS),
    launch("_sdf_render_bwd_sdf_kernel", NO_RGB | TILE | BY_CELL, HOPPER, 255, 8192, 100, "HMMA"),
    launch("_sdf_render_bwd_sdf_kernel", RGB | TILE | ADD | FEWER, HOPPER, 255, 8192, 100, "HMMA"),
    launch("_sdf_render_bwd_sdf_kernel", RGB | TILE | BY_CELL | FEWER, HOPPER, 255, 8192, 100, "HMMA"),
    launch("_sdf_render_bwd_sdf_kernel", RGB | TILE | ADD | ONE_VOXEL, HOPPER, 255, 8192, 100, "HMMA"),
    launch("_sdf_render_bwd_sdf_kernel", WIDE_SHALLOW | TILE | ADD, HOPPER, 255, 33792, 592, "HMMA", WIDE_WARPS),
    launch("_sdf_render_bwd_sdf_kernel", WIDE | TILE | ADD | IEEE, AMD, warps=WIDE_WARPS),
]


def test_launches_have_the_tiles_that_the_code_chooses():
    assert_tiles_are_as_chosen(LAUNCHES)


@pytest.mark.parametrize(
    "work, warps, programs",
    [
        (1, 1, 1),
        (1056, 1, 1056),  # all that 132 multiprocessors can run at once
        (1057, 1, 529),  # two each, since one has two: half of the sums
        (3072, 1, 1024),  # rays of camera-0.1, three each
        (3072, 8, 128),
    ],
)
def test_no_more_programs_than_the_slowest_needs(work, warps, programs):
    assert programs_for(work, multiprocessors=132, warps=warps) == programs


def test_zero_upstream_gradient_gives_a_zero_volume_gradient():
    inputs = make_inputs(R=2, S=5, sdf_layers=2, rgb_layers=2)
    inputs["volume"].requires_grad_()
    outs = adapted(sdf_render)(**inputs)
    (d_volume,) = torch.autograd.grad(outs, inputs["volume"], [torch.zeros_like(o) for o in outs])
    assert d_volume.shape == inputs["volume"].shape and not d_volume.any()


@pytest.mark.parametrize("Z", [2, 1])
@pytest.mark.parametrize("volumes", [(0, 0), (1, 0)])
def test_strict_determinism_sums_by_cell(volumes, Z):
    """The fused backward runs, with `cell_sum` in place of atomic adds. Some samples lie on cell faces or outside."""
    inputs = make_inputs(R=2, S=20, channels=16, sdf_layers=2, rgb_layers=2, B=1 + max(volumes))
    inputs["volume"], inputs["volume_idx"] = inputs["volume"][:, :Z, :3, :3], torch.tensor(volumes, device=DEVICE).int()
    inputs["cells_per_unit"], inputs["cell_offset"] = torch.tensor([[1.0, 1, 2], [1.0, 1, 0.5]], device=DEVICE)
    inputs["edges"] = torch.arange(21, device=DEVICE).expand(2, 21) / 8
    inputs["origins"] = torch.zeros(2, 3, device=DEVICE)
    inputs["directions"] = torch.tensor([[1.0, 0, 0], [0, 0.6, 0.8]], device=DEVICE)
    truth = results(formulas("neus"), inputs, torch.float64)
    torch.use_deterministic_algorithms(True)  # until the end of this test, see conftest.py
    with launches() as launched:
        ours = results(adapted(sdf_render, exact=True), inputs)
    assert "_cell_sum_kernel" in launched and launched[-1] == "_pack_bwd_kernel"
    for name, value in ours.items():
        # some gradients are sums of few samples, whose terms cancel
        assert_close_to_max(value, truth[name], 5e-5, name)


def training_step(method):
    """A step of a fused renderer: (tensors that every call reads, a function that returns losses and gradients)."""
    cfg = Render(
        method=method, channels=16, samples=6, importance=4, sdf_layers=2, rgb_layers=2,
        truncation=1.5, free_space_weight=1.0, sdf_weight=10.0, eikonal_weight=0.01, points_weight=1.0,
        features_weight=1.0,
    )  # fmt: skip
    grid = Grid(low=(-8.0, -8.0, -2.0), high=(8.0, 8.0, 2.0), cell=(4.0, 4.0, 2.0))
    renderer = Renderer(cfg, grid, feature_channels=5).to(DEVICE)
    volume = torch.randn(2, 16, 2, 4, 4, device=DEVICE).requires_grad_()
    directions = F.normalize(torch.randn(4, 3, device=DEVICE) * torch.tensor([1, 1, 0.2], device=DEVICE), dim=1)
    depth = torch.tensor([4.0, 5.0, -1.0, 6.0], device=DEVICE)  # -1: unknown
    volume_idx = torch.tensor([0, 1, 0, 1], device=DEVICE).int()
    targets = torch.rand(4, 3, device=DEVICE), volume_idx, torch.randn(4, 5, device=DEVICE)
    rays = Rays(torch.zeros_like(directions), directions, depth, *targets)
    jitter = torch.rand(4, renderer.jitters, device=DEVICE)
    points = directions * 5, volume_idx
    wrt = [volume, *(p for p in renderer.parameters() if p.requires_grad)]

    def step():
        losses = renderer.loss(renderer(volume, rays, jitter, points), rays)
        return [*losses.values(), *torch.autograd.grad(sum(losses.values()), wrt)]

    return (volume, jitter, directions), step


@pytest.mark.parametrize("deterministic", [False, True])
def test_only_volsdfs_sampler_waits_for_the_device_in_a_training_step(deterministic):
    """Sampling, forward, losses and backward; a step without waits can be captured as a CUDA graph.

    `WaitRecorder` finds the waits on a CPU too.
    """
    _, step = training_step("neus")
    torch.use_deterministic_algorithms(True, warn_only=not deterministic)
    with launches() as launched, WaitRecorder() as waits:
        values = step()
    assert not waits.marked and not waits.unmarked
    assert {"_resample_kernel", "_sdf_render_bwd_sdf_kernel"} <= {*launched}
    assert ("_cell_sum_kernel" in launched) == deterministic and all(t.isfinite().all() for t in values)
    _, step = training_step("volsdf")
    with WaitRecorder() as waits:
        step()
    assert set(waits.marked) == {"convergence of VolSDF's sampler"} and not waits.unmarked


def test_volsdf_uses_no_cumsum_of_floats():
    """VolSDF's sampler needs running sums, which must be deterministic under `--deterministic`."""
    _, step = training_step("volsdf")
    torch.use_deterministic_algorithms(True)
    with launches() as launched, NoFloatCumsum():
        values = step()
    assert "_cell_sum_kernel" in launched and all(t.isfinite().all() for t in values)
    with pytest.raises(AssertionError, match="not deterministic"), NoFloatCumsum():
        torch.ones(3).cumsum(0)  # `NoFloatCumsum` detects it


@pytest.mark.skipif(not HAS_GPU, reason="CUDA graphs need a GPU")
def test_a_training_step_replayed_as_a_cuda_graph_matches():
    """Captured once and replayed on new values: the same losses and gradients as a step without a graph."""
    read_by_step, step = training_step("neus")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels and lets the libraries allocate
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in read_by_step:
            tensor.copy_(tensor.flip(0))
    graph.replay()
    for value, expected in zip(captured, step(), strict=True):
        assert_close_to_max(value, expected, 1e-5)  # atomic adds: the last bits vary

"""Kernels and references reject the same arguments and give geometry no gradient; references ignore autocast."""

from contextlib import nullcontext

import pytest
import torch

from tests.conftest import HAS_GPU
from unipad.kernels.backend import references
from unipad.kernels.voxelize import grid_subsample
from unipad.selfcheck import checks

DEVICE = "cuda" if HAS_GPU else "cpu"
# Op name -> its first case in the self-check, at the small size (reversed, so that the first replaces the later ones)
CASES = {case.name.split(",")[0].split()[0]: case for case in reversed(list(checks(("small",))))}
PATHS = {"kernel": nullcontext, "reference": references}  # kernels run by default in this folder, see conftest.py


def inputs_of(op):
    torch.manual_seed(0)
    return CASES[op].inputs(DEVICE, torch.float32)


def both_resamplers(**wrong):
    return [("sample_pdf", wrong), ("resample", wrong)]


# op, wrong arguments (or functions that make them from the valid ones), pattern in the message. The sizes in the
# messages (33 rays, 40 boxes) are those of the self-check's small cases.
REJECTED = [
    (*call, message)
    for calls, message in [
        ([("clip_rays", dict(directions=lambda t: t[:1]))], r"\(1, 3\) do not match"),
        ([("clip_rays", dict(low=(-1.0, -1.0)))], "corners"),
        ([("stratified_edges", dict(far=lambda t: t[:1]))], r"far \(1,\) do not match"),
        ([("stratified_edges", dict(S=0))], "at least one sample"),
        ([("stratified_edges", dict(jitter=lambda t: t[:-1]))], r"jitter \(32,\) does not match 33 rays"),
        (both_resamplers(edges=lambda t: t[:, 1:]), r"edges \(33, 9\) do not match weights \(33, 9\)"),
        (both_resamplers(edges=lambda t: t[:, :1], weights=lambda t: t[:, :0]), "S > 0"),
        (both_resamplers(jitter=lambda t: t[:1]), r"jitter \(1,\) does not match 33 rays"),
        (both_resamplers(n=-1), "cannot draw -1"),
        ([("neus_resample", dict(sdf=lambda t: t[:, 1:]))], r"edges \(33, 10\) do not match sdf \(33, 8\)"),
        ([("neus_resample", dict(n=-1))], "cannot draw -1"),
        ([("merge", dict(new_edges=lambda t: t[:1]))], r"\(33, 10\) and \(1, 8\) do not match"),
        ([("trilinear", dict(points=lambda t: t[..., :2]))], "do not match"),
        ([("trilinear_value", dict(volume_idx=lambda t: t[:1]))], "do not match"),
        ([("ray_features", dict(edges=lambda t: t[:, 1:]))], "do not match"),
        ([("ray_features", dict(weights=lambda t: t[:1]))], "do not match"),
        ([("ray_features", dict(volume=lambda t: t[:, :0]))], "has no voxels"),
        ([("ray_features", dict(cells=lambda t: (t[0], t[1][:1])))], r"\[3\] each, not \[\(3,\), \(1,\)\]"),
        ([("ray_features", dict(weights=lambda t: t.double()))], "all are fp32 or all are fp64"),
        ([("composite", dict(alpha=lambda t: t[:, :1]))], r"alpha \(33, 1\) does not match values \(33, 16, 4\)"),
        ([("composite", dict(values=lambda t: t[..., 0]))], "does not match"),
        ([("composite", dict(alpha=lambda t: t.double()))], "alpha is torch.float64"),
        ([("depth_in_range", dict(hit=lambda t: t[:1]))], r"\(33,\), \(1,\)\] do not match"),
        ([("depth_in_range", dict(edges=lambda t: t[:, :1]))], "S > 0"),
        ([("warp", dict(depth=lambda t: t[:1]))], r"\(1,\), \(33, 3\).* do not match"),
        ([("warp", dict(projections=lambda t: t[:, :1]))], "do not match"),
        ([("warp", dict(images=lambda t: t[0]))], "do not match"),
        ([("warp", dict(images=lambda t: t[:, :, :0]))], "no pixels"),
        ([("warp", dict(depth=lambda t: t.half()))], "fp32 or fp64"),
        ([("ray_mean", dict(of_volume=lambda t: t[:, :1]))], r"\(33,\), \(2, 1\)\] do not match"),
        ([("ray_mean", dict(of_volume=lambda t: t.double()))], "of_volume torch.float64"),
        ([("neus_alpha", dict(deltas=lambda t: t[:, :1]))], r"deltas \(33, 1\) do not match sdf \(33, 16\)"),
        ([("neus_alpha", dict(directions=lambda t: t[:1]))], "match sdf"),
        ([("neus_alpha", dict(gradient=lambda t: t[:, :1]))], "match sdf"),
        ([("neus_alpha", dict(inv_s=lambda t: t.expand(33)))], r"is \[1\], not \(33,\)"),
        ([("volsdf_alpha", dict(deltas=lambda t: t[:1]))], "match sdf"),
        ([("volsdf_alpha", dict(beta=lambda t: t.expand(16)))], r"is \[1\], not \(16,\)"),
        ([("lift", dict(features=[], depths=[]))], "0 levels"),
        ([("lift", dict(lidar2image=lambda t: t[:, :1]))], "does not match"),
        ([("lift", dict(low=(0.0, 0.0)))], r"\(x, y, z\) each"),
        ([("voxel_pool", dict(depths=lambda t: t[..., 0]))], r"\[B, N, h, w, channels\]"),
        ([("voxel_pool", dict(shape=(8, 8)))], r"\(x, y, z\) each"),
        ([("sdf_render", dict(edges=lambda t: t[:, :1]))], "S > 0"),
        ([("sdf_render", dict(density_param=lambda t: t.expand(4)))], r"density_param is \[1\]"),
        ([("pack", dict(channels=31))], r"tensor 2 of the distance MLP is \[16, 32\], not \[16, 31\]"),
        ([("sdf_values", dict(starts=lambda t: t[:1]))], "do not match"),
        ([("sdf_values", dict(cells=lambda t: t[0]))], r"cells_per_unit and cell_offset are \[3\]"),
        ([("rotated_iou_bev", dict(a=lambda t: t[:, :4]))], r"\[N, 5\]"),
        ([("paired_iou_3d", dict(a=lambda t: t[:1]))], "1 boxes do not match 40"),
        ([("rotated_nms", dict(scores=lambda t: t[:1]))], "do not match"),
        ([("voxelize", dict(low=(0.0, 0.0)))], "triples"),
        ([("voxelize", dict(cell=(0.5, 0.0, 0.5)))], "size above 0"),
        ([("voxelize", dict(max_points=0))], "max_points"),
        ([("carve", dict(ends=lambda t: t[:1]))], r"\(300, 3\), \(1, 3\), \(300,\), \(300,\), \(300,\)\] do not match"),
        ([("carve", dict(rank=lambda t: t[:1]))], r"\(1,\), \(300,\)\] do not match"),
        ([("carve", dict(origins=lambda t: t.double()))], "float32, not torch.float64"),
        ([("carve", dict(volume_idx=lambda t: t.long()))], "int32"),
        ([("carve", dict(hit=lambda t: t.int()))], "hit is bool"),
        ([("carve", dict(cell=(0.5, 0.0, 0.5)))], "size above 0"),
        ([("carve", dict(shape=(8, 8)))], "triples"),
        ([("carve", dict(B=0))], "at least 1 volume"),
    ]
    for call in calls
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("op, wrong, message", REJECTED, ids=[f"{op}-{'-'.join(wrong)}" for op, wrong, _ in REJECTED])
def test_kernel_and_reference_reject_the_same_arguments(op, wrong, message, path):
    inputs = inputs_of(op)
    wrong = {name: value(inputs[name]) if callable(value) else value for name, value in wrong.items()}
    with pytest.raises(AssertionError, match=message), PATHS[path]():
        CASES[op].op(**inputs | wrong)


def test_grid_subsample_rejects_invalid_arguments():
    """Not a case above: it has no kernel."""
    points = torch.rand(5, 3, device=DEVICE)
    with pytest.raises(AssertionError, match=r"noise \(4,\) does not match 5 points"):
        grid_subsample(points, [5], 0.5, torch.rand(4, device=DEVICE))
    with pytest.raises(AssertionError, match="size above 0"):
        grid_subsample(points, [5], 0.0)


# convolutions follow autocast
@pytest.mark.parametrize("op", [op for op in CASES if not op.startswith(("sparse_conv", "sparse_layers"))])
def test_autocast_does_not_change_a_reference(op):
    case, inputs = CASES[op], inputs_of(op)

    def run():
        outs = case.op(**inputs)
        return outs if isinstance(outs, tuple) else (outs,)

    with references():
        plain = run()  # without autocast
        with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
            under_autocast = run()
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(plain, under_autocast, strict=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "op, names",
    [
        ("lift", ["lidar2image"]),
        ("voxel_pool", ["lidar2image"]),
        ("sdf_render", ["rays", "edges", "cells"]),
        ("warp", ["rays", "projections"]),
        ("ray_features", ["rays", "edges", "cells"]),
    ],
)
def test_geometry_has_no_gradient_on_either_path(op, names, path):
    inputs = inputs_of(op)
    geometry = [t.requires_grad_() for name in names for t in _tensors(inputs[name]) if t.is_floating_point()]
    wrt = [t.requires_grad_() for name in CASES[op].wrt for t in _tensors(inputs[name])]
    with PATHS[path]():
        out = CASES[op].op(**inputs)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
    assert all(t.grad is None for t in geometry) and any(t.grad is not None and t.grad.any() for t in wrt)


def _tensors(value):
    return [value] if torch.is_tensor(value) else [t for part in value for t in _tensors(part)]

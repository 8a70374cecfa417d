"""Check that the kernels compute correct results on your GPU: compare every op with its PyTorch reference in fp64.

    python -m unipad.selfcheck                           all ops, at small and at recipe sizes
    python -m unipad.selfcheck --sizes small             small sizes only
    python -m unipad.selfcheck --ops lift sdf_render     ops whose names start with one of these

Prints one line per check: the largest error of outputs and gradients, its bound, and for information the time of
forward and backward. The exit code is 1 if a check fails. Without a GPU, the references run at small sizes.

An error is the largest absolute difference of an output or gradient, as a fraction of its largest true value. It may be
twice the error of the reference in the same type, plus SLACK. The true values are computed in fp64 from inputs rounded
to the type, which are what the kernels read. Integers and booleans must be equal. NaN and infinity always fail.

A faulting kernel can destroy the GPU context of its process. So the checks run in a separate process, and after a crash
the remaining ones continue in a new process.
"""

import contextlib
import faulthandler
import json
import math
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
import tyro

from unipad.errors import UserError
from unipad.kernels.backend import on_triton, triton
from unipad.kernels.composite import composite, composite_ref
from unipad.kernels.lift import lift, lift_ref
from unipad.kernels.ray_sample import (
    clip_rays,
    clip_rays_ref,
    merge,
    merge_ref,
    resample,
    resample_ref,
    sample_pdf,
    sample_pdf_ref,
    stratified_starts,
    stratified_starts_ref,
)
from unipad.kernels.rotated_iou import (
    paired_iou_3d,
    paired_iou_3d_ref,
    rotated_iou_bev,
    rotated_iou_bev_ref,
    rotated_nms,
    rotated_nms_ref,
)
from unipad.kernels.sdf_alpha import (
    interval_alpha,
    interval_alpha_ref,
    neus_alpha,
    neus_alpha_ref,
    unisurf_alpha,
    volsdf_alpha,
    volsdf_alpha_ref,
)
from unipad.kernels.sdf_render import sdf_render, sdf_render_ref, sdf_values, sdf_values_ref
from unipad.kernels.sparse_conv import sparse_conv, sparse_conv_act, sparse_conv_act_ref, sparse_conv_ref
from unipad.kernels.sparse_map import (
    inverse_map,
    inverse_map_ref,
    out_shape,
    strided_map,
    strided_map_ref,
    submanifold_map,
    submanifold_map_ref,
    transposed_map,
    transposed_map_ref,
)
from unipad.kernels.sparse_tiles import NeighborTable
from unipad.kernels.trilinear import trilinear, trilinear_ref, trilinear_value, trilinear_value_ref
from unipad.kernels.voxel_keys import sort_voxels, sort_voxels_ref, voxel_keys, voxel_keys_ref
from unipad.kernels.voxel_pool import voxel_pool, voxel_pool_ref
from unipad.kernels.voxelize import voxelize, voxelize_ref
from unipad.recipes import PRETRAIN
from unipad.runtime import commit, exit_on_user_error, has_bf16

SIZES = ("small", "recipe")
TYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Fractions of the largest true value. tf32 has the mantissa of fp16, and Hopper truncates operands instead of rounding
# them, which accumulates over the layers of a field instead of averaging out.
SLACK = {"fp32": 1e-5, "tf32": 1e-2, "fp16": 1e-3, "bf16": 1e-2}
CASE_TIMEOUT = 240  # seconds per check, including compilation; then its process is killed
JOBS = 16  # processes that compile in parallel, at most
TIMED_RUNS = 3  # the fastest is reported


@dataclass(frozen=True)
class Case:
    """One op at one size, in one type."""

    name: str
    size: str  # one of SIZES
    dtype: str  # a key of TYPES
    inputs: Callable  # takes the device and the torch dtype, returns the arguments by name
    op: Callable
    ref: Callable
    wrt: tuple = ()  # names of the inputs whose gradients are compared
    slack: float | None = None  # None: SLACK of the type
    double: bool = True  # False: compare with fp32, whose rounding decides e.g. which cell a point lies in
    strict: bool = False  # run under strict determinism, twice: both runs must be bit-equal

    def __str__(self):
        return f"{self.name}, {self.size}, {self.dtype}"


@dataclass(frozen=True)
class Result:
    name: str
    size: str
    dtype: str
    error: float  # of the output or gradient with the largest error relative to its bound
    bound: float
    ms: float  # forward and backward of the op
    message: str  # "" if the check passed

    @property
    def ok(self):
        return not self.message

    def __str__(self):
        kind = f"{self.name:36} {self.size:6} {self.dtype:4}"
        ms = "" if math.isnan(self.ms) else f"  {self.ms:8.3f} ms"
        figures = f"error {self.error:.1e} (bound {self.bound:.1e}){ms}"
        return f"{kind}  ok    {figures}" if self.ok else f"{kind}  FAIL  {self.message}"


def run(case):
    """The `Result` of a case. Never raises: an exception of the op becomes the result's message."""
    device, facts = _device(), (case.name, case.size, case.dtype)
    try:
        torch.manual_seed(0)
        inputs = case.inputs(device, TYPES[case.dtype])
        truth = _run(case.ref, inputs, case, torch.float64 if case.double else None)
        plain = _run(case.ref, inputs, case)
        with _strict_determinism(case.strict):
            ours = _run(case.op, inputs, case)
            again = _run(case.op, inputs, case) if case.strict else ours
        error, bound, message = _compare(ours, plain, truth, case)
        differ = [name for name in ours if not torch.equal(ours[name], again[name])]
        if not message and differ:
            message = f"{differ[0]} differs from run to run"
        with _strict_determinism(case.strict):
            return Result(*facts, error, bound, _milliseconds(case, inputs), message)
    except Exception as fault:  # noqa: BLE001 any exception of an op is a result to report
        where = traceback.extract_tb(fault.__traceback__)[-1]
        text = " ".join(str(fault).split())[:300]
        message = f"{type(fault).__name__}: {text} ({os.path.basename(where.filename)}:{where.lineno})"
        return Result(*facts, math.nan, math.nan, math.nan, message)


def _device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def _run(fn, inputs, case, dtype=None):
    """Outputs as out0, out1, ...; gradients as d_<name>, under one fixed random upstream gradient per output.

    dtype: the type that floating inputs are cast to; None: no cast.
    """
    inputs, named = _prepare(inputs, case, dtype)
    outs, grads = _forward_backward(fn, inputs, named, lambda outs: _upstream(outs, case))
    found = {f"out{i}": out.detach() for i, out in enumerate(outs)}
    for (name, leaf), grad in zip(named, grads, strict=True):
        found[f"d_{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return found


def _prepare(inputs, case, dtype=None):
    """The inputs, and (name, leaf) of those that get gradients."""
    inputs = _map(inputs, lambda t: t.detach().to(dtype) if t.is_floating_point() else t)
    named = [(name, leaf) for key in case.wrt for name, leaf in _leaves(inputs[key], key)]
    for _, leaf in named:
        leaf.requires_grad_()
    return inputs, named


def _forward_backward(fn, inputs, named, upstream):
    """Outputs as a tuple, and the gradients; `upstream` makes the upstream gradients of differentiable outputs."""
    with torch.set_grad_enabled(bool(named)):
        outs = fn(**inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    if not named:
        return outs, []
    tracked = [out for out in outs if out.requires_grad]
    return outs, torch.autograd.grad(tracked, [leaf for _, leaf in named], upstream(tracked), allow_unused=True)


def _upstream(outs, case):
    gen = torch.Generator(outs[0].device).manual_seed(1)
    return [torch.randn(o.shape, generator=gen, dtype=TYPES[case.dtype], device=o.device).to(o) for o in outs]


def _compare(ours, plain, truth, case):
    """Error and bound of the worst output or gradient, and a message: "" if all are within their bounds."""
    slack = SLACK[case.dtype] if case.slack is None else case.slack
    worst, error, bound, message = -1.0, 0.0, slack, ""
    for name, true in truth.items():
        found = ours[name]
        if found.shape != true.shape:
            return math.nan, slack, f"{name} is {list(found.shape)}, not {list(true.shape)}"
        if not true.is_floating_point():
            if not torch.equal(found, true):
                wrong = (found != true).sum().item()
                return math.nan, 0.0, f"{name}: {wrong} of {true.numel()} numbers are wrong"
            continue
        if not true.isfinite().all():
            return math.nan, slack, f"{name}: the reference in fp64 is not finite"
        if not found.isfinite().all():
            return math.nan, slack, f"{name}: {(~found.isfinite()).sum().item()} of {true.numel()} are not finite"
        here, limit = _error(found, true), 2 * _error(plain[name], true) + slack
        if here / limit > worst:
            worst, error, bound = here / limit, here, limit
            message = "" if here <= limit else f"{name}: error {here:.1e} exceeds {limit:.1e}"
    return error, bound, message


def _error(found, true):
    if not true.numel():
        return 0.0
    scale = true.double().abs().max().item()
    return (found.double() - true.double()).abs().max().item() / (scale or 1.0)


@contextlib.contextmanager
def _strict_determinism(on):
    """Strict determinism, as under `--deterministic`."""
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _milliseconds(case, inputs):
    """Time of the op's forward and backward on a GPU: the fastest of a few runs."""
    if _device() != "cuda":
        return math.nan
    inputs, named = _prepare(inputs, case)
    ups = []

    def upstream(outs):
        if not ups:
            ups.extend(_upstream(outs, case))
        return ups

    fastest = math.inf
    for _ in range(TIMED_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        _forward_backward(case.op, inputs, named, upstream)
        end.record()
        torch.cuda.synchronize()
        fastest = min(fastest, start.elapsed_time(end))
    return fastest


def _map(value, fn):
    """`fn` applied to every tensor in nested lists, tuples and dicts."""
    if isinstance(value, dict):
        return {name: _map(v, fn) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(v, fn) for v in value)
    return fn(value) if torch.is_tensor(value) else value


def _leaves(value, name):
    """(name, tensor) of every floating tensor in nested lists and tuples."""
    if isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            yield from _leaves(v, f"{name}[{i}]")
    elif torch.is_tensor(value) and value.is_floating_point():
        yield name, value


# The cases


def checks(sizes=SIZES):
    """Every `Case` of these sizes, without bf16 on a GPU that lacks it."""
    bf16 = has_bf16(torch.device(_device()))
    for size in sizes:
        for group in (_voxels, _sparse, _views, _boxes, _rays, _field):
            yield from (case for case in group(size, size == "recipe") if bf16 or case.dtype != "bf16")


def _each(dtypes, name, size, op, ref, inputs, wrt=(), **flags):
    """Cases of an op in several types."""
    for dtype in dtypes.split():
        yield Case(name, size, dtype, inputs, op, ref, wrt, **flags)


# LiDAR: the recipe's grid of 0.075 m, or a grid of a few cells

LIDAR = PRETRAIN["lidar"]["lidar-0.075"]
THREE, TWO, ONE = (3, 3, 3), (2, 2, 2), (1, 1, 1)
DOWN = [(THREE, TWO, padding, ONE) for padding in (ONE, ONE, (0, 1, 1))]  # between stages of the encoder
UP = (TWO, TWO, (0, 0, 0), ONE)
WIDTHS = 16, 32, 64, 128  # of the stages


def _grid(recipe):
    """low, cell, (Z, Y, X)"""
    if not recipe:
        return (-2.5, -1.5, -1.5), (0.5, 0.3, 0.7), (4, 10, 10)
    cell = LIDAR.lidar.cell
    sizes = [round((h - l) / c) for l, h, c in zip(LIDAR.grid.low, LIDAR.grid.high, cell, strict=True)]
    return LIDAR.grid.low, cell, tuple(sizes[::-1])


def _points(recipe, device):
    """[P, 5] x, y, z meters, intensity, time lag: ten sweeps of 32 beams over a street between walls.

    The work of a sparse convolution depends on the number of neighbors. Random cells have none; surfaces scanned by a
    moving sensor have about as many as in nuScenes.
    """
    if not recipe:
        low, cell, shape = _grid(False)
        extent = torch.tensor([c * n for c, n in zip(cell, shape[::-1], strict=True)], device=device)
        points = torch.rand(300, 5, device=device)
        points[:, :3] = points[:, :3] * 1.2 * extent + torch.tensor(low, device=device)
        return points
    sweeps = []
    for sweep in range(10):
        elevation = torch.linspace(-30.67, 10.67, 32, device=device).deg2rad()[:, None]
        azimuth = (torch.arange(1084, device=device) + torch.rand((), device=device)) * (2 * math.pi / 1084)
        facet = (azimuth * (40 / (2 * math.pi))).long() % 40  # each has a wall, at its own distance
        wall = 4 + 30 * torch.rand(40, generator=torch.Generator().manual_seed(2)).to(device) ** 2
        along = wall[facet] / ((azimuth * 40 / (2 * math.pi)) % 1 - 0.5).mul(2 * math.pi / 40).cos()
        t = torch.minimum(along / elevation.cos(), torch.where(elevation < 0, -1.84 / elevation.sin(), math.inf))
        t = t + 0.02 * torch.randn_like(t) + (torch.rand_like(t) < 0.1) * -0.5 * torch.rand_like(t).log()
        height = elevation.sin().expand_as(t) * t
        xyz = torch.stack([elevation.cos() * azimuth.cos() * t, elevation.cos() * azimuth.sin() * t, height], dim=-1)
        xyz = xyz + torch.tensor([0.0, -0.3 * sweep, 0.0], device=device)  # 6 m/s at 20 Hz
        back = torch.rand_like(t) < 0.4
        rest = torch.stack([torch.rand_like(t), torch.full_like(t, 0.05 * sweep)], dim=-1)
        sweeps.append(torch.cat([xyz, rest], dim=-1)[back & (t < 70)])
    return torch.cat(sweeps)


def _stage(number, recipe, device):
    """Coordinates [N, 4] and grid (Z, Y, X) of a stage of the encoder, computed by the references."""
    low, cell, (Z, Y, X) = _grid(recipe)
    points = _points(recipe, device)
    coords = voxelize_ref(points, [len(points)], low, cell, (Z, Y, X), 10, 120000)[1]
    shape = (Z + 1, Y, X)
    for geometry in DOWN[:number]:
        coords, shape = strided_map_ref(coords, shape, *geometry)[0], out_shape(shape, *geometry)
    return coords, shape


def _voxels(size, recipe):
    def points(device, dtype):
        low, cell, shape = _grid(recipe)
        one, other = _points(recipe, device), _points(recipe, device).flip(0)
        counts = [len(one), len(other)]
        return dict(
            points=torch.cat([one, other]), point_counts=counts, low=low, cell=cell, shape=shape,
            max_points=10 if recipe else 3, max_voxels=120000 if recipe else 300,
        )  # fmt: skip

    def set_of(number):
        def inputs(device, dtype):
            coords, shape = _stage(number, recipe, device)
            return dict(coords=coords, shape=shape)

        return inputs

    def neighbors(kernel):
        def inputs(device, dtype):
            coords, shape = _stage(0, recipe, device)
            keys, order = sort_voxels_ref(coords, shape)
            return dict(coords=coords, keys=keys, order=order, shape=shape, kernel=kernel, dilation=ONE)

        return inputs

    def pairs(number, geometry):
        def inputs(device, dtype):
            names = "kernel", "stride", "padding", "dilation"
            return set_of(number)(device, dtype) | dict(zip(names, geometry, strict=True)) | dict(batch_size=1)

        return inputs

    def table(device, dtype):
        coords, shape = _stage(0, recipe, device)
        return dict(neighbor_idx=strided_map_ref(coords, shape, *DOWN[0])[1], N=len(coords))

    def case(name, op, ref, inputs):
        return Case(name, size, "fp32", inputs, op, ref, double=False)

    yield case("voxelize", voxelize, voxelize_ref, points)
    yield case("voxel_keys", voxel_keys, voxel_keys_ref, set_of(0))
    yield case("sort_voxels", sort_voxels, sort_voxels_ref, set_of(0))
    yield case("submanifold_map 3x3x3", submanifold_map, submanifold_map_ref, neighbors(THREE))
    yield case("submanifold_map 5x5x5", submanifold_map, submanifold_map_ref, neighbors((5, 5, 5)))
    for number, geometry in enumerate(DOWN):
        yield case(f"strided_map, stage {number + 1}", strided_map, strided_map_ref, pairs(number, geometry))
    yield case("transposed_map", transposed_map, transposed_map_ref, pairs(1, UP))
    yield case("inverse_map", inverse_map, inverse_map_ref, table)


def _sparse(size, recipe):
    def inputs(kind, number, kernel, c_in, c_out):
        def make(device, dtype):
            coords, shape = _stage(number if recipe else 0, recipe, device)  # a small scene has no later stages
            if kind == "submanifold":
                table = submanifold_map_ref(coords, *sort_voxels_ref(coords, shape), shape, kernel, ONE)
                tables = table, None
            else:
                table = strided_map_ref(coords, shape, *DOWN[number])[1]
                tables = table, inverse_map_ref(table, len(coords))
            if kind == "inverse":
                tables = tables[::-1]
            N = len(coords) if kind != "inverse" else table.shape[1]
            weight = torch.randn(c_out, *kernel, c_in, device=device) / (math.prod(kernel) * c_in) ** 0.5
            features = torch.randn(N, c_in, device=device).to(dtype)
            # fp32 parameters, as under autocast, with values representable in the type
            if recipe:  # with cached tiles, as in a model
                tables = [table if table is None else NeighborTable(table) for table in tables]
            given = dict(zip(("neighbor_idx", "inverse_idx"), tables, strict=True), features=features)
            return given | dict(weight=weight.to(dtype).float())

        return make

    def inference(make):
        """Arguments of the inference op."""

        def act(device, dtype):
            given = make(device, dtype)
            del given["inverse_idx"]
            M, O = len(given["features"]), len(given["weight"])
            scale, shift = torch.rand(O, device=device) + 0.5, torch.randn(O, device=device)
            residual = torch.randn(M, O, device=device).to(dtype)
            return given | dict(scale=scale, shift=shift, residual=residual, relu=True)

        return act

    def conv(dtypes, name, *what):
        wrt = ("features", "weight")
        for dtype in dtypes.split():
            op = partial(sparse_conv, allow_tf32=True) if dtype == "tf32" else sparse_conv
            yield Case(f"sparse_conv {name}", size, dtype, inputs(*what), op, sparse_conv_ref, wrt)

    sub = "submanifold"
    yield from conv("fp32 bf16", "5 -> 16, stem", sub, 0, THREE, 5, 16)
    for number, width in enumerate(WIDTHS):
        dtypes = "fp32 tf32 fp16 bf16" if number in (0, 3) or recipe else "bf16"
        yield from conv(dtypes, f"{width}, stage {number + 1}", sub, number, THREE, width, width)
    yield from conv("fp16", "8 -> 32", sub, 0, THREE, 8, 32)  # few channels: groups of offsets
    yield from conv("bf16", "5x5x5, 5 -> 32", sub, 0, (5, 5, 5), 5, 32)  # SpUNet's stem
    yield from conv("bf16", "96", sub, 1, THREE, 96, 96)  # SpUNet's way up
    yield from conv("fp16", "256", sub, 3, THREE, 256, 256)
    for number in range(3):
        what = THREE, WIDTHS[number], WIDTHS[number + 1]
        yield from conv("fp32 bf16" if not number else "bf16", f"strided, stage {number + 1}", "strided", number, *what)
    yield from conv("bf16", "inverse", "inverse", 1, THREE, 64, 32)
    for number, dtypes in ((0, "bf16"), (2, "fp32 tf32 fp16")):
        act = inference(inputs(sub, number, THREE, WIDTHS[number], WIDTHS[number]))
        for dtype in dtypes.split():
            op = partial(sparse_conv_act, allow_tf32=True) if dtype == "tf32" else sparse_conv_act
            yield Case(f"sparse_conv_act {WIDTHS[number]}", size, dtype, act, op, sparse_conv_act_ref)


# Cameras


def _rig(scale, device):
    """[1, 6, 4, 4] LiDAR meters -> pixels of images `scale` times 1600 wide, with nuScenes' yaws and focal lengths."""
    views = []
    for yaw, focal in ((0, 1266), (-55, 1266), (-110, 1266), (180, 809), (110, 1266), (55, 1266)):
        s, c = math.sin(math.radians(yaw)), math.cos(math.radians(yaw))
        intrinsics = torch.eye(4)
        intrinsics[:2, :3] = scale * torch.tensor([[focal, 0, 816.0], [0, focal, 491]])
        # camera axes right, down, ahead in LiDAR axes right, ahead, up
        views.append(intrinsics @ torch.tensor([[c, s, 0, 0], [0, 0, -1, -0.3], [-s, c, 0, -0.5], [0, 0, 0, 1]]))
    return torch.stack(views)[None].to(device)


def _views(size, recipe):
    """Volumes offset from the rig's planes: rounding decides on which side a corner on an image border falls."""

    def lifted(device, dtype):
        low, cell = (-54.0137, -54.0137, -5.0137), (0.84375, 0.84375, 1.6)
        grid = dict(low=low, cell=cell, shape=(128, 128, 5))
        C, D, image, levels = 128, 64, (928, 1600), [(116, 200), (58, 100), (29, 50), (15, 25)]
        if not recipe:
            grid = dict(low=(-8.0137, -8.0137, -2.0137), cell=(2.0, 2.0, 2.0), shape=(8, 8, 2))
            C, D, image, levels = 20, 9, (92, 160), [(12, 20), (6, 10)]
        randn = partial(torch.randn, device=device)
        return dict(
            features=[randn(1, 6, h, w, C).to(dtype) for h, w in levels],
            depths=[(2 * randn(1, 6, h, w, D)).softmax(-1).to(dtype) for h, w in levels],
            lidar2image=_rig(image[1] / 1600, device), image_size=image, depth_range=(1.0, 65.0), **grid,
        )  # fmt: skip

    def pooled(device, dtype):
        grid = dict(low=(-54.0137, -54.0137, -5.0137), cell=(0.6, 0.6, 1.6), shape=(180, 180, 5))
        C, D, (h, w), stride = 256, 118, (29, 50), 32
        if not recipe:
            grid = dict(low=(-8.0137, -8.0137, -2.0137), cell=(2.0, 2.0, 2.0), shape=(8, 8, 2))
            C, D, (h, w), stride = 20, 12, (4, 6), 25
        randn = partial(torch.randn, device=device)
        return dict(
            features=randn(1, 6, h, w, C).to(dtype), depths=randn(1, 6, h, w, D).softmax(-1).to(dtype),
            lidar2image=_rig(w * stride / 1600, device), stride=stride, depth_range=(1.0, 60.0), **grid,
        )  # fmt: skip

    wrt = ("features", "depths")
    # Image positions are fp32 for every type: in 200 columns they are off by 2e-5, as are interpolation weights. How
    # they round depends on the compiler.
    yield from _each("fp32", "lift", size, lift, lift_ref, lifted, wrt, slack=1e-4)
    yield from _each("fp32", "lift, bit-equal", size, lift, lift_ref, lifted, wrt, slack=1e-4, strict=True)
    yield from _each("fp16 bf16", "lift", size, lift, lift_ref, lifted, wrt)
    yield from _each("bf16", "lift, bit-equal", size, lift, lift_ref, lifted, wrt, strict=True)
    yield from _each("fp32 fp16 bf16", "voxel_pool", size, voxel_pool, voxel_pool_ref, pooled, wrt)
    yield from _each("bf16", "voxel_pool, bit-equal", size, voxel_pool, voxel_pool_ref, pooled, wrt, strict=True)


# Boxes


def _boxes(size, recipe):
    def boxes(N, device):
        """[N, 7] boxes of the size of road users, three around each location."""
        places = N // 3 + 1
        which = torch.randint(places, (N,), device=device)
        middle = (torch.rand(places, 3, device=device) - 0.5) * torch.tensor([108.0, 108, 2], device=device)
        sizes = torch.tensor([1.9, 4.6, 1.7], device=device) * (0.5 + torch.rand(N, 3, device=device))
        yaw = (6.3 * torch.rand(places, device=device))[which] + 0.2 * torch.randn(N, device=device)
        return torch.cat([middle[which] + 0.5 * torch.randn(N, 3, device=device), sizes, yaw[:, None]], dim=1)

    def above(N, device):
        return boxes(N, device)[:, [0, 1, 3, 4, 6]].contiguous()

    N, M = (3000, 900) if recipe else (40, 33)

    def two_sets(device, dtype):
        both = above(N + M, device)
        return dict(a=both[:N].contiguous(), b=both[N:].contiguous())

    def partners(device, dtype):
        a = boxes(N, device)
        return dict(a=a, b=a + 0.3 * torch.randn_like(a) * a.new_tensor([1, 1, 1, 0, 0, 0, 1]))

    def overlapping(device, dtype):
        """With a threshold that no IoU is near, so that rounding does not change what is suppressed."""
        found = above(N, device)
        iou = rotated_iou_bev_ref(found.double(), found.double()).flatten()
        near = iou[(iou > 0.1) & (iou < 0.3)].sort().values
        gap = near.diff().argmax()
        threshold = ((near[gap] + near[gap + 1]) / 2).item()
        return dict(boxes=found, scores=torch.randperm(N, device=device).float(), threshold=threshold)

    yield from _each("fp32", "rotated_iou_bev", size, rotated_iou_bev, rotated_iou_bev_ref, two_sets)
    yield from _each("fp32", "paired_iou_3d", size, paired_iou_3d, paired_iou_3d_ref, partners)
    yield from _each("fp32", "rotated_nms", size, rotated_nms, rotated_nms_ref, overlapping)


# Rays: those of six views with 512 pixels each, with 72 samples and 24 more


def _rays(size, recipe):
    R, S, n = (3072, 72, 24) if recipe else (33, 9, 7)

    def through_box(device, dtype):
        origins = torch.rand(R, 3, device=device) * 0.1 - 0.05
        directions = F.normalize(torch.randn(R, 3, device=device), dim=1)
        box = dict(low=(-1.0, -1.0, -0.1), high=(1.0, 1.0, 0.06), near=0.02)
        return dict(origins=origins, directions=directions, **box)

    def ends(device, dtype):
        near, jitter = torch.rand(R, device=device), torch.rand(R, device=device)
        return dict(near=near, far=near + 1, S=S, jitter=jitter)

    def weighted(device, dtype):
        edges = torch.rand(R, S + 1, device=device).sort(dim=1).values
        weights = torch.rand(R, S, device=device) ** 4 + 0.01  # no mass so small that rounding moves samples
        return dict(edges=edges, weights=weights, n=n, jitter=torch.rand(R, device=device))

    def lists(device, dtype):
        edges, new_edges = (torch.rand(R, k + 1, device=device).sort(dim=1).values for k in (S, n))
        return dict(edges=edges, new_edges=new_edges)

    yield from _each("fp32", "clip_rays", size, clip_rays, clip_rays_ref, through_box)
    yield from _each("fp32", "stratified_starts", size, stratified_starts, stratified_starts_ref, ends)
    yield from _each("fp32", "sample_pdf", size, sample_pdf, sample_pdf_ref, weighted)
    yield from _each("fp32", "resample", size, resample, resample_ref, weighted)
    yield from _each("fp32", "merge", size, merge, merge_ref, lists)

    def at_points(device, dtype):
        sizes = (5, 180, 180, 32) if recipe else (2, 3, 4, 5)
        points = torch.rand(R, S + n, 3, device=device) * (torch.tensor(sizes[2::-1], device=device) + 3) - 2
        volume_idx = torch.randint(2, (R,), device=device, dtype=torch.int32)
        return dict(volume=torch.randn(2, *sizes, device=device).to(dtype), points=points, volume_idx=volume_idx)

    wrt = ("volume", "points")
    yield from _each("fp32 bf16", "trilinear", size, trilinear, trilinear_ref, at_points, wrt)
    yield from _each("fp32", "trilinear, bit-equal", size, trilinear, trilinear_ref, at_points, wrt, strict=True)
    yield from _each("fp32", "trilinear_value", size, trilinear_value, trilinear_value_ref, at_points)

    def distances(device, dtype):
        randn = partial(torch.randn, device=device)
        return dict(sdf=(randn(R, S + n) / 10).to(dtype), deltas=(randn(R, S + n).abs() / 10).to(dtype))

    def neus(device, dtype):
        gradient = torch.randn(R, S + n, 3, device=device).to(dtype)
        directions = F.normalize(torch.randn(R, 3, device=device), dim=1).to(dtype)
        inv_s = torch.tensor([20.0], device=device, dtype=dtype)
        return distances(device, dtype) | dict(gradient=gradient, directions=directions, inv_s=inv_s)

    def volsdf(device, dtype):
        return distances(device, dtype) | dict(beta=torch.tensor([0.1], device=device).to(dtype))

    def interval(device, dtype):
        return distances(device, dtype) | dict(inv_s=64.0)

    def alone(device, dtype):
        return dict(sdf=distances(device, dtype)["sdf"])

    wrt = ("sdf", "gradient", "inv_s")
    yield from _each("fp32 bf16", "neus_alpha", size, neus_alpha, neus_alpha_ref, neus, wrt)
    yield from _each("fp32 bf16", "volsdf_alpha", size, volsdf_alpha, volsdf_alpha_ref, volsdf, ("sdf", "beta"))
    yield from _each("fp32", "interval_alpha", size, interval_alpha, interval_alpha_ref, interval)
    # plain PyTorch on every device: it has no kernel
    yield from _each("fp32", "unisurf_alpha", size, unisurf_alpha, unisurf_alpha, alone, ("sdf",))

    def samples(device, dtype):
        alpha, values = torch.rand(R, S + n, device=device), torch.randn(R, S + n, 4, device=device)
        return dict(alpha=alpha.to(dtype), values=values.to(dtype))

    yield from _each("fp32 fp16 bf16", "composite", size, composite, composite_ref, samples, ("alpha", "values"))


# The fused renderer

CLEAR = 2e-4  # distance in cells between a sample and the nearest face, where the slope of the volume jumps
OFF_KINK = 3.0  # bias of the color MLP's hidden units: five standard deviations, so that rounding switches none


def _mlp(conditions, outputs, hidden, layers, bias, device):
    """Leaves with the distribution of `nn.Linear`, in the order that `sdf_render` takes."""
    widths = [(hidden, 3), *[(hidden, conditions), (hidden, hidden)] * (layers - 1), (hidden, conditions)]
    leaves = []
    for rows, columns in [*widths, (outputs, hidden)]:
        leaves += [(torch.rand(*n, device=device) * 2 - 1) * columns**-0.5 for n in ((rows, columns), (rows,))]
    for b in leaves[5:-1:4]:
        b += bias
    return leaves


def _field(size, recipe):
    (Z, Y, X), R, S = ((5, 180, 180), 3072, 96) if recipe else ((5, 9, 9), 4, 33)

    def inputs(method, C=32, hidden=16, sdf_layers=6, rgb_layers=4):
        def make(device, dtype):
            cells = torch.tensor([[X / 2, Y / 2, 5 * Z], [X / 2, Y / 2, Z / 2]], device=device).unbind()
            many = 2 * R
            origins = torch.randn(many, 3, device=device) * 0.02
            directions = F.normalize(torch.randn(many, 3, device=device) * torch.tensor([1, 1, 0.1], device=device))
            edges = (0.02 + 1.3 * torch.rand(many, S + 1, device=device)).sort(dim=1).values
            points = origins[:, None].double() + directions[:, None].double() * edges[:, :-1, None].double()
            place = points * cells[0] + cells[1]
            clear = ((place - place.round()).abs() > CLEAR).all(dim=2).all(dim=1).nonzero()[:R, 0]
            assert len(clear) == R, "too few rays stay clear of cell faces"
            which = torch.arange(R, device=device)
            rays = origins[clear], directions[clear], (which % 2).int(), which % 10 != 3
            sdf_mlp = _mlp(C, 1 + hidden, hidden, sdf_layers, 0.0, device)
            rgb_mlp = _mlp(6 + C + hidden, 3, hidden, rgb_layers, OFF_KINK, device) if rgb_layers else None
            return dict(
                volume=torch.randn(2, Z, Y, X, C, device=device), rays=rays, edges=edges[clear],
                mlps=(sdf_mlp, rgb_mlp), density=torch.tensor([20.0 if method == "neus" else 0.1], device=device),
                cells=cells, method=method,
            )  # fmt: skip

        return make

    def values(device, dtype):
        given = inputs("neus")(device, dtype)
        return dict(
            volume=given["volume"], rays=given["rays"][:3], starts=given["edges"][:, :-1].contiguous(),
            sdf_mlp=given["mlps"][0], cells=given["cells"],
        )  # fmt: skip

    kinds = {"neus": inputs("neus"), "volsdf": inputs("volsdf"), "neus without color": inputs("neus", rgb_layers=0)}
    if not recipe:
        wide = dict(C=64, hidden=64, sdf_layers=2, rgb_layers=2)
        kinds |= {
            "volsdf of 20 channels": inputs("volsdf", 20, 24, 2, 3),
            "neus of 64 channels": inputs("neus", **wide),
        }
    wrt = ("volume", "mlps", "density")
    for dtype, exact in (("tf32", False), ("fp32", True)):
        render, look_up = partial(sdf_render, exact=exact), partial(sdf_values, exact=exact)
        for kind, make in kinds.items():
            if not (exact and "channels" in kind):  # exact and wide: takes minutes to compile, and no preset uses it
                yield Case(f"sdf_render {kind}", size, dtype, make, render, sdf_render_ref, wrt)
        yield Case("sdf_render neus, bit-equal", size, dtype, kinds["neus"], render, sdf_render_ref, wrt, strict=True)
        yield Case("sdf_render neus, no gradients", size, dtype, kinds["neus"], render, sdf_render_ref)
        yield Case("sdf_values", size, dtype, values, look_up, sdf_values_ref)
    early = partial(sdf_render, stop=1e-4, exact=True)
    # samples after the stop have no distance: compare color and depth only
    yield Case(
        "sdf_render neus, stops early", size, "fp32", kinds["neus"], lambda **given: early(**given)[:2],
        lambda **given: sdf_render_ref(**given)[:2], slack=1e-3,
    )  # fmt: skip


# The command


def results(cases, isolate=None):
    """Yields the `Result` of each case as soon as it is known.

    isolate: run in separate processes, so that a crash does not affect later cases; None: if there is a GPU.
    """
    isolate = torch.cuda.is_available() if isolate is None else isolate
    left = list(cases)
    if not isolate:
        yield from map(run, left)
        return
    _compile(left)
    while left:
        known = len(left)
        with _worker("check", left, subprocess.PIPE) as worker:
            for line in worker.stdout:
                with contextlib.suppress(ValueError):  # printed by another library
                    yield Result(**json.loads(line))
                    left.pop(0)
        if left and (worker.returncode or len(left) == known):
            case = left.pop(0)
            message = f"its process ended with exit code {worker.returncode} before the result was known"
            yield Result(case.name, case.size, case.dtype, math.nan, math.nan, math.nan, message)


def _compile(cases):
    """Run all cases once in parallel processes, since compiling takes longest. Failures are reported later."""
    jobs = min(JOBS, os.cpu_count())
    kinds = list(dict.fromkeys(_kind(case) for case in cases))
    shares = [[case for case in cases if kinds.index(_kind(case)) % jobs == i] for i in range(jobs)]
    for worker in [_worker("compile", share, subprocess.DEVNULL) for share in shares if share]:
        worker.wait()


def _kind(case):
    """Cases of one kind share kernels, across sizes."""
    return case.name.split(",")[0], case.dtype


def _worker(task, cases, stdout):
    command = [sys.executable, "-m", "unipad.selfcheck", "--worker", task]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, text=True)
    json.dump([str(case) for case in cases], worker.stdin)
    worker.stdin.close()
    return worker


def _work(task):
    """Run the cases named on stdin; "check" prints a line each, and exits early if the GPU context is lost."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for strict cases
    known = {str(case): case for case in checks()}
    for name in json.load(sys.stdin):
        faulthandler.dump_traceback_later(CASE_TIMEOUT, exit=True)
        case = known[name]
        if task == "compile":
            with contextlib.suppress(Exception), _strict_determinism(case.strict):
                _run(case.op, case.inputs(_device(), TYPES[case.dtype]), case)
            continue
        print(json.dumps(asdict(run(case))), flush=True)
        if _device() == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(0)  # reported already; with a lost context, destructors would fail too


@dataclass
class Args:
    sizes: tuple[Literal["small", "recipe"], ...] = SIZES  # sizes of the inputs
    ops: tuple[str, ...] = ()  # prefixes of op names (default: all ops)


def main(args):
    """Print a line per check and what to report; returns the exit code."""
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or on_triton(torch.empty(0))):
        print("There is no GPU to check: the PyTorch references run instead of the kernels, at small sizes.")
        args = replace(args, sizes=("small",))
    cases = [case for case in checks(args.sizes) if not args.ops or case.name.startswith(args.ops)]
    if not cases:
        raise UserError(f"--ops {' '.join(args.ops)}: no op has a name that starts so; leave the flag out to run all.")
    began, failed = time.perf_counter(), []
    for result in results(cases):
        print(result, flush=True)
        failed += [] if result.ok else [result]
    took = time.perf_counter() - began
    if not failed:
        print(f"All {len(cases)} checks passed, in {took:.0f} s on {_machine()}.")
        return 0
    print(f"{len(failed)} of {len(cases)} checks failed. Please report these lines: {_machine()}")
    for result in failed:
        print(result)
    return 1


def _machine():
    """GPU, driver, versions and commit."""
    device = "no GPU"
    if torch.cuda.is_available():
        driver = "unknown"
        with contextlib.suppress(OSError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0] or driver
        device = f"{torch.cuda.get_device_name()}, driver {driver}"
    versions = f"torch {torch.__version__}, triton {getattr(triton, '__version__', 'none')}"
    return f"{device}, {versions}, Python {platform.python_version()}, commit {commit()}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _work(sys.argv[2])
    else:
        with exit_on_user_error():
            sys.exit(main(tyro.cli(Args, description=__doc__)))

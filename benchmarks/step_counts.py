"""The work of one training step, counted in a dry run: FLOPs, bytes and launches of every part of a recipe.

`count` runs the step of train.py and finetune.py in a `DryRun`: in bf16, forward, backward, gradient clipping, AdamW.
Nothing is computed, so it needs neither a GPU nor memory. Every operator of PyTorch and every launch of one of this
project's kernels becomes a `Work`; an operator of the backward belongs to the part whose forward made it necessary.

    FLOPs   of matrix products and convolutions, two per multiplication, as torch.utils.flop_counter counts them; of our
            kernels those that their references would do: no padding, nothing recomputed
    bytes   each tensor that is read or written, once per operator; of tables that are indexed, only the rows that are
            read. Nothing is subtracted for what caches or fused kernels save, or added for rows that are read twice

Sizes that depend on the data (voxels, and their neighbors) are those of `benchmarks.lidar_scene`, a scene with the
statistics of nuScenes.
"""

import functools
import pkgutil
from bisect import bisect_right
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.dry_run import CUDA, DryRun, Generator, backward, launches_kernel, make_batch, tensors_in, to_gpu
from benchmarks.lidar_scene import scene
from unipad.config import DetectRecipe, OccupancyRecipe, PretrainRecipe, SegmentRecipe, UnetConfig
from unipad.kernels.sparse_tiles import NeighborTable
from unipad.kernels.voxelize import grid_subsample, voxelize
from unipad.model.detect import Detector
from unipad.model.lidar import LidarEncoder
from unipad.model.occupancy import OccupancyModel
from unipad.model.pretrain import Pretrain
from unipad.model.segment import Segmenter
from unipad.model.unet import UnetEncoder
from unipad.optimizer import make_optimizer

aten = torch.ops.aten
MODELS = {PretrainRecipe: Pretrain, DetectRecipe: Detector, SegmentRecipe: Segmenter, OccupancyRecipe: OccupancyModel}

# Part -> functions of unipad.model whose work it is, but for what they call of another part
PARTS = {
    "batch": (),  # `Batch.to`: images from bytes to [0, 1]
    "image encoder": ("encoder.Encoder._encode_images", "camera.CameraEncoder.forward"),
    "LiDAR encoder": (
        "lidar.LidarEncoder.forward",
        "unet.UnetEncoder.forward",
        "unet.UnetEncoder.voxel_features",
    ),
    "neck": (
        "camera.FPN.forward",
        "depth.SimpleDepth.forward",
        "depth.ComplexDepth.forward",
        "lidar.Second.forward",
        "lidar.SecondFPN.forward",
    ),
    "view transform": (  # and all that is computed on the volume before the renderer or the head reads it
        "encoder.Encoder.encode",
        "volume.GatherLift.forward",
        "volume.VoxelPoolLift.forward",
        "volume.FrameFusion.forward",
        "volume.ConvNormReLU3d.forward",
    ),
    "sampler": ("pretrain.Pretrain.forward",),  # the choice of rays; `count` adds the renderer's sampler
    "render": ("render.Renderer.forward",),
    "head": ("detect.Detector.forward", "segment.Segmenter.forward", "occupancy.OccupancyModel.forward"),
    "losses": (
        "render.Renderer.loss",
        "carving.Carving.loss",
        "detect.detection_losses",
        "detect.depth_loss",
        "segment.losses",
        "occupancy.losses",
        "occupancy.depth_loss",
    ),
    "optimizer": (),
}
# Operators that read some rows of their first argument, and that write some rows of it
GATHERS = ("index", "gather", "index_select", "embedding")
SCATTERS = ("index_put_", "index_copy_", "index_fill_", "index_add_", "scatter_", "scatter_add_")


class Work(NamedTuple):
    """One operator of PyTorch, or one launch of a kernel of this project."""

    part: str  # a key of PARTS
    name: str
    python: bool  # Python called it; else PyTorch's C++ did: a cast by autocast, or the backward of an operator
    flops: int
    unit: str  # what multiplies on the GPU: half (tensor cores in fp16 or bf16), tf32 (these too) or fp32
    bytes: int


class Meter(DryRun):
    """A `DryRun` that records in `work` what runs while `part` is set.

    pairs: (offsets K, input rows N, output rows M) of a neighbor table -> number of its entries that are not -1: the
        pairs of an output row and a neighbor.
    """

    def __init__(self, answers, pairs):
        super().__init__(answers)
        self.pairs, self.work, self.part = pairs, [], None
        self.node = None  # the node of the autograd graph whose backward runs now
        self._marks = []  # (number of the next node that the forward makes, part that it belongs to), ascending

    def __enter__(self):
        super().__enter__()
        for part, names in PARTS.items():
            for name in names:
                target = f"unipad.model.{name}"
                self.enter_context(mock.patch(target, self.within(part, pkgutil.resolve_name(target))))
        self.enter_context(_Operators(self))
        return self

    @contextmanager
    def inside(self, part):
        """Context whose work belongs to `part`."""
        before, self.part = self.part, part
        self._marks.append((torch.autograd._get_sequence_nr(), part))
        try:
            yield
        finally:
            self.part = before
            self._marks.append((torch.autograd._get_sequence_nr(), before))

    def within(self, part, function):
        """`function`, whose work then belongs to `part`."""

        @functools.wraps(function)
        def call(*args, **kwargs):
            with self.inside(part):
                return function(*args, **kwargs)

        return call

    def enter_node(self, node):
        """Before a node of the backward: set `part` to the one whose forward made the node."""
        self.node = node
        if node.name().endswith("AccumulateGrad"):  # copies in `dry_run.backward`; PyTorch's engine does not
            self.part = None
        else:
            self.part = self._marks[bisect_right(self._marks, node._sequence_nr(), key=itemgetter(0)) - 1][1]

    def called_by_python(self, name):
        """Whether Python calls the operator that runs now. Of the forward's casts, nearly all are autocast's."""
        if self.node is None:
            return name != "_to_copy"
        return isinstance(self.node, torch.autograd.function.BackwardCFunction)

    def _launch(self, kernel, *args, **kwargs):
        super()._launch(kernel, *args, **kwargs)
        if self.part:
            _, given = self.calls[-1]
            flops, unit = launch_flops(kernel.__name__, given, self.pairs)
            moved = sum(map(size_of, tensors_in(tuple(given.values()))))
            self.work.append(Work(self.part, kernel.__name__, True, flops, unit, moved))


class _Operators(TorchDispatchMode):
    """Adds every operator on the GPU to the work of a `Meter`."""

    def __init__(self, meter):
        super().__init__()
        self.meter = meter

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.meter.part and launches_kernel(func) and any(t.is_cuda for t in tensors_in((args, kwargs, out))):
            name = func.overloadpacket.__name__
            costs = *operator_flops(func, args, kwargs, out), operator_bytes(name, args, kwargs, out)
            self.meter.work.append(Work(self.meter.part, name, self.meter.called_by_python(name), *costs))
        return out


def operator_flops(func, args, kwargs, out):
    """(FLOPs, unit) of an operator of PyTorch; (0, fp32) if it multiplies no matrices."""
    packet = func.overloadpacket
    if packet not in flop_registry:
        return 0, "fp32"
    tensors = [t for t in tensors_in(args) if t.is_floating_point()]
    if packet is aten.convolution_backward:
        # flop_counter takes the weights' gradient of grouped convolutions for that of full ones
        d_out, x, weight, _, *geometry, _, groups, mask = args
        forward = flop_registry[aten.convolution](x, weight, None, *geometry, out_val=d_out)
        flops = forward * sum(mask[:2])
        depthwise = groups > 1
    else:
        flops = flop_registry[packet](*args, **kwargs, out_val=out)
        depthwise = packet is aten.convolution and args[8] > 1
    is_convolution = packet in (aten.convolution, aten.convolution_backward)
    # PyTorch's defaults: of fp32, convolutions multiply in tf32, matrix products do not
    unit = "half" if tensors[0].dtype.itemsize == 2 else "tf32" if is_convolution else "fp32"
    return flops, "fp32" if depthwise else unit  # tensor cores multiply matrices, which a depthwise convolution lacks


def operator_bytes(name, args, kwargs, out):
    """Bytes that an operator of PyTorch reads and writes."""
    tensors = tensors_in((args, kwargs))
    inputs, outputs = [size_of(t) for t in tensors], sum(map(size_of, tensors_in(out)))
    if name in GATHERS:
        inputs[0] = min(inputs[0], outputs)
    if name in SCATTERS:  # the rows that are read and written are as large as the values; without any, as the indices
        values = [size_of(t) for t in tensors[1:] if t.dtype == tensors[0].dtype]
        inputs[0] = outputs = min(inputs[0], sum(values or inputs[1:]))
    return sum(inputs) + outputs


def size_of(t):
    """Bytes of a tensor; an expanded dimension, of stride 0, is read once."""
    count = t.element_size() if t.numel() else 0
    for size, stride in zip(t.shape, t.stride(), strict=True):
        count *= size if stride else 1
    return count


def launch_flops(name, given, pairs):
    """(FLOPs, unit) of a launch of one of our kernels; given: its arguments by name; pairs: of `Meter`."""
    if name == "_gather_gemm_kernel":
        features, out = given["features_ptr"], given["out_ptr"]
        return 2 * pairs[given["K"], len(features), len(out)] * given["I"] * given["O"], _unit(features, given)
    if name in ("_d_weight_kernel", "_d_weight_of_groups_kernel"):  # of one or more layers alike
        features, d_out = given["features_ptrs"][0], given["d_out_ptrs"][0]
        K = given["K"] if "K" in given else given["read_idx_ptr"].numel() // len(d_out)
        products = pairs[K, len(features), len(d_out)] * features.shape[1] * d_out.shape[1]
        return 2 * products * len(given["d_out_ptrs"]), _unit(features, given)
    if not name.startswith("_sdf_"):
        return 0, "fp32"
    C, H = given["CHANNELS"], given["H"]
    if name == "_sdf_values_kernel":
        return 2 * given["starts_ptr"].numel() * sdf_products(C, H, given["LAYERS"], outputs=1), _unit(None, given)
    distance, color = field_products(C, H, given["SDF_LAYERS"], given["RGB_LAYERS"])
    # a backward has two products for each of the forward: the gradients of both factors
    products = {"_sdf_render_fwd_kernel": distance + color, "_sdf_render_bwd_rgb_kernel": 2 * color,
                "_sdf_render_bwd_sdf_kernel": 2 * distance}[name]  # fmt: skip
    return 2 * given["edges_ptr"][:, 1:].numel() * products, _unit(None, given)


def _unit(features, given):
    if features is not None and features.dtype != torch.float32:
        return "half"
    return "tf32" if "tf32" in (given.get("PREC"), given.get("PRECISION")) else "fp32"


def sdf_products(C, H, layers, outputs):
    """Multiplications per sample of the distance MLP, as in `decode_sdf` of kernels/sdf_reference.py.

    C: channels of the volume; H: hidden units; outputs: of the last layer.
    """
    return ((layers - 1) * H + outputs) * C + 3 * H + (layers - 2) * H * H + outputs * H


def field_products(C, H, sdf_layers, rgb_layers):
    """Multiplications per sample (of the distance and its gradient, of the color), as in `decode` there."""
    distance = sdf_products(C, H, sdf_layers, 1 + H) + (sdf_layers - 2) * H * H + (sdf_layers - 1) * H * C + 3 * H
    color = ((rgb_layers - 1) * H + 3) * (C + H + 6) + 3 * H + (rgb_layers - 2) * H * H + 3 * H
    return distance, color if rgb_layers else 0


class Counts(NamedTuple):
    work: list[Work]
    batch_bytes: int  # of the batch, which is copied to the GPU
    gradient_bytes: int  # of the gradients, which several GPUs sum


def count(recipe, cameras=6, voxels=1.0):
    """`Counts` of one training step on one GPU.

    recipe:  its `batch_size` is that of the GPU.
    cameras: of the rig.
    voxels:  factor on the numbers of voxels and of their neighbors.
    """
    with torch.device("meta"):
        net = MODELS[type(recipe)](recipe)
    answers, pairs = host_reads(recipe, voxels)
    with Meter(answers, pairs) as meter:
        net = to_gpu(net)
        optimizer = make_optimizer(net, recipe.optim)
        batch = make_batch(recipe, cameras=cameras)
        if isinstance(recipe, PretrainRecipe):
            net.renderer.sampler = meter.within("sampler", net.renderer.sampler)
        with torch.autocast("cuda", torch.bfloat16):
            with meter.inside("batch"):
                inputs = batch.to(CUDA)
            losses = net(inputs, [Generator() for _ in range(len(batch))])
        losses = losses[0] if isinstance(losses, tuple) else losses  # `Pretrain` returns (losses, missed rays)
        with meter.inside("losses"):
            loss = sum(losses.values())
        backward(loss, meter.enter_node)
        meter.node = None
        for part in (None, "optimizer"):  # the first step of AdamW, not counted, allocates its state
            with meter.inside(part):
                # foreach: as by default on a GPU; fake tensors would take the path for unknown types
                torch.nn.utils.clip_grad_norm_(net.parameters(), recipe.optim.clip, foreach=True)
                optimizer.step()
    names = ("images", "image_sizes", "lidar2image", "lidar2camera", "points", "boxes", "labels", "point_labels")
    others = ("occupancy", "source_images", "features", "points_beyond", "sweep_origins")
    names += tuple(name for name in others if getattr(batch, name) is not None)
    return Counts(
        meter.work,
        batch_bytes=sum(size_of(getattr(batch, name)) for name in names),
        gradient_bytes=sum(size_of(p) for p in net.parameters() if p.requires_grad),
    )


def host_reads(recipe, factor=1.0):
    """(`answers` of a `DryRun`, `pairs` of a `Meter`) for a batch of the recipe's size, of copies of one scene."""
    reads = {"assignment costs for the Hungarian method": None, "convergence of VolSDF's sampler": False}
    reads["indices of the labeled voxels"] = 43_000  # of a sample: those of the example that Occ3D's authors publish
    if recipe.lidar is None:
        return reads, {}

    def scaled(n):
        return round(n * factor) * recipe.optim.batch_size

    occupied, extent, visible, outputs, pairs = voxel_counts(replace(recipe, camera=None))
    reads |= {
        "number of occupied voxels": scaled(occupied),
        "number and extent of occupied cells": [scaled(occupied), *extent],
        "indices of the visible voxels": scaled(visible),
        "indices of the labeled points": scaled(occupied),
        # 1: this wait is for keys, and there is one after those of the voxels, NO_KEY
        "number of a convolution's output voxels": [scaled(n) + 1 for n in outputs],
    }
    return reads, {(K, scaled(N), scaled(M)): scaled(n) for (K, N, M), n in pairs.items()}


class _Counted(Exception):
    """Ends an encoder's forward where `voxel_counts` knows all."""


@lru_cache
def voxel_counts(recipe):
    """Of one scene: number of occupied voxels; their lowest and highest (z, y, x), six numbers (0 if not a U-Net, which
    alone reads them); number of visible voxels; numbers of output voxels of the strided convolutions in their order;
    and `pairs` as in `Meter`.

    Builds the encoder's tables on the CPU; its convolutions compute nothing.
    """
    points, (low, high) = scene(), (torch.tensor(v) for v in (recipe.grid.low, recipe.grid.high))
    points = points[points[:, 4] < 0.05 * (recipe.data.sweeps - 0.5)]  # a sweep is 0.05 s older than the next
    if not isinstance(recipe, SegmentRecipe):  # which keeps points outside of the grid
        points = points[((points[:, :3] >= low) & (points[:, :3] < high)).all(dim=1)]
    cfg, number, visible, outputs, pairs = recipe.lidar, torch.tensor([len(points)]), [], [], {}
    unet = isinstance(cfg, UnetConfig)
    with torch.device("meta"):
        encoder = (UnetEncoder if unet else LidarEncoder)(cfg, recipe.grid)
    if unet:
        _, coords, _, extent = grid_subsample(points, number, cfg.cell)
    else:
        settings = cfg.cell, encoder.voxel_counts, cfg.max_points, cfg.max_voxels[0]  # 0: in training
        (_, coords), extent = voxelize(points, number, recipe.grid.low, *settings), ([0] * 3, [0] * 3)

    def sparse_conv(features, weight, table, inverse, allow_tf32=False, rounded=None):
        idx = NeighborTable.of(table).idx
        (K, M), N = idx.shape, len(features)
        if (K, N, M) not in pairs:
            pairs[K, N, M] = pairs[K, M, N] = int((idx >= 0).sum())  # the second: of the inverse table
            outputs.extend([M] if M != N else [])
        return features.new_empty(M, len(weight))

    def forward(x):
        visible.append(len(x.voxels))
        type(encoder.encoder).forward(encoder.encoder, x.replace_feature(x.features.to("meta")))
        raise _Counted

    encoder.encoder.forward = forward
    masked = isinstance(recipe, PretrainRecipe)
    noise = torch.rand(1, *encoder.mask_shape, generator=torch.Generator().manual_seed(0)) if masked else None
    run = encoder.voxel_features if isinstance(recipe, SegmentRecipe) else functools.partial(encoder, noise=noise)
    with (
        mock.patch("unipad.spconv.conv.sparse_conv", sparse_conv),
        mock.patch(f"{type(encoder).__module__}.in_fp32", lambda stem, x: stem(x)),  # autocast knows no meta tensors
        suppress(_Counted),
    ):
        run(points, number)
    return len(coords), sum(map(list, extent), []), visible[0], outputs, pairs

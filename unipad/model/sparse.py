"""Blocks of sparse convolutions (unipad/spconv) with batch norm and ReLU, run in as few ops as possible."""

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unipad.kernels import backend
from unipad.kernels.backend import StreamCache, on_triton
from unipad.kernels.norm_relu import norm_relu
from unipad.kernels.sparse_conv import sparse_conv_act
from unipad.kernels.sparse_layers import Layer, sparse_layers
from unipad.model.norm import SyncedBatchNorm, is_alone
from unipad.spconv.conv import SparseConvolution, SubMConv3d
from unipad.spconv.tensor import SparseConvTensor
from unipad.spconv.voxels import VoxelSet

NORM = dict(eps=1e-3, momentum=0.01)  # of the LiDAR encoders' batch norms, as in SECOND


class SparseLinear(SubMConv3d):
    """A linear layer on the features. Its weight (Cout, 1, 1, 1, Cin) is a matrix (Cout, Cin) also in memory, unlike a
    1 x 1 x 1 convolution's of spconv."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1, bias=False)

    def kernel_weight(self):
        return self.weight


class SparseBatchNorm(SyncedBatchNorm):
    """Batch normalization over the occupied voxels of all samples of all processes."""

    # Scale and shift; ids and versions of the tensors that they depend on; these tensors, held so that ids stay unique
    _cache = _versions = _inputs = None

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        return x.replace_feature(super().forward(x.features))

    def is_fused(self, x: Tensor) -> bool:
        """Whether `relu` of features x is one op: in one process that trains on a GPU."""
        return self.training and _can_fuse(x)

    def relu(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """relu(self(x) + residual) of features [N, C]."""
        if self.is_fused(x) and len(x) > 1:
            residual = None if residual is None else residual.to(x.dtype)
            return norm_relu(x, self.weight, self.bias, self.eps, residual, self.running(), self.momentum)
        out = super().forward(x)
        return (out if residual is None else out + residual).relu()

    def running(self) -> tuple[Tensor, Tensor, Tensor]:
        """Running mean [C], running variance [C] and number of batches []."""
        return tuple(self._buffers.values())  # faster than by name

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """(scale [C], shift [C]) of the layer in evaluation mode: x * scale + shift.

        Cached until the mode, a parameter or a statistic changes; changes through `.data`, which autograd does not
        record, go unnoticed. A CUDA graph that reads it must not be replayed after a change.
        """
        if torch.compiler.is_compiling():
            return self._make_scale_and_shift()
        inputs = *self._parameters.values(), *self._buffers.values()  # faster than by name
        versions = [(id(t), t.is_inference() or t._version) for t in inputs]  # those of inference have no version
        device = inputs[0].device
        if versions != self._versions:
            if backend.capturing(device) or any(t.is_inference() for t in inputs):
                return self._make_scale_and_shift()
            self._cache, self._versions, self._inputs = StreamCache(), versions, inputs
        return self._cache.get("scale and shift", device, self._make_scale_and_shift)

    def _make_scale_and_shift(self):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, torch.addcmul(self.bias, self.running_mean, scale, value=-1)

    def train(self, mode=True):
        self._cache = self._versions = self._inputs = None
        return super().train(mode)


def _can_fuse(x):
    return on_triton(x) and x.dtype != torch.float64 and is_alone() and not torch.compiler.is_compiling()


class Step(NamedTuple):
    """relu(norm(conv(x))), or with `skips` relu(norm(conv(x)) + x of the step before)."""

    conv: SparseConvolution
    norm: SparseBatchNorm
    skips: bool = False


def run_steps(
    steps: Sequence[Step], x: SparseConvTensor, residual: Tensor | None = None, dtype: torch.dtype | None = None
) -> SparseConvTensor:
    """x through all steps. In training on a GPU, consecutive steps are one op; a step is not part of one if its norm is
    frozen, its convolution has a bias or no table (K = 1), or it has less than two output voxels. In evaluation mode
    without gradients, each step is one kernel.

    residual: [M, C] or None, is added before the last ReLU, if the last step does not skip.
    dtype:    of the result; None: that of the convolutions.
    """
    fuses, before, sets = _can_fuse(x.features), None, []
    while steps:
        layers, sets = _layers(steps, x) if fuses else ([], [])
        n = max(1, len(layers))
        is_last = n == len(steps)
        added = before if steps[0].skips else residual if is_last else None
        if layers:
            out = sparse_layers(x.features, layers, added, dtype if is_last else None)
            before, x = x.features, SparseConvTensor.of(out, sets[n - 1])
        else:
            before, x = x.features, _run_step(steps[0], x, added)
        steps = steps[n:]
    return x if dtype is None else x.replace_feature(x.features.to(dtype))


def _layers(steps, x):
    """(The first steps as layers of `sparse_layers`, as many as can be one op; voxels of these steps, and maybe of the
    next, which has to find them again). A first step that skips is alone: the caller adds the residual."""
    layers, sets = [], []
    for conv, norm, skips in steps:
        if not norm.training or conv.bias is not None or layers and steps[0].skips:
            break
        voxels, table = conv.output_voxels_and_table(sets[-1] if sets else x.voxels)
        sets.append(voxels)
        if table is None or voxels.coords.shape[0] < 2:
            break
        of_conv = dict(rounded=conv.rounded_for(x.features), allow_tf32=conv.allow_tf32)
        of_norm = dict(eps=norm.eps, running=norm.running(), momentum=norm.momentum)
        skips = skips and bool(layers)
        layers.append(Layer(conv.weight, norm.weight, norm.bias, *table, skips=skips, **of_conv, **of_norm))
    # a step that skips adds the input of the step before it, which must not be inside of an op
    while 1 < len(layers) < len(steps) and steps[len(layers)].skips:
        layers.pop()
    return layers, sets


def _run_step(step, x, residual):
    conv, norm, _ = step
    voxels, table = None, None
    if conv.bias is None and not norm.training and not torch.is_grad_enabled():
        voxels, table = conv.output_voxels_and_table(x.voxels)
    if table is None:
        y = conv(x)
        return y.replace_feature(norm.relu(y.features, residual))
    rounded, (scale, shift) = conv.rounded_for(x.features), norm.scale_and_shift()
    out = sparse_conv_act(
        x.features, conv.weight if rounded is None else rounded, table.neighbors, scale, shift, residual, relu=True,
        allow_tf32=conv.allow_tf32,
    )  # fmt: skip
    return SparseConvTensor.of(out, voxels)


def in_fp32(stem: "ConvNormReLU", x: SparseConvTensor) -> SparseConvTensor:
    """stem(x), an encoder's first convolution, computed in fp32; its result in autocast's dtype.

    The features that it reads include coordinates, and bf16 resolves 50 m only in steps of 25 cm. As one op, it rounds
    its result to autocast's type once; its gradient then comes in that type too, also in fp16.
    """
    device = x.features.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    with torch.autocast(device, enabled=False):
        if _can_fuse(x.features):
            return run_steps(stem.steps(), x, dtype=dtype)
        x = stem(x)
        return x if dtype is None else x.replace_feature(x.features.to(dtype))


def convolutions_with_tables(*nets: nn.Module) -> list[SparseConvolution]:
    """The sparse convolutions of `nets` with more than one kernel offset; autocast itself casts the others' weights."""
    modules = (module for net in nets for module in net.modules())
    return [m for m in modules if isinstance(m, SparseConvolution) and math.prod(m.kernel_size) > 1]


def rounded_weights(convs: Sequence[SparseConvolution]):
    """Context in which these convolutions share one cast of their fp32 weights, under autocast.

    The cast is made on entry, in one launch for all of them, and read by the forward and the backward of what runs
    inside; the weights must not change there. Without autocast, and in compiled code, every convolution casts its own.

    convs: of `convolutions_with_tables`, which a net calls once, since it takes the host as long as several launches.
    """
    if torch.compiler.is_compiling() or not convs:
        return contextlib.nullcontext()
    device = convs[0].weight.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return contextlib.nullcontext()
    return _rounded_weights(convs, torch.get_autocast_dtype(device))


@contextlib.contextmanager
def _rounded_weights(convs, dtype):
    convs = [(conv, conv.weight.detach()) for conv in convs if conv.weight.dtype == torch.float32]
    rounded = [torch.empty_like(weight, dtype=dtype) for _, weight in convs]
    if rounded:
        torch._foreach_copy_(rounded, [weight for _, weight in convs])
    set_attribute = object.__setattr__  # not Module's, which looks for parameters and takes ten times as long
    try:
        for (conv, _), weight in zip(convs, rounded, strict=True):
            set_attribute(conv, "rounded", weight)
        yield
    finally:
        for conv, _ in convs:
            set_attribute(conv, "rounded", None)


class ConvNormReLU(nn.Sequential):
    """relu(norm(conv(x))) of a SparseConvTensor."""

    def __init__(self, conv: SparseConvolution):
        super().__init__(conv, SparseBatchNorm(conv.weight.shape[0], **NORM))

    def steps(self) -> list[Step]:
        return [Step(*self)]

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        return run_steps(self.steps(), x)


class SparseBlock(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))); an x of another width is projected before it is added."""

    def __init__(self, width: int, in_channels: int | None = None):
        super().__init__()
        self.proj = None
        if in_channels not in (None, width):
            self.proj = nn.Sequential(SparseLinear(in_channels, width), SparseBatchNorm(width, **NORM))
        self.conv1 = SubMConv3d(in_channels or width, width, 3, bias=False)
        self.bn1 = SparseBatchNorm(width, **NORM)
        self.conv2 = SubMConv3d(width, width, 3, bias=False)
        self.bn2 = SparseBatchNorm(width, **NORM)

    def steps(self) -> list[Step]:
        return [Step(self.conv1, self.bn1), Step(self.conv2, self.bn2, skips=self.proj is None)]

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        return run_steps(self.steps(), x, None if self.proj is None else self.proj(x).features)


class SparseStage(nn.Sequential):
    """`SparseBlock`s and `ConvNormReLU`s one after the other; in training on a GPU one op, but for blocks that project
    their input. There the modules are not called: their hooks, and wrappers around them, have no effect."""

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        if not _can_fuse(x.features):
            return super().forward(x)
        steps = []
        for module in self:
            if isinstance(module, SparseBlock) and module.proj is not None:
                x, steps = module(run_steps(steps, x) if steps else x), []
            else:
                steps += module.steps()
        return run_steps(steps, x) if steps else x


def make_tables(net: nn.Module, voxels: VoxelSet) -> list[VoxelSet]:
    """Build all tables of `net` before it runs on `voxels`.

    Then nothing in the net waits for the device (only building a table does), and `torch.compile` makes it one graph.

    net: its sparse convolutions run in the order in which they are registered, each on the voxels of the one before.

    Returns the voxel sets: keep them until the net has run.
    """
    sets = [voxels]
    for module in net.modules():
        if isinstance(module, SparseConvolution):
            sets.append(module.output_voxels(sets[-1]))
    return sets

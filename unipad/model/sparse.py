"""Sparse convolutions on the occupied voxels of a batch of grids, and the blocks made of them.

Only occupied voxels have a row of features. Which rows a convolution gathers (its neighbor table) depends on where the
voxels are, not on its weights: a `VoxelSet` builds each table once per geometry (kernel, stride, padding, dilation) and
keeps it. All triples are (z, y, x).
"""

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipad.kernels import backend, sparse_map, sparse_outputs, voxel_keys
from unipad.kernels.backend import StreamCache, on_triton
from unipad.kernels.norm_relu import norm_relu
from unipad.kernels.sparse_conv import sparse_conv, sparse_conv_act
from unipad.kernels.sparse_layers import Layer, sparse_layers
from unipad.kernels.sparse_tiles import NeighborTable
from unipad.model.norm import SyncedBatchNorm, is_alone

NORM = dict(eps=1e-3, momentum=0.01)  # of the LiDAR encoders' batch norms, as in SECOND
Triple = tuple[int, int, int]


class Table(NamedTuple):
    """Which rows a convolution from N to M voxels with K kernel offsets gathers; -1 where there is no voxel."""

    neighbors: NeighborTable  # [K, M], the input row that each output reads
    inverse: NeighborTable | None  # [K, N], the output row that reads each input; None: neighbors.idx.flip(0)

    @staticmethod
    def of(neighbor_idx, inverse_idx):
        return Table(NeighborTable(neighbor_idx), None if inverse_idx is None else NeighborTable(inverse_idx))


class VoxelSet:
    """The occupied voxels of a batch of grids, and a cache (per CUDA stream) of the tables of the convolutions on them.

    The output set of a strided convolution refers to its input set and to the table between them (`source`). The input
    set refers to the output set only weakly: the next convolution of that geometry finds it as long as it is in use,
    and the voxels of past batches do not stay on the device.
    """

    def __init__(
        self,
        coords: Tensor,
        shape: Sequence[int],
        batch_size: int,
        in_order: bool = False,
        check: bool = True,
        keys: Tensor | None = None,
    ):
        """
        coords:     [N, 4] int32 (b, z, y, x), each voxel once.
        shape:      cells (Z, Y, X).
        batch_size: number of grids; some may be empty.
        in_order:   the voxels are already in ascending order of (b, z, y, x), and need not be sorted.
        check:      raise ValueError for a voxel that is outside or occurs twice; waits for the device.
        keys:       [N] int64, of `voxel_keys`, if already computed.
        """
        assert coords.dim() == 2 and coords.shape[1] == 4, f"coordinates are [N, 4], not {tuple(coords.shape)}"
        assert coords.dtype == torch.int32, f"coordinates are int32, not {coords.dtype}"
        voxel_keys.check_grid(shape, batch_size)
        self.coords, self.shape, self.batch_size = coords.contiguous(), tuple(shape), batch_size
        self.source = None  # (VoxelSet, kernel, Table) of the convolution that made this set
        self._cache, self._is_in_order = StreamCache(), in_order
        if keys is not None:
            self._cache.put("keys", coords.device, keys)
        self.keys()  # fills the cache, which compiled code only reads
        if check:
            self._cache.put("sorted", coords.device, voxel_keys.sort_voxels(self.coords, self.shape))
            last = backend.to_host(self.coords[:, 0].max(), "largest batch index of a voxel") if len(coords) else -1
            if last >= batch_size:
                raise ValueError(f"a voxel is in grid {last} of a batch of {batch_size}")

    def __len__(self):
        return len(self.coords)

    def keys(self):
        """[N] int64, the linear index of each voxel's cell in the dense batch."""
        return self._cache.get("keys", self.coords.device, lambda: voxel_keys.voxel_keys(self.coords, self.shape))

    def submanifold(self, kernel: Triple, dilation: Triple) -> Table:
        """The table of a convolution from these voxels to themselves."""
        table = self._cache.find((kernel, dilation), self.coords.device)
        return self._make_table(kernel, dilation) if table is None else table

    def strided(self, kernel: Triple, stride: Triple, padding: Triple, dilation: Triple) -> "VoxelSet":
        """The output voxels of a strided convolution: all whose window contains at least one of these voxels."""
        geometry = (kernel, stride, padding, dilation)
        weak_outputs = self._cache.find(geometry, self.coords.device)
        outputs = None if weak_outputs is None else weak_outputs()
        return self._make_strided(geometry) if outputs is None else outputs

    # Compiled code takes existing tables as inputs. It cannot build them, since their sizes depend on the data.
    @torch.compiler.disable
    def _make_table(self, kernel, dilation):
        neighbor_idx = sparse_map.submanifold_map(self.coords, *self._sorted_keys(), self.shape, kernel, dilation)
        # the offsets of an odd kernel are symmetric: its inverse table is the table flipped along K
        odd = all(k % 2 for k in kernel)
        table = Table.of(neighbor_idx, None if odd else sparse_map.inverse_map(neighbor_idx, len(self)))
        self._cache.put((kernel, dilation), self.coords.device, table)
        return table

    @torch.compiler.disable
    def _make_strided(self, geometry):
        shape = sparse_outputs.out_shape(self.shape, *geometry)
        coords, keys, *tables = sparse_map.strided_tables(
            self.coords, self.shape, *geometry, self.batch_size, *self._sorted_keys()
        )
        outputs = VoxelSet(coords, shape, self.batch_size, in_order=True, check=False, keys=keys)
        kernel, *_ = geometry
        outputs.source = (self, kernel, Table.of(*tables))
        self._cache.put(geometry, self.coords.device, weakref.ref(outputs))
        return outputs

    def _sorted_keys(self):
        """(ascending keys, index of the voxel of each key); the second is None if the voxels are in order as given."""
        if self._is_in_order:
            return self.keys(), None
        make = partial(voxel_keys.sort_voxels, self.coords, self.shape, check=False)
        return self._cache.get("sorted", self.coords.device, make)


@dataclasses.dataclass(frozen=True)
class SparseTensor:
    """Features of the occupied voxels."""

    features: Tensor  # [N, C]
    voxels: VoxelSet  # of N voxels

    def replace(self, features: Tensor) -> "SparseTensor":
        """The same voxels with other features."""
        return SparseTensor(features, self.voxels)

    def dense(self) -> Tensor:
        """[B, C, Z, Y, X] in memory format channels_last_3d; 0 in empty voxels."""
        voxels, C = self.voxels, self.features.shape[1]
        cells = self.features.new_zeros(voxels.batch_size * math.prod(voxels.shape), C)
        cells.index_copy_(0, voxels.keys(), self.features)
        return cells.view(voxels.batch_size, *voxels.shape, C).permute(0, 4, 1, 2, 3)


class _SparseConvolution(nn.Module):
    """A sparse convolution; subclasses choose its output voxels.

    weight: (Cout, kz, ky, kx, Cin), as in spconv 2; initialized as in `nn.Conv3d`.
    """

    allow_tf32 = False  # True: multiply fp32 features in tf32

    def __init__(self, in_channels, out_channels, kernel, bias=True):
        super().__init__()
        self.rounded = None  # inside of `rounded_weights`: the weight in autocast's type
        self.kernel = _triple(kernel)
        self.weight = nn.Parameter(torch.empty(out_channels, *self.kernel, in_channels))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        bound = 1 / math.sqrt(in_channels * math.prod(self.kernel))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def output_voxels(self, voxels: VoxelSet) -> VoxelSet:
        """The output voxels for these input voxels; builds the table between them if there is none yet."""
        return self.output_voxels_and_table(voxels)[0]

    def output_voxels_and_table(self, voxels: VoxelSet) -> tuple[VoxelSet, Table | None]:
        """`output_voxels(voxels)` and the `Table` between them; None: every voxel reads only itself, K = 1."""
        raise NotImplementedError

    def forward(self, x: SparseTensor) -> SparseTensor:
        voxels, table = self.output_voxels_and_table(x.voxels)
        return SparseTensor(self.convolve(x.features, table), voxels)

    def convolve(self, features: Tensor, table: Table | None) -> Tensor:
        """The features of the output voxels: [N, Cin] -> [M, Cout]."""
        if table is None:
            return F.linear(features, self.weight.flatten(1), self.bias)
        rounded = self.rounded_for(features)
        out = sparse_conv(features, self.weight, *table, allow_tf32=self.allow_tf32, rounded=rounded)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def rounded_for(self, features: Tensor) -> Tensor | None:
        """The weight in autocast's type inside of `rounded_weights`, if autocast casts these features; else None."""
        if self.rounded is None or features.dtype == torch.float64:
            return None
        return self.rounded if torch.is_autocast_enabled(features.device.type) else None

    def extra_repr(self):
        (out_channels, *_, in_channels), names = self.weight.shape, ("kernel", "stride", "padding", "dilation")
        geometry = (f"{name}={getattr(self, name)}" for name in names if hasattr(self, name))
        return ", ".join([str(in_channels), str(out_channels), *geometry, f"bias={self.bias is not None}"])


class SubMConv3d(_SparseConvolution):
    """Submanifold convolution: the output has the voxels of the input. Offsets are centered at kernel // 2."""

    def __init__(self, in_channels, out_channels, kernel, dilation=1, bias=True):
        super().__init__(in_channels, out_channels, kernel, bias)
        self.dilation = _triple(dilation)

    def output_voxels_and_table(self, voxels):
        return voxels, None if self.kernel == (1, 1, 1) else voxels.submanifold(self.kernel, self.dilation)


class SparseConv3d(_SparseConvolution):
    """`nn.Conv3d` on voxels: the output has every voxel whose window contains one of the input, in ascending order.

    A 1 x 1 x 1 kernel without stride and padding leaves the voxels and their order as they are.
    """

    def __init__(self, in_channels, out_channels, kernel, stride=1, padding=0, dilation=1, bias=True):
        super().__init__(in_channels, out_channels, kernel, bias)
        self.stride, self.padding, self.dilation = _triple(stride), _triple(padding), _triple(dilation)

    def output_voxels_and_table(self, voxels):
        if (self.kernel, self.stride, self.padding) == ((1, 1, 1), (1, 1, 1), (0, 0, 0)):
            return voxels, None
        outputs = voxels.strided(self.kernel, self.stride, self.padding, self.dilation)
        _, _, table = outputs.source
        return outputs, table


class SparseInverseConv3d(_SparseConvolution):
    """Back to the input voxels of a `SparseConv3d` with the same kernel, by the inverse of its table.

    A transposed convolution, with weights of its own, restricted to these voxels.
    """

    def output_voxels_and_table(self, voxels):
        assert voxels.source is not None, "these voxels came from no SparseConv3d: there is nothing to go back to"
        source, kernel, table = voxels.source
        assert kernel == self.kernel, f"the voxels came from a kernel {kernel}, this one is {self.kernel}"
        return source, Table(table.inverse, table.neighbors)


class SparseBatchNorm(SyncedBatchNorm):
    """Batch normalization over the occupied voxels of all samples of all processes."""

    # Scale and shift; ids and versions of the tensors that they depend on; these tensors, held so that ids stay unique
    _cache = _versions = _inputs = None

    def forward(self, x: SparseTensor) -> SparseTensor:
        return x.replace(super().forward(x.features))

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

    conv: _SparseConvolution
    norm: SparseBatchNorm
    skips: bool = False


def run_steps(
    steps: Sequence[Step], x: SparseTensor, residual: Tensor | None = None, dtype: torch.dtype | None = None
) -> SparseTensor:
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
            before, x = x.features, SparseTensor(out, sets[n - 1])
        else:
            before, x = x.features, _run_step(steps[0], x, added)
        steps = steps[n:]
    return x if dtype is None else x.replace(x.features.to(dtype))


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
        return y.replace(norm.relu(y.features, residual))
    rounded, (scale, shift) = conv.rounded_for(x.features), norm.scale_and_shift()
    out = sparse_conv_act(
        x.features, conv.weight if rounded is None else rounded, table.neighbors, scale, shift, residual, relu=True,
        allow_tf32=conv.allow_tf32,
    )  # fmt: skip
    return SparseTensor(out, voxels)


def in_fp32(stem: "ConvNormReLU", x: SparseTensor) -> SparseTensor:
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
        return x if dtype is None else x.replace(x.features.to(dtype))


def convolutions_with_tables(*nets: nn.Module) -> list[_SparseConvolution]:
    """The sparse convolutions of `nets` with more than one kernel offset; autocast itself casts the others' weights."""
    modules = (module for net in nets for module in net.modules())
    return [m for m in modules if isinstance(m, _SparseConvolution) and math.prod(m.kernel) > 1]


def rounded_weights(convs: Sequence[_SparseConvolution]):
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
    """relu(norm(conv(x))) of a SparseTensor."""

    def __init__(self, conv: _SparseConvolution):
        super().__init__(conv, SparseBatchNorm(conv.weight.shape[0], **NORM))

    def steps(self) -> list[Step]:
        return [Step(*self)]

    def forward(self, x: SparseTensor) -> SparseTensor:
        return run_steps(self.steps(), x)


class SparseBlock(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))); an x of another width is projected before it is added."""

    def __init__(self, width: int, in_channels: int | None = None):
        super().__init__()
        self.proj = None
        if in_channels not in (None, width):
            self.proj = nn.Sequential(SubMConv3d(in_channels, width, 1, bias=False), SparseBatchNorm(width, **NORM))
        self.conv1 = SubMConv3d(in_channels or width, width, 3, bias=False)
        self.bn1 = SparseBatchNorm(width, **NORM)
        self.conv2 = SubMConv3d(width, width, 3, bias=False)
        self.bn2 = SparseBatchNorm(width, **NORM)

    def steps(self) -> list[Step]:
        return [Step(self.conv1, self.bn1), Step(self.conv2, self.bn2, skips=self.proj is None)]

    def forward(self, x: SparseTensor) -> SparseTensor:
        return run_steps(self.steps(), x, None if self.proj is None else self.proj(x).features)


class SparseStage(nn.Sequential):
    """`SparseBlock`s and `ConvNormReLU`s one after the other; in training on a GPU one op, but for blocks that project
    their input. There the modules are not called: their hooks, and wrappers around them, have no effect."""

    def forward(self, x: SparseTensor) -> SparseTensor:
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
        if isinstance(module, _SparseConvolution):
            sets.append(module.output_voxels(sets[-1]))
    return sets


def _triple(value):
    return (value,) * 3 if isinstance(value, int) else tuple(value)

"""Sparse convolutions of one to three dimensions, with the arguments and the weights of spconv 2."""

import math
from collections.abc import Sequence
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipad.kernels.sparse_conv import sparse_conv
from unipad.spconv.modules import SparseModule
from unipad.spconv.tensor import Shared, SparseConvTensor
from unipad.spconv.voxels import Geometry, Table, VoxelSet

MAX_VOXELS = "max_num_voxels_during_training"  # spconv's name of a buffer


class ConvAlgo(Enum):
    """spconv's algorithms, for the argument `algo`, which has no effect: there is one algorithm here."""

    Native = 0
    MaskImplicitGemm = 1
    MaskSplitImplicitGemm = 2


class SparseLayer(SparseModule):
    """A layer with a window: a convolution or a pooling. Subclasses choose its output voxels."""

    ndim = 3
    kind = None  # of the table, see `Shared`
    groups = 1
    pointwise = False  # every voxel reads only itself

    def set_geometry(self, kernel_size, stride, padding, dilation, indice_key, record_voxel_count):
        """Arguments as given to the layer."""
        self.indice_key = indice_key
        given = dict(kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation)
        for name, value in given.items():
            setattr(self, name, _expand(name, value, self.ndim))
        # as triples: leading axes that a grid does not have are one cell long
        fills = dict(kernel_size=1, stride=1, padding=0, dilation=1)
        self.geometry = Geometry(*((fill,) * (3 - self.ndim) + (*getattr(self, n),) for n, fill in fills.items()))
        self.record_voxel_count = record_voxel_count
        if record_voxel_count:
            self.register_buffer(MAX_VOXELS, torch.zeros(1, dtype=torch.int32))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # state dicts with and without the counter fit
        if self.record_voxel_count:
            state_dict.setdefault(prefix + MAX_VOXELS, self.get_max_num_voxels())
        else:
            state_dict.pop(prefix + MAX_VOXELS, None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # names of spconv, for code that reads them

    @property
    def subm(self) -> bool:
        return self.kind == "submanifold"

    @property
    def transposed(self) -> bool:
        return self.kind == "transposed"

    @property
    def inverse(self) -> bool:
        return self.kind == "inverse"

    @property
    def conv1x1(self) -> bool:
        return math.prod(self.kernel_size) == 1

    @property
    def output_padding(self) -> list[int]:
        return [0] * self.ndim

    def get_max_num_voxels(self) -> Tensor | None:
        """[1] int32, the largest number of output voxels so far; None without `record_voxel_count`."""
        return getattr(self, MAX_VOXELS, None)

    def output_voxels(self, voxels: VoxelSet) -> VoxelSet:
        """The output voxels for these input voxels; builds the table between them if there is none yet."""
        return self.output_voxels_and_table(voxels)[0]

    def output_voxels_and_table(self, voxels: VoxelSet) -> tuple[VoxelSet, Table | None]:
        """`output_voxels(voxels)` and the `Table` between them; None: every voxel reads only itself, K = 1.

        Without `indice_key`, which only `find_table` knows."""
        raise NotImplementedError

    def find_table(self, x: SparseConvTensor) -> tuple[VoxelSet, Table | None, dict]:
        """Output voxels, table, and the output's `indice_dict`. Tables of an `indice_key` are shared, if they fit."""
        key, voxels = self.indice_key, x.voxels
        if key is None or self.pointwise:
            return *self.output_voxels_and_table(voxels), x.indice_dict
        shared = x.indice_dict.get(key)
        if shared is not None:
            self._check_shared(shared, voxels)
        if shared is None or shared.outputs.was_modified():
            outputs, table = self.output_voxels_and_table(voxels)
            shared = Shared(self.kind, self.geometry, voxels, outputs, table, self.ndim)
            return outputs, table, x.indice_dict | {key: shared}
        return shared.outputs, shared.table, x.indice_dict

    def _check_shared(self, shared, voxels):
        key = self.indice_key
        if (shared.kind, shared.geometry) != (self.kind, self.geometry):
            raise ValueError(
                f"indice_key {key!r} belongs to a {shared.kind} layer with {_described(shared.geometry)}, this one is "
                f"{self.kind} with {_described(self.geometry)}: give it another key"
            )
        if not shared.voxels.same_as(voxels):
            raise ValueError(
                f"indice_key {key!r} belongs to other voxels ({len(shared.voxels)} in a grid of {shared.voxels.shape}) "
                f"than this layer's input ({len(voxels)} in a grid of {voxels.shape}): give this layer another key"
            )

    def check_input(self, x: SparseConvTensor, channels: int | None = None):
        """Raise ValueError if x has other dimensions or channels than this layer, or rows that are no voxels."""
        if not isinstance(x, SparseConvTensor):
            raise TypeError(f"{type(self).__name__} takes a SparseConvTensor, not {type(x).__name__}")
        if x.ndim != self.ndim:
            raise ValueError(f"{type(self).__name__} takes a tensor in {self.ndim}D, not in {x.ndim}D")
        if torch.compiler.is_compiling():
            return  # sizes vary: comparing them would become a part of the graph; the ops compare them
        rows, C = x.features.shape
        if channels not in (None, C):
            raise ValueError(f"{type(self).__name__} takes {channels} channels, not {C}")
        if rows != len(x.current_voxels()):
            raise ValueError(f"{rows} rows of features do not match {len(x.voxels)} voxels")

    def count(self, outputs: VoxelSet):
        if self.record_voxel_count:
            self.get_max_num_voxels().clamp_(min=len(outputs))

    def extra_repr(self):
        return ", ".join(
            f"{name}={tuple(getattr(self, name))}" for name in ("kernel_size", "stride", "padding", "dilation")
        )


class SparseConvolution(SparseLayer):
    """A sparse convolution: base class of those with a number of dimensions.

    weight: (Cout, *kernel_size, Cin), as in spconv 2.2 and 2.3; initialized as in `nn.Conv3d`, as is `bias`.

    If no voxel reads another one (a kernel of 1, stride 1, no padding), the weight's memory is read as a matrix
    (Cin, Cout), as spconv does: see `kernel_weight`.

    indice_key: name of a table that layers share and that inverse convolutions look for. Here, layers without one share
        tables too. Another layer, geometry or other voxels under the same key raise ValueError.
    algo, fp32_accum, use_hash, large_kernel_fast_algo: no effect; sums are in fp32 or better.
    record_voxel_count: register a buffer that counts output voxels, as spconv does for TensorRT.
    """

    allow_tf32 = False  # True: multiply fp32 features in tf32

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | Sequence[int], stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0, dilation: int | Sequence[int] = 1, groups: int = 1, bias: bool = True,
        indice_key: str | None = None, algo=None, fp32_accum=None, *, use_hash=False, large_kernel_fast_algo=False,
        record_voxel_count: bool = False, act_type=None, act_alpha=0, act_beta=0, name: str | None = None, device=None,
        dtype=None,
    ):  # fmt: skip
        super().__init__(name)
        if groups != 1:
            raise ValueError(f"sparse convolutions have one group, not {groups}")
        if getattr(act_type, "name", act_type) not in (None, "None_"):
            raise ValueError(f"act_type {act_type} is not supported: append the activation as a module")
        counted = record_voxel_count and self.kind in ("strided", "transposed")
        self.set_geometry(kernel_size, stride, padding, dilation, indice_key, counted)
        self.in_channels, self.out_channels, self.algo, self.fp32_accum = in_channels, out_channels, algo, fp32_accum
        self.rounded = None  # inside of `model.sparse.rounded_weights`: the weight in autocast's type
        options = dict(device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.empty(out_channels, *self.kernel_size, in_channels, **options))
        self.bias = nn.Parameter(torch.empty(out_channels, **options)) if bias else None
        one, zero = (1, 1, 1), (0, 0, 0)
        self.pointwise = self.geometry[:3] == (one, one, zero)
        self.reset_parameters()

    def reset_parameters(self):
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def kernel_weight(self) -> Tensor:
        """[Cout, kz, ky, kx, Cin], the weight of each kernel offset: a view of `weight`."""
        weight, kernel = self.weight, self.geometry.kernel
        if self.pointwise:
            weight = weight.view(self.in_channels, self.out_channels).t()
        return weight if weight.dim() == 5 else weight.view(self.out_channels, *kernel, self.in_channels)

    def forward(self, x: SparseConvTensor, add_input: SparseConvTensor | None = None) -> SparseConvTensor:
        """add_input: is added to the result, of the same voxels."""
        self.check_input(x, self.in_channels)
        outputs, table, indice_dict = self.find_table(x)
        self.count(outputs)
        out = SparseConvTensor.of(self.convolve(x.features, table), outputs, indice_dict, self.ndim)
        return out if add_input is None else out + add_input

    def convolve(self, features: Tensor, table: Table | None) -> Tensor:
        """The features of the output voxels: [N, Cin] -> [M, Cout]."""
        weight = self.kernel_weight()
        if table is None:
            bias = None if self.bias is None else self.bias.to(features.dtype)
            return F.linear(features, weight.flatten(1).to(features.dtype), bias)
        rounded = self.rounded_for(features)
        out = sparse_conv(features, weight, *table, allow_tf32=self.allow_tf32, rounded=rounded)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def rounded_for(self, features: Tensor) -> Tensor | None:
        """The weight in autocast's type inside of `model.sparse.rounded_weights`, if autocast casts these features;
        else None."""
        if self.rounded is None or features.dtype == torch.float64:
            return None
        return self.rounded if torch.is_autocast_enabled(features.device.type) else None

    def extra_repr(self):
        return f"{self.in_channels}, {self.out_channels}, {super().extra_repr()}, bias={self.bias is not None}"


class SubMConv(SparseConvolution):
    """Submanifold convolution: the output has the voxels of the input. Offsets are centered at kernel // 2; stride and
    padding have no effect, as in spconv."""

    kind = "submanifold"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        kernel, _, _, dilation = self.geometry
        self.geometry = Geometry(kernel, (1, 1, 1), (0, 0, 0), dilation)
        self.pointwise = kernel == (1, 1, 1)

    def output_voxels_and_table(self, voxels):
        return voxels, None if self.pointwise else voxels.submanifold(self.geometry.kernel, self.geometry.dilation)


class SparseConv(SparseConvolution):
    """`nn.Conv3d` on voxels: the output has every voxel whose window contains one of the input, in ascending order.

    A kernel of 1 without stride and padding leaves the voxels and their order as they are.
    """

    kind = "strided"

    def output_voxels_and_table(self, voxels):
        if self.pointwise:
            return voxels, None
        outputs = voxels.strided(*self.geometry)
        _, _, table = outputs.source
        return outputs, table


class SparseConvTranspose(SparseConvolution):
    """`nn.ConvTranspose3d` on voxels: the output has every voxel that one of the input spreads to, in ascending order.

    The grid has the size of PyTorch's result; spconv's is smaller if the dilation is above 1.
    """

    kind = "transposed"

    def output_voxels_and_table(self, voxels):
        if self.pointwise:
            return voxels, None
        outputs = voxels.transposed(*self.geometry)
        _, _, table = outputs.source
        return outputs, table


class SparseInverseConv(SparseConvolution):
    """Back to the input voxels of a convolution or pooling with the same kernel, by the inverse of its table.

    A transposed convolution, with weights of its own, restricted to these voxels.

    indice_key: of the layer to invert. None: the layer that made the input's voxels.
    """

    kind = "inverse"

    def __init__(
        self, in_channels, out_channels, kernel_size, indice_key=None, bias=True, algo=None, fp32_accum=None, **options
    ):
        options |= dict(bias=bias, indice_key=indice_key, algo=algo, fp32_accum=fp32_accum)
        super().__init__(in_channels, out_channels, kernel_size, **options)

    def output_voxels_and_table(self, voxels):
        if voxels.source is None:
            raise ValueError("these voxels came from no strided convolution: there is nothing to go back to")
        source, kernel, table = voxels.source
        self._check_kernel(kernel)
        return source, table.inverted()

    def find_table(self, x):
        if self.indice_key is None:
            return *self.output_voxels_and_table(x.voxels), x.indice_dict
        shared = x.indice_dict.get(self.indice_key)
        if shared is None and self.pointwise:  # its convolution was pointwise, too
            return x.voxels, None, x.indice_dict
        if shared is None or shared.kind == "submanifold":
            keys = [key for key, other in x.indice_dict.items() if other.kind != "submanifold"]
            raise ValueError(
                f"no strided convolution before this one has indice_key {self.indice_key!r}; those with one have {keys}"
            )
        self._check_kernel(shared.geometry.kernel)
        if not shared.outputs.same_as(x.voxels):
            raise ValueError(
                f"the input has other voxels ({len(x.voxels)} in a grid of {x.voxels.shape}) than the convolution with "
                f"indice_key {self.indice_key!r} made ({len(shared.outputs)} in a grid of {shared.outputs.shape}): "
                "first invert the layers between them that changed the voxels"
            )
        return shared.voxels, shared.table.inverted(), x.indice_dict

    def _check_kernel(self, kernel):
        if kernel != self.geometry.kernel:
            raise ValueError(f"the voxels came from a kernel {kernel}, this one is {self.geometry.kernel}")


class SubMConv1d(SubMConv):
    ndim = 1


class SubMConv2d(SubMConv):
    ndim = 2


class SubMConv3d(SubMConv):
    ndim = 3


class SparseConv1d(SparseConv):
    ndim = 1


class SparseConv2d(SparseConv):
    ndim = 2


class SparseConv3d(SparseConv):
    ndim = 3


class SparseConvTranspose1d(SparseConvTranspose):
    ndim = 1


class SparseConvTranspose2d(SparseConvTranspose):
    ndim = 2


class SparseConvTranspose3d(SparseConvTranspose):
    ndim = 3


class SparseInverseConv1d(SparseInverseConv):
    ndim = 1


class SparseInverseConv2d(SparseInverseConv):
    ndim = 2


class SparseInverseConv3d(SparseInverseConv):
    ndim = 3


def _expand(name, value, ndim):
    """`value` as a list of `ndim` numbers."""
    several = hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0  # arrays of no dimension are numbers
    values = [int(v) for v in value] if several else [int(value)] * ndim
    if len(values) != ndim or min(values) < (0 if name == "padding" else 1):
        raise ValueError(f"{name} {value} is not one or {ndim} valid numbers")
    return values


def _described(geometry):
    return ", ".join(f"{name} {value}" for name, value in geometry._asdict().items())

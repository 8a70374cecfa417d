"""sparse_conv: kernels, reference and spconv, at the stages of the LiDAR recipe.

    python -m benchmarks.bench_sparse_conv
    python -m benchmarks.bench_sparse_conv --tune                 our launches autotuned
    OMP_NUM_THREADS=1 python -m benchmarks.bench_sparse_conv      on a CPU: with more threads spconv has data races

Voxels come from benchmarks/lidar_scene.py, whose statistics are printed next to those of nuScenes. In results named
"cold" every run builds the neighbor tables, from unsorted coordinates as a peer does; in others ("warm" in the code)
they are built once. All results are compared with results computed in fp64.
Peers, if installed: spconv (pip install spconv-cu126; spconv for a CPU) and spconv-triton, with spconv's interface.
"""

import copy
import importlib
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import tyro
from torch import nn
from torch.func import functional_call

from benchmarks.harness import DEVICE, Case, compare
from benchmarks.lidar_scene import DOWNSAMPLES, NUSCENES, SHAPE, voxels
from unipad.kernels import tuning
from unipad.kernels.backend import references
from unipad.kernels.sparse_conv import sparse_conv, sparse_conv_ref
from unipad.kernels.sparse_map import inverse_map, strided_map, submanifold_map
from unipad.kernels.sparse_outputs import out_shape
from unipad.kernels.sparse_tiles import NeighborTable
from unipad.kernels.voxel_keys import sort_voxels
from unipad.model import sparse
from unipad.model.lidar import SparseEncoder
from unipad.spconv.conv import SparseConv3d, SubMConv3d
from unipad.spconv.tensor import SparseConvTensor
from unipad.spconv.voxels import VoxelSet

WIDTHS = 16, 32, 64, 128  # channels of the stages
KERNEL, DILATION = (3, 3, 3), (1, 1, 1)  # of the submanifold convolutions
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32  # spconv has no bf16
AGREE = 5e-3 if DEVICE == "cuda" else 1e-3  # of the largest value; outputs in fp16 are rounded to about 1e-3 of it
AGREE_DEEP = 5e-2 if DEVICE == "cuda" else 5e-3  # after the encoder's 21 convolutions


@dataclass
class Level:
    """Voxels of one stage, and what each implementation caches for them."""

    name: str
    coords: torch.Tensor  # [N, 4] int32
    shape: tuple  # cells (Z, Y, X)
    batch: int
    cache: dict = field(default_factory=dict)

    def submanifold(self):
        """A new neighbor table of a 3 x 3 x 3 submanifold convolution, and None for the `inverse_idx` of `sparse_conv`,
        which then takes the table with its kernel offsets reversed."""
        keys, order = sort_voxels(self.coords, self.shape, check=False)
        table = submanifold_map(self.coords, keys, order, self.shape, KERNEL, DILATION)
        return NeighborTable(table), None

    def tables(self):
        """The result of `submanifold`, cached."""
        if "tables" not in self.cache:
            self.cache["tables"] = self.submanifold()
        return self.cache["tables"]

    def pairs(self):
        """Number of pairs of output and neighbor."""
        return (self.tables()[0].idx >= 0).sum().item()


def stages(batch):
    """The `Level` of each stage of the encoder, for `batch` scenes."""
    levels, coords, shape = [], voxels(batch, DEVICE), SHAPE
    for i in range(len(WIDTHS)):
        if i:
            coords, shape = strided_map(coords, shape, *DOWNSAMPLES[i - 1])[0], out_shape(shape, *DOWNSAMPLES[i - 1])
        levels.append(Level(f"B={batch} stage {i + 1}", coords, shape, batch))
    return levels


def print_statistics(levels):
    print("| stage | voxels | nuScenes | neighbors of 27 | nuScenes |\n|---|---|---|---|---|")
    for i, (level, (N, neighbors)) in enumerate(zip(levels, NUSCENES, strict=True)):
        measured = level.pairs() / len(level.coords)
        print(f"| {i + 1} | {len(level.coords)} | {N:.0f} | {measured:.1f} | {neighbors} |")
    print()


# Ours: functions of a case's inputs, with `op` either `sparse_conv` or its reference


def warm(op):
    return lambda features, weight, level: op(features, weight, *level.tables())


def cold(op):
    return lambda features, weight, level: op(features, weight, *level.submanifold())


def strided(op):
    """A strided convolution with its tables, made in every run; geometry: one of DOWNSAMPLES.

    Implementations order output rows differently, so the sum over the rows is compared.
    """

    def run(features, weight, level, geometry):
        _, table = strided_map(level.coords, level.shape, *geometry, level.batch)
        return op(features, weight, table, inverse_map(table, len(features))).sum(dim=0)

    return run


class Encoders:
    """One encoder, its weights shared by all implementations."""

    def __init__(self):
        self.encoder = SparseEncoder(in_channels=5, widths=WIDTHS, blocks=2, out_channels=256).to(DEVICE)
        for module in self.encoder.modules():
            if isinstance(module, sparse.SparseBatchNorm):
                # keeps the ReLUs' inputs away from 0, where rounding decides whether a gradient passes: with a bias of
                # 0, gradients in fp32 differ from those in fp64 by up to 12 %
                nn.init.constant_(module.bias, 8)
        # Gradients are compared for the weights of the convolutions only: the bias of a norm has little effect after
        # the next norm, so its gradient would be mostly rounding error.
        self.names = [name for name, p in self.encoder.named_parameters() if p.dim() == 5]
        self.weights = [self.encoder.get_parameter(name) for name in self.names]

    def ours(self, op, keep):
        """A function that runs the encoder with `op`. keep: build the neighbor tables once, and cache them (warm)."""

        def run(features, weights, level):  # weights: the encoder's own, passed for their gradients
            cache = level.cache if keep else {}
            if "voxels" not in cache:
                cache["voxels"] = VoxelSet(level.coords, level.shape, level.batch, check=False)
                # the tables are in the voxel sets of all stages, which live as long as this list
                cache["voxel sets"] = sparse.make_tables(self.encoder, cache["voxels"])
            tensor = SparseConvTensor.of(features, cache["voxels"])
            with run_with(op), half():
                return self.encoder(tensor).dense(memory_format=torch.channels_last_3d)

        return run

    def exact(self, features, weights, level):
        """The encoder's output by the reference; for fp64 inputs, these are the true values."""
        voxels = VoxelSet(level.coords, level.shape, level.batch, check=False)
        encoder = copy.deepcopy(self.encoder).double()
        with run_with(sparse_conv_ref):
            given = dict(zip(self.names, weights, strict=True))
            out = functional_call(encoder, given, SparseConvTensor.of(features, voxels))
            return out.dense(memory_format=torch.channels_last_3d)

    def theirs(self, lib, keep):
        """`ours` with the convolutions of a peer."""
        encoder = as_peer(self.encoder, lib)

        def run(features, weights, level):
            cache = level.cache.setdefault(lib.__name__ + " encoder", {}) if keep else {}
            tensor = lib.SparseConvTensor(features, level.coords, list(level.shape), level.batch, indice_dict=cache)
            with half():
                return encoder(PeerTensor(tensor)).dense()

        return run


def run_with(op):
    """Context in which a model's ops are their references, if `op` is one."""
    return references() if op is sparse_conv_ref else nullcontext()


def half():
    """Autocast to fp16 on a GPU, since spconv has no bf16."""
    return torch.autocast(DEVICE, torch.float16, enabled=DEVICE == "cuda")


# Peers


def installed():
    """{name: module} of the peers that can run here; prints which cannot, and why."""
    libs = {}
    for name, module in {"spconv": "spconv.pytorch", "spconv-triton": "spconv_triton.pytorch"}.items():
        try:
            if name == "spconv-triton" and DEVICE == "cpu":
                raise ImportError("needs a GPU")
            if name == "spconv" and DEVICE == "cpu" and torch.get_num_threads() > 1:
                raise ImportError("sums wrongly on a CPU with more than one thread: set OMP_NUM_THREADS=1")
            libs[name] = importlib.import_module(module)
        except ImportError as e:
            print(f"{name} is left out: {e}")
    if DEVICE == "cpu" and "spconv" in libs:
        # its backward asks for the CUDA stream, which it then does not use
        importlib.import_module("spconv.pytorch.ops").get_current_stream = lambda: 0
    return libs


def warm_peer(lib):
    def run(features, weight, level):
        if lib.__name__ not in level.cache:
            tensor = lib.SparseConvTensor(features, level.coords, list(level.shape), level.batch)
            level.cache[lib.__name__] = tensor  # caches the table, by the convolution's `indice_key`
        conv = peer_conv(lib, level, weight)
        return conv(level.cache[lib.__name__].replace_feature(features)).features

    return run


def cold_peer(lib):
    def run(features, weight, level):
        tensor = lib.SparseConvTensor(features, level.coords, list(level.shape), level.batch)
        return peer_conv(lib, level, weight)(tensor).features

    return run


def strided_peer(lib):
    def run(features, weight, level, geometry):
        tensor = lib.SparseConvTensor(features, level.coords, list(level.shape), level.batch)
        return peer_conv(lib, level, weight, geometry)(tensor).features.sum(dim=0)

    return run


def peer_conv(lib, level, weight, geometry=None):
    """The peer's module with this weight, made once. geometry: of a strided convolution; None: submanifold."""
    key = lib.__name__, id(weight)
    if key not in level.cache:
        out_channels, in_channels = weight.shape[0], weight.shape[4]
        if geometry is None:
            conv = lib.SubMConv3d(in_channels, out_channels, 3, bias=False, indice_key="0")
        else:
            kernel, stride, padding, _ = geometry
            conv = lib.SparseConv3d(in_channels, out_channels, kernel, stride, padding, bias=False)
        conv.weight = weight
        level.cache[key] = conv.to(DEVICE)
    return level.cache[key]


class PeerTensor:
    """A peer's tensor with the interface of our SparseConvTensor."""

    def __init__(self, tensor):
        self.tensor, self.features, self.dense = tensor, tensor.features, tensor.dense

    def replace_feature(self, features):
        return PeerTensor(self.tensor.replace_feature(features))


class PeerConv(nn.Module):
    """A peer's convolution, from `PeerTensor` to `PeerTensor`."""

    bias = ()  # not None, with which ours is fused with its batch norm

    def __init__(self, conv):
        super().__init__()
        self.conv, self.weight = conv, conv.weight

    def forward(self, x):
        return PeerTensor(self.conv(x.tensor))


class Pointwise(nn.Module):
    """`SparseLinear` for peers, whose 1 x 1 x 1 convolution has its weight in another order, so that it could not share
    ours."""

    bias = ()

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x.replace_feature(x.features @ self.weight.flatten(1).T)


def as_peer(encoder, lib):
    """A copy of the encoder with the peer's convolutions; all parameters are shared."""
    twin = copy.deepcopy(encoder, {id(p): p for p in encoder.parameters()})
    twin.convs, stage = [], 0  # none whose weights are cast for our kernels
    for parent in list(twin.modules()):
        for name, conv in list(parent.named_children()):
            if isinstance(conv, sparse.SparseLinear):
                setattr(parent, name, Pointwise(conv.weight))
                continue
            if isinstance(conv, SubMConv3d):
                sizes = conv.weight.shape[4], conv.weight.shape[0], conv.weight.shape[1:4]  # channels in, out; kernel
                theirs = lib.SubMConv3d(*sizes, bias=False, indice_key=f"subm{stage}")
            elif isinstance(conv, SparseConv3d):
                kernel, stride, padding, _ = DOWNSAMPLES[stage]
                sizes = conv.weight.shape[4], conv.weight.shape[0], kernel, stride, padding
                stage += 1
                theirs = lib.SparseConv3d(*sizes, bias=False, indice_key=f"down{stage}")
            else:
                continue
            theirs.weight = conv.weight
            setattr(parent, name, PeerConv(theirs.to(DEVICE)))
    return twin


# Cases


def case(level, width, d_features=True, d_weight=True):
    """A submanifold convolution of `width` channels; the name gives the FLOP of the forward.

    d_features, d_weight: whether these gradients are computed.
    """
    features, weight = tensors(len(level.coords), width, width, d_features, d_weight)
    table, pairs = level.tables()[0].idx, level.pairs()
    name = f"{level.name} C={width} N={len(features)}, {2e-9 * pairs * width**2:.1f} GFLOP"
    moved = 2 * features.nbytes + weight.nbytes + table.nbytes  # the output is as large as the features
    return Case(name, (features, weight, level), moved)


def strided_case(level, width, geometry):
    features, weight = tensors(len(level.coords), width, 2 * width)
    out_coords, table = strided_map(level.coords, level.shape, *geometry)
    name = f"{level.name} C={width}, {2 * width} N={len(features)}, M={len(out_coords)}"
    out_bytes = len(out_coords) * 2 * width * features.element_size()
    moved = features.nbytes + weight.nbytes + 2 * table.nbytes + out_bytes  # the table is written and read
    return Case(name, (features, weight, level, geometry), moved)


def encoder_case(level, weights):
    features = torch.randn(len(level.coords), 5, device=DEVICE, requires_grad=True)
    moved = features.nbytes + sum(w.nbytes for w in weights)
    return Case(f"B={level.batch} N={len(features)}", (features, weights, level), moved)


def tensors(N, c_in, c_out, d_features=True, d_weight=True):
    """Random features and weights; d_features, d_weight: whether they require gradients."""
    features = torch.randn(N, c_in, device=DEVICE, dtype=DTYPE, requires_grad=d_features)
    # an output sums about 14 neighbors (see NUSCENES), so outputs have a variance of about 1
    weight = torch.randn(c_out, *KERNEL, c_in, device=DEVICE) / (14 * c_in) ** 0.5
    return features, nn.Parameter(weight.to(DTYPE), requires_grad=d_weight)


def main(tune: bool = False):
    """Measure and print.

    Args:
        tune: autotune our launches first.
    """
    tuned = ", tuned" if tune else ""  # suffix of the op's name
    if tune:
        tuning.enable()
    libs = installed()
    for batch in [1, 4] if DEVICE == "cuda" else [1]:
        levels = stages(batch)
        if batch == 1:
            print_statistics(levels)
        nets = Encoders()
        for name, keep in [("sparse encoder", True), ("sparse encoder, cold", False)]:
            compare(
                name + tuned,
                nets.ours(sparse_conv_ref, keep),
                nets.ours(sparse_conv, keep),
                {peer: nets.theirs(lib, keep) for peer, lib in libs.items()},
                [encoder_case(levels[0], nets.weights)],
                agree=AGREE_DEEP,
                exact=nets.exact,
            )

        sized = list(zip(levels, WIDTHS, strict=True))  # (level, channels)
        # more channels than the recipe has at this stage: for these, matrix products should cost more than gathering
        wide = [(levels[1], 128), (levels[1], 256)] if DEVICE == "cuda" else []

        peers = {name: warm_peer(lib) for name, lib in libs.items()}
        reference = warm(sparse_conv_ref)  # with fp64 inputs also the true values
        for name, wanted in [
            ("sparse_conv", dict(d_features=True, d_weight=True)),
            ("sparse_conv, gradient of the features", dict(d_features=True, d_weight=False)),
            ("sparse_conv, gradient of the weights", dict(d_features=False, d_weight=True)),
        ]:
            cases = [case(*s, **wanted) for s in sized + wide]
            compare(name + tuned, reference, warm(sparse_conv), peers, cases, agree=AGREE, exact=reference)

        peers = {name: cold_peer(lib) for name, lib in libs.items()}
        reference, name = cold(sparse_conv_ref), f"sparse_conv, cold{tuned}"
        cases = [case(*s) for s in sized]
        compare(name, reference, cold(sparse_conv), peers, cases, agree=AGREE, exact=reference)

        peers = {name: strided_peer(lib) for name, lib in libs.items()}
        reference, name = strided(sparse_conv_ref), f"sparse_conv, strided, cold{tuned}"
        # the last stage has no strided convolution
        cases = [strided_case(*s, geometry) for s, geometry in zip(sized, DOWNSAMPLES, strict=False)]
        compare(name, reference, strided(sparse_conv), peers, cases, agree=AGREE, exact=reference)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)

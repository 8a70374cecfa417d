"""Functions of several sparse tensors, and weights of spconv 1."""

from functools import reduce

import torch
from torch import Tensor, nn

from unipad.kernels.backend import host_wait
from unipad.spconv.conv import SparseConvolution
from unipad.spconv.tensor import SparseConvTensor


def sparse_add(*tensors: SparseConvTensor) -> SparseConvTensor:
    """The sum of sparse tensors whose voxels differ, in grids of the same size: a voxel has the sum of the tensors that
    have it.

    If one of them has all voxels, the result has its voxels, in its order, and its tables: inverse convolutions work as
    behind it. Else the result has the union, in ascending order, and no tables. Its type is the widest, as of `a + b`.
    Waits for the device.

    Raises ValueError for different grids, batch sizes or numbers of channels.
    """
    first, most = tensors[0], max(range(len(tensors)), key=lambda i: len(tensors[i].current_voxels()))
    for x in tensors:
        sizes = [(t.spatial_shape, t.batch_size, t.features.shape[1]) for t in (first, x)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"cannot add sparse tensors of (grid, batch size, channels) {sizes[0]} and {sizes[1]}")
    with host_wait("the union of voxels"):
        keys, row = torch.unique(torch.cat([x.voxels.keys() for x in tensors]), return_inverse=True)
    rows = list(row.split([len(x.voxels) for x in tensors]))
    if len(keys) == len(rows[most]):
        order = torch.empty_like(rows[most])  # row of the tensor with all voxels, for each key
        order[rows[most]] = torch.arange(len(keys), device=keys.device)
        rows, total = [order[r] for r in rows], tensors[most].replace_feature
    else:
        Z, Y, X = first.voxels.shape
        coords = torch.stack([keys // (Z * Y * X), keys // (Y * X) % Z, keys // X % Y, keys % X], dim=1).int()
        indices = torch.cat([coords[:, :1], coords[:, 4 - first.ndim :]], dim=1)

        def total(features):
            return SparseConvTensor(features, indices, first.spatial_shape, first.batch_size)

    dtype = reduce(torch.promote_types, [x.features.dtype for x in tensors])
    features = first.features.new_zeros(len(keys), first.features.shape[1], dtype=dtype)
    for x, r in zip(tensors, rows, strict=True):
        # no two rows of `x` are added to the same one, so the order of additions is that of the tensors
        features = features.index_add(0, r, x.features.to(dtype))
    return total(features)


sparse_add_hash_based = sparse_add  # spconv's name for another implementation


def from_spconv1(state: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """A state dict of spconv 1 for a net of this package: weights (*kernel_size, Cin, Cout) become those of spconv 2,
    other entries stay as they are.

    net: its module names are those of the state dict; keys that it does not have are kept.

    Raises ValueError for a weight of another shape. Weights of spconv 2.0 and 2.1, (*kernel_size, Cout, Cin), are not
    told from those of spconv 1 if Cin is Cout: they are not for this function.
    """
    state = dict(state)
    for name, module in net.named_modules():
        key = f"{name}.weight" if name else "weight"
        if isinstance(module, SparseConvolution) and key in state:
            weight, expected = state[key], (*module.kernel_size, module.in_channels, module.out_channels)
            if weight.shape != expected:
                raise ValueError(f"{key} is {tuple(weight.shape)}, in spconv 1 it is {expected}: is it of spconv 2?")
            # read as a matrix (Cin, Cout) here, too
            moved = weight.contiguous() if module.pointwise else weight.movedim(-1, 0)
            state[key] = moved.reshape(module.weight.shape)
    return state

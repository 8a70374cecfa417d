"""Modules that map sparse tensors to sparse tensors, and the container that runs dense modules on their features."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from unipad.spconv.tensor import SparseConvTensor


class SparseModule(nn.Module):
    """Base class of modules that a `SparseSequential` calls with the sparse tensor, not with its features."""

    def __init__(self, name: str | None = None):
        super().__init__()
        self.name = name


class _OfFeatures:
    """Lets a layer of `torch.nn` take a sparse tensor too."""

    def forward(self, x):
        if isinstance(x, SparseConvTensor):
            return x.replace_feature(super().forward(x.features))
        return super().forward(x)


class SparseBatchNorm(_OfFeatures, nn.BatchNorm1d):
    pass


class SparseSyncBatchNorm(_OfFeatures, nn.SyncBatchNorm):
    pass


class SparseReLU(_OfFeatures, nn.ReLU):
    pass


class SparseIdentity(_OfFeatures, nn.Identity):
    pass


def is_spconv_module(module: nn.Module) -> bool:
    """Whether the module takes a sparse tensor."""
    return isinstance(module, SparseModule | _OfFeatures)


class SparseSequential(nn.Sequential, SparseModule):
    """`nn.Sequential` of sparse modules and of modules that run on the features, such as norms and activations.

    Modules are positional arguments, an `OrderedDict`, or keyword arguments, which name them.
    """

    def __init__(self, *modules: nn.Module | OrderedDict, **named: nn.Module):
        super().__init__(*modules)
        for name, module in named.items():
            self.add(module, name)

    def add(self, module: nn.Module, name: str | None = None):
        name = str(len(self)) if name is None else name
        if name in self._modules:
            raise KeyError(f"there is a module {name!r} already")
        self.add_module(name, module)

    def forward(self, x):
        for module in self:
            if is_spconv_module(module) or not isinstance(x, SparseConvTensor):
                x = module(x)
            else:  # without voxels too: they may change the number of channels, or wait for other processes
                x = x.replace_feature(module(x.features))
        return x


class ToDense(SparseModule):
    """`SparseConvTensor.dense`."""

    def forward(self, x: SparseConvTensor) -> Tensor:
        return x.dense()


class RemoveGrid(SparseModule):
    """Nothing: there is no buffer to remove."""

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        return x


class Identity(nn.Module):
    def forward(self, x):
        return x


class AddTable(SparseModule):
    """The sum of sparse tensors with the same voxels."""

    def forward(self, tensors: list[SparseConvTensor]) -> SparseConvTensor:
        return sum(tensors[1:], tensors[0])


class JoinTable(SparseModule):
    """The features of sparse tensors with the same voxels, side by side."""

    def forward(self, tensors: list[SparseConvTensor]) -> SparseConvTensor:
        first = tensors[0]
        if not all(first.current_voxels().same_as(x.current_voxels()) for x in tensors):
            raise ValueError("the sparse tensors to join have different voxels")
        return first.replace_feature(torch.cat([x.features for x in tensors], dim=1))


class ConcatTable(SparseModule):
    """A list of the results of all its modules on the same input."""

    def forward(self, x: SparseConvTensor) -> list:
        return [module(x) for module in self.children()]

    def add(self, module: nn.Module) -> "ConcatTable":
        self.add_module(str(len(self._modules)), module)
        return self


def assign_name_for_sparse_modules(net: nn.Module):
    """Set the attribute `name` of all sparse modules in `net` to their path; nothing here reads it."""
    for name, module in net.named_modules():
        if isinstance(module, SparseModule):
            module.name = name

"""What code imports from `spconv.core` and `spconv.pytorch.core`."""

from unipad.spconv.conv import ConvAlgo
from unipad.spconv.tensor import SparseConvTensor

__all__ = ["ConvAlgo", "SparseConvTensor"]

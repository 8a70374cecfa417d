"""Dropout drawn per sample: what is dropped from a sample does not depend on the rest of the batch."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Dropout:
    """Dropout with masks from one `torch.Generator` per sample; without generators, as in evaluation, drops nothing."""

    def __init__(self, rate: float = 0.0, generators: Sequence[torch.Generator] | None = None):
        self.rate, self.generators = rate, generators
        self.drops = rate > 0 and generators is not None

    def __call__(self, x: Tensor) -> Tensor:
        """x: [M, ...], sample after sample, the same number of rows for each generator."""
        if not self.drops:
            return x
        kept = torch.empty_like(x, dtype=torch.bool)
        for mask, generator in zip(kept.chunk(len(self.generators)), self.generators, strict=True):
            mask.bernoulli_(1 - self.rate, generator=generator)
        return torch.where(kept, x / (1 - self.rate), 0)

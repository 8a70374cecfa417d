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
        return drop(x, self._drawn(torch.empty_like(x, dtype=torch.bool)) if self.drops else None, self.rate)

    def masks(self, *shapes: Sequence[int]) -> list[Tensor | None]:
        """Masks for `drop`, one for each shape [M, ...], drawn in this order; None each where nothing is dropped."""
        if not self.drops:
            return [None] * len(shapes)
        return [self._drawn(torch.empty(s, dtype=torch.bool, device=self.generators[0].device)) for s in shapes]

    def _drawn(self, kept):
        for mask, generator in zip(kept.chunk(len(self.generators)), self.generators, strict=True):
            mask.bernoulli_(1 - self.rate, generator=generator)
        return kept


def drop(x: Tensor, kept: Tensor | None, rate: float) -> Tensor:
    """x / (1 - rate) where the mask `kept` is True, else 0; x itself without a mask."""
    return x if kept is None else torch.where(kept, x / (1 - rate), 0)

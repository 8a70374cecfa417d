"""Dropout that is reproducible sample by sample, whatever else is in the batch."""

import torch


class Dropout:
    """Dropout whose masks come from one `torch.Generator` a sample; without generators nothing is dropped."""

    def __init__(self, rate=0.0, generators=None):
        self.rate, self.generators = rate, generators
        self.drops = rate > 0 and generators is not None

    def __call__(self, x):
        """x: [M, ...], each sample's M / B rows after those of the sample before."""
        if not self.drops:
            return x
        kept = torch.empty_like(x, dtype=torch.bool)
        for mask, generator in zip(kept.chunk(len(self.generators)), self.generators, strict=True):
            mask.bernoulli_(1 - self.rate, generator=generator)
        return torch.where(kept, x / (1 - self.rate), 0)

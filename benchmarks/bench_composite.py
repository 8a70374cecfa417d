"""composite: kernel, reference, and UniPAD's formula in eager PyTorch.   python -m benchmarks.bench_composite"""

import torch

from benchmarks.harness import DEVICE, Case, compare
from unipad.kernels.composite import EPS, composite, composite_ref

# Rays, samples of each, channels composited. UniPAD: 6 cameras x 512 rays, 72 + 24 samples, RGB and depth; then more
# channels, then more rays. On a CPU first about the tiny preset's sizes (6 x 64 rays, 40 + 16 samples)
GPU_SIZES = [(3072, 96, 4), (3072, 96, 32), (24576, 96, 32)]
CPU_SIZES = [(384, 64, 4), (3072, 96, 4)]


def case(R, S, C):
    alpha = torch.rand(R, S, device=DEVICE, requires_grad=True)
    values = torch.randn(R, S, C, device=DEVICE, requires_grad=True)
    # read inputs; write output (4 bytes per number), transmittance (for the backward) and weights
    moved = alpha.nbytes + values.nbytes + 4 * R * C + 2 * alpha.nbytes
    return Case(name=f"R={R} S={S} C={C}", inputs=(alpha, values), fwd_bytes=moved)


def eager(alpha, values):
    """UniPAD's formula: weights, then a sum over a tensor of the size of `values`."""
    trans = torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha + EPS], dim=1).cumprod(dim=1)[:, :-1]
    weights = alpha * trans
    return (weights[..., None] * values).sum(dim=1), weights


if __name__ == "__main__":
    sizes = GPU_SIZES if DEVICE == "cuda" else CPU_SIZES
    compare("composite", composite_ref, composite, {"eager": eager}, [case(*size) for size in sizes])

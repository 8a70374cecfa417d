"""composite: kernel, reference, and UniPAD's formula in eager PyTorch.   python -m benchmarks.bench_composite

Also depth_in_range, which clamps the composited depth, and ray_mean, of the losses: kernels and reference.
"""

import torch

from benchmarks.harness import DEVICE, Case, compare
from unipad.kernels.composite import EPS, composite, composite_ref
from unipad.kernels.depth_range import depth_in_range, depth_in_range_ref, rows_of_volumes
from unipad.kernels.ray_mean import ray_mean, ray_mean_ref

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


def depth_case(R, S, B=1):
    edges = torch.rand(R, S + 1, device=DEVICE).sort(dim=1).values
    depth, hit = torch.rand(R, device=DEVICE, requires_grad=True), torch.ones(R, device=DEVICE, dtype=torch.bool)
    volume_idx = torch.randint(B, (R,), device=DEVICE, dtype=torch.int32)
    # read depth, index, hit (1 byte) and two edges of each ray; write depth, its slope (for the backward) and of_volume
    moved = 4 * R * (1 + 1 + 2 + 1 + 1 + B) + R
    return Case(name=f"R={R} B={B}", inputs=(depth, edges, volume_idx, hit, B, 1 / 54), fwd_bytes=moved)


def mean_case(R, B):
    of_volume = rows_of_volumes(torch.randint(B, (R,), device=DEVICE), B, torch.float32)
    of_ray = torch.rand(R, device=DEVICE, requires_grad=True)
    # read both; write the slope of each ray (for the backward) and one number
    return Case(name=f"R={R} B={B}", inputs=(of_ray, of_volume, 3), fwd_bytes=4 * R * (B + 2) + 4)


if __name__ == "__main__":
    sizes = GPU_SIZES if DEVICE == "cuda" else CPU_SIZES
    compare("composite", composite_ref, composite, {"eager": eager}, [case(*size) for size in sizes])
    rays = [(R, S, B) for B, (R, S, _) in zip((1, 4), sizes[::2] if DEVICE == "cuda" else sizes, strict=True)]
    compare("depth_in_range", depth_in_range_ref, depth_in_range, {}, [depth_case(*size) for size in rays])
    compare("ray_mean", ray_mean_ref, ray_mean, {}, [mean_case(R, B) for R, _, B in rays])

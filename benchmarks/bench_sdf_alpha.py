"""sdf_alpha: kernels, and the references, on a GPU also compiled.   python -m benchmarks.bench_sdf_alpha"""

import torch
import torch.nn.functional as F

from benchmarks.harness import DEVICE, Case, compare, compiled
from unipad.kernels.sdf_alpha import (
    neus_alpha,
    neus_alpha_ref,
    volsdf_alpha,
    volsdf_alpha_ref,
)

# Rays, samples of each. UniPAD: 6 cameras x 512 rays, 72 + 24 samples; on a CPU first about the tiny preset's sizes:
# 6 x 64 rays, 40 + 16 samples
GPU_SIZES = [(3072, 96), (24576, 96)]
CPU_SIZES = [(384, 64), (3072, 96)]


def sdf_and_deltas(R, S):
    """SDF on rays of length about 1 that meet a surface half-way, with noise; and the distances between samples."""
    deltas = torch.rand(R, S, device=DEVICE) * 2 / S
    return 0.5 - deltas.cumsum(dim=1) + 0.01 * torch.randn(R, S, device=DEVICE), deltas


def neus_case(R, S):
    sdf, deltas = sdf_and_deltas(R, S)
    directions = F.normalize(torch.randn(R, 3, device=DEVICE), dim=1)
    gradient = 0.2 * torch.randn(R, S, 3, device=DEVICE) - directions[:, None]  # about against the ray
    inv_s = torch.full((1,), 20.0, device=DEVICE)  # about the initial value, exp(10 * 0.3)
    inputs = (sdf.requires_grad_(), gradient.requires_grad_(), directions, deltas, inv_s.requires_grad_())
    # numbers per sample: SDF, gradient (3), delta, opacity; per ray: direction (3)
    return Case(name=f"R={R} S={S}", inputs=inputs, fwd_bytes=4 * R * (6 * S + 3))


def volsdf_case(R, S):
    sdf, deltas = sdf_and_deltas(R, S)
    beta = torch.full((1,), 0.1, device=DEVICE)
    inputs = (sdf.requires_grad_(), deltas, beta.requires_grad_())
    # numbers per sample: SDF, delta, opacity
    return Case(name=f"R={R} S={S}", inputs=inputs, fwd_bytes=4 * R * 3 * S)


if __name__ == "__main__":
    sizes = GPU_SIZES if DEVICE == "cuda" else CPU_SIZES
    for reference, op, case in [
        (neus_alpha_ref, neus_alpha, neus_case),
        (volsdf_alpha_ref, volsdf_alpha, volsdf_case),
    ]:
        peers = {"compiled": compiled(reference)} if DEVICE == "cuda" else {}
        compare(op.__name__, reference, op, peers, [case(*size) for size in sizes])

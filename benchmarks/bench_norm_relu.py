"""norm_relu: kernels, reference, and PyTorch's batch norm, addition and ReLU.   python -m benchmarks.bench_norm_relu"""

import torch
import torch.nn.functional as F

from benchmarks.harness import DEVICE, Case, compare
from unipad.kernels.norm_relu import norm_relu, norm_relu_ref

# Voxels and channels of the LiDAR recipe's stages for one scene (benchmarks/lidar_scene.py), of the first for four
SIZES = [(76796, 16), (70559, 32), (27584, 64), (8408, 128), (4 * 76796, 16)]
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
EPS = 1e-3  # of the encoder's norms
AGREE = 2e-2 if DEVICE == "cuda" else 1e-3  # the operators round three times, the op once


def case(N, C):
    x, residual = (torch.randn(N, C, device=DEVICE).to(DTYPE).requires_grad_() for _ in range(2))
    weight = torch.ones(C, device=DEVICE).requires_grad_()
    # keeps the ReLU's inputs away from 0, where rounding decides whether a gradient passes
    bias = torch.full((C,), 8.0, device=DEVICE).requires_grad_()
    # read x for the statistics, then x and the residual; write the output
    return Case(name=f"N={N} C={C}", inputs=(x, weight, bias, EPS, residual), fwd_bytes=4 * x.nbytes)


def operators(x, weight, bias, eps, residual):
    """As before the op existed."""
    return (F.batch_norm(x, None, None, weight, bias, training=True, eps=eps) + residual).relu()


if __name__ == "__main__":
    cases = [case(*size) for size in SIZES]
    compare("norm_relu", norm_relu_ref, norm_relu, {"operators": operators}, cases, agree=AGREE)

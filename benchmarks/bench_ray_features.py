"""ray_features: kernels, reference, and two other ways to compute it.   python -m benchmarks.bench_ray_features

The peers: `trilinear` and a sum over the samples, and `F.grid_sample` and the same sum; both store [R, S, C] features.
"""

import torch
from torch.nn import functional as F

from benchmarks.harness import DEVICE, Case, compare
from unipad.kernels.ray_features import ray_features, ray_features_ref
from unipad.kernels.trilinear import trilinear

# Volume (Z, Y, X, C), rays, samples of each. UniPAD: 6 cameras x 512 rays, 72 + 24 samples; then more rays; then 64
# channels. On a CPU the tiny preset's 6 x 64 rays, 40 + 16 samples
GPU_SIZES = [((5, 128, 128, 32), 3072, 96), ((5, 128, 128, 32), 24576, 96), ((5, 180, 180, 64), 3072, 96)]
CPU_SIZES = [((6, 64, 64, 32), 384, 56), ((6, 64, 64, 64), 384, 56)]


def case(shape, R, S):
    """Rays from the center of a volume outwards, with weights that are 0 for half of the samples."""
    Z, Y, X, C = shape
    volume = torch.randn(1, *shape, device=DEVICE, requires_grad=True)
    directions = F.normalize(torch.randn(R, 3, device=DEVICE), dim=1)
    rays = torch.zeros_like(directions), directions, torch.zeros(R, dtype=torch.int32, device=DEVICE)
    edges = torch.linspace(0, 1, S + 1, device=DEVICE).expand(R, S + 1)
    weights = (torch.rand(R, S, device=DEVICE) * (torch.rand(R, S, device=DEVICE) > 0.5) / S).requires_grad_()
    half = (torch.tensor([X, Y, Z], device=DEVICE) - 1) / 2
    # read volume, rays, edges and weights; write the sums
    moved = volume.nbytes + sum(t.nbytes for t in rays) + 2 * weights.nbytes + 4 * R * C
    return Case(f"ZYXC={shape} R={R} S={S}", (volume, rays, edges, weights, (half, half)), moved)


def points_of(rays, edges, cells):
    origins, directions, _ = rays
    return (origins[:, None] + directions[:, None] * edges[:, :-1, None]) * cells[0] + cells[1]


def interpolated(volume, rays, edges, weights, cells):
    features, _ = trilinear(volume, points_of(rays, edges, cells), rays[2])
    return torch.einsum("rs,rsc->rc", weights, features)


def grid_sample(volume, rays, edges, weights, cells):  # there is one volume: `volume_idx` is all 0
    Z, Y, X = volume.shape[1:4]
    size = torch.tensor([X - 1, Y - 1, Z - 1], device=volume.device)
    normalized = points_of(rays, edges, cells) * (2 / size) - 1
    features = F.grid_sample(volume.permute(0, 4, 1, 2, 3), normalized[None, None], align_corners=True)
    return torch.einsum("rs,crs->rc", weights, features[0, :, 0])


if __name__ == "__main__":
    sizes = GPU_SIZES if DEVICE == "cuda" else CPU_SIZES
    peers = {"trilinear and a sum": interpolated, "grid_sample and a sum": grid_sample}
    compare("ray_features", ray_features_ref, ray_features, peers, [case(*size) for size in sizes])

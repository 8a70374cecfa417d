"""ray_sample: kernels, and the references, on a GPU also compiled.   python -m benchmarks.bench_ray_sample"""

import torch
import torch.nn.functional as F

from benchmarks.harness import DEVICE, Case, compare, compiled
from unipad.kernels.ray_sample import (
    clip_rays,
    clip_rays_ref,
    neus_resample,
    neus_resample_ref,
    resample,
    resample_ref,
    stratified_edges,
    stratified_edges_ref,
)

# Rays, samples of each, new samples (of the last two ops only). UniPAD: 6 cameras x 512 rays, 72 + 24; on a CPU first
# about the tiny preset's sizes: 6 x 64 rays, 40 + 16
GPU_SIZES = [(3072, 72, 24), (24576, 72, 24), (24576, 128, 128)]
CPU_SIZES = [(384, 48, 16), (3072, 72, 24)]


def clip_case(R):
    origins = torch.rand(R, 3, device=DEVICE) - 0.5
    directions = F.normalize(torch.randn(R, 3, device=DEVICE), dim=1)
    box = ((-1.0, -1.0, -0.1), (1.0, 1.0, 0.06))  # about UniPAD's volume, in units of half its width
    near = 0.02  # about 1 m
    # read origin and direction; write enter and leave, and hit (1 byte)
    return Case(name=f"R={R}", inputs=(origins, directions, *box, near), fwd_bytes=(6 * 4 + 2 * 4 + 1) * R)


def edges_case(R, S):
    near, jitter = torch.rand(R, device=DEVICE), torch.rand(R, device=DEVICE)
    # read near, far and jitter; write the edges
    return Case(name=f"R={R} S={S}", inputs=(near, near + 1, S, jitter), fwd_bytes=4 * R * (3 + S + 1))


def resample_case(R, S, n):
    edges = torch.rand(R, S + 1, device=DEVICE).sort(dim=1).values
    weights = torch.rand(R, S, device=DEVICE) ** 4 + 0.01  # peaked; no mass so small that rounding moves samples
    inputs = (edges, weights, n, torch.rand(R, device=DEVICE))
    # read edges (S + 1), weights (S) and jitter; write the merged edges
    return Case(name=f"R={R} S={S} n={n}", inputs=inputs, fwd_bytes=4 * R * (2 * S + 2 + S + n + 1))


def neus_case(R, S, n):
    edges = torch.arange(S + 1, device=DEVICE) + torch.rand(R, S + 1, device=DEVICE)
    # a surface that rays approach slowly: no weight so small that rounding moves samples
    sdf = 0.5 - 2 * edges[:, :-1] / (S + 1) + 0.02 * torch.rand(R, S, device=DEVICE)
    inputs = (edges, sdf, 3.0, n, torch.rand(R, device=DEVICE))
    # as `resample_case`, with signed distances in place of weights
    return Case(name=f"R={R} S={S} n={n}", inputs=inputs, fwd_bytes=4 * R * (2 * S + 2 + S + n + 1))


def peers(reference):
    return {"compiled": compiled(reference)} if DEVICE == "cuda" else {}


if __name__ == "__main__":
    sizes = GPU_SIZES if DEVICE == "cuda" else CPU_SIZES
    compare("clip_rays", clip_rays_ref, clip_rays, peers(clip_rays_ref), [clip_case(R) for R, _, _ in sizes[:2]])
    cases = [edges_case(R, S) for R, S, _ in sizes[:2]]
    compare("stratified_edges", stratified_edges_ref, stratified_edges, peers(stratified_edges_ref), cases)
    compare("resample", resample_ref, resample, peers(resample_ref), [resample_case(*size) for size in sizes])
    cases = [neus_case(*size) for size in sizes]
    compare("neus_resample", neus_resample_ref, neus_resample, peers(neus_resample_ref), cases)

"""warp: kernel, reference, and the same op with F.grid_sample.   python -m benchmarks.bench_warp"""

import torch
import torch.nn.functional as F

from benchmarks.harness import DEVICE, Case, compare
from unipad.kernels.warp import MIN_DEPTH, warp, warp_ref

# Rays, source images, their height and width. First `camera-0.1-images` at its stored size: 6 x 512 patches of 9 rays,
# at the rendered depth in four frames of 6 images, and at 32 depths in the four frames of their own camera
GPU_SIZES = [(27648, 24, 900, 1600), (884736, 4, 900, 1600)]
CPU_SIZES = [(378, 12, 128, 224), (3072, 12, 128, 224), (110592, 4, 64, 112)]  # the last: depths of `images-tiny`


def case(R, M, H, W):
    """Cameras in all directions, 0.1 m apart, each seen by about a sixth of the rays."""
    yaw = torch.arange(M, device=DEVICE) * (torch.pi / 3)
    zero = torch.zeros(M, device=DEVICE)
    right, ahead = torch.stack([yaw.cos(), -yaw.sin(), zero], -1), torch.stack([yaw.sin(), yaw.cos(), zero], -1)
    projections = torch.eye(4, device=DEVICE).repeat(1, M, 1, 1)
    projections[0, :, 0, :3] = 0.87 * W * right + W / 2 * ahead
    projections[0, :, 1, :3] = H / 2 * ahead - 0.87 * W * torch.eye(3, device=DEVICE)[2]
    projections[0, :, 2, :3] = ahead
    projections[0, :, :3, 3] = 0.1 * torch.randn(M, 3, device=DEVICE)
    directions = F.normalize(torch.randn(R, 3, device=DEVICE) * torch.tensor([1, 1, 0.1], device=DEVICE), dim=1)
    rays = torch.zeros(R, 3, device=DEVICE), directions, torch.zeros(R, device=DEVICE, dtype=torch.int32)
    depth = (3 + 40 * torch.rand(R, device=DEVICE)).requires_grad_()
    # ramps of one gray level per pixel: their gradients do not jump between pixels, as those of noise
    place = torch.arange(H, device=DEVICE)[:, None, None] + torch.arange(W, device=DEVICE)[:, None]
    ramps = ((place + 13 * torch.arange(M * 3, device=DEVICE).view(M, 1, 1, 3)) % 510 - 255).abs()
    images = ramps.to(torch.uint8)[None]
    sizes = torch.tensor([H, W], device=DEVICE).expand(1, M, 2).contiguous()
    # per ray: depth, origin, direction, index; per pair of a ray and an image: color and slope, and whether it is seen;
    # the pixels, four of each sixth pair
    moved = 32 * R + 25 * R * M + 12 * R * M // 6
    return Case(name=f"R={R} M={M} {H}x{W}", inputs=(depth, rays, images, projections, sizes), fwd_bytes=moved)


def sampled(depth, rays, images, projections, sizes):
    """Projection by a matrix product, and F.grid_sample on images in floats [M, 3, H, W]; one sample."""
    origins, directions, _ = rays
    ends = F.pad(origins + depth[:, None] * directions, (0, 1), value=1.0)
    u, v, d, _ = torch.einsum("mij,rj->mri", projections[0], ends).unbind(-1)  # [M, R]
    height, width = sizes[0, :, :1], sizes[0, :, 1:]
    seen = d >= MIN_DEPTH
    d = torch.where(seen, d, 1.0)
    seen = seen & (u / d >= 0.5) & (v / d >= 0.5) & (u / d <= width - 0.5) & (v / d <= height - 0.5)
    grid = torch.stack([u / d / images.shape[3] * 2 - 1, v / d / images.shape[2] * 2 - 1], dim=-1)
    pixels = images[0].permute(0, 3, 1, 2).float() / 255
    colors = F.grid_sample(pixels, grid[:, None], align_corners=False)[:, :, 0]  # [M, 3, R]
    return (colors * seen[:, None]).permute(2, 0, 1), seen.t()


if __name__ == "__main__":
    sizes = GPU_SIZES if DEVICE == "cuda" else CPU_SIZES
    compare("warp", warp_ref, warp, {"grid_sample": sampled}, [case(*size) for size in sizes])

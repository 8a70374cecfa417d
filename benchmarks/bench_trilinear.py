"""trilinear and trilinear_value: kernels, references and peers in PyTorch.   python -m benchmarks.bench_trilinear

The forward of `trilinear` computes what the renderer needs: the features at the points and, for a given upstream
gradient of the features (in the renderer, from an MLP), the gradient w.r.t. the points. The backward is through both,
which takes a double backward in the peer. `trilinear_value` computes the features only, without a backward.
"""

import torch
from torch.nn import functional as F

from benchmarks.eager import TWICE_DIFFERENTIABLE, gathered_sample
from benchmarks.harness import DEVICE, Case, compare
from unipad.kernels.trilinear import trilinear, trilinear_ref, trilinear_value, trilinear_value_ref

# Volume (Z, Y, X, C), rays, samples of each. UniPAD: 6 cameras x 512 rays, 72 + 24 samples; then more rays; then more
# voxels and channels. On a CPU the tiny preset's 6 x 64 rays (there 40 + 16 samples)
GPU_SIZES = [((5, 128, 128, 32), 3072, 96), ((5, 128, 128, 32), 24576, 96), ((5, 180, 180, 256), 3072, 96)]
CPU_SIZES = [((5, 64, 64, 32), 384, 64), ((5, 64, 64, 32), 384, 96)]


def case(shape, R, S, gradients=True):
    """Rays from the center of a volume outwards.

    gradients: a `Case` of `trilinear`; False: of `trilinear_value`.
    """
    Z, Y, X, C = shape
    volume = torch.randn(1, *shape, device=DEVICE, requires_grad=gradients)
    size = torch.tensor([X, Y, Z], device=DEVICE)
    offset = F.normalize(torch.randn(R, 1, 3, device=DEVICE), dim=-1) * torch.linspace(0, 1, S, device=DEVICE)[:, None]
    points = (size - 1) / 2 * (1 + offset)
    # away from the cells' faces, where the rounding of normalized coordinates may pick the other cell
    points = points.floor() + 0.05 + 0.9 * points.frac()
    volume_idx = torch.zeros(R, dtype=torch.int32, device=DEVICE)
    d_value = torch.randn(R, S, C, device=DEVICE)
    # read volume and points; write the features and, per point, their gradient along x, y and z
    moved = volume.nbytes + points.nbytes + d_value.nbytes * (4 if gradients else 1)
    inputs = (volume, points, volume_idx) + ((d_value,) if gradients else ())
    return Case(name=f"ZYXC={shape} R={R} S={S}", inputs=inputs, fwd_bytes=moved)


def with_gradient(op):
    """A function of a case's inputs: the features at the points, and the gradient of <features, d_value> there."""

    def run(volume, points, volume_idx, d_value):
        value, gradient = op(volume, points, volume_idx)
        return value, torch.einsum("rsdc,rsc->rsd", gradient, d_value)

    return run


def grid_sample(volume, points, volume_idx):  # there is one volume: `volume_idx` is all 0
    Z, Y, X = volume.shape[1:4]
    normalized = points * (2 / torch.tensor([X - 1, Y - 1, Z - 1], device=points.device)) - 1
    value = F.grid_sample(volume.permute(0, 4, 1, 2, 3), normalized[None, None], align_corners=True)
    return value[0, :, 0].permute(1, 2, 0)


def gathers(volume, points, volume_idx):  # likewise
    size = points.new_tensor(volume.shape[3:0:-1])
    return gathered_sample(volume[0].permute(3, 0, 1, 2), points * (2 / (size - 1)) - 1)


def double_backward(volume, points, volume_idx, d_value):
    """As the original: differentiate the interpolation w.r.t. the points, and let the loss differentiate that again."""
    points = points.detach().requires_grad_()
    value = (grid_sample if TWICE_DIFFERENTIABLE else gathers)(volume, points, volume_idx)
    return value, torch.autograd.grad(value, points, d_value, create_graph=True)[0]


if __name__ == "__main__":
    sizes = GPU_SIZES if DEVICE == "cuda" else CPU_SIZES
    peers = {f"{'grid_sample' if TWICE_DIFFERENTIABLE else 'gathers'}, double backward": double_backward}
    compare("trilinear", with_gradient(trilinear_ref), with_gradient(trilinear), peers, [case(*s) for s in sizes])
    value_cases = [case(*s, gradients=False) for s in sizes]
    compare("trilinear_value", trilinear_value_ref, trilinear_value, {"grid_sample": grid_sample}, value_cases)

"""lift: kernel, reference, UniPAD's formulas (eager and compiled); then with more and fewer views, voxels, channels.

    python -m benchmarks.bench_lift
    OMP_NUM_THREADS=1 python -m benchmarks.bench_lift --paper      on a CPU: paper size too

On a GPU, "triton, bit-equal" is the op under `torch.use_deterministic_algorithms`: without it, the last bits of
gradients vary from run to run.
"""

import math
from functools import partial

import torch
import tyro

from benchmarks.eager import eager_lift
from benchmarks.harness import AGREE, DEVICE, Case, compare, compiled
from unipad.kernels.lift import lift, lift_ref
from unipad.recipes import PRETRAIN

# preset, padded image (H, W), width before padding / 1600, strides of the levels
PAPER = ("camera-0.1", (928, 1600), 1.0, (8, 16, 32, 64))
TINY = ("tiny", (160, 256), 0.16, (8, 16, 32))  # images a little larger than the preset's 128 x 224
# nuScenes' rig at 900 x 1600: yaw in degrees, counter-clockwise from ahead; focal length in pixels
CAMERAS = [(0, 1266), (-55, 1266), (-110, 1266), (180, 809), (110, 1266), (55, 1266)]
CENTER = (816, 491)  # principal point (u, v) in pixels of nuScenes' front camera, used for all six
# AGREE for bf16 and fp16: bf16 results that one implementation rounds up and another down differ by up to 4e-3
AGREE_HALF = 1e-2


def case(preset, image_size, scale, strides, dtype=torch.float32, views=6, channels=None, across=None):
    """A `Case`. channels: instead of the preset's; across: voxels along x and along y, instead of the preset's."""
    grid, camera = PRETRAIN["camera"][preset].grid, PRETRAIN["camera"][preset].camera
    channels, shape, cell = channels or camera.channels, grid.shape, grid.cell
    if across:
        shape = (across, across, shape[2])
        cell = (*((h - l) / across for l, h in zip(grid.low[:2], grid.high[:2], strict=True)), cell[2])
    sizes = [(math.ceil(image_size[0] / s), math.ceil(image_size[1] / s)) for s in strides]
    randn = partial(torch.randn, device=DEVICE)
    features = [randn(1, views, h, w, channels) for h, w in sizes]
    depths = [randn(1, views, h, w, camera.depth_bins).softmax(-1) for h, w in sizes]
    features, depths = ([t.to(dtype).requires_grad_() for t in levels] for levels in (features, depths))
    geometry = (rig(scale, views), grid.low, cell, shape, image_size, camera.depth_range)
    out_bytes = math.prod(shape) * channels * features[0].element_size()
    size = f"{views} views, {shape[0]} x {shape[1]} x {shape[2]}, C {channels}"
    name = f"{preset} {str(dtype).removeprefix('torch.')}, {size}"
    return Case(name, (features, depths, *geometry), out_bytes + sum(t.nbytes for t in features + depths))


def rig(scale, count=6):
    """lidar2image [1, count, 4, 4] of cameras 0.3 m below the LiDAR; images are `scale` * 1600 pixels wide.

    Each camera is 0.5 m from the LiDAR's vertical axis, in its viewing direction. Views beyond the sixth repeat the
    first ones, as those of an earlier frame would.
    """
    views = []
    for yaw, focal in (CAMERAS[n % len(CAMERAS)] for n in range(count)):
        s, c = math.sin(math.radians(yaw)), math.cos(math.radians(yaw))
        intrinsics = torch.tensor([[focal * scale, 0, CENTER[0] * scale, 0], [0, focal * scale, CENTER[1] * scale, 0]])
        intrinsics = torch.cat([intrinsics, torch.eye(4)[2:]])
        # LiDAR frame (right, ahead, up) -> camera frame (right, down, ahead)
        extrinsics = torch.tensor([[c, s, 0, 0], [0, 0, -1, -0.3], [-s, c, 0, -0.5], [0, 0, 0, 1]])
        views.append(intrinsics @ extrinsics)
    return torch.stack(views)[None].to(DEVICE)


def deterministic(*inputs):
    """`lift` whose backward gathers on every level; by default it adds atomically on fine ones.

    The forward notes the mode for its backward, which runs after the mode is reset.
    """
    torch.use_deterministic_algorithms(True)
    try:
        return lift(*inputs)
    finally:
        torch.use_deterministic_algorithms(False)


def main(paper: bool = False):
    """Measure and print.

    Args:
        paper: paper size on a CPU too.
    """
    on_gpu = DEVICE == "cuda"
    strict = {"triton, bit-equal": deterministic} if on_gpu else {}
    peers = {"eager": eager_lift, "compiled": compiled(eager_lift), **strict}
    run = partial(compare, "lift", lift_ref, lift)
    if on_gpu:
        run(peers, [case(*PAPER, torch.bfloat16), case(*PAPER, torch.float16)], agree=AGREE_HALF)
    if on_gpu or paper:
        run({"eager": eager_lift, **strict}, [case(*PAPER)])
    run(peers, [case(*TINY)])
    size, dtype = (PAPER, torch.bfloat16) if on_gpu else (TINY, torch.float32)
    scaling = [case(*size, dtype, views=views) for views in (1, 3, 12)]
    scaling += [case(*size, dtype, across=across) for across in ((64, 256) if on_gpu else (32, 128))]
    scaling += [case(*size, dtype, channels=channels) for channels in ((64, 256, 512) if on_gpu else (16, 64, 128))]
    run({"eager": eager_lift, **strict}, scaling, agree=AGREE_HALF if on_gpu else AGREE)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)

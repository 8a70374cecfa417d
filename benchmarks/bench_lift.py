"""lift: kernel, reference, and the original's formulas in eager PyTorch.   python -m benchmarks.bench_lift"""

import math
from functools import partial

import torch

from benchmarks.eager import eager_lift
from benchmarks.harness import DEVICE, Case, compare
from kernels.lift import lift, lift_ref
from unipad.recipes import PRETRAIN

# preset, image (H, W) padded, content width / 1600, strides of the levels
PAPER = ("camera-0.1", (928, 1600), 1.0, (8, 16, 32, 64))
TINY = ("tiny", (160, 256), 0.16, (8, 16, 32))
# nuScenes' rig at 900 x 1600: yaw to the left of ahead in degrees, focal length in pixels
CAMERAS = [(0, 1266), (-55, 1266), (-110, 1266), (180, 809), (110, 1266), (55, 1266)]
# a result in bf16 is off by up to 4e-3 of itself where two sums round to different sides
AGREE_HALF = 1e-2


def case(preset, image_size, scale, strides, dtype=torch.float32):
    grid, camera = PRETRAIN["camera"][preset].grid, PRETRAIN["camera"][preset].camera
    sizes = [(math.ceil(image_size[0] / s), math.ceil(image_size[1] / s)) for s in strides]
    rand = partial(torch.randn, device=DEVICE)
    features = [rand(1, len(CAMERAS), h, w, camera.channels) for h, w in sizes]
    depths = [rand(1, len(CAMERAS), h, w, camera.depth_bins).softmax(-1) for h, w in sizes]
    features, depths = ([t.to(dtype).requires_grad_() for t in levels] for levels in (features, depths))
    geometry = (rig(scale), grid.low, grid.cell, grid.shape, image_size, camera.depth_range)
    out_bytes = math.prod(grid.shape) * camera.channels * features[0].element_size()
    name = f"{preset} {str(dtype).removeprefix('torch.')}"
    return Case(name, (features, depths, *geometry), out_bytes + sum(t.nbytes for t in features + depths))


def rig(scale):
    """[1, 6, 4, 4] cameras half a metre from the LiDAR's axis and 0.3 m below it; images `scale` times 1600 wide."""
    views = []
    for yaw, focal in CAMERAS:
        s, c = math.sin(math.radians(yaw)), math.cos(math.radians(yaw))
        intrinsics = torch.tensor([[focal * scale, 0, 816 * scale, 0], [0, focal * scale, 491 * scale, 0]])
        intrinsics = torch.cat([intrinsics, torch.eye(4)[2:]])
        # camera axes right, down, ahead in LiDAR axes right, ahead, up
        extrinsics = torch.tensor([[c, s, 0, 0], [0, 0, -1, -0.3], [-s, c, 0, -0.5], [0, 0, 0, 1]])
        views.append(intrinsics @ extrinsics)
    return torch.stack(views)[None].to(DEVICE)


if __name__ == "__main__":
    run = partial(compare, "lift", lift_ref, lift, {"eager": eager_lift})
    run([case(*TINY), case(*PAPER)] if DEVICE == "cuda" else [case(*TINY)])
    if DEVICE == "cuda":
        run([case(*PAPER, torch.float16), case(*PAPER, torch.bfloat16)], agree=AGREE_HALF)

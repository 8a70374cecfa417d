import pytest
import torch
from torch.nn import functional as F

from tests.ahead_of_time import Launch
from tests.check import check_against_ref
from unipad.kernels.warp import TILE, warp, warp_ref


def launch(images, C=3, slope=True, **limits):
    block_c = 1 << (C - 1).bit_length()
    constexprs = dict(BYTES=images == "*u8", WITH_SLOPE=slope, BLOCK_C=block_c, BLOCK_N=TILE // block_c)
    types = {"images_ptr": images, "sizes_ptr": "*i64", "seen_ptr": "*i1"}
    return Launch("_warp_fwd_kernel", constexprs, types, elements=("fp32",), **limits)


LAUNCHES = [  # checked by tests/test_compiles.py
    launch("*u8", registers=72, shared=1024),
    launch("*u8", slope=False, registers=56, shared=1024),
    launch("*fp32", registers=72, shared=1024),
    launch("*bf16", C=64, registers=168),  # no recipe has so many channels
]

SHAPES = [  # B, M, H, W, C, R
    (1, 1, 2, 2, 1, 1),
    (3, 5, 7, 9, 3, 11),  # odd sizes
    (2, 4, 6, 8, 3, 32),  # exactly one block of pairs
    (2, 3, 6, 8, 3, 43),  # one pair more than a block
    (1, 2, 5, 4, 65, 5),  # many channels
    (2, 2, 5, 4, 3, 0),  # no rays
    (2, 0, 5, 4, 3, 5),  # no images
    (2, 2, 5, 4, 0, 5),  # no channels
]
CLEARANCE = 1e-3  # pixels from lines through pixel centers, where gradients jump, and so from the images' borders too


def make_inputs(B, M, H, W, C, R, device):
    """Rays from near the origin; cameras with a random pose near the origin look ahead, along z, with a few exceptions:
    some images are smaller than their padding, the last one of the last sample does not exist."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(shape, generator=generator)

    projections = torch.eye(4).repeat(B, M, 1, 1)
    projections[..., :3, :3] += 0.2 * (rand(B, M, 3, 3) - 0.5)
    projections[..., :3, 3] = rand(B, M, 3) - 0.5
    intrinsics = torch.eye(4)
    intrinsics[:2, :3] = torch.tensor([[W / 2, 0, W / 2], [0, H / 2, H / 2]])
    projections = intrinsics @ projections
    sizes = torch.tensor([H, W]) - (3 * rand(B, M, 2)).long() * (rand(B, M, 1) < 0.5) * (min(H, W) > 3)
    if M:
        sizes[-1, -1] = 0
    K = 4 * R + 20  # candidates, of which the first R with clearance are taken
    origins = 0.3 * (rand(K, 3) - 0.5)
    directions = F.normalize(torch.cat([1.6 * (rand(K, 2) - 0.5), torch.ones(K, 1)], dim=1), dim=1)
    directions[::7] *= -1  # some look back, where no camera looks
    depth, volume_idx = 1 + 5 * rand(K), (B * rand(K)).int()
    points = torch.cat([origins + depth[:, None] * directions, torch.ones(K, 1)], dim=1).double()
    uvd = torch.einsum("kmij,kj->kmi", projections.double()[volume_idx.long()], points)
    x = uvd[..., :2] / uvd[..., 2:3] - 0.5
    clear = ((x - x.round()).abs() > CLEARANCE).flatten(1).all(dim=1).nonzero()[:R, 0]
    assert len(clear) == R, "too few rays have clearance"
    images = rand(B, M, H, W, C).double()
    rays = tuple(t[clear].to(device) for t in (origins, directions, volume_idx))
    others = dict(images=images, projections=projections, sizes=sizes)
    return dict(depth=depth[clear].to(device), rays=rays) | {name: t.to(device) for name, t in others.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype, device):
    inputs = make_inputs(*shape, device)
    _, seen = warp_ref(**inputs)
    assert seen.numel() < 100 or 0.2 < seen.float().mean() < 0.9
    check_against_ref(warp, warp_ref, inputs, dtype, wrt=["depth"])


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_match_reference(shape, device):
    inputs = make_inputs(*shape, device)
    inputs["images"] = (255 * inputs["images"]).to(torch.uint8)
    check_against_ref(warp, warp_ref, inputs, torch.float32, wrt=["depth"])
    in_floats = inputs | {"images": inputs["images"] / 255}
    torch.testing.assert_close(warp(**inputs)[0], warp(**in_floats)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fn", [warp, warp_ref])
def test_by_hand(fn, device):
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    image = (10 * y + x * x)[None, None, :, :, None].to(device)
    image[..., 3, :, :] = image[..., :, 4, :] = 1000  # padding
    ends = torch.tensor(
        [
            [1, 1, 1],  # (u, v) = (1, 1): between columns 0, 1 and rows 0, 1
            [2.5, 0.5, 1],  # the center of pixel (2, 0): slopes are those towards the next column and row
            [3.5, 2.5, 1],  # the center of the last pixel: slopes are those from the one before
            [3.75, 2.5, 1],  # beyond the center of the last pixel
            [0.25, 1, 1],  # before the center of the first pixel
            [5, 3, 2],  # (2.5, 1.5) at twice the depth
            [1, 1, -1],  # behind the camera
        ],
        device=device,
    )
    # each ray goes along the optical axis, from a point at depth 0: d (u, v) / d depth = -(u, v) / depth
    origins, directions = ends * torch.tensor([1.0, 1, 0], device=device), torch.eye(3, device=device)[2:].expand(7, 3)
    depth = ends[:, 2].clone().requires_grad_()
    rays = origins, directions, torch.zeros(7, dtype=torch.int32, device=device)
    eye, size = torch.eye(4, device=device)[None, None], torch.tensor([[[3, 4]]], device=device)
    colors, seen = fn(depth, rays, image, eye, size)
    assert seen.flatten().tolist() == [True, True, True, False, False, True, False]
    assert colors.flatten().tolist() == [5.5, 4, 29, 0, 0, 14, 0] and not seen.requires_grad
    # -(u dI/du + v dI/dv) / depth: -(1 + 10), -(2.5 * 5 + 0.5 * 10), -(3.5 * 5 + 2.5 * 10), -(2.5 * 5 + 1.5 * 10) / 2
    slope = torch.autograd.grad(colors.sum(), depth)[0]
    assert slope.tolist() == [-11, -17.5, -42.5, 0, 0, -13.75, 0]


@pytest.mark.parametrize("fn", [warp, warp_ref])
def test_what_is_nearer_than_10_cm_is_not_seen(fn, device):
    depth = torch.tensor([0.099, 0.101], device=device)
    origins, ahead = torch.zeros(2, 3, device=device), torch.eye(3, device=device)[[2, 2]]
    projection = torch.eye(4, device=device)[None, None].clone()
    projection[..., :2, 2] = 1  # the optical axis meets the image at (1, 1)
    sizes, sample = torch.tensor([[[2, 2]]], device=device), torch.zeros(2, dtype=torch.int32, device=device)
    _, seen = fn(depth, (origins, ahead, sample), torch.ones(1, 1, 2, 2, 1, device=device), projection, sizes)
    assert seen.flatten().tolist() == [False, True]


@pytest.mark.parametrize("fn", [warp, warp_ref])
def test_matches_grid_sample(fn, device):
    """With the pixels' centers at half coordinates: `align_corners=False`."""
    inputs = make_inputs(1, 3, 6, 8, 3, 40, device)
    inputs = {k: v.double() if torch.is_tensor(v) and k != "sizes" else v for k, v in inputs.items()}
    inputs["sizes"][:] = torch.tensor([6, 8])
    colors, seen = fn(**inputs)
    origins, directions, _ = inputs["rays"]
    ends = F.pad(origins + inputs["depth"][:, None] * directions, (0, 1), value=1.0).double()
    u, v, d, _ = torch.einsum("mij,rj->mri", inputs["projections"][0], ends).unbind(-1)  # [M, R]
    where = torch.stack([u / d / 4 - 1, v / d / 3 - 1], dim=-1)[:, None]
    truth = F.grid_sample(inputs["images"][0].permute(0, 3, 1, 2), where, align_corners=False)[:, :, 0]  # [M, C, R]
    assert seen.any() and torch.equal(
        seen, ((where.abs() <= 1 - 1 / where.new_tensor([8, 6])).all(-1)[:, 0] & (d > 0.1)).T
    )
    torch.testing.assert_close(colors[seen], truth.permute(2, 0, 1)[seen], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fn", [warp, warp_ref])
def test_gradcheck(fn, device):
    inputs = make_inputs(2, 3, 5, 7, 2, 9, device)
    inputs = {k: v.double() if torch.is_tensor(v) and k != "sizes" else v for k, v in inputs.items()}
    inputs["depth"].requires_grad_()
    # no step of gradcheck (1e-6) crosses a line through pixel centers: see `CLEARANCE`
    torch.autograd.gradcheck(lambda depth: fn(**inputs | {"depth": depth})[0], (inputs["depth"],))


@pytest.mark.parametrize("fn", [warp, warp_ref])
def test_nan_is_not_hidden(fn, device):
    """A diverged model's depth: the color is NaN too, and indexing on a CPU does not raise."""
    inputs = make_inputs(2, 3, 5, 7, 2, 9, device)
    inputs["depth"][3] = torch.nan
    colors, seen = fn(**inputs)
    assert colors.isnan().flatten(1).any(dim=1).tolist() == [i == 3 for i in range(9)]
    assert seen[3].any()
    inputs["depth"][3] = torch.inf
    assert not fn(**inputs)[0].isinf().any()

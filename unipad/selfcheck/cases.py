"""The cases of the self-check: nearly all at a small size and at the size of a recipe.

A function `_*_cases(size, recipe)` makes the cases of one size; recipe: True if it is the size of a recipe. Its local
functions make the inputs of an op: (device, dtype) -> arguments by name.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

from unipad.kernels.composite import composite, composite_ref
from unipad.kernels.depth_range import depth_in_range, depth_in_range_ref, rows_of_volumes
from unipad.kernels.lift import lift, lift_ref
from unipad.kernels.ray_features import ray_features, ray_features_ref
from unipad.kernels.ray_mean import ray_mean, ray_mean_ref
from unipad.kernels.ray_sample import (
    clip_rays,
    clip_rays_ref,
    merge,
    merge_ref,
    neus_resample,
    neus_resample_ref,
    resample,
    resample_ref,
    sample_pdf,
    sample_pdf_ref,
    stratified_edges,
    stratified_edges_ref,
)
from unipad.kernels.rotated_iou import (
    paired_iou_3d,
    paired_iou_3d_ref,
    rotated_iou_bev,
    rotated_iou_bev_ref,
    rotated_nms,
    rotated_nms_ref,
)
from unipad.kernels.sdf_alpha import (
    neus_alpha,
    neus_alpha_ref,
    unisurf_alpha,
    volsdf_alpha,
    volsdf_alpha_ref,
)
from unipad.kernels.sdf_pack import pack, pack_bwd, pack_bwd_ref, pack_ref
from unipad.kernels.sdf_render import sdf_render, sdf_render_ref, sdf_values, sdf_values_ref
from unipad.kernels.trilinear import trilinear, trilinear_ref, trilinear_value, trilinear_value_ref
from unipad.kernels.voxel_pool import voxel_pool, voxel_pool_ref
from unipad.kernels.warp import warp, warp_ref
from unipad.runtime import has_bf16
from unipad.selfcheck.check import Case, default_device
from unipad.selfcheck.lidar_cases import sparse_cases, voxel_cases

SIZES = ("small", "recipe")


def checks(sizes=SIZES):
    """Every `Case` of these sizes, without bf16 on a GPU that lacks it."""
    bf16 = has_bf16(torch.device(default_device()))
    for size in sizes:
        for group in (voxel_cases, sparse_cases, _view_cases, _box_cases, _ray_cases, _field_cases):
            cases = group(size, recipe=size == "recipe")
            yield from (case for case in cases if bf16 or case.dtype != "bf16")


def _each(dtypes, name, size, op, ref, inputs, wrt=(), **flags):
    """Cases of an op in several types.

    dtypes: keys of `check.TYPES`, separated by spaces; flags: other fields of `Case`.
    """
    for dtype in dtypes.split():
        yield Case(name, size, dtype, inputs, op, ref, wrt, **flags)


# Cameras


def _rig(scale, device):
    """[1, 6, 4, 4] LiDAR meters -> pixels of images `scale` * 1600 wide, with about nuScenes' cameras."""
    views = []
    # yaw in degrees to the left, focal length in pixels of the full image
    for yaw, focal in ((0, 1266), (-55, 1266), (-110, 1266), (180, 809), (110, 1266), (55, 1266)):
        s, c = math.sin(math.radians(yaw)), math.cos(math.radians(yaw))
        intrinsics = torch.eye(4)
        intrinsics[:2, :3] = scale * torch.tensor([[focal, 0, 816.0], [0, focal, 491]])
        # camera axes right, down, ahead in LiDAR axes right, ahead, up
        views.append(intrinsics @ torch.tensor([[c, s, 0, 0], [0, 0, -1, -0.3], [-s, c, 0, -0.5], [0, 0, 0, 1]]))
    return torch.stack(views)[None].to(device)


def _view_cases(size, recipe):
    """Cases of the view transforms.

    The volumes are offset a little, so that no voxel corner is projected onto an image border, where rounding would
    decide whether it is inside.
    """

    def lifted(device, dtype):
        low, cell = (-54.0137, -54.0137, -5.0137), (0.84375, 0.84375, 1.6)
        grid = dict(low=low, cell=cell, shape=(128, 128, 5))
        C, D, image, levels = 128, 64, (928, 1600), [(116, 200), (58, 100), (29, 50), (15, 25)]
        if not recipe:
            grid = dict(low=(-8.0137, -8.0137, -2.0137), cell=(2.0, 2.0, 2.0), shape=(8, 8, 2))
            C, D, image, levels = 20, 9, (92, 160), [(12, 20), (6, 10)]
        randn = partial(torch.randn, device=device)
        return dict(
            features=[randn(1, 6, h, w, C).to(dtype) for h, w in levels],
            depths=[(2 * randn(1, 6, h, w, D)).softmax(-1).to(dtype) for h, w in levels],
            lidar2image=_rig(image[1] / 1600, device), image_size=image, depth_range=(1.0, 65.0), **grid,
        )  # fmt: skip

    def pooled(device, dtype):
        grid = dict(low=(-54.0137, -54.0137, -5.0137), cell=(0.6, 0.6, 1.6), shape=(180, 180, 5))
        C, D, (h, w), stride = 256, 118, (29, 50), 32
        if not recipe:
            grid = dict(low=(-8.0137, -8.0137, -2.0137), cell=(2.0, 2.0, 2.0), shape=(8, 8, 2))
            C, D, (h, w), stride = 20, 12, (4, 6), 25
        randn = partial(torch.randn, device=device)
        return dict(
            features=randn(1, 6, h, w, C).to(dtype), depths=randn(1, 6, h, w, D).softmax(-1).to(dtype),
            lidar2image=_rig(w * stride / 1600, device), stride=stride, depth_range=(1.0, 60.0), **grid,
        )  # fmt: skip

    wrt = ("features", "depths")
    # Image positions are fp32 for every type: among 200 columns they are off by up to 2e-5 columns, and so are
    # interpolation weights. How they round depends on the compiler, so fp32 needs more slack than `check.SLACK` gives.
    yield from _each("fp32", "lift", size, lift, lift_ref, lifted, wrt, slack=1e-4)
    yield from _each("fp32", "lift, bit-equal", size, lift, lift_ref, lifted, wrt, slack=1e-4, strict=True)
    yield from _each("fp16 bf16", "lift", size, lift, lift_ref, lifted, wrt)
    yield from _each("bf16", "lift, bit-equal", size, lift, lift_ref, lifted, wrt, strict=True)
    yield from _each("fp32 fp16 bf16", "voxel_pool", size, voxel_pool, voxel_pool_ref, pooled, wrt)
    yield from _each("bf16", "voxel_pool, bit-equal", size, voxel_pool, voxel_pool_ref, pooled, wrt, strict=True)

    def warped(device, dtype):
        """Rays from a camera into two other places of the rig, with clearance from lines through pixel centers, where
        gradients jump; ramps of one gray level per pixel, since fp32 positions are off by up to 1e-3 pixels."""
        R, H, W = (3072, 900, 1600) if recipe else (33, 90, 160)
        rig = _rig(W / 1600, device).repeat(1, 2, 1, 1)  # [1, 12, 4, 4]
        # the sources' cameras are 0.6 m before and behind the keyframe's
        rig[..., 3] += rig[..., 1] * torch.tensor([0.6, -0.6], device=device).repeat_interleave(6)[:, None]
        # candidates, of which the first R with clearance are taken
        origins = 0.1 * torch.randn(2 * R, 3, device=device)
        directions = F.normalize(torch.randn(2 * R, 3, device=device) * torch.tensor([1, 1, 0.1], device=device))
        depth = 3 + 40 * torch.rand(2 * R, device=device)
        ends = F.pad(origins + depth[:, None] * directions, (0, 1), value=1.0).double()
        u, v, d, _ = torch.einsum("mij,rj->rmi", rig[0].double(), ends).unbind(-1)
        x, y = u / d - 0.5, v / d - 0.5
        near = ((x - x.round()).abs() < 20 * CLEARANCE) | ((y - y.round()).abs() < 20 * CLEARANCE)
        clear = (~near | (d < 0)).all(dim=1).nonzero()[:R, 0]
        assert len(clear) == R, "too few rays have clearance"
        place = torch.arange(H, device=device)[:, None, None] + torch.arange(W, device=device)[:, None]
        ramps = ((place + 13 * torch.arange(12 * 3, device=device).view(12, 1, 1, 3)) % 510 - 255).abs()
        return dict(
            depth=depth[clear],
            rays=(origins[clear], directions[clear], torch.zeros(R, device=device, dtype=torch.int32)),
            images=ramps.to(torch.uint8)[None], projections=rig,
            sizes=torch.tensor([H, W], device=device).expand(1, 12, 2).contiguous(),
        )  # fmt: skip

    yield from _each("fp32", "warp", size, warp, warp_ref, warped, ("depth",), slack=1e-3)


# Boxes


def _box_cases(size, recipe):
    def boxes(N, device):
        """[N, 7] boxes of the size of road users, on average three around each location, so that many overlap."""
        locations = N // 3 + 1
        location = torch.randint(locations, (N,), device=device)
        center = (torch.rand(locations, 3, device=device) - 0.5) * torch.tensor([108.0, 108, 2], device=device)
        sizes = torch.tensor([1.9, 4.6, 1.7], device=device) * (0.5 + torch.rand(N, 3, device=device))
        yaw = (6.3 * torch.rand(locations, device=device))[location] + 0.2 * torch.randn(N, device=device)
        return torch.cat([center[location] + 0.5 * torch.randn(N, 3, device=device), sizes, yaw[:, None]], dim=1)

    def bev_boxes(N, device):
        return boxes(N, device)[:, [0, 1, 3, 4, 6]].contiguous()

    N, M = (3000, 900) if recipe else (40, 33)

    def two_sets(device, dtype):
        both = bev_boxes(N + M, device)
        return dict(a=both[:N].contiguous(), b=both[N:].contiguous())

    def shifted_pairs(device, dtype):
        a = boxes(N, device)
        return dict(a=a, b=a + 0.3 * torch.randn_like(a) * a.new_tensor([1, 1, 1, 0, 0, 0, 1]))

    def overlapping(device, dtype):
        """Boxes and a threshold in the widest gap between their IoUs from 0.1 to 0.3, so that rounding does not change
        which are suppressed."""
        rectangles = bev_boxes(N, device)
        iou = rotated_iou_bev_ref(rectangles.double(), rectangles.double()).flatten()
        near = iou[(iou > 0.1) & (iou < 0.3)].sort().values
        gap = near.diff().argmax()
        threshold = ((near[gap] + near[gap + 1]) / 2).item()
        return dict(boxes=rectangles, scores=torch.randperm(N, device=device).float(), threshold=threshold)

    yield from _each("fp32", "rotated_iou_bev", size, rotated_iou_bev, rotated_iou_bev_ref, two_sets)
    yield from _each("fp32", "paired_iou_3d", size, paired_iou_3d, paired_iou_3d_ref, shifted_pairs)
    yield from _each("fp32", "rotated_nms", size, rotated_nms, rotated_nms_ref, overlapping)


# Rays; at recipe size six views of 512 rays each, with 72 stratified and 24 importance samples


def _ray_cases(size, recipe):
    R, S, n = (3072, 72, 24) if recipe else (33, 9, 7)  # rays, stratified and importance samples on each

    def through_box(device, dtype):
        origins = torch.rand(R, 3, device=device) * 0.1 - 0.05
        directions = F.normalize(torch.randn(R, 3, device=device), dim=1)
        box = dict(low=(-1.0, -1.0, -0.1), high=(1.0, 1.0, 0.06), near=0.02)
        return dict(origins=origins, directions=directions, **box)

    def ends(device, dtype):
        near, jitter = torch.rand(R, device=device), torch.rand(R, device=device)
        return dict(near=near, far=near + 1, S=S, jitter=jitter)

    def weighted(device, dtype):
        edges = torch.rand(R, S + 1, device=device).sort(dim=1).values
        weights = torch.rand(R, S, device=device) ** 4 + 0.01  # no weight so small that rounding moves samples
        return dict(edges=edges, weights=weights, n=n, jitter=torch.rand(R, device=device))

    def approaching(device, dtype):
        """Surfaces that rays approach slowly: all intervals have weights so large that rounding moves no samples."""
        edges = torch.arange(S + 1, device=device) + torch.rand(R, S + 1, device=device)
        sdf = 0.5 - 2 * edges[:, :-1] / (S + 1) + 0.02 * torch.rand(R, S, device=device)
        return dict(edges=edges, sdf=sdf, inv_s=3.0, n=n, jitter=torch.rand(R, device=device))

    def two_lists(device, dtype):
        edges, new_edges = (torch.rand(R, k + 1, device=device).sort(dim=1).values for k in (S, n))
        return dict(edges=edges, new_edges=new_edges)

    yield from _each("fp32", "clip_rays", size, clip_rays, clip_rays_ref, through_box)
    yield from _each("fp32", "stratified_edges", size, stratified_edges, stratified_edges_ref, ends)
    yield from _each("fp32", "sample_pdf", size, sample_pdf, sample_pdf_ref, weighted)
    yield from _each("fp32", "resample", size, resample, resample_ref, weighted)
    yield from _each("fp32", "neus_resample", size, neus_resample, neus_resample_ref, approaching)
    yield from _each("fp32", "merge", size, merge, merge_ref, two_lists)

    def at_points(device, dtype):
        sizes = (5, 180, 180, 32) if recipe else (2, 3, 4, 5)  # Z, Y, X, C
        # x, y, z, integers at voxel centers, from 2 before the first to 2 after the last: some are outside
        points = torch.rand(R, S + n, 3, device=device) * (torch.tensor(sizes[2::-1], device=device) + 3) - 2
        volume_idx = torch.randint(2, (R,), device=device, dtype=torch.int32)
        return dict(volume=torch.randn(2, *sizes, device=device).to(dtype), points=points, volume_idx=volume_idx)

    wrt = ("volume", "points")
    yield from _each("fp32 bf16", "trilinear", size, trilinear, trilinear_ref, at_points, wrt)
    yield from _each("fp32", "trilinear, bit-equal", size, trilinear, trilinear_ref, at_points, wrt, strict=True)
    yield from _each("fp32", "trilinear_value", size, trilinear_value, trilinear_value_ref, at_points)

    def along_rays(device, dtype):
        Z, Y, X, C = (5, 180, 180, 32) if recipe else (2, 3, 4, 5)
        size = torch.tensor([X, Y, Z], device=device, dtype=torch.float32)  # units: the length of a ray
        rays = (
            torch.rand(R, 3, device=device) * 0.1 - 0.05,
            F.normalize(torch.randn(R, 3, device=device), dim=1),
            torch.randint(2, (R,), device=device, dtype=torch.int32),
        )
        edges = torch.rand(R, S + n + 1, device=device).sort(dim=1).values
        weights = torch.rand(R, S + n, device=device)
        volume = torch.randn(2, Z, Y, X, C, device=device)
        return dict(volume=volume, rays=rays, edges=edges, weights=weights, cells=(0.6 * size, (size - 1) / 2))

    wrt = ("volume", "weights")
    yield from _each("fp32", "ray_features", size, ray_features, ray_features_ref, along_rays, wrt)

    def sdf_and_deltas(device, dtype):
        randn = partial(torch.randn, device=device)
        return dict(sdf=(randn(R, S + n) / 10).to(dtype), deltas=(randn(R, S + n).abs() / 10).to(dtype))

    def neus(device, dtype):
        gradient = torch.randn(R, S + n, 3, device=device).to(dtype)
        directions = F.normalize(torch.randn(R, 3, device=device), dim=1).to(dtype)
        inv_s = torch.tensor([20.0], device=device, dtype=dtype)
        return sdf_and_deltas(device, dtype) | dict(gradient=gradient, directions=directions, inv_s=inv_s)

    def volsdf(device, dtype):
        return sdf_and_deltas(device, dtype) | dict(beta=torch.tensor([0.1], device=device).to(dtype))

    def sdf_only(device, dtype):
        return dict(sdf=sdf_and_deltas(device, dtype)["sdf"])

    wrt = ("sdf", "gradient", "inv_s")
    yield from _each("fp32 bf16", "neus_alpha", size, neus_alpha, neus_alpha_ref, neus, wrt)
    yield from _each("fp32 bf16", "volsdf_alpha", size, volsdf_alpha, volsdf_alpha_ref, volsdf, ("sdf", "beta"))
    # it has no kernel, being plain PyTorch on every device: so it is its own reference
    yield from _each("fp32", "unisurf_alpha", size, unisurf_alpha, unisurf_alpha, sdf_only, ("sdf",))

    def samples(device, dtype):
        alpha, values = torch.rand(R, S + n, device=device), torch.randn(R, S + n, 4, device=device)
        return dict(alpha=alpha.to(dtype), values=values.to(dtype))

    def rendered_depths(device, dtype):
        edges = 0.5 + torch.rand(R, S + n + 1, device=device).sort(dim=1).values
        volume_idx, hit = torch.randint(2, (R,), device=device, dtype=torch.int32), torch.rand(R, device=device) < 0.8
        depth = 2 * torch.rand(R, device=device)  # some are out of range
        return dict(depth=depth, edges=edges, volume_idx=volume_idx, hit=hit, B=2, scale=1 / 54)

    def ray_values(device, dtype):
        of_volume = rows_of_volumes(torch.randint(2, (R,), device=device), 2, dtype)
        return dict(of_ray=torch.rand(R, device=device).to(dtype), of_volume=of_volume, count=3)

    yield from _each("fp32", "depth_in_range", size, depth_in_range, depth_in_range_ref, rendered_depths, ("depth",))
    yield from _each("fp32", "ray_mean", size, ray_mean, ray_mean_ref, ray_values, ("of_ray",))
    yield from _each("fp32 fp16 bf16", "composite", size, composite, composite_ref, samples, ("alpha", "values"))


# The fused renderer

# Smallest distance, in cells, between a sample and a plane through voxel centers, where the volume's gradient jumps
CLEARANCE = 2e-4
# Added to biases of the color MLP's hidden units: few inputs of its ReLUs are near 0, where rounding would flip them
OFF_KINK = 3.0


def _mlp(conditions, outputs, hidden, layers, bias, device):
    """Parameters as `nn.Linear` initializes them: P, q, then C_l, d_l, W_l, b_l of every layer, as in `sdf_render`.

    conditions: channels that C_l reads; bias: added to every b_l but the last.
    """
    shapes = [(hidden, 3), *[(hidden, conditions), (hidden, hidden)] * (layers - 1)]
    shapes += [(hidden, conditions), (outputs, hidden)]
    leaves = []
    for rows, columns in shapes:
        leaves += [(torch.rand(*n, device=device) * 2 - 1) * columns**-0.5 for n in ((rows, columns), (rows,))]
    for b in leaves[5:-1:4]:  # b_l of every layer but the last
        b += bias
    return leaves


def _field_cases(size, recipe):
    (Z, Y, X), R, S = ((5, 180, 180), 3072, 96) if recipe else ((5, 9, 9), 4, 33)

    def inputs(method, C=32, hidden=16, sdf_layers=6, rgb_layers=4):
        def make(device, dtype):
            # cells per unit, and offset, of x, y, z: the volume spans -1 to 1 in x and y, -0.1 to 0.1 in z
            cells = torch.tensor([[X / 2, Y / 2, 5 * Z], [X / 2, Y / 2, Z / 2]], device=device).unbind()
            candidates = 2 * R  # rays, of which the first R with `CLEARANCE` are taken
            origins = torch.randn(candidates, 3, device=device) * 0.02
            directions = F.normalize(
                torch.randn(candidates, 3, device=device) * torch.tensor([1, 1, 0.1], device=device)
            )
            edges = (0.02 + 1.3 * torch.rand(candidates, S + 1, device=device)).sort(dim=1).values
            points = origins[:, None].double() + directions[:, None].double() * edges[:, :-1, None].double()
            cell = points * cells[0] + cells[1]
            clear = ((cell - cell.round()).abs() > CLEARANCE).all(dim=2).all(dim=1).nonzero()[:R, 0]
            assert len(clear) == R, "too few rays have clearance"
            i = torch.arange(R, device=device)
            # rays are of samples 0 and 1 in turn; rays 3, 13, 23, ... count as misses
            rays = origins[clear], directions[clear], (i % 2).int(), i % 10 != 3
            sdf_mlp = _mlp(C, 1 + hidden, hidden, sdf_layers, 0.0, device)
            conditions = 3 + C + 3 + hidden  # channels of direction, feature, gradient, geometry
            rgb_mlp = _mlp(conditions, 3, hidden, rgb_layers, OFF_KINK, device) if rgb_layers else None
            return dict(
                volume=torch.randn(2, Z, Y, X, C, device=device), rays=rays, edges=edges[clear],
                mlps=(sdf_mlp, rgb_mlp), density_param=torch.tensor([20.0 if method == "neus" else 0.1], device=device),
                cells=cells, method=method,
            )  # fmt: skip

        return make

    def values(device, dtype):
        given = inputs("neus")(device, dtype)
        return dict(
            volume=given["volume"], rays=given["rays"][:3], starts=given["edges"][:, :-1].contiguous(),
            sdf_mlp=given["mlps"][0], cells=given["cells"],
        )  # fmt: skip

    def parameters(device, dtype):
        sdf_mlp, rgb_mlp = inputs("neus")(device, dtype)["mlps"]
        return dict(sdf_mlp=sdf_mlp, rgb_mlp=rgb_mlp, channels=32, exact=True)

    def parameters_and_upstream(device, dtype):
        given = parameters(device, dtype)
        packed = pack_ref(**given)
        del given["exact"]
        return given | dict(d_sdf=torch.randn_like(packed.sdf), d_rgb=torch.randn_like(packed.rgb_w[0]))

    def gradients(bwd):
        return lambda **given: tuple(bwd(**given))

    def tensors(fn):
        return lambda **given: fn(**given)[:3]

    yield from _each("fp32", "pack", size, tensors(pack), tensors(pack_ref), parameters)
    made = gradients(pack_bwd), gradients(pack_bwd_ref)
    yield from _each("fp32", "pack_bwd", size, *made, parameters_and_upstream)
    kinds = {"neus": inputs("neus"), "volsdf": inputs("volsdf"), "neus without color": inputs("neus", rgb_layers=0)}
    if not recipe:
        kinds |= {
            "volsdf of 20 channels": inputs("volsdf", C=20, hidden=24, sdf_layers=2, rgb_layers=3),
            "neus of 64 channels": inputs("neus", C=64, hidden=64, sdf_layers=2, rgb_layers=2),
        }
    wrt = ("volume", "mlps", "density_param")
    for dtype, exact in (("tf32", False), ("fp32", True)):
        render, look_up = partial(sdf_render, exact=exact), partial(sdf_values, exact=exact)
        for kind, make in kinds.items():
            if not (exact and "channels" in kind):  # these would compile for minutes, and no preset uses them
                yield Case(f"sdf_render {kind}", size, dtype, make, render, sdf_render_ref, wrt)
        yield Case("sdf_render neus, bit-equal", size, dtype, kinds["neus"], render, sdf_render_ref, wrt, strict=True)
        yield Case("sdf_render neus, no gradients", size, dtype, kinds["neus"], render, sdf_render_ref)
        yield Case("sdf_values", size, dtype, values, look_up, sdf_values_ref)
    early = partial(sdf_render, stop=1e-4, exact=True)
    # Skipped samples have no signed distance: compare color and depth only. The error made by stopping is in the slack.
    yield Case(
        "sdf_render neus, stops early", size, "fp32", kinds["neus"], lambda **given: early(**given)[:2],
        lambda **given: sdf_render_ref(**given)[:2], slack=1e-3,
    )  # fmt: skip

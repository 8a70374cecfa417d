"""Render rays through a feature volume to depth and color, with one hand-written backward.

    f = volume at p,  (sdf, geometry) = distance MLP(p, f),  g = d sdf / d p
    rgb = color MLP(p, direction, f, g, geometry)
    alpha from (sdf, g) as in `sdf_alpha`,  compositing as in `composite`

where geometry is a vector of H numbers. Colors and NeuS's opacities depend on g, so training needs second derivatives
of the distance: see kernels/sdf_backward.py.

Sizes: R rays, S samples on each, N = R * S, C channels, H hidden units, M samples per tile, which a program computes at
once. In kernels, C and H are padded, CHANNELS is the volume's C; the volume's sizes are constants there, one per model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from unipad.kernels.backend import cdiv, jit, on_triton, tl, without_autocast
from unipad.kernels.composite import composite_ref
from unipad.kernels.sdf_alpha import clip_to_1, neus_alpha_ref, volsdf_alpha_ref
from unipad.kernels.sdf_backward import render_bwd
from unipad.kernels.sdf_field import (
    BLOCK_S,
    COLORS,
    SEARCH_BLOCK,
    color_of,
    columns,
    distance,
    distance_bwd,
    geometry,
    opacity,
    padded_width,
    precision,
    rgb_hidden,
    rgb_inputs,
    sdf_hidden,
    tile_launch,
)
from unipad.kernels.sdf_gather import (
    cell_around,
    interpolate,
    interpolate_with_slopes,
    load3,
    load_ray,
    sample_at,
    store3,
)
from unipad.kernels.sdf_pack import Packed, pack, pack_bwd
from unipad.kernels.sdf_reference import field_ref, values_ref
from unipad.kernels.sdf_weights import operand

METHODS = ("neus", "volsdf")
WIDTH_RANGE, LAYERS_RANGE = (16, 64), (2, 8)  # (smallest, largest): channels and hidden units, layers of an MLP


def kernels_support(
    method: str, dtype: torch.dtype, channels: int, hidden: int, sdf_layers: int, rgb_layers: int
) -> bool:
    """Whether the kernels support a field of these sizes. `rgb_layers`: 0 if color is not rendered."""
    width_fits = all(WIDTH_RANGE[0] <= n <= WIDTH_RANGE[1] for n in (channels, hidden))
    depth_fits = all(LAYERS_RANGE[0] <= n <= LAYERS_RANGE[1] for n in (sdf_layers, rgb_layers or sdf_layers))
    return method in METHODS and dtype == torch.float32 and width_fits and depth_fits


def sdf_render(
    volume: Tensor, rays: tuple[Tensor, Tensor, Tensor, Tensor], edges: Tensor,
    mlps: tuple[Sequence[Tensor], Sequence[Tensor] | None], density_param: Tensor, cells: tuple[Tensor, Tensor],
    method: str, exact: bool = False, stop: float = 0.0, packed: Packed | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Render rays to color and depth.

    Args:
        volume: [B, Z, Y, X, C] features, at least one voxel.
        rays:   origins [R, 3], unit directions [R, 3], volume_idx [R] int32 and hit [R] bool (False: weights are 0);
                origins and `edges` in any unit of length, in the volume's frame (here LiDAR).
        edges:  [R, S + 1] ascending distances: S samples, each at the start of its interval.
        mlps:   (distance MLP, color MLP or None: color is not rendered). Each is a list of tensors: P, q,
                then C_l, d_l, W_l, b_l of every layer (see `sdf_reference`).
        density_param: [1] NeuS's inv_s or VolSDF's beta.
        cells:  cells_per_unit [3] and cell_offset [3]: grid coordinates (x, y, z) = point * cells_per_unit +
                cell_offset; integers are voxel centers.
        method: "neus" or "volsdf".
        exact:  compute the MLPs' matrix products with fp32 accuracy (tf32x3) instead of tf32 (operands rounded to a
                10-bit mantissa). tf32x3 computes three products instead of one; its cost was not measured on a GPU.
        stop:   transmittance below which a ray needs no more samples; one that does not hit needs none. It ends with
                the first tile behind which it needs no more. `weights`, `sdf` and `gradient` of the samples behind are
                0; `rgb` is off by less than `stop`, `depth` by less than `stop` times the ray's length. 0: off; above 0
                only under `no_grad`.
        packed: what `pack` returns for `mlps` and `exact`, to pack once for several calls; None: packed in this one.

    Returns:
        rgb:      [R, 3], black background; 0 without the color MLP.
        depth:    [R] sum of weight * start of the interval, divided by the sum of weights + 1e-10.
        weights:  [R, S] weight of each sample.
        sdf:      [R, S] signed distance at the samples.
        gradient: [R, S, 3] d sdf / d point.

    Differentiable once, through every output, w.r.t. `volume`, the MLPs and `density_param`. fp32. The host never waits
    for the device. Kernels add atomically to the gradient of `volume`, so its last bits vary from run to run; under
    `torch.use_deterministic_algorithms(True)` samples are sorted by cell and summed instead. Raises AssertionError if
    shapes do not match, `packed` is of other sizes or another `exact`, `kernels_support` is False for the field, or
    `stop` is above 0 with gradients enabled.
    """
    _check(volume, rays, edges, mlps, density_param, cells, method)
    assert not (stop and torch.is_grad_enabled()), "rays that stop early have no gradients: render under no_grad"
    if not on_triton(volume):
        return sdf_render_ref(volume, rays, edges, mlps, density_param, cells, method)
    if packed is not None:
        packed.check(*mlps, volume.shape[4], exact)
    elif len(edges):  # without rays nothing is launched
        packed = pack(*mlps, volume.shape[4], exact)
    (origins, directions, volume_idx, hit), (cells_per_unit, cell_offset) = rays, cells
    ray_tensors = dict(
        origins_ptr=origins, directions_ptr=directions, volume_idx_ptr=volume_idx, hit_ptr=hit, edges_ptr=edges,
        cells_per_unit_ptr=cells_per_unit, cell_offset_ptr=cell_offset,
    )  # fmt: skip
    ray_tensors = {name: tensor.contiguous() for name, tensor in ray_tensors.items()}
    (sdf_mlp, rgb_mlp), options = mlps, dict(NEUS=method == "neus", PREC=precision(exact), **_sizes(volume, mlps))
    return SdfRender.apply(
        volume.contiguous(), density_param, packed, ray_tensors, options, float(stop), *sdf_mlp, *(rgb_mlp or ())
    )


@without_autocast
def sdf_render_ref(volume, rays, edges, mlps, density_param, cells, method, exact=False, stop=0.0, packed=None):
    """`sdf_render` in plain PyTorch, for any field and in fp64 too; ignores `exact`, `stop` and `packed`."""
    (origins, directions, volume_idx, hit), edges = (t.detach() for t in rays), edges.detach()
    cells = [t.detach() for t in cells]
    starts, deltas = edges[:, :-1], edges.diff(dim=1)
    points = origins[:, None] + directions[:, None] * starts[..., None]  # [R, S, 3]
    sdf, gradient, rgb = field_ref(volume, points, directions, volume_idx, mlps, cells)
    if method == "neus":
        alpha = neus_alpha_ref(sdf, gradient, directions, deltas, density_param)
    else:
        alpha = volsdf_alpha_ref(sdf, deltas, density_param)
    out, weights = composite_ref(alpha * hit[:, None], torch.cat([rgb, starts[..., None]], dim=-1))
    return out[:, :3], out[:, 3] / (weights.sum(dim=1) + 1e-10), weights, sdf, gradient


def sdf_values(
    volume: Tensor, rays: tuple[Tensor, Tensor, Tensor], starts: Tensor, sdf_mlp: Sequence[Tensor],
    cells: tuple[Tensor, Tensor], exact: bool = False, packed: Packed | None = None,
) -> Tensor:  # fmt: skip
    """Signed distance [R, S] at `starts` [R, S] along the rays; arguments as for `sdf_render`, `rays` without `hit`.

    Not differentiable: used to search for the surface along rays. packed: with or without a color MLP. Raises
    AssertionError if shapes do not match, or `packed` is of other sizes or another `exact`.
    """
    _check_field(volume, rays, starts, sdf_mlp, cells)
    if not on_triton(volume):
        return sdf_values_ref(volume, rays, starts, sdf_mlp, cells)
    origins, directions, volume_idx = rays
    R, S = starts.shape
    sdf = starts.new_empty(R, S)
    if sdf.numel():
        if packed is None:
            packed = pack(sdf_mlp, None, volume.shape[4], exact)
        else:
            packed.check(sdf_mlp, None, volume.shape[4], exact)
        sizes = _sizes(volume, (sdf_mlp, None))
        cells_per_unit, cell_offset = cells
        launch = tile_launch(sizes, "BLOCK_M", SEARCH_BLOCK)
        _sdf_values_kernel[(cdiv(R * S, launch["BLOCK_M"]),)](
            volume_ptr=volume.contiguous(), origins_ptr=origins.contiguous(), directions_ptr=directions.contiguous(),
            volume_idx_ptr=volume_idx.contiguous(), starts_ptr=starts.contiguous(),
            cells_per_unit_ptr=cells_per_unit.contiguous(), cell_offset_ptr=cell_offset.contiguous(),
            mlp_ptr=packed.sdf, w_ptr=packed.sdf_w, sdf_ptr=sdf, R=R, S=S, **_volume_sizes(volume),
            C=sizes["C"], H=sizes["H"], LAYERS=sizes["SDF_LAYERS"], PREC=precision(exact), **launch,
        )  # fmt: skip
    return sdf


@without_autocast
@torch.no_grad()
def sdf_values_ref(volume, rays, starts, sdf_mlp, cells, exact=False, packed=None):
    """`sdf_values` in plain PyTorch."""
    origins, directions, volume_idx = rays
    points = origins[:, None] + directions[:, None] * starts[..., None]  # [R, S, 3]
    return values_ref(volume, points, volume_idx, sdf_mlp, cells)


def _check(volume, rays, edges, mlps, density_param, cells, method):
    assert edges.dim() == 2 and edges.shape[1] > 1, f"edges {tuple(edges.shape)} do not match: [R, S + 1], S > 0"
    _check_field(volume, rays, edges, mlps[0], cells)
    hit, layers = rays[3], [0 if m is None else len(m[2::4]) for m in mlps]  # one C_l per layer
    assert hit.shape == edges.shape[:1], f"hit {tuple(hit.shape)} and edges {tuple(edges.shape)} do not match"
    assert density_param.shape == (1,), f"density_param is [1], not {tuple(density_param.shape)}"
    H, C = mlps[0][2].shape  # C_0
    assert kernels_support(method, volume.dtype, C, H, *layers), (
        f"no kernel for {method}, {volume.dtype}, {C=}, {H=}, {layers=}"
    )


def _check_field(volume, rays, starts, sdf_mlp, cells):
    (origins, directions, volume_idx, *_), R = rays, len(starts)
    fits = volume.dim() == 5 and origins.shape == directions.shape == (R, 3) and volume_idx.shape == (R,)
    assert fits and starts.dim() == 2, (
        f"volume, origins, directions, volume_idx, distances of "
        f"{_shapes(volume, origins, directions, volume_idx, starts)} do not match"
    )
    assert min(volume.shape[1:4]) > 0, f"volume {tuple(volume.shape)} has no voxels"
    # kernels number voxels and samples in int32, those that fill the last tile included
    few = volume.shape[:4].numel() < 2**31 and starts.numel() < 2**30
    assert few, f"too many voxels or samples: {_shapes(volume, starts)}"
    assert all(t.shape == (3,) for t in cells), (
        f"cells_per_unit and cell_offset are [3] each, not {[tuple(t.shape) for t in cells]}"
    )
    C = sdf_mlp[2].shape[1]  # of C_0 [H, C]
    assert C == volume.shape[4], f"an MLP for {C} channels does not match volume {tuple(volume.shape)}"


def _shapes(*tensors):
    return [tuple(t.shape) for t in tensors]


def _sizes(volume, mlps):
    """Sizes of the field by name of the kernels' constants."""
    sdf, rgb = mlps
    return dict(
        C=padded_width(volume.shape[4]), H=padded_width(len(sdf[0])),  # sdf[0] is P [H, 3]
        SDF_LAYERS=len(sdf) // 4, RGB_LAYERS=0 if rgb is None else len(rgb) // 4,
    )  # fmt: skip


def _volume_sizes(volume):
    """The volume's sizes by name of the kernels' constants."""
    return dict(zip(("Z", "Y", "X", "CHANNELS"), volume.shape[1:], strict=True))


class SdfRender(torch.autograd.Function):
    @staticmethod
    def forward(ctx, volume, density_param, packed, ray_tensors, options, stop, *mlps):
        ctx.options, edges = options, ray_tensors["edges_ptr"]
        R, S = len(edges), edges.shape[1] - 1
        rgb = edges.new_empty(R, 3) if options["RGB_LAYERS"] else edges.new_zeros(R, 3)
        new = edges.new_zeros if stop else edges.new_empty  # the kernel fills all samples up to where it stops
        saved = dict(
            volume_ptr=volume, density_param_ptr=density_param, **ray_tensors,
            depth_ptr=edges.new_empty(R), total_ptr=edges.new_empty(R),
            weights_ptr=new(R, S), trans_ptr=new(R, S), sdf_ptr=new(R, S), gradient_ptr=new(R, S, 3),
            colors_ptr=edges.new_empty(R, S, 3 if options["RGB_LAYERS"] else 0),
        )  # fmt: skip
        if R:
            saved |= dict(sdf_mlp_ptr=packed.sdf, sdf_w_ptr=packed.sdf_w, rgb_w_ptr=packed.rgb_w)
            _sdf_render_fwd_kernel[(R,)](
                **saved, rgb_ptr=rgb, S=S, STOP=stop, **_volume_sizes(volume), **options,
                **tile_launch(options, "BLOCK_S", BLOCK_S),
            )  # fmt: skip
        ctx.names = tuple(saved)
        ctx.save_for_backward(*saved.values(), *mlps)
        ctx.set_materialize_grads(False)
        return rgb, saved["depth_ptr"], saved["weights_ptr"], saved["sdf_ptr"], saved["gradient_ptr"]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_rgb, d_depth, d_weights, d_sdf, d_gradient):
        saved, options = ctx.saved_tensors, ctx.options
        mlps, saved = saved[len(ctx.names) :], dict(zip(ctx.names, saved, strict=False))
        volume, density_param = saved["volume_ptr"], saved["density_param_ptr"]
        if not len(saved["edges_ptr"]):
            d_volume, d_density_param, *d_mlps = (torch.zeros_like(t) for t in (volume, density_param, *mlps))
        else:
            upstream = dict(
                up_rgb_ptr=d_rgb,
                up_depth_ptr=d_depth,
                up_weights_ptr=d_weights,
                up_sdf_ptr=d_sdf,
                up_gradient_ptr=d_gradient,
            )
            if any(up is None for up in upstream.values()):
                # of outputs that no loss reads: they share the largest zeros
                zeros = torch.zeros_like(saved["gradient_ptr"])
                upstream = {name: zeros if up is None else up for name, up in upstream.items()}
            d_volume, d_density_param, d_sdf_w, d_rgb_w = render_bwd(saved, upstream, options)
            at = 2 + 4 * options["SDF_LAYERS"]  # where the color MLP begins
            d_mlps = pack_bwd(mlps[:at], mlps[at:] or None, volume.shape[4], d_sdf_w, d_rgb_w)
        return d_volume, d_density_param, None, None, None, None, *d_mlps


@jit(varying=("R",))
def _sdf_values_kernel(
    volume_ptr,  # [B, Z, Y, X, CHANNELS]
    origins_ptr, directions_ptr, volume_idx_ptr, starts_ptr,  # [R, 3] x 2, [R], [N]
    cells_per_unit_ptr, cell_offset_ptr,  # [3], [3]
    mlp_ptr, w_ptr,  # `Packed`'s sdf and sdf_w
    sdf_ptr,  # [N]
    R, S,
    Z: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, CHANNELS: tl.constexpr,
    C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, PREC: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = n // S  # int32: R * S is below 2^30
    ok = r < R
    n = n.to(tl.int64)
    ray = load_ray(origins_ptr, directions_ptr, volume_idx_ptr, tl.minimum(r, R - 1).to(tl.int64))
    start = tl.load(starts_ptr + n, mask=ok, other=0.0)
    point, coords, volume_idx = sample_at(ray, start, cells_per_unit_ptr, cell_offset_ptr)
    cell = cell_around(coords, volume_idx, Z, Y, X)
    feature = interpolate(volume_ptr, cell, Z, Y, X, CHANNELS, C)
    xs = sdf_hidden(point, operand(feature, PREC), mlp_ptr, w_ptr, C, H, LAYERS, PREC)
    tl.store(sdf_ptr + n, distance(xs[LAYERS - 2], feature, mlp_ptr, C, H, LAYERS), mask=ok)


@jit
def _sdf_render_fwd_kernel(
    volume_ptr,  # [B, Z, Y, X, CHANNELS]
    origins_ptr, directions_ptr, volume_idx_ptr, hit_ptr, edges_ptr,  # [R, 3] x 2, [R] x 2, [R, S + 1]
    cells_per_unit_ptr, cell_offset_ptr,  # [3], [3]
    sdf_mlp_ptr, sdf_w_ptr, rgb_w_ptr,  # `Packed`
    density_param_ptr,  # [1]
    rgb_ptr, depth_ptr, total_ptr,  # [R, 3], [R], [R] sum of the weights
    weights_ptr, trans_ptr, sdf_ptr, gradient_ptr, colors_ptr,  # [N] x 3, [N, 3], [N, 3]
    S,
    Z: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, CHANNELS: tl.constexpr,
    NEUS: tl.constexpr, PREC: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
    SDF_LAYERS: tl.constexpr, RGB_LAYERS: tl.constexpr, STOP: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    ray = load_ray(origins_ptr, directions_ptr, volume_idx_ptr, r)
    hit = tl.load(hit_ptr + r)
    density_param = tl.load(density_param_ptr)
    passed = 1.0  # transmittance up to the tile
    if STOP > 0:  # then `passed` starts at 0 for rays that miss: they need no samples
        passed = hit.to(tl.float32)
    total, depth_sum, red, green, blue = 0.0, 0.0, 0.0, 0.0, 0.0
    tile, tiles = 0, tl.cdiv(S, BLOCK_S)
    while tile < tiles:
        s = tile * BLOCK_S + tl.arange(0, BLOCK_S)
        ok = s < S
        n = r * S + s
        start = tl.load(edges_ptr + n + r, mask=ok, other=0.0)
        delta = tl.load(edges_ptr + n + r + 1, mask=ok, other=0.0) - start
        point, coords, volume_idx = sample_at(ray, start, cells_per_unit_ptr, cell_offset_ptr)
        cell = cell_around(coords, volume_idx, Z, Y, X)
        feature, slopes = interpolate_with_slopes(volume_ptr, cell, Z, Y, X, CHANNELS, C)
        feature_operand = operand(feature, PREC)
        xs = sdf_hidden(point, feature_operand, sdf_mlp_ptr, sdf_w_ptr, C, H, SDF_LAYERS, PREC)
        sdf = distance(xs[SDF_LAYERS - 2], feature, sdf_mlp_ptr, C, H, SDF_LAYERS)
        # d sdf / d p at a fixed feature, d sdf / d f
        qx, qy, qz, sdf_by_feature = distance_bwd(xs, sdf_mlp_ptr, sdf_w_ptr, C, H, SDF_LAYERS, PREC)
        # ... and through the feature, per cell
        scale = load3(cells_per_unit_ptr, 0)
        gx = tl.sum(sdf_by_feature * slopes[0], axis=1) * scale[0] + qx
        gy = tl.sum(sdf_by_feature * slopes[1], axis=1) * scale[1] + qy
        gz = tl.sum(sdf_by_feature * slopes[2], axis=1) * scale[2] + qz
        gradient = (gx, gy, gz)

        alpha, _, _, _ = opacity(sdf, gradient, ray[1], delta, density_param, NEUS)
        alpha = tl.where(ok & hit, clip_to_1(alpha), 0.0)
        # what each sample lets through, 1 beyond the last; k >= 1e-7, so dividing by it is safe
        k = tl.where(ok, 1.0 - alpha + 1e-7, 1.0)
        through = passed * tl.cumprod(k, axis=0)  # transmittance behind the sample
        trans = through / k  # in front of it
        weight = trans * alpha
        passed = tl.sum(tl.where(tl.arange(0, BLOCK_S) == BLOCK_S - 1, through, 0.0), axis=0)
        total += tl.sum(weight, axis=0)
        depth_sum += tl.sum(weight * start, axis=0)
        tl.store(weights_ptr + n, weight, mask=ok)
        tl.store(trans_ptr + n, trans, mask=ok)
        tl.store(sdf_ptr + n, sdf, mask=ok)
        store3(gradient_ptr, n, gradient, ok)
        if RGB_LAYERS > 0:
            x = operand(xs[SDF_LAYERS - 2], PREC)
            geo = operand(geometry(x, feature_operand, sdf_mlp_ptr, sdf_w_ptr, C, H, SDF_LAYERS, PREC), PREC)
            e = operand(rgb_inputs(point, ray[1], gradient), PREC)
            rgb_xs = rgb_hidden(e, feature_operand, geo, rgb_w_ptr, C, H, RGB_LAYERS, PREC)
            color = color_of(rgb_xs[RGB_LAYERS - 2], e, feature_operand, geo, rgb_w_ptr, C, H, RGB_LAYERS, PREC)
            channel = tl.arange(0, COLORS)[None, :]
            tl.store(colors_ptr + 3 * n[:, None] + channel, color, mask=ok[:, None] & (channel < 3))
            red_, green_, blue_ = columns(color * weight[:, None], 0)
            red += tl.sum(red_, axis=0)
            green += tl.sum(green_, axis=0)
            blue += tl.sum(blue_, axis=0)
        tile += 1
        if STOP > 0:
            tiles = tl.where(passed < STOP, tile, tiles)  # ends the loop
    tl.store(depth_ptr + r, depth_sum / (total + 1e-10))
    tl.store(total_ptr + r, total)
    if RGB_LAYERS > 0:
        tl.store(rgb_ptr + 3 * r, red)
        tl.store(rgb_ptr + 3 * r + 1, green)
        tl.store(rgb_ptr + 3 * r + 2, blue)

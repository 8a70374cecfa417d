"""The backward of `sdf_render`, in two kernels: compositing and the color MLP along rays; then the distance MLP.

Compositing, with the transmittance T_s of the ray up to sample s and the weight w_s = T_s alpha_s:

    dL/dalpha_s = T_s dL/dw_s - (sum over t > s of w_t dL/dw_t) / (1 - alpha_s + 1e-7)

(the recursion of `composite` written as a sum, since the samples of a tile are computed in parallel).

Colors and opacities depend on the gradient g of the distance, so training needs second derivatives. With v = dL/dg,

    dL/dtheta through g = v^T dg/dtheta = d(g . v)/dtheta at fixed v :

the gradient of *one* number, the derivative g . v of the distance along v. The backward of the distance is therefore
reverse mode over the MLP and its tangent along v. Here z. is the derivative of z along v (in the code z_dot; f. is
`along`), z- is dL/dz (d_z), and z^ is the derivative of the distance w.r.t. z (z_hat):

    z._l = W_l x._l + A_l f. + E_l (v, 0),   x._{l+1} = act'(z_l) z._l,   f. = (df / dp) v
    x^_l = W_l^T z^_l,   z^_{l-1} = act'(z_{l-1}) x^_l,   z^_last = (1, 0, ...)   (the reverse pass that gave g)
    x-_l = W_l^T z-_l,   z-_{l-1} = act'(z_{l-1}) x-_l + act''(z_{l-1}) z._{l-1} x^_l,   z-_last = dL/dz_last
    W-_l = z-_l x_l^T + z^_l x._l^T,   A-_l = z-_l f^T + z^_l f.^T,   f- = sum_l A_l^T z-_l,   f^ = sum_l A_l^T z^_l

(E- as W-, with e for x; f- also has the gradient through the color MLP), with the matrices of `sdf_field`. A corner of
a sample's cell with interpolation weight a and b = da / dp adds a f- + (b . v) f^ to the gradient of its voxel.

The reference is the gradient of `sdf_render_ref` by autograd; timed by benchmarks.bench_sdf_render.
Sizes as in `sdf_render`.
"""

import torch

from unipad.kernels.backend import cdiv, jit, multiprocessors, on_triton, tl, triton
from unipad.kernels.cell_sum import cell_of, cell_sum
from unipad.kernels.sdf_alpha import clip_to_1
from unipad.kernels.sdf_field import (
    BLOCK_S,
    COLORS,
    INPUTS,
    POINT,
    columns,
    geometry,
    load_row,
    opacity,
    point_inputs,
    point_product,
    programs_for,
    rgb_hidden,
    rgb_inputs,
    sdf_hidden,
    softplus,
    softplus_grads,
    tile_launch,
)
from unipad.kernels.sdf_gather import (
    cell_around,
    corner_ptr,
    interpolate,
    interpolate_along,
    load3,
    load3_masked,
    load_ray,
    sample_at,
    store3,
    weight,
    weight_along,
)
from unipad.kernels.sdf_weights import (
    flatten,
    linear,
    linear_bwd_input,
    linear_bwd_weight,
    operand,
    rounded,
    unflatten,
)


def render_bwd(saved, upstream, options):
    """Gradients w.r.t. the volume, `density_param`, and both packed MLPs in the first order of sdf_weights.py.

    There must be a ray.

    saved:    inputs of the forward kernel and its outputs except `rgb`, by name of the kernel argument.
    upstream: gradients w.r.t. the outputs of `sdf_render`, also by name of the kernel argument.
    options:  constexpr arguments of the kernels, without the block sizes.
    """
    volume, sdf_mlp, rgb_w, edges = (saved[f"{name}_ptr"] for name in ("volume", "sdf_mlp", "rgb_w", "edges"))
    R, S, C, H = len(edges), edges.shape[1] - 1, options["C"], options["H"]
    _, Z, Y, X, CHANNELS = volume.shape
    options = options | dict(Z=Z, Y=Y, X=X, CHANNELS=CHANNELS) | tile_launch(options, "BLOCK_S", BLOCK_S)
    # scatter: add to the volume's gradient atomically, which strict determinism forbids
    scatter, has_rgb = on_triton(volume, deterministic=False), options["RGB_LAYERS"] > 0
    # written by the first kernel, read by the second, which overwrites d_feature unless it scatters
    d_sdf, d_gradient = volume.new_empty(R, S), volume.new_empty(R, S, 3)
    d_feature = volume.new_empty(R * S if has_rgb or not scatter else 0, C)
    d_geometry = volume.new_empty(R * S if has_rgb else 0, H)

    programs = programs_for(R, multiprocessors(volume), options["num_warps"])
    d_rgb_w = volume.new_zeros(programs, *rgb_w.shape[1:]) if has_rgb else rgb_w
    d_density_param = volume.new_empty(programs)
    _sdf_render_bwd_rgb_kernel[(programs,)](
        **saved, **{name: t.contiguous() for name, t in upstream.items()},
        d_sdf_ptr=d_sdf, d_gradient_ptr=d_gradient, d_feature_ptr=d_feature, d_geometry_ptr=d_geometry,
        d_rgb_w_ptr=d_rgb_w, d_density_param_ptr=d_density_param, R=R, S=S, **options,
    )  # fmt: skip
    if has_rgb:  # summed now, to free the programs' sums before the next are allocated
        d_rgb_w = d_rgb_w.sum(0)

    programs = programs_for(R * cdiv(S, options["BLOCK_S"]), multiprocessors(volume), options["num_warps"])
    d_volume, d_sdf_w = torch.zeros_like(volume), volume.new_zeros(programs, *sdf_mlp.shape)
    scratch = volume.new_empty(programs, 2 * (options["SDF_LAYERS"] - 2), options["BLOCK_S"] * H)
    feature_hat = volume.new_empty(0 if scatter else R * S, C)
    cell = torch.empty(len(feature_hat), dtype=torch.int32, device=volume.device)
    _sdf_render_bwd_sdf_kernel[(programs,)](
        volume_ptr=volume, origins_ptr=saved["origins_ptr"], directions_ptr=saved["directions_ptr"],
        volume_idx_ptr=saved["volume_idx_ptr"], edges_ptr=edges,
        cells_per_unit_ptr=saved["cells_per_unit_ptr"], cell_offset_ptr=saved["cell_offset_ptr"],
        sdf_mlp_ptr=sdf_mlp, sdf_w_ptr=saved["sdf_w_ptr"],
        d_sdf_ptr=d_sdf, d_gradient_ptr=d_gradient, d_feature_ptr=d_feature, d_geometry_ptr=d_geometry,
        d_sdf_w_ptr=d_sdf_w, d_volume_ptr=d_volume, scratch_ptr=scratch,
        feature_hat_ptr=feature_hat, cell_idx_ptr=cell, R=R, S=S, **options, SCATTER=scatter,
    )  # fmt: skip
    if not scatter:
        cell_sum(
            d_volume, cell, d_feature, feature_hat, d_gradient,
            origins=saved["origins_ptr"], directions=saved["directions_ptr"], edges=edges,
            cells_per_unit=saved["cells_per_unit_ptr"], cell_offset=saved["cell_offset_ptr"],
        )  # fmt: skip
    return d_volume, d_density_param.sum(0, keepdim=True), d_sdf_w.sum(0), d_rgb_w


@triton.jit
def opacity_bwd(d_alpha, sdf, gradient, direction, delta, density_param, NEUS: tl.constexpr):
    """Gradients w.r.t. the distance, its slope along the ray, and `density_param`, [M] each.

    Formulas and names as in sdf_alpha.py, with inv_s or beta called `density_param`.
    """
    if NEUS:
        alpha, slope, prev_cdf, next_cdf = opacity(sdf, gradient, direction, delta, density_param, NEUS)
        half = tl.minimum(slope, 0.0) * delta / 2
        d_alpha = tl.where((alpha >= 0) & (alpha <= 1), d_alpha, 0.0) / (prev_cdf + 1e-5)
        a = d_alpha * next_cdf / (prev_cdf + 1e-5) * prev_cdf * (1.0 - prev_cdf)
        b = -d_alpha * next_cdf * (1.0 - next_cdf)
        d_slope = tl.where(slope < 0, density_param * (b - a) * delta / 2, 0.0)
        return density_param * (a + b), d_slope, a * (sdf - half) + b * (sdf + half)
    else:
        _, _, tail, density = opacity(sdf, gradient, direction, delta, density_param, NEUS)
        d_density = d_alpha * delta * tl.exp(-density * delta)
        d_sdf = -d_density * tail / (density_param * density_param)
        return d_sdf, tl.zeros_like(d_sdf), -(d_density * density + d_sdf * sdf) / density_param


@jit(varying=("R",))
def _sdf_render_bwd_rgb_kernel(
    volume_ptr,  # [B, Z, Y, X, CHANNELS]
    origins_ptr, directions_ptr, volume_idx_ptr, hit_ptr, edges_ptr,  # [R, 3] x 2, [R] x 2, [R, S + 1]
    cells_per_unit_ptr, cell_offset_ptr,  # [3], [3]
    sdf_mlp_ptr, sdf_w_ptr, rgb_w_ptr,  # `Packed`
    density_param_ptr,  # [1]
    depth_ptr, total_ptr,  # [R], [R] sum of the weights
    weights_ptr, trans_ptr, sdf_ptr, gradient_ptr, colors_ptr,  # [N] x 3, [N, 3], [N, 3]
    # upstream gradients: [R, 3], [R], [N], [N], [N, 3]
    up_rgb_ptr, up_depth_ptr, up_weights_ptr, up_sdf_ptr, up_gradient_ptr,
    d_sdf_ptr, d_gradient_ptr, d_feature_ptr, d_geometry_ptr,  # [N], [N, 3], [N, C], [N, H]
    d_rgb_w_ptr, d_density_param_ptr,  # [programs, packed] zeros, in the first order; [programs]
    R, S,
    Z: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, CHANNELS: tl.constexpr,
    NEUS: tl.constexpr, PREC: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
    SDF_LAYERS: tl.constexpr, RGB_LAYERS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    STRIDE: tl.constexpr = C + 2 * H + INPUTS  # columns of W, A, G and E, as packed by `sdf_pack`
    ROWS: tl.constexpr = (RGB_LAYERS - 1) * H + COLORS
    LAST: tl.constexpr = (RGB_LAYERS - 1) * H * STRIDE
    d_w_ptr = d_rgb_w_ptr + tl.program_id(0).to(tl.int64) * ROWS * STRIDE
    density_param = tl.load(density_param_ptr)
    d_density_param = tl.zeros((BLOCK_S,), tl.float32)
    tiles = tl.cdiv(S, BLOCK_S)
    is_behind = tl.arange(0, BLOCK_S)[:, None] < tl.arange(0, BLOCK_S)[None, :]  # [sample, other sample]: other behind
    for group in range(tl.program_id(0), R, tl.num_programs(0)):
        r = tl.cast(group, tl.int64)
        ray = load_ray(origins_ptr, directions_ptr, volume_idx_ptr, r)
        direction, hit = ray[1], tl.load(hit_ptr + r)
        depth = tl.load(depth_ptr + r)
        # depth = depth_sum / (total + 1e-10), depth_sum = sum of weight * start
        d_depth_sum = tl.load(up_depth_ptr + r) / (tl.load(total_ptr + r) + 1e-10)
        behind = 0.0  # sum of weight * d_weight over the tiles behind
        for i in range(tiles):
            s = (tiles - 1 - i) * BLOCK_S + tl.arange(0, BLOCK_S)
            ok = s < S
            n = r * S + s
            start = tl.load(edges_ptr + n + r, mask=ok, other=0.0)
            delta = tl.load(edges_ptr + n + r + 1, mask=ok, other=0.0) - start
            gradient = load3_masked(gradient_ptr, n, ok)
            sdf = tl.load(sdf_ptr + n, mask=ok, other=0.0)
            weight = tl.load(weights_ptr + n, mask=ok, other=0.0)
            d_weight = tl.load(up_weights_ptr + n, mask=ok, other=0.0) + d_depth_sum * (start - depth)
            if RGB_LAYERS > 0:
                channel = tl.arange(0, COLORS)[None, :]
                color_ok = ok[:, None] & (channel < 3)
                color = tl.load(colors_ptr + 3 * n[:, None] + channel, mask=color_ok, other=0.0)
                d_rgb = tl.load(up_rgb_ptr + 3 * r + channel, mask=channel < 3, other=0.0)
                d_weight += tl.sum(d_rgb * color, axis=1)

            term = tl.where(ok, weight * d_weight, 0.0)
            # summed anew for each sample: a cumulative sum minus the sample's own term would round away small terms
            # behind it
            sum_behind = behind + tl.sum(tl.where(is_behind, term[None, :], 0.0), axis=1)
            behind += tl.sum(term, axis=0)
            alpha, _, _, _ = opacity(sdf, gradient, direction, delta, density_param, NEUS)
            k = 1.0 - clip_to_1(alpha) + 1e-7
            trans = tl.load(trans_ptr + n, mask=ok, other=0.0)
            d_alpha = tl.where(ok & hit, trans * d_weight - sum_behind / k, 0.0)
            d_sdf, d_slope, d_param = opacity_bwd(d_alpha, sdf, gradient, direction, delta, density_param, NEUS)
            d_density_param += d_param
            tl.store(d_sdf_ptr + n, d_sdf + tl.load(up_sdf_ptr + n, mask=ok, other=0.0), mask=ok)
            vx, vy, vz = load3_masked(up_gradient_ptr, n, ok)
            vx += d_slope * direction[0]
            vy += d_slope * direction[1]
            vz += d_slope * direction[2]

            if RGB_LAYERS > 0:
                point, coords, volume_idx = sample_at(ray, start, cells_per_unit_ptr, cell_offset_ptr)
                cell = cell_around(coords, volume_idx, Z, Y, X)
                feature = interpolate(volume_ptr, cell, Z, Y, X, CHANNELS, C)
                f = operand(feature, PREC)
                xs = sdf_hidden(point, f, sdf_mlp_ptr, sdf_w_ptr, C, H, SDF_LAYERS, PREC)
                x = operand(xs[SDF_LAYERS - 2], PREC)
                geo = geometry(x, f, sdf_mlp_ptr, sdf_w_ptr, C, H, SDF_LAYERS, PREC)
                e = rgb_inputs(point, direction, gradient)
                rgb_xs = rgb_hidden(operand(e, PREC), f, operand(geo, PREC), rgb_w_ptr, C, H, RGB_LAYERS, PREC)

                conditions = (rounded(feature, PREC), rounded(geo, PREC), rounded(e, PREC))
                # w.r.t. the input of the color's sigmoid
                d_z = tl.where(ok[:, None], d_rgb * weight[:, None] * color * (1.0 - color), 0.0)
                d_x, d_conditions = _rgb_layer_bwd(
                    d_z, rgb_xs[RGB_LAYERS - 2], conditions, rgb_w_ptr, d_w_ptr, LAST,
                    (tl.zeros((1, C), tl.float32), tl.zeros((1, H), tl.float32), tl.zeros((1, INPUTS), tl.float32)),
                    COLORS, C, H, RGB_LAYERS, PREC,
                )  # fmt: skip
                for j in tl.static_range(RGB_LAYERS - 1):
                    d_z = tl.where(rgb_xs[RGB_LAYERS - 2 - j] > 0, d_x, 0.0)
                    x = rgb_xs[RGB_LAYERS - 3 - j] if j < RGB_LAYERS - 2 else None
                    d_x, d_conditions = _rgb_layer_bwd(
                        d_z, x, conditions, rgb_w_ptr, d_w_ptr, (RGB_LAYERS - 2 - j) * H * STRIDE,
                        d_conditions, H, C, H, RGB_LAYERS, PREC,
                    )  # fmt: skip
                d_gx, d_gy, d_gz = columns(d_conditions[2], 3)  # the SDF's gradient is in columns 3 to 5
                vx += d_gx
                vy += d_gy
                vz += d_gz
                rows = n[:, None]
                tl.store(d_feature_ptr + rows * C + tl.arange(0, C)[None, :], d_conditions[0], mask=ok[:, None])
                tl.store(d_geometry_ptr + rows * H + tl.arange(0, H)[None, :], d_conditions[1], mask=ok[:, None])
                tl.debug_barrier()  # with several warps: next, other threads add to the same weights' gradients
            store3(d_gradient_ptr, n, (vx, vy, vz), ok)
    tl.store(d_density_param_ptr + tl.program_id(0), tl.sum(d_density_param, axis=0))


@triton.jit
def _rgb_layer_bwd(
    d_z, x, conditions, w_ptr, d_w_ptr, AT: tl.constexpr, d_conditions,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The layer of the color MLP at AT: adds to its gradients and to d_conditions; returns d_x and d_conditions.

    x: None in layer 0, whose x is 0. conditions: feature, geometry and e, rounded.
    """
    SECOND: tl.constexpr = ((LAYERS - 1) * H + COLORS) * (C + 2 * H + INPUTS)  # where the weights' second order begins
    feature, geo, e = conditions
    d_feature, d_geo, d_e = d_conditions
    d_zt = tl.trans(rounded(d_z, PREC))
    linear_bwd_weight(d_w_ptr, AT + H * N, d_zt, feature, None, None, PREC)
    linear_bwd_weight(d_w_ptr, AT + (H + C) * N, d_zt, geo, None, None, PREC)
    linear_bwd_weight(d_w_ptr, AT + (2 * H + C) * N, d_zt, e, None, None, PREC)
    d_z = operand(d_z, PREC)
    d_feature = linear_bwd_input(d_z, w_ptr, SECOND + AT + H * N, d_feature, C, PREC)
    d_geo = linear_bwd_input(d_z, w_ptr, SECOND + AT + (H + C) * N, d_geo, H, PREC)
    d_e = linear_bwd_input(d_z, w_ptr, SECOND + AT + (2 * H + C) * N, d_e, INPUTS, PREC)
    d_x = d_z
    if x is not None:
        linear_bwd_weight(d_w_ptr, AT, d_zt, rounded(x, PREC), None, None, PREC)
        d_x = linear_bwd_input(d_z, w_ptr, SECOND + AT, tl.zeros((1, H), tl.float32), H, PREC)
    return d_x, (d_feature, d_geo, d_e)


@jit(varying=("R",))
def _sdf_render_bwd_sdf_kernel(
    volume_ptr,  # [B, Z, Y, X, CHANNELS]
    origins_ptr, directions_ptr, volume_idx_ptr, edges_ptr,  # [R, 3] x 2, [R], [R, S + 1]
    cells_per_unit_ptr, cell_offset_ptr,  # [3], [3]
    sdf_mlp_ptr, sdf_w_ptr,  # `Packed`
    d_sdf_ptr, d_gradient_ptr, d_feature_ptr, d_geometry_ptr,  # [N], [N, 3], [N, C], [N, H]
    d_sdf_w_ptr, d_volume_ptr,  # [programs, packed] zeros, in the first order; [B, Z, Y, X, CHANNELS] zeros
    scratch_ptr,  # [programs, SDF_LAYERS - 2, 2, M * H] scratch: x_l and x._l, flattened
    feature_hat_ptr, cell_idx_ptr,  # [N, C], [N]: without SCATTER these and d_feature are written instead of d_volume
    R, S,
    Z: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, CHANNELS: tl.constexpr,
    NEUS: tl.constexpr, PREC: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
    SDF_LAYERS: tl.constexpr, RGB_LAYERS: tl.constexpr, SCATTER: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    STRIDE: tl.constexpr = C + H + INPUTS  # columns of W, A and E, as packed by `sdf_pack`
    SECOND: tl.constexpr = (SDF_LAYERS * H + 1) * STRIDE  # where the weights' second order begins
    LAST: tl.constexpr = (SDF_LAYERS - 1) * H * STRIDE
    E: tl.constexpr = C + H + POINT
    d_w_ptr = d_sdf_w_ptr + tl.program_id(0).to(tl.int64) * SECOND
    scratch_ptr += tl.program_id(0).to(tl.int64) * 2 * (SDF_LAYERS - 2) * BLOCK_S * H
    c, h, flat = tl.arange(0, C)[None, :], tl.arange(0, H)[None, :], tl.arange(0, BLOCK_S * H)
    tiles = tl.cdiv(S, BLOCK_S)  # per ray
    for tile in range(tl.program_id(0), R * tiles, tl.num_programs(0)):
        r = (tile // tiles).to(tl.int64)
        s = tile % tiles * BLOCK_S + tl.arange(0, BLOCK_S)
        ok = s < S
        n = r * S + s
        ray = load_ray(origins_ptr, directions_ptr, volume_idx_ptr, r)
        start = tl.load(edges_ptr + n + r, mask=ok, other=0.0)
        point, coords, volume_idx = sample_at(ray, start, cells_per_unit_ptr, cell_offset_ptr)
        v = load3_masked(d_gradient_ptr, n, ok)  # 0, as d_sdf, beyond the ray's last sample, which so adds nothing
        feature, along = interpolate_along(
            volume_ptr, cell_around(coords, volume_idx, Z, Y, X), to_grid(v, cells_per_unit_ptr), Z, Y, X, CHANNELS, C
        )  # along: f.
        d_sdf = tl.load(d_sdf_ptr + n, mask=ok, other=0.0)
        # the last layer's row of the distance, behind all other rows; of the columns of E only that of the bias is used
        bias_ptr = d_w_ptr + (SECOND - STRIDE + E + 3)
        tl.store(bias_ptr, tl.load(bias_ptr) + tl.sum(d_sdf, axis=0))

        f, f_dot = operand(feature, PREC), operand(along, PREC)
        x = tl.zeros((BLOCK_S, H), tl.float32)
        x_dot = x
        for l in tl.static_range(SDF_LAYERS - 1):
            z = load_row(sdf_mlp_ptr, l * H * STRIDE + E + 3, H, STRIDE)  # the bias
            z_dot = tl.zeros((1, H), tl.float32)
            if l == 0:
                z += point_product(point, sdf_mlp_ptr, E, H, STRIDE)
                z_dot += point_product(v, sdf_mlp_ptr, E, H, STRIDE)
            else:
                tl.store(scratch_ptr + ((2 * l - 2) * BLOCK_S * H + flat), flatten(x))
                tl.store(scratch_ptr + ((2 * l - 1) * BLOCK_S * H + flat), flatten(x_dot))
                z = linear(operand(x, PREC), sdf_w_ptr, l * H * STRIDE, z, H, PREC)
                z_dot = linear(operand(x_dot, PREC), sdf_w_ptr, l * H * STRIDE, z_dot, H, PREC)
            x = softplus(linear(f, sdf_w_ptr, l * H * STRIDE + H * H, z, H, PREC))
            z_dot = linear(f_dot, sdf_w_ptr, l * H * STRIDE + H * H, z_dot, H, PREC)
            x_dot = softplus_grads(x)[0] * z_dot
        tl.debug_barrier()  # with several warps, other threads may read the scratch

        # the columns of the feature in the row of the distance; written before the layers, they cost more registers
        add_row(d_w_ptr, SECOND - STRIDE + H, tl.sum(d_sdf[:, None] * feature + along, axis=0))
        # the last layer: row 0 is of the distance, the others are of the geometry
        add_row(d_w_ptr, SECOND - STRIDE, tl.sum(d_sdf[:, None] * x + x_dot, axis=0))
        d_x = d_sdf[:, None] * load_row(sdf_mlp_ptr, LAST, H)  # x-
        d_feature = d_sdf[:, None] * load_row(sdf_mlp_ptr, LAST + H, C)  # f-
        x_hat = tl.broadcast_to(load_row(sdf_mlp_ptr, LAST, H), (BLOCK_S, H))  # x^
        feature_hat = tl.broadcast_to(load_row(sdf_mlp_ptr, LAST + H, C), (BLOCK_S, C))  # f^
        feature, along = rounded(feature, PREC), rounded(along, PREC)
        p, p_dot = rounded(point_inputs(point, 1), PREC), rounded(point_inputs(v, 0), PREC)
        if RGB_LAYERS > 0:
            d_feature += tl.load(d_feature_ptr + n[:, None] * C + c, mask=ok[:, None], other=0.0)
            d_geo = tl.load(d_geometry_ptr + n[:, None] * H + h, mask=ok[:, None], other=0.0)
            d_z, d_zt = operand(d_geo, PREC), tl.trans(rounded(d_geo, PREC))
            d_x = linear_bwd_input(d_z, sdf_w_ptr, SECOND + LAST, d_x, H, PREC)
            d_feature = linear_bwd_input(d_z, sdf_w_ptr, SECOND + LAST + H * H, d_feature, C, PREC)
            linear_bwd_weight(d_w_ptr, LAST, d_zt, rounded(x, PREC), None, None, PREC)
            linear_bwd_weight(d_w_ptr, LAST + H * H, d_zt, feature, None, None, PREC)
            linear_bwd_weight(d_w_ptr, LAST + H * E, d_zt, p, None, None, PREC)
        for i in tl.static_range(SDF_LAYERS - 1):
            # of layer SDF_LAYERS - 2 - i
            act_grad, ratio = softplus_grads(x)  # act', act'' / act'
            d_z = d_x * act_grad + x_hat * x_dot * ratio  # x_dot * ratio = act'' z_dot
            z_hat = x_hat * act_grad
            d_zt, z_hat_t = tl.trans(rounded(d_z, PREC)), tl.trans(rounded(z_hat, PREC))
            d_z, z_hat = operand(d_z, PREC), operand(z_hat, PREC)
            at = (SDF_LAYERS - 2 - i) * H * STRIDE
            linear_bwd_weight(d_w_ptr, at + H * H, d_zt, feature, z_hat_t, along, PREC)
            d_feature = linear_bwd_input(d_z, sdf_w_ptr, SECOND + at + H * H, d_feature, C, PREC)
            feature_hat = linear_bwd_input(z_hat, sdf_w_ptr, SECOND + at + H * H, feature_hat, C, PREC)
            if i < SDF_LAYERS - 2:
                linear_bwd_weight(d_w_ptr, at + H * E, d_zt, p, None, None, PREC)
                x_ptr = scratch_ptr + (2 * (SDF_LAYERS - 3 - i) * BLOCK_S * H + flat)
                x, x_dot = unflatten(tl.load(x_ptr), BLOCK_S, H), unflatten(tl.load(x_ptr + BLOCK_S * H), BLOCK_S, H)
                linear_bwd_weight(d_w_ptr, at, d_zt, rounded(x, PREC), z_hat_t, rounded(x_dot, PREC), PREC)
                d_x = linear_bwd_input(d_z, sdf_w_ptr, SECOND + at, tl.zeros((1, H), tl.float32), H, PREC)
                x_hat = linear_bwd_input(z_hat, sdf_w_ptr, SECOND + at, tl.zeros((1, H), tl.float32), H, PREC)
            else:  # only layer 0 reads the point
                linear_bwd_weight(d_w_ptr, at + H * E, d_zt, p, z_hat_t, p_dot, PREC)
        tl.debug_barrier()  # with several warps: next, other threads write to the same gradients and scratch

        # loaded and computed anew: otherwise these values would occupy registers throughout the layers
        ray = load_ray(origins_ptr, directions_ptr, volume_idx_ptr, r)
        start = tl.load(edges_ptr + n + r, mask=ok, other=0.0)
        _, coords, volume_idx = sample_at(ray, start, cells_per_unit_ptr, cell_offset_ptr)
        if SCATTER:
            cell, v = cell_around(coords, volume_idx, Z, Y, X), load3_masked(d_gradient_ptr, n, ok)
            scatter(
                d_volume_ptr, cell, to_grid(v, cells_per_unit_ptr), d_feature, feature_hat, ok,
                Z, Y, X, CHANNELS, C, PREC,
            )  # fmt: skip
        else:
            tl.store(d_feature_ptr + n[:, None] * C + c, d_feature, mask=ok[:, None])
            tl.store(feature_hat_ptr + n[:, None] * C + c, feature_hat, mask=ok[:, None])
            tl.store(cell_idx_ptr + n, cell_of(coords, volume_idx, Z, Y, X), mask=ok)


@triton.jit
def to_grid(v, cells_per_unit_ptr):
    """v in grid coordinates."""
    scale = load3(cells_per_unit_ptr, 0)
    return v[0] * scale[0], v[1] * scale[1], v[2] * scale[2]


@triton.jit
def add_row(ptr, AT: tl.constexpr, value):
    """Add value [K] to a row of this program's own packed gradient."""
    out_ptr = ptr + (AT + tl.arange(0, value.shape[0]))
    tl.store(out_ptr, tl.load(out_ptr) + value)


@triton.jit
def scatter(
    d_volume_ptr, cell, v, d_feature, feature_hat, ok,
    Z: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, CHANNELS: tl.constexpr, C: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Add the tile's part of the volume's gradient, of the samples `ok`; v in grid coordinates.

    Samples in one cell, often several in succession on a ray, are summed first: an element is added once per cell.
    """
    M: tl.constexpr = d_feature.shape[0]
    row = cell[0]
    m = tl.arange(0, M)
    same = row[:, None] == row[None, :]  # [M, M]
    is_first = tl.sum(tl.where(same & (m[None, :] < m[:, None]), 1, 0), axis=1) == 0  # sums its cell's samples
    adds = (is_first & ok)[:, None]
    d_feature, feature_hat = rounded(d_feature, PREC), rounded(feature_hat, PREC)
    if CHANNELS < C:
        adds = adds & (tl.arange(0, C)[None, :] < CHANNELS)
    for z in range(2):
        for k in tl.static_range(4):
            a, b = rounded(weight(cell, z, k), PREC), rounded(weight_along(cell, v, z, k), PREC)
            a, b = tl.where(same, a[None, :], 0.0), tl.where(same, b[None, :], 0.0)
            d_row = tl.dot(b, feature_hat, tl.dot(a, d_feature, input_precision=PREC), input_precision=PREC)
            tl.atomic_add(corner_ptr(d_volume_ptr, cell, z, k, Z, Y, X, CHANNELS, C), d_row, mask=adds, sem="relaxed")

"""The backward of `sdf_render`, in two kernels: compositing and the color MLP along rays; then the distance MLP.

Compositing, with the transmittance T_s of the ray up to sample s and the weight w_s = T_s alpha_s:

    dL/dalpha_s = T_s dL/dw_s - (sum over t > s of w_t dL/dw_t) / (1 - alpha_s + 1e-7)

(the recursion of `composite` written as a sum, since the samples of a tile are computed in parallel).

Colors and opacities depend on the gradient g of the distance, so training needs second derivatives. With v = dL/dg,

    dL/dtheta through g = v^T dg/dtheta = d(g . v)/dtheta at fixed v :

the gradient of *one* number, the derivative g . v of the distance along v. The backward of the distance is therefore
reverse mode over the MLP and its tangent along v. z. (in the code z_dot; f. is called along) is the derivative of z
along v, z- (d_z) that of L w.r.t. z, z^ (z_hat) that of the distance w.r.t. z:

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

from unipad.kernels.backend import jit, on_triton, tl, triton
from unipad.kernels.cell_sum import cell_of, cell_sum
from unipad.kernels.sdf_field import (
    COLORS,
    INPUTS,
    activation_ptr,
    add_row,
    columns,
    corner,
    geometry,
    interpolate,
    interpolate_along,
    linear,
    linear_bwd_input,
    linear_bwd_weight,
    load3,
    load_row,
    new_scratch,
    opacity,
    product,
    ray_launch,
    ray_tile,
    rgb_hidden,
    rgb_inputs,
    sample_launch,
    sample_on_ray,
    sdf_hidden,
    sdf_inputs,
    softplus,
    softplus_grads,
    store3,
)


def render_bwd(saved, upstream, options):
    """Gradients w.r.t. the volume, both packed MLPs and `density_param`.

    saved:    inputs of the forward kernel and its outputs except `rgb`, by name of the kernel argument.
    upstream: gradients w.r.t. the outputs of `sdf_render`, also by name of the kernel argument.
    options:  constexpr arguments of the kernels, without the block sizes.
    """
    volume, sdf_mlp, rgb_mlp, edges = (saved[f"{name}_ptr"] for name in ("volume", "sdf_mlp", "rgb_mlp", "edges"))
    R, S, C, H = len(edges), edges.shape[1] - 1, options["C"], options["H"]
    if not R:
        return [torch.zeros_like(t) for t in (volume, sdf_mlp, rgb_mlp, saved["density_param_ptr"])]
    _, Z, Y, X, CHANNELS = volume.shape
    sizes = dict(S=S, Z=Z, Y=Y, X=X, CHANNELS=CHANNELS)
    # scatter: add to the volume's gradient atomically, which strict determinism forbids
    scatter, has_rgb = on_triton(volume, deterministic=False), options["RGB_LAYERS"] > 0
    # written by the first kernel, read by the second, which overwrites d_feature unless it scatters
    d_sdf, d_gradient = volume.new_empty(R, S), volume.new_empty(R, S, 3)
    d_feature = volume.new_empty(R * S if has_rgb or not scatter else 0, C)
    d_geometry = volume.new_empty(R * S if has_rgb else 0, H)

    programs, launch = ray_launch(R, options)
    scratch = new_scratch(volume, programs, max(options["RGB_LAYERS"] - 1, 0), H)
    d_rgb_mlp, d_density_param = volume.new_zeros(programs, *rgb_mlp.shape), volume.new_empty(programs)
    _sdf_render_bwd_rgb_kernel[(programs,)](
        **saved, **{name: t.contiguous() for name, t in upstream.items()},
        d_sdf_ptr=d_sdf, d_gradient_ptr=d_gradient, d_feature_ptr=d_feature, d_geometry_ptr=d_geometry,
        d_rgb_mlp_ptr=d_rgb_mlp, d_density_param_ptr=d_density_param, scratch_ptr=scratch,
        R=R, **sizes, **options, **launch,
    )  # fmt: skip
    d_rgb_mlp = d_rgb_mlp.sum(0)  # summed now, to free the programs' sums before the next are allocated

    programs, launch = sample_launch(R * S, options)
    scratch = new_scratch(volume, programs, 2 * (options["SDF_LAYERS"] - 1), H)  # x_l and its derivative along v
    d_volume, d_sdf_mlp = torch.zeros_like(volume), volume.new_zeros(programs, *sdf_mlp.shape)
    feature_hat = volume.new_empty(0 if scatter else R * S, C)
    cell = torch.empty(len(feature_hat), dtype=torch.int32, device=volume.device)
    _sdf_render_bwd_sdf_kernel[(programs,)](
        volume_ptr=volume, origins_ptr=saved["origins_ptr"], directions_ptr=saved["directions_ptr"],
        volume_idx_ptr=saved["volume_idx_ptr"], edges_ptr=edges,
        cells_per_unit_ptr=saved["cells_per_unit_ptr"], cell_offset_ptr=saved["cell_offset_ptr"], sdf_mlp_ptr=sdf_mlp,
        d_sdf_ptr=d_sdf, d_gradient_ptr=d_gradient, d_feature_ptr=d_feature, d_geometry_ptr=d_geometry,
        d_sdf_mlp_ptr=d_sdf_mlp, d_volume_ptr=d_volume, scratch_ptr=scratch,
        feature_hat_ptr=feature_hat, cell_idx_ptr=cell,
        N=R * S, **sizes, **options, SCATTER=scatter, **launch,
    )  # fmt: skip
    if not scatter:
        cell_sum(
            d_volume, cell, d_feature, feature_hat, d_gradient,
            origins=saved["origins_ptr"], directions=saved["directions_ptr"], edges=edges,
            cells_per_unit=saved["cells_per_unit_ptr"], cell_offset=saved["cell_offset_ptr"],
        )  # fmt: skip
    return d_volume, d_sdf_mlp.sum(0), d_rgb_mlp, d_density_param.sum(0, keepdim=True)


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
    sdf_mlp_ptr, rgb_mlp_ptr, density_param_ptr,  # packed, packed, [1]
    depth_ptr, total_ptr,  # [R], [R] sum of the weights
    weights_ptr, trans_ptr, sdf_ptr, gradient_ptr, colors_ptr,  # [N] x 3, [N, 3], [N, 3]
    # upstream gradients: [R, 3], [R], [N], [N], [N, 3]
    up_rgb_ptr, up_depth_ptr, up_weights_ptr, up_sdf_ptr, up_gradient_ptr,
    d_sdf_ptr, d_gradient_ptr, d_feature_ptr, d_geometry_ptr,  # [N], [N, 3], [N, C], [N, H]
    d_rgb_mlp_ptr, d_density_param_ptr,  # [programs, packed] zeros, [programs]
    scratch_ptr,  # [programs, RGB_LAYERS - 1, M, H] scratch
    R, S, Z, Y, X, CHANNELS,
    NEUS: tl.constexpr, PREC: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
    SDF_LAYERS: tl.constexpr, RGB_LAYERS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    STRIDE: tl.constexpr = C + 2 * H + INPUTS  # columns of W, A, G and E, as packed by `sdf_pack`
    ROWS: tl.constexpr = (RGB_LAYERS - 1) * H + COLORS
    last: tl.constexpr = (RGB_LAYERS - 1) * H * STRIDE
    d_mlp_ptr = d_rgb_mlp_ptr + tl.program_id(0).to(tl.int64) * ROWS * STRIDE
    scratch_ptr += tl.program_id(0).to(tl.int64) * (RGB_LAYERS - 1) * BLOCK_R * BLOCK_S * H
    density_param = tl.load(density_param_ptr)
    d_density_param = tl.zeros((BLOCK_R * BLOCK_S,), tl.float32)
    tiles = tl.cdiv(S, BLOCK_S)
    s = tl.arange(0, BLOCK_S)
    is_behind = s[None, :, None] < s[None, None, :]  # [1, sample, other sample]: the other is behind
    for group in range(tl.program_id(0), tl.cdiv(R, BLOCK_R), tl.num_programs(0)):
        behind = tl.zeros((BLOCK_R,), tl.float32)  # sum of weight * d_weight over the tiles behind
        for i in range(tiles):
            r, n, ok, start, delta = ray_tile(edges_ptr, group, tiles - 1 - i, R, S, BLOCK_R, BLOCK_S)
            point, direction, grid_coords = sample_on_ray(
                origins_ptr, directions_ptr, volume_idx_ptr, cells_per_unit_ptr, cell_offset_ptr, r, start, ok, Z
            )
            gradient = load3(gradient_ptr, n, ok)
            sdf = tl.load(sdf_ptr + n, mask=ok, other=0.0)
            weight = tl.load(weights_ptr + n, mask=ok, other=0.0)
            # depth = depth_sum / (total + 1e-10), depth_sum = sum of weight * start
            d_depth_sum = tl.load(up_depth_ptr + r, mask=ok, other=0.0) / (
                tl.load(total_ptr + r, mask=ok, other=1.0) + 1e-10
            )
            d_weight = tl.load(up_weights_ptr + n, mask=ok, other=0.0)
            d_weight += d_depth_sum * (start - tl.load(depth_ptr + r, mask=ok, other=0.0))
            if RGB_LAYERS > 0:
                channel = tl.arange(0, COLORS)[None, :]
                color_ok = ok[:, None] & (channel < 3)
                color = tl.load(colors_ptr + 3 * n[:, None] + channel, mask=color_ok, other=0.0)
                d_rgb = tl.load(up_rgb_ptr + 3 * r[:, None] + channel, mask=color_ok, other=0.0)
                d_weight += tl.sum(d_rgb * color, axis=1)

            term = tl.reshape(weight * d_weight, (BLOCK_R, BLOCK_S))
            # summed anew for each sample: a cumulative sum minus the sample's own term would round away small terms
            # behind it
            sum_behind = behind[:, None] + tl.sum(tl.where(is_behind, term[:, None, :], 0.0), axis=2)
            behind += tl.sum(term, axis=1)
            alpha, _, _, _ = opacity(sdf, gradient, direction, delta, density_param, NEUS)
            k = 1.0 - tl.minimum(tl.maximum(alpha, 0.0), 1.0) + 1e-7
            trans = tl.load(trans_ptr + n, mask=ok, other=0.0)
            d_alpha = trans * d_weight - tl.reshape(sum_behind, (BLOCK_R * BLOCK_S,)) / k
            d_alpha = tl.where(ok & tl.load(hit_ptr + r, mask=ok, other=0), d_alpha, 0.0)
            d_sdf, d_slope, d_param = opacity_bwd(d_alpha, sdf, gradient, direction, delta, density_param, NEUS)
            d_density_param += d_param
            tl.store(d_sdf_ptr + n, d_sdf + tl.load(up_sdf_ptr + n, mask=ok, other=0.0), mask=ok)
            vx, vy, vz = load3(up_gradient_ptr, n, ok)
            vx += d_slope * direction[0]
            vy += d_slope * direction[1]
            vz += d_slope * direction[2]

            if RGB_LAYERS > 0:
                feature = interpolate(volume_ptr, grid_coords, ok, Z, Y, X, CHANNELS, C)
                # False: activations are not stored, only the geometry is needed here
                x = sdf_hidden(sdf_inputs(point, 1.0), feature, sdf_mlp_ptr, scratch_ptr, False, C, H, SDF_LAYERS, PREC)
                geo = geometry(x, feature, sdf_mlp_ptr, C, H, SDF_LAYERS, PREC)
                e = rgb_inputs(point, direction, gradient)
                x = rgb_hidden(e, feature, geo, rgb_mlp_ptr, scratch_ptr, True, C, H, RGB_LAYERS, PREC)
                tl.debug_barrier()  # CUDA's __syncthreads: other threads read the scratch
                d_out = d_rgb * weight[:, None] * color * (1.0 - color)  # w.r.t. the input of the color's sigmoid
                zeros_c, zeros_h = tl.zeros((1, C), tl.float32), tl.zeros((1, H), tl.float32)
                zeros_e = tl.zeros((1, INPUTS), tl.float32)
                d_x, d_feature, d_geo, d_e = _rgb_layer_bwd(
                    d_out, x, feature, geo, e, rgb_mlp_ptr + last, d_mlp_ptr + last,
                    zeros_c, zeros_h, zeros_e, C, H, PREC,
                )  # fmt: skip
                for j in range(RGB_LAYERS - 1):
                    l = RGB_LAYERS - 2 - j
                    d_z = tl.where(x > 0, d_x, 0.0)
                    x = tl.load(activation_ptr(scratch_ptr, l, BLOCK_R * BLOCK_S, H))
                    d_x, d_feature, d_geo, d_e = _rgb_layer_bwd(
                        d_z, x, feature, geo, e, rgb_mlp_ptr + l * H * STRIDE, d_mlp_ptr + l * H * STRIDE,
                        d_feature, d_geo, d_e, C, H, PREC,
                    )  # fmt: skip
                d_gx, d_gy, d_gz = columns(d_e, 7)  # e has the SDF's gradient in columns 7 to 9
                vx += d_gx
                vy += d_gy
                vz += d_gz
                rows = n[:, None]
                tl.store(d_feature_ptr + rows * C + tl.arange(0, C)[None, :], d_feature, mask=ok[:, None])
                tl.store(d_geometry_ptr + rows * H + tl.arange(0, H)[None, :], d_geo, mask=ok[:, None])
                tl.debug_barrier()  # next, other threads add to the same MLP gradients and overwrite the scratch
            store3(d_gradient_ptr, n, (vx, vy, vz), ok)
    tl.store(d_density_param_ptr + tl.program_id(0), tl.sum(d_density_param, axis=0))


@triton.jit
def _rgb_layer_bwd(
    d_z, x, feature, geo, e, mlp_ptr, d_mlp_ptr, d_feature, d_geo, d_e,
    C: tl.constexpr, H: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One layer of the color MLP: adds to its gradients and to d_feature, d_geo, d_e; returns d_x and these."""
    STRIDE: tl.constexpr = C + 2 * H + INPUTS
    linear_bwd_weight(d_mlp_ptr, STRIDE, d_z, x, None, PREC)
    linear_bwd_weight(d_mlp_ptr + H, STRIDE, d_z, feature, None, PREC)
    linear_bwd_weight(d_mlp_ptr + H + C, STRIDE, d_z, geo, None, PREC)
    linear_bwd_weight(d_mlp_ptr + 2 * H + C, STRIDE, d_z, e, None, PREC)
    d_feature = linear_bwd_input(d_z, mlp_ptr + H, STRIDE, d_feature, C, PREC)
    d_geo = linear_bwd_input(d_z, mlp_ptr + H + C, STRIDE, d_geo, H, PREC)
    d_e = linear_bwd_input(d_z, mlp_ptr + 2 * H + C, STRIDE, d_e, INPUTS, PREC)
    return linear_bwd_input(d_z, mlp_ptr, STRIDE, tl.zeros((1, H), tl.float32), H, PREC), d_feature, d_geo, d_e


@jit(varying=("N",))
def _sdf_render_bwd_sdf_kernel(
    volume_ptr,  # [B, Z, Y, X, CHANNELS]
    origins_ptr, directions_ptr, volume_idx_ptr, edges_ptr,  # [R, 3] x 2, [R], [R, S + 1]
    cells_per_unit_ptr, cell_offset_ptr,  # [3], [3]
    sdf_mlp_ptr,  # packed
    d_sdf_ptr, d_gradient_ptr, d_feature_ptr, d_geometry_ptr,  # [N], [N, 3], [N, C], [N, H]
    d_sdf_mlp_ptr, d_volume_ptr,  # [programs, packed] zeros, [B, Z, Y, X, CHANNELS] zeros
    scratch_ptr,  # [programs, 2, SDF_LAYERS - 1, M, H] scratch
    feature_hat_ptr, cell_idx_ptr,  # [N, C], [N]: without SCATTER these and d_feature are written instead of d_volume
    N, S, Z, Y, X, CHANNELS,
    NEUS: tl.constexpr, PREC: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
    SDF_LAYERS: tl.constexpr, RGB_LAYERS: tl.constexpr, SCATTER: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    STRIDE: tl.constexpr = C + H + INPUTS  # columns of W, A and E, as packed by `sdf_pack`
    ROWS: tl.constexpr = SDF_LAYERS * H + 1  # the last layer has 1 + H: distance and geometry
    d_mlp_ptr = d_sdf_mlp_ptr + tl.program_id(0).to(tl.int64) * ROWS * STRIDE
    scratch_ptr += tl.program_id(0).to(tl.int64) * 2 * (SDF_LAYERS - 1) * BLOCK_M * H
    tangents_ptr = scratch_ptr + (SDF_LAYERS - 1) * BLOCK_M * H
    c = tl.arange(0, C)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.num_programs(0)):
        n = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        ok = n < N
        r = n // S
        start = tl.load(edges_ptr + n + r, mask=ok, other=0.0)
        point, _, grid_coords = sample_on_ray(
            origins_ptr, directions_ptr, volume_idx_ptr, cells_per_unit_ptr, cell_offset_ptr, r, start, ok, Z
        )
        v = load3(d_gradient_ptr, n, ok)
        vx = v[0] * tl.load(cells_per_unit_ptr)  # v in grid coordinates
        vy = v[1] * tl.load(cells_per_unit_ptr + 1)
        vz = v[2] * tl.load(cells_per_unit_ptr + 2)
        feature = interpolate(volume_ptr, grid_coords, ok, Z, Y, X, CHANNELS, C)
        along = interpolate_along(volume_ptr, grid_coords, ok, vx, vy, vz, Z, Y, X, CHANNELS, C)  # f.
        e, e_dot = sdf_inputs(point, 1.0), sdf_inputs(v, 0.0)
        zero = tl.zeros((1, H), tl.float32)
        x = tl.zeros((BLOCK_M, H), tl.float32)
        x_dot = x
        for l in range(SDF_LAYERS - 1):
            tl.store(activation_ptr(scratch_ptr, l, BLOCK_M, H), x)
            tl.store(activation_ptr(tangents_ptr, l, BLOCK_M, H), x_dot)
            layer_ptr = sdf_mlp_ptr + l * H * STRIDE
            z_dot = linear(e_dot, layer_ptr + H + C, STRIDE, zero, H, PREC)
            z_dot = linear(x_dot, layer_ptr, STRIDE, linear(along, layer_ptr + H, STRIDE, z_dot, H, PREC), H, PREC)
            z = linear(feature, layer_ptr + H, STRIDE, linear(e, layer_ptr + H + C, STRIDE, zero, H, PREC), H, PREC)
            x = softplus(linear(x, layer_ptr, STRIDE, z, H, PREC))
            x_dot = softplus_grads(x)[0] * z_dot
        tl.debug_barrier()  # other threads read the scratch

        # the last layer: row 0 is of the distance, the others are of the geometry
        last: tl.constexpr = (SDF_LAYERS - 1) * H * STRIDE
        d_sdf = tl.load(d_sdf_ptr + n, mask=ok, other=0.0)[:, None]
        d_x = d_sdf * load_row(sdf_mlp_ptr + last, H)  # x-
        d_feature = d_sdf * load_row(sdf_mlp_ptr + last + H, C)  # f-
        x_hat = tl.broadcast_to(load_row(sdf_mlp_ptr + last, H), (BLOCK_M, H))  # x^
        feature_hat = tl.broadcast_to(load_row(sdf_mlp_ptr + last + H, C), (BLOCK_M, C))  # f^
        add_row(d_mlp_ptr + last, tl.sum(d_sdf * x + x_dot, axis=0))
        add_row(d_mlp_ptr + last + H, tl.sum(d_sdf * feature + along, axis=0))
        add_row(d_mlp_ptr + last + H + C, tl.sum(d_sdf * e, axis=0))  # without e_dot: only layer 0 reads the point
        if RGB_LAYERS > 0:
            h = tl.arange(0, H)[None, :]
            d_feature += tl.load(d_feature_ptr + n[:, None] * C + c, mask=ok[:, None], other=0.0)
            d_geo = tl.load(d_geometry_ptr + n[:, None] * H + h, mask=ok[:, None], other=0.0)
            d_x = linear_bwd_input(d_geo, sdf_mlp_ptr + last + STRIDE, STRIDE, d_x, H, PREC)
            d_feature = linear_bwd_input(d_geo, sdf_mlp_ptr + last + STRIDE + H, STRIDE, d_feature, C, PREC)
            linear_bwd_weight(d_mlp_ptr + last + STRIDE, STRIDE, d_geo, x, None, PREC)
            linear_bwd_weight(d_mlp_ptr + last + STRIDE + H, STRIDE, d_geo, feature, None, PREC)
            linear_bwd_weight(d_mlp_ptr + last + STRIDE + H + C, STRIDE, d_geo, e, None, PREC)
        for i in range(SDF_LAYERS - 1):
            l = SDF_LAYERS - 2 - i
            act_grad, ratio = softplus_grads(x)  # act', act'' / act'
            d_z = d_x * act_grad + x_hat * x_dot * ratio  # x_dot * ratio = act'' z_dot
            z_hat = x_hat * act_grad
            x = tl.load(activation_ptr(scratch_ptr, l, BLOCK_M, H))
            x_dot = tl.load(activation_ptr(tangents_ptr, l, BLOCK_M, H))
            layer_ptr, d_layer_ptr = sdf_mlp_ptr + l * H * STRIDE, d_mlp_ptr + l * H * STRIDE
            linear_bwd_weight(d_layer_ptr, STRIDE, d_z, x, product(tl.trans(z_hat), x_dot, None, PREC), PREC)
            linear_bwd_weight(d_layer_ptr + H, STRIDE, d_z, feature, product(tl.trans(z_hat), along, None, PREC), PREC)
            linear_bwd_weight(d_layer_ptr + H + C, STRIDE, d_z, e, product(tl.trans(z_hat), e_dot, None, PREC), PREC)
            d_feature = linear_bwd_input(d_z, layer_ptr + H, STRIDE, d_feature, C, PREC)
            feature_hat = linear_bwd_input(z_hat, layer_ptr + H, STRIDE, feature_hat, C, PREC)
            d_x = linear_bwd_input(d_z, layer_ptr, STRIDE, zero, H, PREC)
            x_hat = linear_bwd_input(z_hat, layer_ptr, STRIDE, zero, H, PREC)
        tl.debug_barrier()  # next, other threads add to the same MLP gradients and overwrite the scratch

        # recomputed: otherwise `grid_coords` and v would occupy registers throughout the layers
        start = tl.load(edges_ptr + n + r, mask=ok, other=0.0)
        _, _, grid_coords = sample_on_ray(
            origins_ptr, directions_ptr, volume_idx_ptr, cells_per_unit_ptr, cell_offset_ptr, r, start, ok, Z
        )
        if SCATTER:
            v = load3(d_gradient_ptr, n, ok)
            vx = v[0] * tl.load(cells_per_unit_ptr)
            vy = v[1] * tl.load(cells_per_unit_ptr + 1)
            vz = v[2] * tl.load(cells_per_unit_ptr + 2)
            for k in range(8):
                row, row_ok, weight, bx, by, bz = corner(grid_coords, ok, Z, Y, X, k)
                d_row = weight[:, None] * d_feature + (bx * vx + by * vy + bz * vz)[:, None] * feature_hat
                c_ok = row_ok[:, None] & (c < CHANNELS)
                tl.atomic_add(d_volume_ptr + row[:, None] * CHANNELS + c, d_row, mask=c_ok, sem="relaxed")
        else:
            tl.store(d_feature_ptr + n[:, None] * C + c, d_feature, mask=ok[:, None])
            tl.store(feature_hat_ptr + n[:, None] * C + c, feature_hat, mask=ok[:, None])
            tl.store(cell_idx_ptr + n, cell_of(grid_coords, Z, Y, X), mask=ok)

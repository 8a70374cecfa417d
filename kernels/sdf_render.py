"""Rays through a feature volume to depth and colour, with one hand-written backward.

    f = volume at p,  (sdf, geometry) = MLP(p, f),  g = d sdf / d p,  rgb = MLP(p, direction, f, g, geometry)
    alpha from (sdf, g) as in `sdf_alpha`,  compositing as in `composite`

Colours and opacities read g, so training needs second derivatives of the distance. With v = dL/dg,

    dL/dtheta through g = v^T d g / d theta = d (d sdf / dv) / d theta :

the gradient of *one* directional derivative. The backward of the distance is therefore reverse mode over the MLP and a
single tangent of it (dots: derivatives along v; bars: derivatives of L; z^ : of the distance itself):

    z._l = W_l x._l + A_l f. (+ E_0 v),   x._{l+1} = act'(z_l) z._l,   f. = (df / dp) v
    x^_l = W_l^T z^_l,   z^_{l-1} = act'(z_{l-1}) x^_l,   z^_last = e_0   (the reverse pass that gave g)
    x-_l = W_l^T z-_l,   z-_{l-1} = act'(z_{l-1}) x-_l + act''(z_{l-1}) z._{l-1} x^_l
    W-_l = z-_l x_l^T + z^_l x._l^T,   A-_l = z-_l f^T + z^_l f.^T,   f- = sum_l A_l^T z-_l,   f^ = sum_l A_l^T z^_l

with the matrices of `sdf_field`; a corner of the cell with share w and slope b gets w f- + (b . v) f^.

Sizes: R rays, S samples on each, N = R * S, C channels, H hidden units, M samples a tile.
"""

import torch

from kernels.backend import on_triton, tl, triton
from kernels.cell_sum import cell_of, cell_sum
from kernels.composite import composite_ref
from kernels.sdf_alpha import _sigmoid, neus_alpha_ref, volsdf_alpha_ref
from kernels.sdf_field import (
    COLOURS,
    SEEN,
    add_outer,
    add_row,
    bent,
    colour_of,
    columns,
    corner,
    distance,
    distance_back,
    geometry,
    interpolate,
    interpolate_along,
    kept,
    packed,
    padded,
    rgb_hidden,
    sample_on_ray,
    sdf_hidden,
    seen_by_rgb,
    seen_by_sdf,
    slope_against,
    softplus,
    times,
    times_back,
    vector,
)
from kernels.sdf_reference import field_ref, values_ref

METHODS = ("neus", "volsdf")
WIDTHS, LAYERS = (16, 64), (2, 8)  # smallest and largest


def in_family(method, dtype, channels, hidden, sdf_layers, rgb_layers):
    """Whether the kernels below were made for such a field. `rgb_layers`: 0 where colour is not rendered."""
    wide = all(WIDTHS[0] <= n <= WIDTHS[1] for n in (channels, hidden))
    deep = all(LAYERS[0] <= n <= LAYERS[1] for n in (sdf_layers, rgb_layers or sdf_layers))
    return method in METHODS and dtype == torch.float32 and wide and deep


def sdf_render(volume, rays, edges, mlps, density, cells, method, exact=False, stop=0.0):
    """Render rays.

    Args:
        volume:  [B, Z, Y, X, C] features, at least one voxel.
        rays:    origins [R, 3], unit directions [R, 3], volume_idx [R] int32 and hit [R] bool (False: all is
                 transparent), the first two and `edges` in the renderer's unit of length, LiDAR frame.
        edges:   [R, S + 1] ascending distances: S samples, each at the start of its interval.
        mlps:    of the distance and of the colour, the latter None where colour is not rendered. Each is a list of
                 tensors: P, q, then C_l, d_l, W_l, b_l of every layer (see `sdf_field`).
        density: [1] NeuS's inv_s or VolSDF's beta.
        cells:   cells_per_unit [3] and first_cell [3]: cell = point * cells_per_unit + first_cell, (x, y, z).
        method:  "neus" or "volsdf".
        exact:   products of MLPs as if in fp32 (tf32x3) instead of tf32, at three times the products.
        stop:    above 0 and under `no_grad` only: kernels leave a ray where less than this share of its light is left,
                 and rays that miss at once. What lies behind has weight, distance and gradient 0; `rgb` is off by less
                 than `stop`, `depth` by less than that share of the ray.

    Returns:
        rgb:      [R, 3], black background; 0 without the colour MLP.
        depth:    [R] sum of weight * start over the sum of weights + 1e-10.
        weights:  [R, S] share of each sample.
        sdf:      [R, S] signed distance at the samples.
        gradient: [R, S, 3] d sdf / d point.

    Differentiable once, through every output, in `volume`, the MLPs and `density`. fp32. Kernels never wait for the
    host. They add atomically into the gradient of `volume`, so that its last bits vary from run to run; under strict
    determinism a sum over samples sorted by cell takes their place. Raises AssertionError if shapes do not fit or the
    field is not `in_family`.
    """
    _check(volume, rays, edges, mlps, method)
    assert not (stop and torch.is_grad_enabled()), "a ray that stops early has no gradients: render under no_grad"
    if not on_triton(volume):
        return sdf_render_ref(volume, rays, edges, mlps, density, cells, method)
    packs, sizes = _packed(volume, mlps)
    geometry = [t.contiguous() for t in (*rays, edges, *cells)]
    options = dict(NEUS=method == "neus", PREC=_precision(exact), **sizes)
    return SdfRender.apply(volume.contiguous(), *packs, density, geometry, options, float(stop))


def sdf_render_ref(volume, rays, edges, mlps, density, cells, method, exact=False, stop=0.0):
    """`sdf_render` in plain PyTorch, on any field and in fp64 too; `exact` and `stop` change nothing."""
    origins, directions, volume_idx, hit = rays
    starts, deltas = edges[:, :-1], edges.diff(dim=1)
    points = origins[:, None] + directions[:, None] * starts[..., None]  # [R, S, 3]
    sdf, gradient, rgb = field_ref(volume, points, directions, volume_idx, mlps, cells)
    if method == "neus":
        alpha = neus_alpha_ref(sdf, gradient, directions, deltas, density)
    else:
        alpha = volsdf_alpha_ref(sdf, deltas, density)
    out, weights = composite_ref(alpha * hit[:, None], torch.cat([rgb, starts[..., None]], dim=-1))
    return out[:, :3], out[:, 3] / (weights.sum(dim=1) + 1e-10), weights, sdf, gradient


@torch.no_grad()
def sdf_values(volume, rays, starts, sdf_mlp, cells, exact=False):
    """The signed distance alone, [R, S] at starts [R, S]; arguments as of `sdf_render`, `rays` without `hit`.

    Not differentiable: for searches along rays.
    """
    if not on_triton(volume):
        return sdf_values_ref(volume, rays, starts, sdf_mlp, cells)
    origins, directions, volume_idx = rays
    (packs, sizes), (R, S) = _packed(volume, (sdf_mlp, None)), starts.shape
    sdf = starts.new_empty(R, S)
    if sdf.numel():
        rays = [t.contiguous() for t in (origins, directions, volume_idx, starts, *cells)]
        _, launch = _over_samples(R * S, sizes)
        _sdf_values_kernel[(triton.cdiv(R * S, launch["BLOCK_M"]),)](
            volume.contiguous(), *rays, packs[0], sdf, R, S, *volume.shape[1:],
            C=sizes["C"], H=sizes["H"], LAYERS=sizes["SDF_LAYERS"], PREC=_precision(exact), **launch,
        )  # fmt: skip
    return sdf


@torch.no_grad()
def sdf_values_ref(volume, rays, starts, sdf_mlp, cells, exact=False):
    """`sdf_values` in plain PyTorch."""
    origins, directions, volume_idx = rays
    points = origins[:, None] + directions[:, None] * starts[..., None]  # [R, S, 3]
    return values_ref(volume, points, volume_idx, sdf_mlp, cells)


def _check(volume, rays, edges, mlps, method):
    origins, directions, volume_idx, hit = rays
    R = len(edges)
    fits = volume.dim() == 5 and origins.shape == directions.shape == (R, 3) and volume_idx.shape == hit.shape == (R,)
    shapes = [tuple(t.shape) for t in (volume, *rays, edges)]
    assert fits and edges.dim() == 2 and edges.shape[1] > 1, f"volume, rays and edges of {shapes} do not fit"
    assert min(volume.shape[1:4]) > 0, f"no voxel in volume {tuple(volume.shape)}"
    (H, C), layers = mlps[0][2].shape, [0 if m is None else len(m[2::4]) for m in mlps]
    assert C == volume.shape[4], f"an MLP for {C} channels does not fit volume {tuple(volume.shape)}"
    assert in_family(method, volume.dtype, C, H, *layers), (
        f"no kernel for {method}, {volume.dtype}, {C=}, {H=}, {layers=}"
    )


def _packed(volume, mlps):
    """Both MLPs as matrices (of the colour an empty one if there is none) and the kernels' sizes."""
    (sdf, rgb), channels = mlps, volume.shape[4]
    packs = [packed(sdf, channels, False), volume.new_empty(0) if rgb is None else packed(rgb, channels, True)]
    sizes = dict(C=padded(channels), H=padded(len(sdf[0])))
    return packs, sizes | dict(SDF_LAYERS=len(sdf[2::4]), RGB_LAYERS=0 if rgb is None else len(rgb[2::4]))


def _precision(exact):
    """`tl.dot`'s input precision. AMD's matrix units take fp32 as it is."""
    return "ieee" if torch.version.hip else "tf32x3" if exact else "tf32"


class SdfRender(torch.autograd.Function):
    @staticmethod
    def forward(ctx, volume, sdf_mlp, rgb_mlp, density, rays, options, stop):
        edges = rays[4]
        R, S = len(edges), edges.shape[1] - 1
        rgb, depth, total = edges.new_zeros(R, 3), edges.new_empty(R), edges.new_empty(R)  # total: of the weights
        new = edges.new_zeros if stop else edges.new_empty  # the kernel fills all that it does not stop before
        weights, trans, sdf = (new(R, S) for _ in range(3))
        gradient, colours = new(R, S, 3), edges.new_empty(R, S, 3 if options["RGB_LAYERS"] else 0)
        if R:
            programs, launch = _along_rays(R, options)
            keep = volume.new_empty(programs, options["SDF_LAYERS"] - 1, BLOCK_M, options["H"])
            _sdf_render_fwd_kernel[(programs,)](
                volume, *rays, sdf_mlp, rgb_mlp, density,
                rgb, depth, total, weights, trans, sdf, gradient, colours, keep,
                R, S, *volume.shape[1:], **options, STOP=stop, **launch,
            )  # fmt: skip
        ctx.options = options
        ctx.save_for_backward(
            volume, sdf_mlp, rgb_mlp, density, *rays, depth, total, weights, trans, sdf, gradient, colours
        )
        return rgb, depth, weights, sdf, gradient

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        volume, sdf_mlp, rgb_mlp, density, *rest = ctx.saved_tensors
        rays, rendered, options = rest[:7], rest[7:], ctx.options
        R, S, C, H = len(rays[0]), rays[4].shape[1] - 1, options["C"], options["H"]
        if not R:
            return *(torch.zeros_like(t) for t in (volume, sdf_mlp, rgb_mlp, density)), None, None, None
        scatter, has_rgb = on_triton(volume, deterministic=False), options["RGB_LAYERS"] > 0
        # what the first kernel hands on to the second
        d_sdf, d_gradient = volume.new_empty(R, S), volume.new_empty(R, S, 3)
        d_feature = volume.new_empty(R * S if has_rgb or not scatter else 0, C)
        d_geometry = volume.new_empty(R * S if has_rgb else 0, H)

        programs, launch = _along_rays(R, options)
        keep = volume.new_empty(programs, max(options["RGB_LAYERS"] - 1, 0), BLOCK_M, H)
        d_rgb_mlp, d_density = volume.new_zeros(programs, *rgb_mlp.shape), volume.new_empty(programs)
        _sdf_render_bwd_rgb_kernel[(programs,)](
            volume, *rays, sdf_mlp, rgb_mlp, density, *rendered, *(t.contiguous() for t in upstream),
            d_sdf, d_gradient, d_feature, d_geometry, d_rgb_mlp, d_density, keep,
            R, S, *volume.shape[1:], **options, **launch,
        )  # fmt: skip
        d_rgb_mlp = d_rgb_mlp.sum(0)  # here already, so that its parts need not outlive the next ones

        programs, launch = _over_samples(R * S, options)
        keep = volume.new_empty(programs, 2, options["SDF_LAYERS"] - 1, BLOCK_M, H)
        d_volume, d_sdf_mlp = torch.zeros_like(volume), volume.new_zeros(programs, *sdf_mlp.shape)
        d_slope = volume.new_empty(0 if scatter else R * S, C)
        cell = torch.empty(len(d_slope), dtype=torch.int32, device=volume.device)
        _sdf_render_bwd_sdf_kernel[(programs,)](
            volume, *rays, sdf_mlp, d_sdf, d_gradient, d_feature, d_geometry, d_sdf_mlp, d_volume, keep, d_slope, cell,
            R * S, S, *volume.shape[1:], **options, SCATTER=scatter, **launch,
        )  # fmt: skip
        if not scatter:
            cell_sum(d_volume, rays[:2], rays[4], rays[5:], cell, d_feature, d_slope, d_gradient)
        return d_volume, d_sdf_mlp.sum(0), d_rgb_mlp, d_density.sum(0, keepdim=True), None, None, None


BLOCK_S = 32  # samples on a ray per tile of the kernels that walk along rays
BLOCK_M = 64  # samples per tile, of two rays then; 64 rows is what a Hopper matrix instruction takes
WARPS = 4
NARROW = 32  # a field with more channels or units than that takes half of the samples
PROGRAMS = 528  # at most, of the backward: 4 per multiprocessor of an H100; each sums its own gradient of the MLPs


def _over_samples(N, options):
    """Number of programs over N samples, and how to launch them. A program takes several tiles in turn."""
    block = BLOCK_M if max(options["C"], options["H"]) <= NARROW else BLOCK_M // 2
    return min(PROGRAMS, triton.cdiv(N, block)), dict(BLOCK_M=block, num_warps=WARPS, num_stages=1)


def _along_rays(R, options):
    """As `_over_samples`, over R rays."""
    _, launch = _over_samples(0, options)
    block_r = launch.pop("BLOCK_M") // BLOCK_S
    return min(PROGRAMS, triton.cdiv(R, block_r)), dict(BLOCK_R=block_r, BLOCK_S=BLOCK_S, **launch)


@triton.jit
def _opacity(sdf, gradient, direction, delta, density, NEUS: tl.constexpr):
    """alpha before clipping, the slope along the ray and two more values that its gradient needs, each [M]."""
    if NEUS:
        slope = gradient[0] * direction[0] + gradient[1] * direction[1] + gradient[2] * direction[2]
        half = tl.minimum(slope, 0.0) * delta / 2
        prev_cdf, next_cdf = _sigmoid((sdf - half) * density), _sigmoid((sdf + half) * density)
        return (prev_cdf - next_cdf + 1e-5) / (prev_cdf + 1e-5), slope, prev_cdf, next_cdf
    else:
        tail = tl.exp(-tl.abs(sdf) / density) / 2
        laplace = tl.where(sdf < 0, 1.0 - tail, tail) / density
        return 1.0 - tl.exp(-laplace * delta), sdf, tail, laplace


@triton.jit
def _opacity_back(d_alpha, sdf, gradient, direction, delta, density, NEUS: tl.constexpr):
    """Gradients by the distance, the slope of the distance along the ray, and the density's parameter; [M] each."""
    alpha, slope, a, b = _opacity(sdf, gradient, direction, delta, density, NEUS)
    if NEUS:
        half = tl.minimum(slope, 0.0) * delta / 2
        d_alpha = tl.where((alpha >= 0) & (alpha <= 1), d_alpha, 0.0) / (a + 1e-5)
        d_prev = d_alpha * b / (a + 1e-5) * a * (1.0 - a)
        d_next = -d_alpha * b * (1.0 - b)
        d_slope = tl.where(slope < 0, density * (d_next - d_prev) * delta / 2, 0.0)
        return density * (d_prev + d_next), d_slope, d_prev * (sdf - half) + d_next * (sdf + half)
    else:
        d_laplace = d_alpha * delta * tl.exp(-b * delta)
        d_sdf = -d_laplace * a / (density * density)
        return d_sdf, tl.zeros_like(d_sdf), -(d_laplace * b + d_sdf * sdf) / density


@triton.jit
def _tile(edges_ptr, group, tile, R, S, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):
    """Samples [BLOCK_R * BLOCK_S] of a tile, ray by ray: their rays, places, whether they exist, starts and lengths."""
    m = tl.arange(0, BLOCK_R * BLOCK_S).to(tl.int64)
    r = group * BLOCK_R + m // BLOCK_S
    s = tile * BLOCK_S + m % BLOCK_S
    ok = (r < R) & (s < S)
    at = edges_ptr + r * (S + 1) + s
    start = tl.load(at, mask=ok, other=0.0)
    return r, r * S + s, ok, start, tl.load(at + 1, mask=ok, other=0.0) - start


@triton.jit
def _load3(ptr, n, ok):
    x = tl.load(ptr + 3 * n, mask=ok, other=0.0)
    return x, tl.load(ptr + 3 * n + 1, mask=ok, other=0.0), tl.load(ptr + 3 * n + 2, mask=ok, other=0.0)


@triton.jit
def _store3(ptr, n, v, ok):
    x, y, z = v
    tl.store(ptr + 3 * n, x, mask=ok)
    tl.store(ptr + 3 * n + 1, y, mask=ok)
    tl.store(ptr + 3 * n + 2, z, mask=ok)


@triton.jit
def _sdf_values_kernel(
    volume_ptr,  # [B, Z, Y, X, CHANNELS]
    origins_ptr, directions_ptr, volume_idx_ptr, starts_ptr,  # [R, 3] x 2, [R], [N]
    cells_per_unit_ptr, first_cell_ptr, mlp_ptr,  # [3], [3], packed
    sdf_ptr,  # [N]
    R, S, Z, Y, X, CHANNELS,
    C: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, PREC: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = n // S
    ok = r < R
    start = tl.load(starts_ptr + n, mask=ok, other=0.0)
    point, _, place = sample_on_ray(
        origins_ptr, directions_ptr, volume_idx_ptr, cells_per_unit_ptr, first_cell_ptr, r, start, ok, Z
    )
    feature = interpolate(volume_ptr, place, ok, Z, Y, X, CHANNELS, C)
    x = sdf_hidden(seen_by_sdf(point, 1.0), feature, mlp_ptr, mlp_ptr, False, C, H, LAYERS, PREC)
    tl.store(sdf_ptr + n, distance(x, feature, mlp_ptr, C, H, LAYERS), mask=ok)


@triton.jit
def _sdf_render_fwd_kernel(
    volume_ptr,  # [B, Z, Y, X, CHANNELS]
    origins_ptr, directions_ptr, volume_idx_ptr, hit_ptr, edges_ptr,  # [R, 3] x 2, [R] x 2, [R, S + 1]
    cells_per_unit_ptr, first_cell_ptr,  # [3], [3]
    sdf_mlp_ptr, rgb_mlp_ptr, density_ptr,  # packed, packed, [1]
    rgb_ptr, depth_ptr, total_ptr,  # [R, 3], [R], [R] sum of the weights
    weights_ptr, trans_ptr, sdf_ptr, gradient_ptr, colours_ptr,  # [N] x 3, [N, 3], [N, 3]
    keep_ptr,  # [programs, SDF_LAYERS - 1, M, H] scratch
    R, S, Z, Y, X, CHANNELS,
    NEUS: tl.constexpr, PREC: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
    SDF_LAYERS: tl.constexpr, RGB_LAYERS: tl.constexpr, STOP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    density = tl.load(density_ptr)
    keep_ptr += tl.program_id(0).to(tl.int64) * (SDF_LAYERS - 1) * BLOCK_R * BLOCK_S * H
    for group in range(tl.program_id(0), tl.cdiv(R, BLOCK_R), tl.num_programs(0)):
        passed = tl.full((BLOCK_R,), 1.0, tl.float32)  # light that reaches the tile
        if STOP > 0:  # rays that miss, or do not exist, need not keep the others company
            ray = group * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
            passed = tl.load(hit_ptr + ray, mask=ray < R, other=0).to(tl.float32)
        total = tl.zeros((BLOCK_R,), tl.float32)
        reach, red, green, blue = total, total, total, total
        tile, tiles = 0, tl.cdiv(S, BLOCK_S)
        while tile < tiles:
            r, n, ok, start, delta = _tile(edges_ptr, group, tile, R, S, BLOCK_R, BLOCK_S)
            point, direction, place = sample_on_ray(
                origins_ptr, directions_ptr, volume_idx_ptr, cells_per_unit_ptr, first_cell_ptr, r, start, ok, Z
            )
            feature = interpolate(volume_ptr, place, ok, Z, Y, X, CHANNELS, C)
            x = sdf_hidden(seen_by_sdf(point, 1.0), feature, sdf_mlp_ptr, keep_ptr, True, C, H, SDF_LAYERS, PREC)
            sdf = distance(x, feature, sdf_mlp_ptr, C, H, SDF_LAYERS)
            tl.debug_barrier()  # other threads may read what is kept
            qx, qy, qz, d_feature = distance_back(x, sdf_mlp_ptr, keep_ptr, C, H, SDF_LAYERS, PREC)
            gx, gy, gz = slope_against(volume_ptr, place, ok, d_feature, Z, Y, X, CHANNELS, C)
            gx = gx * tl.load(cells_per_unit_ptr) + qx
            gy = gy * tl.load(cells_per_unit_ptr + 1) + qy
            gz = gz * tl.load(cells_per_unit_ptr + 2) + qz
            gradient = (gx, gy, gz)

            alpha, _, _, _ = _opacity(sdf, gradient, direction, delta, density, NEUS)
            hit = ok & tl.load(hit_ptr + r, mask=ok, other=0)
            alpha = tl.reshape(tl.where(hit, tl.minimum(tl.maximum(alpha, 0.0), 1.0), 0.0), (BLOCK_R, BLOCK_S))
            # behind the last sample nothing weakens the light; k >= 1e-7, so dividing by it is safe
            k = tl.where(tl.reshape(ok, (BLOCK_R, BLOCK_S)), 1.0 - alpha + 1e-7, 1.0)
            through = passed[:, None] * tl.cumprod(k, axis=1)
            trans = through / k
            weight = trans * alpha
            last = tl.arange(0, BLOCK_S)[None, :] == BLOCK_S - 1
            passed = tl.sum(tl.where(last, through, 0.0), axis=1)
            total += tl.sum(weight, axis=1)
            reach += tl.sum(weight * tl.reshape(start, (BLOCK_R, BLOCK_S)), axis=1)
            weight_of = tl.reshape(weight, (BLOCK_R * BLOCK_S,))
            tl.store(weights_ptr + n, weight_of, mask=ok)
            tl.store(trans_ptr + n, tl.reshape(trans, (BLOCK_R * BLOCK_S,)), mask=ok)
            tl.store(sdf_ptr + n, sdf, mask=ok)
            _store3(gradient_ptr, n, gradient, ok)
            if RGB_LAYERS > 0:
                geo = geometry(x, feature, sdf_mlp_ptr, C, H, SDF_LAYERS, PREC)
                e = seen_by_rgb(point, direction, gradient)
                x = rgb_hidden(e, feature, geo, rgb_mlp_ptr, keep_ptr, False, C, H, RGB_LAYERS, PREC)
                colour = colour_of(x, e, feature, geo, rgb_mlp_ptr, C, H, RGB_LAYERS, PREC)
                channel = tl.arange(0, COLOURS)[None, :]
                tl.store(colours_ptr + 3 * n[:, None] + channel, colour, mask=ok[:, None] & (channel < 3))
                r_, g_, b_ = columns(colour * weight_of[:, None], 0)
                red += tl.sum(tl.reshape(r_, (BLOCK_R, BLOCK_S)), axis=1)
                green += tl.sum(tl.reshape(g_, (BLOCK_R, BLOCK_S)), axis=1)
                blue += tl.sum(tl.reshape(b_, (BLOCK_R, BLOCK_S)), axis=1)
            tl.debug_barrier()  # the next tile is kept in the same place
            tile += 1
            if STOP > 0:
                tiles = tl.where(tl.max(passed, axis=0) < STOP, tile, tiles)
        r = group * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        tl.store(depth_ptr + r, reach / (total + 1e-10), mask=r < R)
        tl.store(total_ptr + r, total, mask=r < R)
        if RGB_LAYERS > 0:
            _store3(rgb_ptr, r, (red, green, blue), r < R)


@triton.jit
def _sdf_render_bwd_rgb_kernel(
    volume_ptr,  # [B, Z, Y, X, CHANNELS]
    origins_ptr, directions_ptr, volume_idx_ptr, hit_ptr, edges_ptr,  # [R, 3] x 2, [R] x 2, [R, S + 1]
    cells_per_unit_ptr, first_cell_ptr,  # [3], [3]
    sdf_mlp_ptr, rgb_mlp_ptr, density_ptr,  # packed, packed, [1]
    depth_ptr, total_ptr,  # [R], [R] sum of the weights
    weights_ptr, trans_ptr, sdf_ptr, gradient_ptr, colours_ptr,  # [N] x 3, [N, 3], [N, 3]
    up_rgb_ptr, up_depth_ptr, up_weights_ptr, up_sdf_ptr, up_gradient_ptr,  # [R, 3], [R], [N] x 2, [N, 3]
    d_sdf_ptr, d_gradient_ptr, d_feature_ptr, d_geometry_ptr,  # [N], [N, 3], [N, C], [N, H]
    d_rgb_mlp_ptr, d_density_ptr,  # [programs, packed] zeros, [programs]
    keep_ptr,  # [programs, RGB_LAYERS - 1, M, H] scratch
    R, S, Z, Y, X, CHANNELS,
    NEUS: tl.constexpr, PREC: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
    SDF_LAYERS: tl.constexpr, RGB_LAYERS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    LINE: tl.constexpr = C + 2 * H + SEEN
    ROWS: tl.constexpr = (RGB_LAYERS - 1) * H + COLOURS
    last: tl.constexpr = (RGB_LAYERS - 1) * H * LINE
    d_mlp_ptr = d_rgb_mlp_ptr + tl.program_id(0).to(tl.int64) * ROWS * LINE
    keep_ptr += tl.program_id(0).to(tl.int64) * (RGB_LAYERS - 1) * BLOCK_R * BLOCK_S * H
    density = tl.load(density_ptr)
    d_density = tl.zeros((BLOCK_R * BLOCK_S,), tl.float32)
    tiles = tl.cdiv(S, BLOCK_S)
    s = tl.arange(0, BLOCK_S)
    behind_it = s[None, :, None] < s[None, None, :]
    for group in range(tl.program_id(0), tl.cdiv(R, BLOCK_R), tl.num_programs(0)):
        behind = tl.zeros((BLOCK_R,), tl.float32)  # sum of weight * d_weight over the tiles behind
        for i in range(tiles):
            r, n, ok, start, delta = _tile(edges_ptr, group, tiles - 1 - i, R, S, BLOCK_R, BLOCK_S)
            point, direction, place = sample_on_ray(
                origins_ptr, directions_ptr, volume_idx_ptr, cells_per_unit_ptr, first_cell_ptr, r, start, ok, Z
            )
            gradient = _load3(gradient_ptr, n, ok)
            sdf = tl.load(sdf_ptr + n, mask=ok, other=0.0)
            weight = tl.load(weights_ptr + n, mask=ok, other=0.0)
            d_depth = tl.load(up_depth_ptr + r, mask=ok, other=0.0) / (
                tl.load(total_ptr + r, mask=ok, other=1.0) + 1e-10
            )
            d_weight = tl.load(up_weights_ptr + n, mask=ok, other=0.0)
            d_weight += d_depth * (start - tl.load(depth_ptr + r, mask=ok, other=0.0))
            if RGB_LAYERS > 0:
                channel = tl.arange(0, COLOURS)[None, :]
                some = ok[:, None] & (channel < 3)
                colour = tl.load(colours_ptr + 3 * n[:, None] + channel, mask=some, other=0.0)
                d_colour = tl.load(up_rgb_ptr + 3 * r[:, None] + channel, mask=some, other=0.0)
                d_weight += tl.sum(d_colour * colour, axis=1)

            share = tl.reshape(weight * d_weight, (BLOCK_R, BLOCK_S))
            # summed afresh for every sample: a running sum minus its own term would drown what lies behind
            later = behind[:, None] + tl.sum(tl.where(behind_it, share[:, None, :], 0.0), axis=2)
            behind += tl.sum(share, axis=1)
            alpha, _, _, _ = _opacity(sdf, gradient, direction, delta, density, NEUS)
            k = 1.0 - tl.minimum(tl.maximum(alpha, 0.0), 1.0) + 1e-7
            trans = tl.load(trans_ptr + n, mask=ok, other=0.0)
            d_alpha = trans * d_weight - tl.reshape(later, (BLOCK_R * BLOCK_S,)) / k
            d_alpha = tl.where(ok & tl.load(hit_ptr + r, mask=ok, other=0), d_alpha, 0.0)
            d_sdf, d_slope, d_density_of = _opacity_back(d_alpha, sdf, gradient, direction, delta, density, NEUS)
            d_density += d_density_of
            tl.store(d_sdf_ptr + n, d_sdf + tl.load(up_sdf_ptr + n, mask=ok, other=0.0), mask=ok)
            vx, vy, vz = _load3(up_gradient_ptr, n, ok)
            vx += d_slope * direction[0]
            vy += d_slope * direction[1]
            vz += d_slope * direction[2]

            if RGB_LAYERS > 0:
                feature = interpolate(volume_ptr, place, ok, Z, Y, X, CHANNELS, C)
                x = sdf_hidden(seen_by_sdf(point, 1.0), feature, sdf_mlp_ptr, keep_ptr, False, C, H, SDF_LAYERS, PREC)
                geo = geometry(x, feature, sdf_mlp_ptr, C, H, SDF_LAYERS, PREC)
                e = seen_by_rgb(point, direction, gradient)
                x = rgb_hidden(e, feature, geo, rgb_mlp_ptr, keep_ptr, True, C, H, RGB_LAYERS, PREC)
                tl.debug_barrier()  # other threads may read what is kept
                d_out = d_colour * weight[:, None] * colour * (1.0 - colour)
                no_feature, no_geo = tl.zeros((1, C), tl.float32), tl.zeros((1, H), tl.float32)
                no_e = tl.zeros((1, SEEN), tl.float32)
                d_x, d_feature, d_geo, d_e = _rgb_layer_back(
                    d_out, x, feature, geo, e, rgb_mlp_ptr + last, d_mlp_ptr + last,
                    no_feature, no_geo, no_e, C, H, PREC,
                )  # fmt: skip
                for j in range(RGB_LAYERS - 1):
                    l = RGB_LAYERS - 2 - j
                    d_z = tl.where(x > 0, d_x, 0.0)
                    x = tl.load(kept(keep_ptr, l, BLOCK_R * BLOCK_S, H))
                    d_x, d_feature, d_geo, d_e = _rgb_layer_back(
                        d_z, x, feature, geo, e, rgb_mlp_ptr + l * H * LINE, d_mlp_ptr + l * H * LINE,
                        d_feature, d_geo, d_e, C, H, PREC,
                    )  # fmt: skip
                qx, qy, qz = columns(d_e, 7)
                vx += qx
                vy += qy
                vz += qz
                rows = n[:, None]
                tl.store(d_feature_ptr + rows * C + tl.arange(0, C)[None, :], d_feature, mask=ok[:, None])
                tl.store(d_geometry_ptr + rows * H + tl.arange(0, H)[None, :], d_geo, mask=ok[:, None])
                tl.debug_barrier()  # other threads may add to the sums, and keep the next tile
            _store3(d_gradient_ptr, n, (vx, vy, vz), ok)
    tl.store(d_density_ptr + tl.program_id(0), tl.sum(d_density, axis=0))


@triton.jit
def _rgb_layer_back(
    d_z, x, feature, geo, e, mlp_ptr, d_mlp_ptr, d_feature, d_geo, d_e,
    C: tl.constexpr, H: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Back through one layer of the colour's MLP: adds to the gradients of all it saw and of its weights; d_x."""
    LINE: tl.constexpr = C + 2 * H + SEEN
    add_outer(d_mlp_ptr, LINE, d_z, x, None, PREC)
    add_outer(d_mlp_ptr + H, LINE, d_z, feature, None, PREC)
    add_outer(d_mlp_ptr + H + C, LINE, d_z, geo, None, PREC)
    add_outer(d_mlp_ptr + 2 * H + C, LINE, d_z, e, None, PREC)
    d_feature = times_back(d_z, mlp_ptr + H, LINE, d_feature, C, PREC)
    d_geo = times_back(d_z, mlp_ptr + H + C, LINE, d_geo, H, PREC)
    d_e = times_back(d_z, mlp_ptr + 2 * H + C, LINE, d_e, SEEN, PREC)
    return times_back(d_z, mlp_ptr, LINE, tl.zeros((1, H), tl.float32), H, PREC), d_feature, d_geo, d_e


@triton.jit
def _sdf_render_bwd_sdf_kernel(
    volume_ptr,  # [B, Z, Y, X, CHANNELS]
    origins_ptr, directions_ptr, volume_idx_ptr, hit_ptr, edges_ptr,  # [R, 3] x 2, [R] x 2, [R, S + 1]
    cells_per_unit_ptr, first_cell_ptr,  # [3], [3]
    sdf_mlp_ptr,  # packed
    d_sdf_ptr, d_gradient_ptr, d_feature_ptr, d_geometry_ptr,  # [N], [N, 3], [N, C], [N, H]
    d_sdf_mlp_ptr, d_volume_ptr,  # [programs, packed] zeros, [B, Z, Y, X, CHANNELS] zeros
    keep_ptr,  # [programs, 2, SDF_LAYERS - 1, M, H] scratch
    d_slope_ptr, cell_idx_ptr,  # [N, C], [N]: written, and d_feature rewritten, instead of d_volume without SCATTER
    N, S, Z, Y, X, CHANNELS,
    NEUS: tl.constexpr, PREC: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
    SDF_LAYERS: tl.constexpr, RGB_LAYERS: tl.constexpr, SCATTER: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    LINE: tl.constexpr = C + H + SEEN
    ROWS: tl.constexpr = SDF_LAYERS * H + 1
    d_mlp_ptr = d_sdf_mlp_ptr + tl.program_id(0).to(tl.int64) * ROWS * LINE
    keep_ptr += tl.program_id(0).to(tl.int64) * 2 * (SDF_LAYERS - 1) * BLOCK_M * H
    dots_ptr = keep_ptr + (SDF_LAYERS - 1) * BLOCK_M * H
    c = tl.arange(0, C)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.num_programs(0)):
        n = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        ok = n < N
        r = n // S
        start = tl.load(edges_ptr + n + r, mask=ok, other=0.0)
        point, _, place = sample_on_ray(
            origins_ptr, directions_ptr, volume_idx_ptr, cells_per_unit_ptr, first_cell_ptr, r, start, ok, Z
        )
        v = _load3(d_gradient_ptr, n, ok)
        vx = v[0] * tl.load(cells_per_unit_ptr)  # in cells
        vy = v[1] * tl.load(cells_per_unit_ptr + 1)
        vz = v[2] * tl.load(cells_per_unit_ptr + 2)
        feature = interpolate(volume_ptr, place, ok, Z, Y, X, CHANNELS, C)
        along = interpolate_along(volume_ptr, place, ok, vx, vy, vz, Z, Y, X, CHANNELS, C)  # f.
        e, e_dot = seen_by_sdf(point, 1.0), seen_by_sdf(v, 0.0)
        zero = tl.zeros((1, H), tl.float32)
        x = tl.zeros((BLOCK_M, H), tl.float32)
        x_dot = x
        for l in range(SDF_LAYERS - 1):
            tl.store(kept(keep_ptr, l, BLOCK_M, H), x)
            tl.store(kept(dots_ptr, l, BLOCK_M, H), x_dot)
            at = sdf_mlp_ptr + l * H * LINE
            z_dot = times(along, at + H, LINE, times(e_dot, at + H + C, LINE, zero, H, PREC), H, PREC)
            z_dot = times(x_dot, at, LINE, z_dot, H, PREC)
            z = times(feature, at + H, LINE, times(e, at + H + C, LINE, zero, H, PREC), H, PREC)
            x = softplus(times(x, at, LINE, z, H, PREC))
            x_dot = bent(x)[0] * z_dot
        tl.debug_barrier()  # other threads may read what is kept

        # the last layer: its row 0 is the distance's, the others are the geometry's
        last: tl.constexpr = (SDF_LAYERS - 1) * H * LINE
        d_sdf = tl.load(d_sdf_ptr + n, mask=ok, other=0.0)[:, None]
        d_x = d_sdf * vector(sdf_mlp_ptr + last, H)  # x-
        d_feature = d_sdf * vector(sdf_mlp_ptr + last + H, C)  # f-
        hat_x = tl.broadcast_to(vector(sdf_mlp_ptr + last, H), (BLOCK_M, H))  # x^
        hat_feature = tl.broadcast_to(vector(sdf_mlp_ptr + last + H, C), (BLOCK_M, C))  # f^
        add_row(d_mlp_ptr + last, tl.sum(d_sdf * x + x_dot, axis=0))
        add_row(d_mlp_ptr + last + H, tl.sum(d_sdf * feature + along, axis=0))
        add_row(d_mlp_ptr + last + H + C, tl.sum(d_sdf * e, axis=0))
        if RGB_LAYERS > 0:
            h = tl.arange(0, H)[None, :]
            d_feature += tl.load(d_feature_ptr + n[:, None] * C + c, mask=ok[:, None], other=0.0)
            d_geo = tl.load(d_geometry_ptr + n[:, None] * H + h, mask=ok[:, None], other=0.0)
            d_x = times_back(d_geo, sdf_mlp_ptr + last + LINE, LINE, d_x, H, PREC)
            d_feature = times_back(d_geo, sdf_mlp_ptr + last + LINE + H, LINE, d_feature, C, PREC)
            add_outer(d_mlp_ptr + last + LINE, LINE, d_geo, x, None, PREC)
            add_outer(d_mlp_ptr + last + LINE + H, LINE, d_geo, feature, None, PREC)
            add_outer(d_mlp_ptr + last + LINE + H + C, LINE, d_geo, e, None, PREC)
        for i in range(SDF_LAYERS - 1):
            l = SDF_LAYERS - 2 - i
            slope, bend = bent(x)
            d_z = d_x * slope + hat_x * x_dot * bend
            hat_z = hat_x * slope
            x = tl.load(kept(keep_ptr, l, BLOCK_M, H))
            x_dot = tl.load(kept(dots_ptr, l, BLOCK_M, H))
            at, d_at = sdf_mlp_ptr + l * H * LINE, d_mlp_ptr + l * H * LINE
            add_outer(d_at, LINE, d_z, x, tl.dot(tl.trans(hat_z), x_dot, input_precision=PREC), PREC)
            add_outer(d_at + H, LINE, d_z, feature, tl.dot(tl.trans(hat_z), along, input_precision=PREC), PREC)
            add_outer(d_at + H + C, LINE, d_z, e, tl.dot(tl.trans(hat_z), e_dot, input_precision=PREC), PREC)
            d_feature = times_back(d_z, at + H, LINE, d_feature, C, PREC)
            hat_feature = times_back(hat_z, at + H, LINE, hat_feature, C, PREC)
            d_x = times_back(d_z, at, LINE, zero, H, PREC)
            hat_x = times_back(hat_z, at, LINE, zero, H, PREC)
        tl.debug_barrier()  # other threads may add to the sums, and keep the next tile

        # found once more, so that nothing need be held all through the layers
        start = tl.load(edges_ptr + n + r, mask=ok, other=0.0)
        _, _, place = sample_on_ray(
            origins_ptr, directions_ptr, volume_idx_ptr, cells_per_unit_ptr, first_cell_ptr, r, start, ok, Z
        )
        if SCATTER:
            v = _load3(d_gradient_ptr, n, ok)
            vx = v[0] * tl.load(cells_per_unit_ptr)
            vy = v[1] * tl.load(cells_per_unit_ptr + 1)
            vz = v[2] * tl.load(cells_per_unit_ptr + 2)
            for k in range(8):  # rolled: an atomic add has no latency to hide
                row, row_ok, share, bx, by, bz = corner(place, ok, Z, Y, X, k)
                d_row = share[:, None] * d_feature + (bx * vx + by * vy + bz * vz)[:, None] * hat_feature
                some = row_ok[:, None] & (c < CHANNELS)
                tl.atomic_add(d_volume_ptr + row[:, None] * CHANNELS + c, d_row, mask=some, sem="relaxed")
        else:
            tl.store(d_feature_ptr + n[:, None] * C + c, d_feature, mask=ok[:, None])
            tl.store(d_slope_ptr + n[:, None] * C + c, hat_feature, mask=ok[:, None])
            tl.store(cell_idx_ptr + n, cell_of(place, Z, Y, X), mask=ok)

"""Samples along rays: clipped to a box, stratified, then resampled by weight.

    clip:        t = (face - origin) / (direction + 1e-6) for six faces; from the last entry to the first exit
    stratified:  edge_s = near + x_s (far - near), x_s = s / S or jittered between the adjacent midpoints
    resampling:  new_j = CDF^-1((j + jitter) / (n + 1)), the CDF linear in each interval; merged with the old edges;
                 from given weights, or from NeuS's: those of `composite`, with the opacities of `interval_alpha`

An *edge list* [R, S + 1] holds the starts of S samples and the end of the last one, ascending; a sample lies at its
start and extends to the next: `starts = edges[:, :-1]`, `deltas = edges.diff(dim=1)`. Edges are distances along the
ray. The original resamples in [0, 1] and maps to [near, far] afterwards. That map is affine, and the inverse CDF and
the merge commute with it, so resampling does not need near and far; results differ by rounding only.

Ranks (positions in the merged list) are found by counting, not by sorting: a new start lies in the interval that its
CDF value selects, so one sweep along the ray inverts the CDF and merges. Nothing here is differentiable: it only
decides where the field is sampled.

Sizes: R rays, S samples on each before resampling, N new ones (the argument `n`).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unipad.kernels.backend import cdiv, jit, on_triton, tl, triton
from unipad.kernels.composite import composite_ref
from unipad.kernels.sdf_alpha import interval_alpha, sigmoid


def clip_rays(
    origins: Tensor, directions: Tensor, low: Sequence[float], high: Sequence[float], near: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The part of each ray inside a box and beyond `near`; all lengths in one unit of your choice.

    Args:
        origins:    [R, 3] (x, y, z).
        directions: [R, 3] unit vectors; components may be 0.
        low, high:  (x, y, z) corners of the box.
        near:       smallest distance from the origin at which a ray may start.

    Returns:
        enter, leave: [R] distances, leave >= enter + 1e-6 up to rounding; near and near + 1 where `hit` is False, so
                      that what follows stays finite.
        hit:          [R] bool; False where the ray misses the box, starts beyond it, or leaves it before `near`.

    1 / (d + 1e-6) is the original's guard against components d = 0; it biases distances by a fraction 1e-6 / d.
    The kernel computes in fp32. Raises AssertionError if shapes do not match.
    """
    R = origins.shape[0]
    fits = origins.shape == directions.shape == (R, 3)
    assert fits, f"origins {tuple(origins.shape)} and directions {tuple(directions.shape)} do not match"
    assert len(low) == len(high) == 3, f"corners of a box are (x, y, z), not {tuple(low)} and {tuple(high)}"
    if not on_triton(origins):
        return clip_rays_ref(origins, directions, low, high, near)
    enter, leave = origins.new_empty(R), origins.new_empty(R)
    hit = origins.new_empty(R, dtype=torch.bool)
    if R:
        _clip_rays_kernel[(cdiv(R, BLOCK),)](
            origins_ptr=origins.contiguous(), directions_ptr=directions.contiguous(),
            enter_ptr=enter, leave_ptr=leave, hit_ptr=hit,
            R=R, low_x=float(low[0]), low_y=float(low[1]), low_z=float(low[2]),
            high_x=float(high[0]), high_y=float(high[1]), high_z=float(high[2]), near=float(near), BLOCK=BLOCK,
        )  # fmt: skip
    return enter, leave, hit


@torch.no_grad()
def clip_rays_ref(origins, directions, low, high, near):
    """`clip_rays` in plain PyTorch."""
    low, high = (torch.as_tensor(corner, dtype=origins.dtype, device=origins.device) for corner in (low, high))
    inverse = 1 / (directions + 1e-6)  # [R, 3]
    at_low, at_high = (low - origins) * inverse, (high - origins) * inverse  # [R, 3]
    enter = torch.minimum(at_low, at_high).amax(dim=1).clamp(min=near)  # [R]
    leave = torch.maximum(at_low, at_high).amin(dim=1)  # [R]
    hit = enter < leave
    leave = torch.maximum(leave, enter + 1e-6)
    return torch.where(hit, enter, near), torch.where(hit, leave, near + 1), hit


def stratified_edges(near: Tensor, far: Tensor, S: int, jitter: Tensor | None = None) -> Tensor:
    """Edges of S intervals that divide [near, far] evenly.

    Args:
        near, far: [R] distances.
        S:         number of samples, at least 1.
        jitter:    [R] in [0, 1), one number per ray: every edge moves to that fraction of the way between the midpoints
                   of its two intervals (the first: from near to its midpoint; the last: from its midpoint to far).
                   None: even intervals.

    Returns:
        edges: [R, S + 1] ascending.

    Raises AssertionError if shapes do not match.
    """
    R = near.shape[0]
    fits = near.shape == far.shape == (R,)
    assert fits, f"near {tuple(near.shape)} and far {tuple(far.shape)} do not match: [R] each"
    assert S >= 1, f"rays need at least one sample, not {S}"
    _check_jitter(jitter, R)
    if not on_triton(near):
        return stratified_edges_ref(near, far, S, jitter)
    edges = near.new_empty(R, S + 1)
    if R:
        _stratified_edges_kernel[(cdiv(edges.numel(), BLOCK),)](
            near_ptr=near.contiguous(), far_ptr=far.contiguous(),
            jitter_ptr=near if jitter is None else jitter.contiguous(), edges_ptr=edges,
            R=R, S=S, JITTER=jitter is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return edges


@torch.no_grad()
def stratified_edges_ref(near, far, S, jitter=None):
    """`stratified_edges` in plain PyTorch."""
    x = torch.linspace(0, 1, S + 1, dtype=near.dtype, device=near.device)[None]  # [1, S + 1]
    if jitter is not None:
        middles = (x[:, 1:] + x[:, :-1]) / 2  # [1, S]
        lower, upper = torch.cat([x[:, :1], middles], dim=1), torch.cat([middles, x[:, -1:]], dim=1)  # [1, S + 1]
        x = lower + (upper - lower) * jitter[:, None]  # [R, S + 1]
    # not x far + (1 - x) near, which could be out of order by rounding where near ~ far
    return near[:, None] + x * (far - near)[:, None]


def sample_pdf(edges: Tensor, weights: Tensor, n: int, jitter: Tensor | None = None) -> Tensor:
    """Draw n samples by inverse transform sampling from a density that is constant on each interval.

    Args:
        edges:   [R, S + 1] ascending, S at least 1.
        weights: [R, S] mass of each interval, >= 0, not normalized; a row that sums to less than 1e-5 is raised evenly
                 to that sum.
        n:       number of samples drawn, at least 0.
        jitter:  [R] in [0, 1), one number per ray: the position inside each of n + 1 strata of equal mass. None: 0.5.

    Returns:
        new_edges: [R, n + 1] ascending, in the range of `edges`: n starts and the end of the last.

    The kernel sums the CDF in fp64: errors of an fp32 sum, divided by an interval's mass, as little as 1e-5, would
    visibly move samples. Raises AssertionError if shapes do not match.
    """
    _check(edges, weights, n, jitter)
    if not on_triton(edges):
        return sample_pdf_ref(edges, weights, n, jitter)
    return _resample(edges, weights, n, jitter, MERGE=False)


@torch.no_grad()
def sample_pdf_ref(edges, weights, n, jitter=None):
    """`sample_pdf` in plain PyTorch."""
    (R, S), weights = weights.shape, weights.to(edges.dtype)
    total = weights.sum(dim=1, keepdim=True)  # [R, 1]
    pad = F.relu(1e-5 - total)
    cdf = ((weights + pad / S) / (total + pad)).cumsum(dim=1).clamp(max=1)  # [R, S]
    cdf = F.pad(cdf, (1, 0))  # [R, S + 1]

    jitter = edges.new_full((R,), 0.5) if jitter is None else jitter
    u = (torch.arange(n + 1, device=edges.device) + jitter[:, None]) / (n + 1)  # [R, n + 1]
    below = torch.searchsorted(cdf, u, right=True) - 1
    above = (below + 1).clamp(max=S)  # u may round to 1, where nothing is above
    cdf_below, cdf_above = cdf.gather(1, below), cdf.gather(1, above)
    low, high = edges.gather(1, below), edges.gather(1, above)
    mass = cdf_above - cdf_below
    t = ((u - cdf_below) / torch.where(mass < 1e-5, 1, mass)).clamp(0, 1)
    return torch.minimum(low + t * (high - low), high)  # rounding must not move a sample past its interval


def merge(edges: Tensor, new_edges: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two edge lists of the same rays by start; among equal starts, old ones come first.

    Args:
        edges:     [R, S + 1] ascending.
        new_edges: [R, n + 1] ascending.

    Returns:
        merged: [R, S + n + 1] ascending; its last edge is the larger of the two last ones.
        order:  [R, S + n] int64: `torch.cat([old, new], dim=1).gather(1, order)` puts values of the old and of the new
                samples, [R, S] and [R, n], into the merged order.

    Raises AssertionError if shapes do not match.
    """
    fits = edges.dim() == new_edges.dim() == 2 and len(edges) == len(new_edges) and edges.shape[1] * new_edges.shape[1]
    assert fits, f"edges {tuple(edges.shape)} and {tuple(new_edges.shape)} do not match: [R, intervals + 1] each"
    if not on_triton(edges):
        return merge_ref(edges, new_edges)
    (R, S), n = edges[:, 1:].shape, new_edges.shape[1] - 1
    merged, order = edges.new_empty(R, S + n + 1), edges.new_empty(R, S + n, dtype=torch.int64)
    if R:
        block_r, block_n = _tile(n)
        _merge_kernel[(cdiv(R, block_r),)](
            edges_ptr=edges.contiguous(), new_edges_ptr=new_edges.contiguous(), merged_ptr=merged, order_idx_ptr=order,
            R=R, S=S, N=n, BLOCK_R=block_r, BLOCK_N=block_n,
        )  # fmt: skip
    return merged, order


@torch.no_grad()
def merge_ref(edges, new_edges):
    """`merge` in plain PyTorch."""
    starts, order = torch.cat([edges[:, :-1], new_edges[:, :-1]], dim=1).sort(dim=1, stable=True)
    last = torch.maximum(edges[:, -1:], new_edges[:, -1:])
    return torch.cat([starts, last], dim=1), order


def resample(edges: Tensor, weights: Tensor, n: int, jitter: Tensor | None = None) -> Tensor:
    """`sample_pdf` merged with the edges it draws from: [R, S + n + 1], in one launch; same arguments."""
    _check(edges, weights, n, jitter)
    if not on_triton(edges):
        return resample_ref(edges, weights, n, jitter)
    return _resample(edges, weights, n, jitter)


@torch.no_grad()
def resample_ref(edges, weights, n, jitter=None):
    """`resample` in plain PyTorch."""
    return merge_ref(edges, sample_pdf_ref(edges, weights, n, jitter))[0]


def neus_resample(edges: Tensor, sdf: Tensor, inv_s: float, n: int, jitter: Tensor | None = None) -> Tensor:
    """`resample` by NeuS's weights, in one launch: those of `composite` for the opacities of `interval_alpha`.

    Args:
        edges:  [R, S + 1] ascending, S at least 1.
        sdf:    [R, S] signed distance at the starts, in the unit of `edges`.
        inv_s:  fixed inverse scale of the logistic distribution (64 in the original).
        n, jitter: as for `sample_pdf`.

    Returns:
        merged: [R, S + n + 1] ascending.

    The kernel does not round weights to the type of `sdf`. Raises AssertionError if shapes do not match.
    """
    _check(edges, sdf, n, jitter, name="sdf")
    if not on_triton(edges):
        return neus_resample_ref(edges, sdf, inv_s, n, jitter)
    return _resample(edges, sdf, n, jitter, NEUS=True, inv_s=float(inv_s))


@torch.no_grad()
def neus_resample_ref(edges, sdf, inv_s, n, jitter=None):
    """`neus_resample` in plain PyTorch."""
    alpha = interval_alpha(sdf, edges.diff(dim=1), inv_s)
    _, weights = composite_ref(alpha, alpha[..., None])  # the composited values, here alpha again, do not matter
    return resample_ref(edges, weights, n, jitter)


def _check(edges, weights, n, jitter, name="weights"):
    fits = weights.dim() == 2 and weights.shape[1] >= 1 and edges.shape == (len(weights), weights.shape[1] + 1)
    assert fits, f"edges {tuple(edges.shape)} do not match {name} {tuple(weights.shape)}: [R, S + 1] and [R, S], S > 0"
    assert n >= 0, f"cannot draw {n} samples"
    _check_jitter(jitter, len(weights))


def _check_jitter(jitter, R):
    fits = jitter is None or jitter.shape == (R,)
    assert fits, f"jitter {tuple(jitter.shape)} does not match {R} rays: one number each"


def _resample(edges, weights, n, jitter, MERGE=True, NEUS=False, inv_s=0.0):
    """weights: with NEUS, signed distances."""
    R, S = weights.shape
    out = edges.new_empty(R, (S if MERGE else 0) + n + 1)
    if R:
        jitter = edges.new_full((R,), 0.5) if jitter is None else jitter.contiguous()
        block_r, block_n = _tile(n)
        _resample_kernel[(cdiv(R, block_r),)](
            edges_ptr=edges.contiguous(), weights_ptr=weights.contiguous(), jitter_ptr=jitter, out_ptr=out,
            R=R, S=S, N=n, inv_s=inv_s, MERGE=MERGE, NEUS=NEUS, BLOCK_R=block_r, BLOCK_N=block_n,
        )  # fmt: skip
    return out


BLOCK = 512  # rays or edges per program
PAIRS = 256  # rays x new edges per program


def _tile(n):
    """Block sizes of a program: rays and new edges."""
    block_n = triton.next_power_of_2(n + 1)
    return max(1, PAIRS // block_n), block_n


@jit(varying=("R",))
def _clip_rays_kernel(
    origins_ptr, directions_ptr,  # [R, 3], [R, 3]
    enter_ptr, leave_ptr, hit_ptr,  # [R], [R], [R] bool
    R, low_x, low_y, low_z, high_x, high_y, high_z, near,
    BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    r_ok = r < R
    enter_x, leave_x = _slab(origins_ptr, directions_ptr, 3 * r, r_ok, low_x, high_x)
    enter_y, leave_y = _slab(origins_ptr, directions_ptr, 3 * r + 1, r_ok, low_y, high_y)
    enter_z, leave_z = _slab(origins_ptr, directions_ptr, 3 * r + 2, r_ok, low_z, high_z)
    enter = tl.maximum(tl.maximum(enter_x, enter_y), tl.maximum(enter_z, near))
    leave = tl.minimum(tl.minimum(leave_x, leave_y), leave_z)
    hit = enter < leave
    tl.store(enter_ptr + r, tl.where(hit, enter, near), mask=r_ok)
    tl.store(leave_ptr + r, tl.where(hit, tl.maximum(leave, enter + 1e-6), near + 1), mask=r_ok)
    tl.store(hit_ptr + r, hit, mask=r_ok)


@triton.jit
def _slab(origins_ptr, directions_ptr, i, i_ok, low, high):
    """Distances at which rays enter and leave the slab between the two faces of one axis."""
    origin = tl.load(origins_ptr + i, mask=i_ok, other=0.0).to(tl.float32)
    direction = tl.load(directions_ptr + i, mask=i_ok, other=1.0).to(tl.float32)
    inverse = 1.0 / (direction + 1e-6)
    at_low, at_high = (low - origin) * inverse, (high - origin) * inverse
    return tl.minimum(at_low, at_high), tl.maximum(at_low, at_high)


@jit(varying=("R",))
def _stratified_edges_kernel(
    near_ptr, far_ptr, jitter_ptr,  # [R], [R], [R] (not read without JITTER)
    edges_ptr,  # [R, S + 1]
    R, S,
    JITTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    acc_ty: tl.constexpr = tl.float64 if near_ptr.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    r, s = i // (S + 1), (i % (S + 1)).to(acc_ty)
    r_ok = r < R
    near = tl.load(near_ptr + r, mask=r_ok, other=0.0).to(acc_ty)
    far = tl.load(far_ptr + r, mask=r_ok, other=0.0).to(acc_ty)
    if JITTER:
        lower, upper = tl.maximum(s - 0.5, 0.0), tl.minimum(s + 0.5, S)
        s = lower + (upper - lower) * tl.load(jitter_ptr + r, mask=r_ok, other=0.0).to(acc_ty)
    tl.store(edges_ptr + i, near + s / S * (far - near), mask=r_ok)


@triton.jit
def _weight(ptr, s, S, r_ok, delta, state, inv_s, NEUS: tl.constexpr, acc_ty: tl.constexpr):
    """Weight of interval s of each ray, and the state with which to call this for the next one.

    ptr: where the rays' weights begin; with NEUS, signed distances, from which weights are computed as by
        `interval_alpha` and `composite`. state: signed distance at the interval's start, slope of the interval before
        it, transmittance up to it; before the first interval 0 and 1.
    """
    if NEUS:
        sdf, slope_before, trans = state
        # the last interval ends where no distance is known: its weight is 0
        sdf_after = tl.load(ptr + tl.minimum(s + 1, S - 1), mask=r_ok, other=0.0).to(acc_ty)
        slope = (sdf_after - sdf) / (delta + 1e-5)
        half = tl.minimum(tl.maximum(tl.minimum(slope, slope_before), -1000.0), 0.0) * delta / 2
        middle = (sdf + sdf_after) / 2
        prev_cdf, next_cdf = sigmoid((middle - half) * inv_s), sigmoid((middle + half) * inv_s)
        alpha = tl.where(s < S - 1, (prev_cdf - next_cdf + 1e-5) / (prev_cdf + 1e-5), 0.0)
        return trans * alpha, (sdf_after, slope, trans * (1.0 - alpha + 1e-7))
    else:
        return tl.load(ptr + s, mask=r_ok, other=0.0).to(acc_ty), state


@jit(varying=("R",))
def _resample_kernel(
    edges_ptr, weights_ptr, jitter_ptr,  # [R, S + 1], [R, S] (with NEUS, signed distances), [R]
    out_ptr,  # [R, N + 1]; with MERGE [R, S + N + 1]
    R, S, N, inv_s,  # inv_s: read with NEUS only
    MERGE: tl.constexpr, NEUS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    acc_ty: tl.constexpr = tl.float64 if edges_ptr.dtype.element_ty == tl.float64 else tl.float32
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    j = tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    r_ok = r < R
    out_row = out_ptr + r * (N + 1 + (S if MERGE else 0))  # [BLOCK_R]

    edges_ptr += r * (S + 1)
    weights_ptr += r * S
    first = tl.load(edges_ptr, mask=r_ok, other=0.0).to(acc_ty)
    zeros = tl.zeros((BLOCK_R,), acc_ty)
    begin = (tl.load(weights_ptr, mask=r_ok, other=0.0).to(acc_ty), zeros, zeros + 1.0)
    total = tl.zeros((BLOCK_R,), tl.float64)
    state, low = begin, first
    for s in range(S):  # weights are not stored: with NEUS the second loop computes them again
        high = tl.load(edges_ptr + s + 1, mask=r_ok, other=0.0).to(acc_ty)
        weight, state = _weight(weights_ptr, s, S, r_ok, high - low, state, inv_s, NEUS, acc_ty)
        total += weight.to(tl.float64)
        low = high
    total = total.to(acc_ty)
    pad = tl.maximum(1e-5 - total, 0.0)
    total += pad

    jitter = tl.load(jitter_ptr + r, mask=r_ok, other=0.0).to(acc_ty)
    u = (j + jitter[:, None]) / (N + 1)  # [BLOCK_R, BLOCK_N]
    new = tl.full((BLOCK_R, BLOCK_N), float("inf"), acc_ty)  # inf until the sweep reaches its interval
    rank = j + tl.zeros((BLOCK_R, BLOCK_N), tl.int32)  # index of each new start in the merged list
    mass = tl.zeros((BLOCK_R,), tl.float64)
    cdf = tl.zeros((BLOCK_R,), acc_ty)
    state, low = begin, first
    for s in range(S):
        if MERGE:  # a new start that is still inf comes after this old one
            before = (new < low[:, None]) & (j < N)
            tl.store(out_row + s + tl.sum(before.to(tl.int32), axis=1), low, mask=r_ok)
            rank += (low[:, None] <= new).to(tl.int32)
        high = tl.load(edges_ptr + s + 1, mask=r_ok, other=0.0).to(acc_ty)
        weight, state = _weight(weights_ptr, s, S, r_ok, high - low, state, inv_s, NEUS, acc_ty)
        mass += ((weight + pad / S) / total).to(tl.float64)
        next_cdf = tl.minimum(mass.to(acc_ty), 1.0)
        interval_mass = next_cdf - cdf
        t = (u - cdf[:, None]) / tl.where(interval_mass < 1e-5, 1.0, interval_mass)[:, None]
        t = tl.minimum(tl.maximum(t, 0.0), 1.0)
        # rounding must not move a sample past its interval: ranks rely on the order
        point = tl.minimum(low[:, None] + t * (high - low)[:, None], high[:, None])
        new = tl.where((cdf[:, None] <= u) & (u < next_cdf[:, None]), point, new)
        cdf, low = next_cdf, high
    new = tl.where(new == float("inf"), low[:, None], new)  # the CDF may round to less than u
    if MERGE:
        tl.store(out_row[:, None] + rank, new, mask=r_ok[:, None] & (j < N))
        tl.store(out_row + S + N, low, mask=r_ok)
    else:
        tl.store(out_row[:, None] + j, new, mask=r_ok[:, None] & (j <= N))


@jit(varying=("R",))
def _merge_kernel(
    edges_ptr, new_edges_ptr,  # [R, S + 1], [R, N + 1]
    merged_ptr, order_idx_ptr,  # [R, S + N + 1], [R, S + N] int64
    R, S, N,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    j = tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    r_ok = r < R
    rj_ok = r_ok[:, None] & (j < N)
    merged_row, order_row = merged_ptr + r * (S + N + 1), order_idx_ptr + r * (S + N)

    new = tl.load(new_edges_ptr + r[:, None] * (N + 1) + j, mask=rj_ok, other=float("inf"))
    rank = j + tl.zeros((BLOCK_R, BLOCK_N), tl.int32)
    for s in range(S):
        old = tl.load(edges_ptr + r * (S + 1) + s, mask=r_ok, other=0.0)
        old_rank = s + tl.sum((new < old[:, None]).to(tl.int32), axis=1)
        tl.store(merged_row + old_rank, old, mask=r_ok)
        tl.store(order_row + old_rank, s, mask=r_ok)
        rank += (old[:, None] <= new).to(tl.int32)
    tl.store(merged_row[:, None] + rank, new, mask=rj_ok)
    tl.store(order_row[:, None] + rank, S + j, mask=rj_ok)

    last = tl.load(edges_ptr + r * (S + 1) + S, mask=r_ok, other=0.0)
    new_last = tl.load(new_edges_ptr + r * (N + 1) + N, mask=r_ok, other=0.0)
    tl.store(merged_row + S + N, tl.maximum(last, new_last), mask=r_ok)

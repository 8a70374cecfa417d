"""Where along a ray the field is sampled, one function per rendering method: returns the edges [R, S + 1] of
S = `cfg.samples` + `cfg.importance` intervals, whose starts are the samples.

Each first searches for the surface with `sdf_at` (starts [R, n] -> signed distance [R, n]) and then places the samples
that are rendered, from `near` to `far` ([R] each). Lengths are scaled meters (meters * `grid.scale`). `jitter` is a
list of [R] uniforms or Nones, one per set of samples, in the order in which they are placed. `beta` is used by VolSDF
only. Nothing here is differentiable.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unipad.config import Render
from unipad.kernels.backend import to_host
from unipad.kernels.composite import composite
from unipad.kernels.ray_sample import merge, neus_resample, sample_pdf, stratified_edges
from unipad.kernels.sdf_alpha import laplace_density, unisurf_alpha

INV_S = 64.0  # NeuS: fixed inverse scale of its first round of importance sampling, which is the only one here
ERROR = 0.1  # VolSDF: bound on the opacity's error at which sampling stops (epsilon)
ROUNDS = 5  # VolSDF: maximum number of rounds of sampling
BISECTIONS = 10  # VolSDF: steps that narrow down beta+ in one round
HALF_WIDTH = 0.05  # UniSurf: of the interval around the surface, as a fraction of the ray inside the volume


def neus_edges(cfg: Render, sdf_at: Callable, near: Tensor, far: Tensor, jitter: Sequence, beta: Tensor) -> Tensor:
    """`samples` stratified over the ray, `importance` drawn from the NeuS weights of those at inverse scale INV_S."""
    edges = stratified_edges(near, far, cfg.samples, jitter[0])
    return neus_resample(edges, sdf_at(edges[:, :-1]), INV_S, cfg.importance, jitter[1])


def volsdf_edges(cfg: Render, sdf_at: Callable, near: Tensor, far: Tensor, jitter: Sequence, beta: Tensor) -> Tensor:
    """`importance` by algorithm 1 of VolSDF (arXiv 2106.12052) and `samples` stratified over the ray.

    Starting from `search` samples, each round adds as many where the opacity's error bound is largest, until the bound
    is at most ERROR with the field's own `beta` [1] on every ray of the call: rays rendered together stop together (as
    in the original), for which the host waits for the device once per round. Until then each ray uses beta+, a larger
    beta that meets the bound.
    """
    edges = stratified_edges(near, far, cfg.search, jitter[0])
    sdf = sdf_at(edges[:, :-1])
    # [R], large enough to meet the bound with any distances: VolSDF's lemma 2
    beta_plus = (edges.diff(dim=1).square().sum(dim=1) / (4 * math.log(1 + ERROR))).sqrt()
    for i in range(1, ROUNDS + 1):
        deltas = edges.diff(dim=1)
        clearance = _clearance(sdf, deltas)
        beta_plus = _tighten(beta, beta_plus, sdf, deltas, clearance)
        transmittance, error = _transmittance_and_error(beta_plus[:, None], sdf, deltas, clearance)
        if i == ROUNDS or to_host((beta_plus <= beta).all(), "convergence of VolSDF's sampler"):
            break
        new_edges = sample_pdf(edges, error * transmittance, cfg.search, jitter[i])
        edges, order = merge(edges, new_edges)
        sdf = torch.cat([sdf, sdf_at(new_edges[:, :-1])], dim=1).gather(1, order)
    alpha = 1 - torch.exp(-deltas * laplace_density(sdf, beta_plus[:, None]))
    importance = sample_pdf(edges, alpha * transmittance, cfg.importance, jitter[ROUNDS])
    return merge(importance, stratified_edges(near, far, cfg.samples, jitter[ROUNDS + 1]))[0]


def unisurf_edges(cfg: Render, sdf_at: Callable, near: Tensor, far: Tensor, jitter: Sequence, beta: Tensor) -> Tensor:
    """`samples` stratified around the first entry into a surface (over the whole ray where there is none), `importance`
    drawn from the weights of the occupancy at `search` stratified samples."""
    edges = stratified_edges(near, far, cfg.search, jitter[0])
    starts = edges[:, :-1]
    sdf = sdf_at(starts)
    importance = sample_pdf(edges, _weights(unisurf_alpha(sdf)), cfg.importance, jitter[1])

    changes = sdf[:, :-1] * sdf[:, 1:] < 0  # [R, search - 1]
    first = changes.int().argmax(dim=1, keepdim=True)  # [R, 1]
    (before, after), (start, end) = ((x.gather(1, first), x.gather(1, first + 1)) for x in (sdf, starts))
    enters = changes.any(dim=1) & (before[:, 0] > 0)  # a ray that starts inside leaves first: no visible surface
    surface = ((before * end - after * start) / (before - after))[:, 0]  # [R], by linear interpolation
    half = HALF_WIDTH * (far - near)
    low = torch.where(enters, torch.maximum(surface - half, near), near)
    high = torch.where(enters, torch.minimum(surface + half, far), far)
    return merge(stratified_edges(low, high, cfg.samples, jitter[2]), importance)[0]


# Method -> its sampler and the number of uniforms that it takes per ray, the length of `jitter`
SAMPLERS = {"neus": (neus_edges, 2), "volsdf": (volsdf_edges, ROUNDS + 2), "unisurf": (unisurf_edges, 3)}


def _weights(alpha):
    """[R, S] weights of samples with opacity `alpha` [R, S] in the rendered color."""
    return composite(alpha, alpha[..., None])[1]  # the composited values, here alpha again, do not matter


def _clearance(sdf, deltas):
    """d* of VolSDF's theorem 1: a lower bound on each interval's distance to the surface, [R, S]; 0 if they intersect.

    The signed distances are radii of surface-free balls around the interval's ends. The last interval, whose end has no
    known distance, gets the value of the one before.
    """
    length, before, after = deltas[:, :-1], sdf[:, :-1].abs(), sdf[:, 1:].abs()
    s = (length + before + after) / 2  # half the perimeter of a triangle with these sides
    area = (s * (s - length) * (s - before) * (s - after)).clamp(min=0).sqrt()  # Heron's formula
    height = torch.where(before + after > length, 2 * area / length, 0)
    # in an obtuse triangle the nearer end, not the foot of the height, is the nearest point of the interval
    height = torch.where(length**2 + before**2 <= after**2, before, height)
    height = torch.where(length**2 + after**2 <= before**2, after, height)
    height = torch.where(sdf[:, :-1].sign() * sdf[:, 1:].sign() == 1, height, 0)
    return torch.cat([height, height[:, -1:]], dim=1)


def _transmittance_and_error(beta, sdf, deltas, clearance):
    """Transmittance before each interval, and the bound on the opacity's error up to its end, as a multiple of this
    transmittance, [R, S] each."""
    S = deltas.shape[1]
    optical_depth = deltas * laplace_density(sdf, beta)
    error = torch.exp(-clearance / beta) * deltas**2 / (4 * beta**2)
    # running sums as products with triangular matrices: on a GPU, a cumsum of floats is not deterministic
    up_to = torch.ones(S, S, dtype=deltas.dtype, device=deltas.device).triu()
    transmittance = torch.exp(-(optical_depth @ up_to.triu(1)))
    return transmittance, torch.exp(error @ up_to).clamp(max=1e6) - 1  # finite, since inf * 0 is NaN


def _tighten(beta, beta_plus, sdf, deltas, clearance):
    """The smallest beta+ per ray, [R], with an error up to ERROR: the field's own `beta` [1] if possible, else found by
    bisection between it and the last round's `beta_plus` [R]."""

    def meets(candidate):
        transmittance, error = _transmittance_and_error(candidate, sdf, deltas, clearance)
        return (transmittance * error).amax(dim=1) <= ERROR  # [R]

    high = torch.where(meets(beta), beta, beta_plus)
    low = beta.expand_as(high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        ok = meets(middle[:, None])
        low, high = torch.where(ok, low, middle), torch.where(ok, middle, high)
    return high

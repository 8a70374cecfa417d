"""The loss `photometric`: depth from images alone. A patch of pixels, carried to the rendered depth of its middle ray
and from there into other images, must look there as it does in its own image.

    error in a source   0.85 (1 - SSIM) / 2 + 0.15 |difference| over the patch, mean over its pixels and channels
    error of a patch    the smallest over the sources that see it whole: it is occluded in some others
    pull                if another depth along the ray looks distinctly better, |log(depth / that depth)| instead
    counted             if some source sees the patch at either depth, and none shows it more alike unmoved: in the
                        same place of the same camera's image, as if the car were at rest

Smallest error and unmoved patches are rules of Monodepth2 (Godard et al., arXiv 1806.01260, sections 3.1 and 3.2),
which VisionPAD (Zhang et al., arXiv 2411.14716) uses for pre-training. Here poses are given; all pixels of a patch have
one depth, as in DSO (Engel et al., arXiv 1607.02565), so that one ray per patch is rendered; and a point may leave one
camera and enter another, since sources are all cameras of the frames before and after the keyframe, and the other
cameras of the keyframe.

The pull is what leads out of a wrong depth. Gradients of the error lead to the right one only from as far as an image's
structures reach. What is near but rendered far, such as a wall beside the car, looks more alike unmoved than at the
rendered depth, and would never be counted. So the patch is looked for at `TRIED` depths along its ray, a plane sweep
(Collins 1996), in the frames of its own camera. The error of a depth is the mean of those in the two best of these
frames, since a wrong depth may look right in one of them by chance. The best depth is distinct if its error is less
than `RATIO` times that of any depth elsewhere, like a match by Lowe's ratio test (2004). Depth Hints (Watson et al.,
arXiv 1909.09051) pull towards depths from stereo matching, wherever these have a smaller error; here they come from the
sources themselves, with the patch's rendered depth among those tried.

Coarse patches are of every k-th pixel, on images averaged over squares of k x k pixels.

Unmoved patches are what moves with the car, the whole picture while the car stands, and the sky, which does not move in
the images of a car that drives straight ahead. Other moving objects may be found at a wrong depth, or at none that is
distinct: nothing is done about them.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from unipad.batch import Batch
from unipad.config import RayChoice
from unipad.errors import UserError
from unipad.kernels.warp import warp
from unipad.model.rays import Rays

SSIM_WEIGHT = 0.85  # the rest is that of the absolute difference; as in Monodepth2
NEAREST, FARTHEST, TRIED = 1.5, 60.0, 32  # meters, between which this many depths are tried: 12 % from one to the next
APART, RATIO = 2, 0.6  # depths that are more than APART places from the best have at least its error / RATIO
C1, C2 = 0.01**2, 0.03**2  # constants of SSIM (Wang et al. 2004) for colors in [0, 1]


@dataclass(frozen=True)
class Images:
    """M images per sample: the arguments of `warp` after depths and rays."""

    pixels: Tensor  # [B, M, H, W, 3] uint8, or floats in [0, 1]
    projections: Tensor  # [B, M, 4, 4] LiDAR meters -> (u*d, v*d, d, 1)
    sizes: Tensor  # [B, M, 2] height, width; 0: no image


@dataclass(frozen=True)
class Sources:
    """Where the patches of rays of N cameras are looked for."""

    keyframe: Images  # of the N cameras
    others: Images  # of F frames, each of the N cameras, frame after frame


def sources_of(batch: Batch, cfg: RayChoice) -> Sources:
    """The sources of a batch of keyframes, for rays that `cfg` has chosen. Raises `UserError` if it has none, or not
    all cameras of each frame."""
    if batch.source_images is None:
        raise UserError("this dataset does not read --data.sources, which the loss photometric needs; see `Sample`.")
    M, N = batch.source_images.shape[1], batch.images.shape[1]
    if not N or M % N or not M:
        raise UserError(f"{M} source images are not some frames of {N} cameras each; see `Sample.source_images`.")
    keyframe = _averaged(batch.images, batch.lidar2image, batch.image_sizes, cfg.patch_step)
    others = _averaged(batch.source_images, batch.lidar2source, batch.source_sizes, cfg.patch_step)
    return Sources(keyframe, others)


def _averaged(images, projections, sizes, step):
    """`Images` averaged over squares of `step` x `step` pixels. images: [B, M, 3, H, W]."""
    if step > 1:
        scale = 255 if images.dtype == torch.uint8 else 1
        # sample by sample: only one has all its images in fp32 at a time
        images = torch.stack([F.avg_pool2d(of_sample.float(), step) for of_sample in images]) / scale
        projections = torch.cat([projections[..., :2, :] / step, projections[..., 2:, :]], dim=-2)
        sizes = sizes // step
    return Images(images.permute(0, 1, 3, 4, 2), projections, sizes)


def photometric_error(depth: Tensor, hit: Tensor, patches: Rays, sources: Sources) -> tuple[Tensor, Tensor]:
    """The error of every patch, see above.

    depth:   [P] meters along the middle rays of the patches, in which the error is differentiable once.
    hit:     [P] bool, whether these rays cross the volume: a patch whose middle ray does not is not counted.
    patches: P * E rays of strategy `patch`: sample after sample, view after view, patch after patch.

    Returns:
        error:   [P] at least 0; 0 where it is not counted, NaN where the depth is.
        counted: [P] bool.
    """
    keyframe, others = sources.keyframe, sources.others
    P, (B, N) = len(depth), keyframe.pixels.shape[:2]
    view = torch.arange(P, device=depth.device) * B * N // P  # [P] of each patch, among those of all samples
    own = (torch.arange(N, device=depth.device) == (view % N)[:, None])[:, None]  # [P, 1, N]
    of_view, others_of_view = (_of_views(images, N) for images in (keyframe, others))
    at = depth[:, None]  # [P, 1]

    # in its own camera the end of a ray is seen in the ray's pixel, whatever the depth
    target, seen = _warped(at.detach(), patches, view, of_view)  # [P, 1, E, 1, 3], [P, 1, E, 1]
    known = hit[:, None, None] & seen.all(dim=2)  # [P, 1, 1]
    in_keyframe = _errors(*_warped(at, patches, view // N, keyframe), target, known & ~own)  # [P, 1, N]
    in_others = _errors(*_warped(at, patches, view // N, others), target, known)
    error = torch.cat([in_keyframe, in_others], dim=2).amin(dim=(1, 2))  # [P], inf: seen nowhere
    with torch.no_grad():
        tried, now = _tried(depth)
        errors = _errors(*_warped(tried, patches, view, others_of_view), target, known)  # [P, TRIED, F]
        two = errors.topk(min(2, errors.shape[2]), dim=2, largest=False).values
        errors = torch.where(two < torch.inf, two, two[..., :1]).mean(dim=2)  # [P, TRIED]
        best, place = errors.min(dim=1)
        apart = (torch.arange(TRIED, device=depth.device) - place[:, None]).abs() > APART
        distinct = best < RATIO * errors.where(apart, torch.inf).amin(dim=1)
        pulled = distinct & (place != now)
        proposed = tried.gather(1, place[:, None])[:, 0]
        # the same place: in the middle of one image is that in the middle of the other, whatever their sizes
        stretch = F.pad((others_of_view.sizes / of_view.sizes).flip(-1), (0, 2), value=1.0)  # 0: no image
        at_rest = replace(others_of_view, projections=stretch[..., None] * of_view.projections)
        unmoved = _errors(*_warped(at, patches, view, at_rest), target, known).amin(dim=(1, 2))
        # True for NaN, which must not be hidden
        counted = ~((error == torch.inf) & ~pulled | (torch.minimum(error, best) >= unmoved))
    # 1 for the others: the gradient of log would be NaN at the depth of a ray that crosses no volume, 0
    ratio = torch.where(pulled, depth, 1.0) / torch.where(pulled, proposed, 1.0)
    error = torch.where(pulled, ratio.log().abs(), error)
    return torch.where(counted, error, 0), counted


def _tried(depth):
    """[P, TRIED] depths from NEAREST to FARTHEST, each by the same factor farther than the one before; one of them is
    `depth` [P], where it is between. And [P] which one."""
    step = math.log(FARTHEST / NEAREST) / TRIED
    place = (depth.log() - math.log(NEAREST)) / step
    now = place.floor()
    return NEAREST * torch.exp(step * (torch.arange(TRIED, device=depth.device) + (place - now)[:, None])), now


def _of_views(images, N):
    """`Images` of each sample, [B, F * N, ..], as those of each view's own camera, [B * N, F, ..]."""
    parts = images.pixels, images.projections, images.sizes
    return Images(*(part.unflatten(1, (-1, N)).transpose(1, 2).flatten(0, 1) for part in parts))


def _warped(depth, patches, index, images):
    """The colors of patches in images, with all rays of a patch at the same depth: [P, K, E, M, 3] colors and [P, K, E,
    M] whether they are seen, at K depths [P, K] per patch; index: [P] the row of `images` that a patch reads."""
    (P, K), E = depth.shape, len(patches) // len(depth)

    def of_rays(t):  # [P or P * E, ..] to [P * K * E, ..]
        t = t.unflatten(0, (P, -1))[:, None]
        return t.expand(-1, K, E, *t.shape[3:]).flatten(0, 2)

    rays = of_rays(patches.origins), of_rays(patches.directions), of_rays(index).int()
    results = warp(depth[..., None].expand(-1, -1, E).flatten(), rays, images.pixels, images.projections, images.sizes)
    return (result.unflatten(0, (P, K, E)) for result in results)


def _errors(colors, seen, target, known):
    """[P, K, M] error of patches in each source; inf where a source does not see the whole patch, or one is not `known`
    [P, 1, 1 or M].

    colors, seen: as `_warped` returns them; target: [P, 1, E, 1, 3], the colors in the own images."""
    x, y = colors, target
    x_mean, y_mean = x.mean(dim=2, keepdim=True), y.mean(dim=2, keepdim=True)
    dx, dy = x - x_mean, y - y_mean
    x_var, y_var, covariance = ((a * b).mean(dim=2) for a, b in ((dx, dx), (dy, dy), (dx, dy)))  # [P, K, M, 3]
    x_mean, y_mean = x_mean[:, :, 0], y_mean[:, :, 0]
    ssim = (2 * x_mean * y_mean + C1) * (2 * covariance + C2)
    ssim = ssim / ((x_mean.square() + y_mean.square() + C1) * (x_var + y_var + C2))
    error = SSIM_WEIGHT * (1 - ssim) / 2 + (1 - SSIM_WEIGHT) * (x - y).abs().mean(dim=2)
    return torch.where(seen.all(dim=2) & known, error.mean(dim=-1), torch.inf)

"""The loss `photometric`: depth from images alone. A patch of pixels, carried to the rendered depth of its rays and
from there into other images, must look there as it does in its own image.

    error of a pixel in a source   0.85 (1 - SSIM) / 2 + 0.15 |difference|, SSIM over its patch, mean over the channels
    error of the pixel             the smallest over the sources that see the whole patch: others are occluded in some
    counted                        if the pixel has such a source, and none shows it more alike unmoved: in the same
                                   place of the same camera's image in a source, as if the car were at rest

These are the rules of Monodepth2 (Godard et al., arXiv 1806.01260, sections 3.1 and 3.2: minimum reprojection and
auto-masking), which VisionPAD (Zhang et al., arXiv 2411.14716) uses for pre-training. Here poses are given; there are
patches of rays instead of whole images; and a point may leave one camera and enter another, since sources are all
cameras of the frames before and after the keyframe, and the other cameras of the keyframe.

A surface so near to its camera that no source sees it is not counted, so nothing leads away from it: a loss can escape
there. Starting with soft surfaces (`variance`) makes this less likely.

Gradients lead to the right depth only from as far as an image's structures reach. So patches may be coarse: of every
k-th pixel, on images averaged over squares of k x k pixels.

The second rule drops what moves with the car, the whole picture while the car stands, and the sky, which does not move
in the images of a car that drives straight ahead. Of other moving objects it drops nothing: their pixels may pull the
depth to a wrong place, which the smallest error over sources before and after the keyframe only makes less likely.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unipad.batch import Batch
from unipad.config import RayChoice
from unipad.errors import UserError
from unipad.kernels.warp import warp
from unipad.model.rays import Rays

SSIM_WEIGHT = 0.85  # the rest is that of the absolute difference; as in Monodepth2
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
    patch: int  # pixels along the edge of a patch


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
    return Sources(keyframe, others, cfg.patch)


def _averaged(images, projections, sizes, step):
    """`Images` averaged over squares of `step` x `step` pixels. images: [B, M, 3, H, W]."""
    if step > 1:
        scale = 255 if images.dtype == torch.uint8 else 1
        # sample by sample: only one has all its images in fp32 at a time
        images = torch.stack([F.avg_pool2d(of_sample.float(), step) for of_sample in images]) / scale
        projections = torch.cat([projections[..., :2, :] / step, projections[..., 2:, :]], dim=-2)
        sizes = sizes // step
    return Images(images.permute(0, 1, 3, 4, 2), projections, sizes)


def photometric_error(depth: Tensor, hit: Tensor, rays: Rays, sources: Sources) -> tuple[Tensor, Tensor]:
    """The error of every ray's pixel, see above.

    depth: [R] meters along the rays, in which the error is differentiable once.
    hit:   [R] bool, whether the ray crosses the volume: patches with one that does not are not counted.
    rays:  of strategy `patch`, sample after sample, view after view.

    Returns:
        error:   [R] from 0 to 1; 0 where it is not counted, NaN where the depth is.
        counted: [R] bool.
    """
    keyframe, others, patch = sources.keyframe, sources.others, sources.patch
    R, (B, N), M = len(depth), keyframe.pixels.shape[:2], others.pixels.shape[1]
    bundle = rays.origins, rays.directions, rays.volume_idx
    camera = (torch.arange(R, device=depth.device) * B * N // R % N)[:, None]  # [R, 1] of each ray
    own = torch.arange(N, device=depth.device) == camera  # [R, N]
    in_keyframe = colors, seen = warp(depth, bundle, keyframe.pixels, keyframe.projections, keyframe.sizes)
    # in its own camera the end of a ray is seen in the ray's pixel, whatever the depth
    target = colors.detach().take_along_dim(camera[..., None], dim=1)  # [R, 1, 3]
    known = (hit[:, None] & seen & own).any(dim=1, keepdim=True)  # [R, 1]
    in_others = warp(depth, bundle, others.pixels, others.projections, others.sizes)
    errors = [_errors(in_keyframe, known & ~own, target, patch), _errors(in_others, known, target, patch)]
    error = torch.cat(errors, dim=1).amin(dim=1)  # [R], inf: seen nowhere
    with torch.no_grad():
        # the same place: in the middle of one image is that in the middle of the other, whatever their sizes
        stretch = others.sizes / keyframe.sizes.repeat(1, M // N, 1)  # [B, M, 2] along v and u; 0: no image
        stretch = F.pad(stretch.flip(-1), (0, 2), value=1.0)[..., None]  # [B, M, 4, 1]
        at_rest = stretch * keyframe.projections.repeat(1, M // N, 1, 1)
        unmoved = warp(depth.detach(), bundle, others.pixels, at_rest, others.sizes)
        unmoved = _errors(unmoved, own.repeat(1, M // N), target, patch).amin(dim=1)
        counted = ~((error == torch.inf) | (error >= unmoved))  # True for NaN, which must not be hidden
    return torch.where(counted, error, 0), counted


def _errors(warped, allowed, target, patch):
    """[R, M] error of the rays' colors in each source w.r.t. `target`, [R, 1, 3]; inf where a source does not see the
    whole patch, or is not `allowed`, [R, M or 1].

    warped: the colors [R, M, 3], and whether they are seen, [R, M]."""
    colors, seen = warped[0], warped[1] & allowed
    x, y = (t.unflatten(0, (-1, patch * patch)) for t in (colors, target))  # [patches, pixels, M or 1, 3]
    x_mean, y_mean = x.mean(dim=1, keepdim=True), y.mean(dim=1, keepdim=True)
    dx, dy = x - x_mean, y - y_mean
    x_var, y_var, covariance = ((a * b).mean(dim=1, keepdim=True) for a, b in ((dx, dx), (dy, dy), (dx, dy)))
    ssim = (2 * x_mean * y_mean + C1) * (2 * covariance + C2)
    ssim = ssim / ((x_mean.square() + y_mean.square() + C1) * (x_var + y_var + C2))  # [patches, 1, M, 3]
    error = SSIM_WEIGHT * (1 - ssim) / 2 + (1 - SSIM_WEIGHT) * (x - y).abs()
    whole = seen.unflatten(0, (-1, patch * patch)).all(dim=1, keepdim=True)  # [patches, 1, M]
    return torch.where(whole, error.mean(dim=-1), torch.inf).flatten(0, 1)

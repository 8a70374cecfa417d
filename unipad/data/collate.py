"""Samples to a batch."""

import numpy as np
import torch

from unipad.batch import Batch
from unipad.data.dataset import DataError, Sample


def collate(samples: list[Sample]) -> Batch:
    """Samples to a `Batch` on the CPU, with uint8 images, padded at the right and bottom to a multiple of 32.

    Raises `DataError` for a point with a time lag that no row of its sample's `sweep_origins` has.
    """
    for sample in samples:
        _check_lags(sample)
    images, sizes = _padded([s.images for s in samples])
    source_images, source_sizes = None, None
    if samples[0].source_images is not None:
        source_images, source_sizes = _padded([s.source_images for s in samples])

    def stack(name):
        return torch.from_numpy(np.stack([getattr(s, name) for s in samples]))

    def concatenate(name):
        return torch.from_numpy(np.concatenate([getattr(s, name) for s in samples]))

    features, feature_sizes = _collated_features(samples)

    def stack_or_none(name):
        return stack(name) if all(getattr(s, name) is not None for s in samples) else None

    labeled = all(s.point_labels is not None for s in samples)
    beyond = all(s.points_beyond is not None for s in samples)
    return Batch(
        images=images,
        image_sizes=sizes,
        lidar2image=stack("lidar2image"),
        lidar2camera=stack("lidar2camera"),
        points=concatenate("points"),
        point_counts=torch.tensor([len(s.points) for s in samples]),
        boxes=concatenate("boxes"),
        labels=concatenate("labels"),
        box_counts=torch.tensor([len(s.boxes) for s in samples]),
        point_labels=concatenate("point_labels") if labeled else None,
        tokens=tuple(s.token for s in samples),
        frame_lags=stack_or_none("frame_lags"),
        cameras=samples[0].cameras,
        source_images=source_images,
        source_sizes=source_sizes,
        lidar2source=None if source_images is None else stack("lidar2source"),
        features=features,
        feature_sizes=feature_sizes,
        occupancy=stack_or_none("occupancy"),
        ego2lidar=stack_or_none("ego2lidar"),
        sweep_origins=stack_or_none("sweep_origins"),
        points_beyond=concatenate("points_beyond") if beyond else None,
        beyond_counts=torch.tensor([len(s.points_beyond) for s in samples]) if beyond else None,
    )


def _check_lags(sample):
    """Every point needs an origin for its ray: on the device, points without one would be left out silently."""
    if sample.sweep_origins is None:
        return
    lags = sample.sweep_origins[:, 3]
    for points in (sample.points, sample.points_beyond):
        if points is not None and not (known := np.isin(points[:, 4], lags)).all():
            raise DataError(
                f"{sample.token} has points with the time lag {points[~known][0, 4]}, which is not in "
                "Sample.sweep_origins: both must be exactly equal."
            )


def _padded(images_of_samples):
    """[B, N, C, H, W] uint8 images, zero-padded to a multiple of 32, with C last in memory; [B, N, 2] their sizes."""
    views = len(images_of_samples[0])
    sizes = [image.shape[:2] for images in images_of_samples for image in images]
    sizes = torch.tensor(sizes, dtype=torch.int64).view(len(images_of_samples), views, 2)
    H, W = (max(32, -(-max(sizes[..., i].flatten().tolist(), default=1) // 32) * 32) for i in range(2))
    channels = images_of_samples[0][0].shape[2] if views else 3
    padded = np.zeros((len(images_of_samples), views, H, W, channels), np.uint8)
    for images, views_of_sample in zip(images_of_samples, padded, strict=True):
        for image, view in zip(images, views_of_sample, strict=True):
            view[: image.shape[0], : image.shape[1]] = image
    return torch.from_numpy(padded).permute(0, 1, 4, 2, 3), sizes


def _collated_features(samples):
    """`Batch.features` and `Batch.feature_sizes`."""
    if any(sample.features is None for sample in samples):
        return None, None
    maps = [feature for sample in samples for feature in sample.features]
    sizes = torch.tensor([feature.shape[:2] for feature in maps])
    dtype = np.result_type(*{feature.dtype for feature in maps})
    features = np.zeros((len(maps), *sizes.amax(dim=0).tolist(), maps[0].shape[2]), dtype)
    for feature, padded in zip(maps, features, strict=True):
        padded[: feature.shape[0], : feature.shape[1]] = feature
    return torch.from_numpy(features).unflatten(0, (len(samples), -1)), sizes.unflatten(0, (len(samples), -1))

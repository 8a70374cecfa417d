"""Test-time augmentation: predictions for rotated, scaled and flipped copies of a batch, merged.

As in the original's final fusion recipe, boxes that overlap one of their class with a higher score are dropped,
whichever copy they come from; logits of points are summed. Images keep their pixels and the cameras move with the
points, so the same images are encoded again for every copy, which takes most of the time of a camera or fusion model.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from unipad.batch import Batch
from unipad.boxes import transform_boxes
from unipad.data.transforms import make_transform
from unipad.evaluate.submission import MAX_BOXES
from unipad.model.detect import Detections, suppress
from unipad.model.segment import classes_of

OVERLAP = 0.1  # bird's-eye IoU above which the lower-scored of two boxes is dropped; as in the original


def make_transforms(
    scales: Sequence[float] = (1.0,), angles: Sequence[float] = (0.0,), flips: bool = True
) -> list[np.ndarray]:
    """All combinations of `scales` (factors), `angles` (radians, x towards y) and, with `flips`, the signs of x and y,
    as transforms [4, 4] from the batch's LiDAR frame to that of a copy."""
    flipped = list(itertools.product((False, True), repeat=2)) if flips else [(False, False)]
    return [make_transform(a, s, flip_x=x, flip_y=y) for a, s, (x, y) in itertools.product(angles, scales, flipped)]


def detect_tta(
    detect: Callable[[Batch], list[Detections]], transforms: list[np.ndarray], batch: Batch
) -> list[Detections]:
    """Merged detections of all copies, in the LiDAR frame of `batch`, best score first, `MAX_BOXES` per sample at most.

    detect: such as `Detector.detect`. transforms: from `make_transforms`.
    """
    detections = []  # for each copy a list with the `Detections` of each sample
    for transform in transforms:
        back = np.linalg.inv(transform)
        detections.append([_transformed(found, back) for found in detect(transformed_batch(batch, transform))])
    return [merged(of_sample) for of_sample in zip(*detections, strict=True)]


def segment_tta(
    logits: Callable[[Batch], torch.Tensor], transforms: list[np.ndarray], batch: Batch
) -> list[torch.Tensor]:
    """Classes by the summed logits of all copies of a batch, as `Segmenter.segment` returns them.

    logits: such as `Segmenter.logits`. transforms: from `make_transforms`.
    """
    return classes_of(batch, sum(logits(transformed_batch(batch, transform)) for transform in transforms))


def transformed_batch(batch: Batch, transform: np.ndarray) -> Batch:
    """The batch transformed by `transform` [4, 4], except for its ground-truth boxes, which do not change."""
    forth, back = (torch.from_numpy(m).to(batch.points.device) for m in (transform, np.linalg.inv(transform)))  # fp64
    points = batch.points.clone()
    points[:, :3] = (points[:, :3].double() @ forth[:3, :3].T + forth[:3, 3]).to(points.dtype)
    return replace(
        batch,
        points=points,
        lidar2image=(batch.lidar2image.double() @ back).to(batch.lidar2image.dtype),
        lidar2camera=(batch.lidar2camera.double() @ back).to(batch.lidar2camera.dtype),
        sweep_origins=None,  # for a loss alone, as the points beyond
        points_beyond=None,
        beyond_counts=None,
    )


def merged(detections: Sequence[Detections]) -> Detections:
    """One `Detections` from several of the same sample, all in one LiDAR frame: without boxes that overlap a
    higher-scored one of their class, best score first, `MAX_BOXES` at most."""
    together = Detections(
        *(torch.cat([getattr(one, name) for one in detections]) for name in ("boxes", "scores", "labels"))
    )
    kept = suppress(together, [(label, OVERLAP) for label in together.labels.unique().tolist()])
    best = kept.scores.argsort(descending=True, stable=True)[:MAX_BOXES]
    return Detections(kept.boxes[best], kept.scores[best], kept.labels[best])


def _transformed(detections, transform):
    """`Detections` with their boxes transformed by `transform` [4, 4]."""
    boxes = transform_boxes(detections.boxes.float().cpu().numpy(), transform)
    return replace(detections, boxes=torch.from_numpy(boxes).to(detections.boxes.device))

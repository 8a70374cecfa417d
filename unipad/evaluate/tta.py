"""Test-time augmentation: a batch is looked at turned, scaled and mirrored, and what was found each time is merged;
logits of points are summed.

As the original's final fusion recipe does it: of all boxes of a class, those that overlap a better one go, whichever
look found it. Images keep their pixels; the cameras move with the points. So every look encodes the same images again,
which is most of the time of a camera's or a fusion model.
"""

import itertools
from dataclasses import replace

import numpy as np
import torch

from unipad.boxes import transform_boxes
from unipad.data.transforms import make_transform
from unipad.evaluate.submission import MAX_BOXES
from unipad.model.detect import Detections, suppress
from unipad.model.segment import classes_of

OVERLAP = 0.1  # IoU from above beyond which the worse of two boxes goes; the original's


def looks(scales=(1.0,), angles=(0.0,), flips=True):
    """Every combination as a [4, 4] transform: factors of all lengths, radians from x towards y, and with `flips` x, y
    or both mirrored."""
    mirrors = list(itertools.product((False, True), repeat=2)) if flips else [(False, False)]
    return [make_transform(a, s, flip_x=x, flip_y=y) for a, s, (x, y) in itertools.product(angles, scales, mirrors)]


def detect_tta(detect, motions, batch):
    """What `detect`, a function of a batch such as a `Detector`'s, finds in all looks at a batch: list of `Detections`
    in the batch's own frame, best score first, `MAX_BOXES` of a sample at most."""
    looked = []  # a list of samples for each look
    for move in motions:
        back = np.linalg.inv(move)
        looked.append([_seen_from(found, back) for found in detect(moved_batch(batch, move))])
    return [merged(of_sample) for of_sample in zip(*looked, strict=True)]


def segment_in_looks(logits, motions, batch):
    """The classes that the logits of all looks stand for together, as `Segmenter.segment` returns them.

    logits: function of a batch such as a `Segmenter`'s.
    """
    return classes_of(batch, sum(logits(moved_batch(batch, move)) for move in motions))


def moved_batch(batch, move):
    """The batch in the frame that `move` [4, 4] leads to, but for its true boxes: they stay in the old one."""
    forth, back = (torch.from_numpy(m).to(batch.points.device) for m in (move, np.linalg.inv(move)))  # fp64
    points = batch.points.clone()
    points[:, :3] = (points[:, :3].double() @ forth[:3, :3].T + forth[:3, 3]).to(points.dtype)
    return replace(
        batch,
        points=points,
        lidar2image=(batch.lidar2image.double() @ back).to(batch.lidar2image.dtype),
        lidar2camera=(batch.lidar2camera.double() @ back).to(batch.lidar2camera.dtype),
    )


def merged(found):
    """Several `Detections` of one sample in the same frame as one, without boxes that overlap a better one of their
    class; best score first, `MAX_BOXES` at most."""
    together = Detections(*(torch.cat([getattr(one, name) for one in found]) for name in ("boxes", "scores", "labels")))
    kept = suppress(together, [(label, OVERLAP) for label in together.labels.unique().tolist()])
    best = kept.scores.argsort(descending=True, stable=True)[:MAX_BOXES]
    return Detections(kept.boxes[best], kept.scores[best], kept.labels[best])


def _seen_from(found, move):
    boxes = transform_boxes(found.boxes.float().cpu().numpy(), move)
    return replace(found, boxes=torch.from_numpy(boxes).to(found.boxes.device))

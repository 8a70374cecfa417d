"""Test-time augmentation: ground-truth boxes, transformed to every view, mapped back and merged, are the same boxes.

A view is a transform [4, 4] of the LiDAR frame, not a camera's image.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.test_eval import RECIPE, perfect_detector, tiny_detector, validation
from unipad.boxes import transform_boxes
from unipad.data.collate import collate
from unipad.data.loader import held_out_batches
from unipad.data.nuscenes import NuScenesDataset
from unipad.evaluate.submission import MAX_BOXES
from unipad.evaluate.tta import detect_tta, make_transforms, merged, transformed_batch
from unipad.model.detect import Detections

VIEWS = make_transforms(scales=(1.0, 1.06, 0.96), angles=(0.0, 0.3), flips=True)


def first_frames(root, count, **settings):
    """A batch of the first frames of the validation split."""
    dataset = validation(root, **settings)
    return collate([dataset[i] for i in range(count)])


def test_views_by_hand():
    assert len(VIEWS) == 3 * 2 * 4  # scales * angles * flips
    assert np.array_equal(VIEWS[0], np.eye(4))
    assert [np.diag(view).tolist() for view in make_transforms()] == [[x, y, 1, 1] for x in (1, -1) for y in (1, -1)]
    (view,) = make_transforms(scales=(2.0,), angles=(math.pi / 2,), flips=False)
    assert view @ [1, 0, 0, 1] == pytest.approx([0, 2, 0, 1])


@pytest.mark.parametrize("transform", VIEWS[1::5], ids=lambda t: f"{t[0, 0]:.2f} {t[0, 1]:.2f}")
def test_points_and_cameras_are_transformed_together(transform, city):
    """Points are transformed; their pixels, depths and camera coordinates are as before."""
    batch = first_frames(city, 1, cameras=True)
    after = transformed_batch(batch, transform)
    homogeneous = torch.cat([batch.points[:, :3].double(), torch.ones(len(batch.points), 1).double()], dim=1)
    expected = (homogeneous @ torch.from_numpy(transform).T)[:, :3]
    assert torch.allclose(after.points[:, :3].double(), expected, atol=1e-4)
    assert torch.equal(after.points[:, 3:], batch.points[:, 3:]) and after.images is batch.images
    for name in ("lidar2image", "lidar2camera"):
        projected, projected_after = (
            getattr(b, name)[0] @ torch.cat([b.points[:, :3], torch.ones(len(b.points), 1)], dim=1).T
            for b in (batch, after)
        )
        assert torch.allclose(projected, projected_after, rtol=1e-4, atol=2e-2)


def test_detections_are_mapped_back_and_merged(city):
    """A perfect detector finds every box in the coordinates of each view; after merging, each box is there once."""
    batch = first_frames(city, 2)
    views = []  # that the detector was called with

    def detect(view_batch):
        """Recognizes the view by its points, and returns the ground-truth boxes in its frame."""
        views.append(next(v for v in VIEWS if torch.equal(transformed_batch(batch, v).points, view_batch.points)))
        boxes = torch.from_numpy(transform_boxes(batch.boxes.numpy(), views[-1]))
        return perfect_detector(replace(view_batch, boxes=boxes))

    detections = detect_tta(detect, VIEWS, batch)
    assert all(a is b for a, b in zip(views, VIEWS, strict=True))
    for ours, ground_truth in zip(detections, perfect_detector(batch), strict=True):
        # with the same suppression, though no boxes overlap in this data
        expected = merged([ground_truth])
        assert len(ours.boxes) == len(expected.boxes) > 20
        order, expected_order = (t.boxes[:, 0].argsort() for t in (ours, expected))
        a, b = ours.boxes[order], expected.boxes[expected_order]
        yaw, others = 6, [0, 1, 2, 3, 4, 5, 7, 8]
        assert torch.allclose(a[:, others], b[:, others], atol=2e-5)
        assert (a[:, yaw] - b[:, yaw]).cos().min() > 1 - 1e-6
        assert torch.equal(ours.labels[order], expected.labels[expected_order])


def test_merging_equal_detections_changes_nothing():
    boxes = torch.zeros(40, 9)
    boxes[:, 0] = torch.arange(40.0) * 3  # x: 3 m apart, so that no boxes overlap
    boxes[:, 3:6] = torch.tensor([2.0, 1.5, 1.0])
    boxes[:, 6] = torch.linspace(-3, 3, 40)
    detected = Detections(boxes, torch.linspace(0.9, 0.1, 40), torch.arange(40) % 10)
    for copies in (1, 12):
        again = merged(copies * [detected])
        for name in ("boxes", "scores", "labels"):
            assert torch.equal(getattr(again, name), getattr(detected, name))
    nothing = Detections(boxes[:0], detected.scores[:0], detected.labels[:0])
    assert len(merged([nothing, nothing]).boxes) == 0


def test_merging_keeps_the_best_of_overlapping_boxes_of_a_class():
    box = torch.tensor([[0.0, 0, 0, 2, 4, 1, 0, 0, 0]])
    near = box + torch.tensor([0.5, 0, 0, 0, 0, 0, 0, 0, 0])  # 0.5 m beside it: they overlap
    car, bus = torch.tensor([0]), torch.tensor([3])
    of_views = [
        Detections(box, torch.tensor([0.5]), car),
        Detections(near, torch.tensor([0.6]), car),
        Detections(near, torch.tensor([0.4]), bus),
    ]
    kept = merged(of_views)
    assert kept.scores.tolist() == pytest.approx([0.6, 0.4]) and kept.labels.tolist() == [0, 3]
    assert torch.equal(kept.boxes, torch.cat([near, near]))


def test_merging_keeps_as_many_boxes_as_are_allowed():
    many = torch.zeros(600, 9)
    many[:, 0] = torch.arange(600.0) * 10  # x: far apart
    many[:, 3:6] = 1
    scores = torch.arange(600) / 600  # the last box has the best score
    most = merged([Detections(many, scores, torch.zeros(600, dtype=torch.int64))])
    assert len(most.boxes) == MAX_BOXES and most.scores[-1] == scores[600 - MAX_BOXES]


def test_tta_with_only_the_identity_view_is_merging(city):
    model = tiny_detector().eval()
    _, batch = next(held_out_batches(NuScenesDataset(city, "v1.0-mini", "mini_val", RECIPE.data), 1))
    (plain,) = model.detect(batch)
    (with_tta,) = detect_tta(model.detect, make_transforms(flips=False), batch)
    expected = merged([plain])
    assert torch.equal(with_tta.boxes, expected.boxes) and torch.equal(with_tta.scores, expected.scores)

"""The segmentation losses compared with their definitions, and a model that learns with them."""

import math
from dataclasses import replace

import pytest
import torch

from tests.check import NoFloatCumsum
from unipad.config import Segment
from unipad.data.collate import collate
from unipad.data.nuscenes import NuScenesDataset
from unipad.model.segment import Segmenter, classes_of, losses, lovasz_softmax
from unipad.recipes import SEGMENT

RECIPE = SEGMENT["lidar"]["tiny"]


def by_definition(probabilities, labels):
    """The Lovász extension of 1 - IoU, mean over the classes that occur. Of a class: the sum over all points, largest
    error first, of error times the increase of 1 - IoU when this point becomes wrong after those before it."""
    values = []
    for c in labels.unique().tolist():
        true = {i for i, label in enumerate(labels.tolist()) if label == c}

        def loss_of(wrong, true=true):
            return 1 - len(true - wrong) / len(true | wrong)

        errors = [1 - p if i in true else p for i, p in enumerate(probabilities[:, c].tolist())]
        order = sorted(range(len(errors)), key=lambda i: -errors[i])
        sets = [set(order[:i]) for i in range(len(order) + 1)]
        steps = zip(order, sets, sets[1:], strict=False)
        values.append(sum(errors[i] * (loss_of(after) - loss_of(before)) for i, before, after in steps))
    return sum(values) / len(values)


@pytest.mark.parametrize("points, classes", [(1, 2), (7, 3), (40, 5), (40, 60)])
def test_lovasz_softmax_matches_its_definition(points, classes):
    probabilities = torch.randn(points, classes, dtype=torch.float64).softmax(dim=1)
    labels = torch.randint(classes, (points,))
    assert lovasz_softmax(probabilities, labels).item() == pytest.approx(
        by_definition(probabilities, labels), abs=1e-12
    )


def test_lovasz_softmax_has_the_gradient_of_its_value():
    labels, logits = torch.randint(3, (7,)), torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: lovasz_softmax(x.softmax(dim=1), labels), logits)


def test_lovasz_softmax_of_hard_predictions_is_one_minus_mean_iou():
    labels, predicted = torch.randint(4, (200,)), torch.randint(4, (200,))
    ious = [((labels == c) & (predicted == c)).sum() / ((labels == c) | (predicted == c)).sum() for c in range(4)]
    hard = torch.nn.functional.one_hot(predicted, 4).double()
    assert lovasz_softmax(hard, labels).item() == pytest.approx(1 - sum(ious).item() / 4, abs=1e-6)


def test_losses_by_hand():
    """A point of class 1 with probability 1/3, a point of class 3 with probability 3/4, and one without a label."""
    logits = torch.tensor([[0.0, 0, 0], [0, 0, math.log(6)], [9, 0, 0]]).double()
    values = losses(Segment(classes=3), logits, torch.tensor([1, 3, 0], dtype=torch.uint8))
    assert values["cross_entropy"].item() == pytest.approx((torch.tensor(3.0).log() + torch.tensor(4 / 3).log()) / 2)
    # class 1: errors 2/3 (its point) and 1/8; 1 - IoU is 1 with the first wrong, 1 with both
    # class 3: errors 1/3 and 1/4 (its point); 1 - IoU is 1/2 with the first wrong, 1 with both
    assert values["lovasz"].item() == pytest.approx((2 / 3 + (1 / 6 + 1 / 8)) / 2)
    unlabeled = losses(Segment(), logits.requires_grad_(), torch.zeros(3, dtype=torch.uint8))
    sum(unlabeled.values()).backward()
    assert not any(unlabeled.values()) and not logits.grad.any()
    weighted = losses(Segment(cross_entropy_weight=2.0, lovasz_weight=0.5), logits, torch.tensor([1, 3, 0]).byte())
    for name, factor in {"cross_entropy": 2, "lovasz": 0.5}.items():
        assert weighted[name].item() == pytest.approx(factor * values[name].item())


def test_only_points_of_the_keyframe_get_a_class(city):
    """In the order of the file; the batch also has the points of an earlier sweep."""
    data = replace(RECIPE.data, sweeps=2)  # frame 0 has no sweep before it
    batch = collate([NuScenesDataset(city, "v1.0-mini", "mini_train", data)[i] for i in (1, 2)])
    keyframes = [NuScenesDataset(city, "v1.0-mini", "mini_train", RECIPE.data)[i] for i in (1, 2)]
    # one-hot for the true class, or for class 1 where a point has no label
    logits = torch.nn.functional.one_hot((batch.point_labels.long() - 1).clamp(min=0), 16)
    predicted = classes_of(batch, logits)
    assert batch.point_counts[0] > len(keyframes[0].points)
    assert [c.tolist() for c in predicted] == [k.point_labels.clip(1).tolist() for k in keyframes]
    assert [len(c) for c in Segmenter(RECIPE).eval().segment(batch)] == [len(k.points) for k in keyframes]


def test_the_loss_falls_in_a_few_steps_on_one_frame(city):
    batch = collate([NuScenesDataset(city, "v1.0-mini", "mini_train", RECIPE.data)[0]])
    model = Segmenter(RECIPE)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    curve = []
    for _ in range(8):
        optimizer.zero_grad()
        with NoFloatCumsum():  # a cumsum of floats is not deterministic on a GPU
            loss = sum(model(batch, None).values())
            loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert curve[-1] < 0.7 * curve[0], curve

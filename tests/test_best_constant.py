"""benchmarks.best_constant: the constants by hand, and their scores compared with other computations of the same."""

import numpy as np
import pytest
import torch

from benchmarks import best_constant
from benchmarks.best_constant import Args, class_counts, constants
from unipad.batch import FREE, OCCUPANCY_CLASSES, OCCUPANCY_SHAPE
from unipad.config import Data
from unipad.data.loader import held_out_batches
from unipad.data.nuscenes import NuScenesDataset
from unipad.evaluate.rendering import evaluate_rendering
from unipad.model.pretrain import Pretrain
from unipad.recipes import PRETRAIN

ROAD, CAR = (OCCUPANCY_CLASSES.index(name) for name in ("driveable_surface", "car"))


def printed(lines):
    """{name of a constant: its numbers} of a table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {name: [float(value) for value in values] for name, *values in rows}


def test_the_most_frequent_classes_by_hand():
    """Two voxels in five frames: one is road in four, the other a car in two and, where it is seen, free in one."""
    counts = torch.zeros(640_000, 18, dtype=torch.int32)
    for of_first, of_second, second_seen in [
        (ROAD, CAR, 1), (ROAD, CAR, 1), (ROAD, FREE, 0), (ROAD, FREE, 0), (CAR, FREE, 1),
    ]:  # fmt: skip
        labels = torch.full((3, *OCCUPANCY_SHAPE), FREE, dtype=torch.uint8)
        labels[1:] = 0
        labels[0, 5, 7, 2], labels[0, 5, 8, 2] = of_first, of_second
        labels[2, 5, 7, 2], labels[2, 5, 8, 2] = 1, second_seen
        class_counts(labels, counts)
    assert counts.sum() == 8
    found = constants(counts)
    of_height, of_voxel = (found[f"most frequent class of each {what}"] for what in ("height", "voxel"))
    assert (found["free"] == FREE).all()
    assert (of_height[:, :, 2] == ROAD).all() and (of_height[:, :, :2] == FREE).all()  # 4 times road, 3 times car
    assert of_voxel[5, 7, 2] == ROAD and of_voxel[5, 8, 2] == CAR and of_voxel[5, 9, 2] == FREE
    assert (of_voxel != FREE).sum() == 2


def test_scores_of_occupancy_are_those_of_another_implementation(labeled):
    """Class by class and frame by frame, with NumPy."""
    data, frames = Data(cameras=False), {}
    for split in ("mini_train", "mini_val"):
        dataset = NuScenesDataset(labeled, "v1.0-mini", split, data).with_occupancy()
        frames[split] = [dataset[i].occupancy for i in range(len(dataset))]
    votes = np.stack([sum((true == c) & (seen > 0) for true, _, seen in frames["mini_train"]) for c in range(18)])
    constant = np.where(votes.any(axis=0), votes.argmax(axis=0), FREE)
    ious = []
    for c in range(FREE):
        shared = sum(((true == c) & (constant == c) & (seen > 0)).sum() for true, _, seen in frames["mini_val"])
        either = sum((((true == c) | (constant == c)) & (seen > 0)).sum() for true, _, seen in frames["mini_val"])
        ious += [shared / either] if either else []
    scores = printed(best_constant.occupancy(Args(data_root=labeled)))
    miou, iou, rayiou = scores["most frequent class of each voxel"]
    assert miou == pytest.approx(np.mean(ious), abs=5e-5) and 0 < miou < 0.2
    assert 0 < iou < 1 and 0 < rayiou < 0.2 and scores["free"] == [0, 0, 0]
    assert scores["most frequent class of each height"][0] < miou
    without = printed(best_constant.occupancy(Args(data_root=labeled, rays=False)))
    assert without == {name: values[:2] for name, values in scores.items()}


def test_scores_of_features_are_those_of_a_model_that_predicts_the_constant(city, capsys):
    recipe = PRETRAIN["camera"]["features-tiny"]
    train_set, val_set = NuScenesDataset.train_and_val(city, "v1.0-mini", recipe, 1.0, None)
    best_constant.main(Args(target="features", data_root=city, frames=2))
    scores = printed(capsys.readouterr().out.splitlines())
    pixels = torch.cat([best_constant.unit_features(b.to("cpu")) for _, b in held_out_batches(val_set, 2)])
    net = Pretrain(recipe)
    net.renderer.feature_head.weight.data.zero_()
    net.renderer.feature_head.bias.data.copy_(pixels.mean(dim=0))
    metrics = evaluate_rendering(net, held_out_batches(val_set, 2), seed=0, device=torch.device("cpu"))
    (best,), (of_training,) = scores["best of these frames"], scores["best of the training frames"]
    assert best == pytest.approx(metrics["features_cosine"], abs=1e-4)
    assert 0.3 < of_training < best < 1


def test_no_other_depth_has_a_lower_relative_error(city, capsys):
    truth = torch.tensor([2.0, 4, 5, 20, 20])  # weights 0.5, 0.25, 0.2, 0.05, 0.05: half of their sum is below 4
    assert best_constant.least_relative_error(truth) == 4
    truth = 1 + 30 * torch.rand(999, dtype=torch.float64)
    best = best_constant.least_relative_error(truth)
    errors = [((c - truth).abs() / truth).mean() for c in (best, *torch.linspace(1, 31, 200).tolist())]
    assert errors[0] <= min(errors) + 1e-12
    best_constant.main(Args(target="depth", data_root=city, frames=2))
    of_training, of_these = printed(capsys.readouterr().out.splitlines()).values()
    assert 3 < of_these[0] < 30 and 0.1 < of_these[1] <= of_training[1] < 2 and 0 < of_these[2] < 1

"""The dataset interface: a custom dataset in a file outside the package is read and trained on like nuScenes."""

import sys
from dataclasses import replace

import pytest
import torch

from unipad.config import Augment
from unipad.data.dataset import DEFAULT_DATASET, DataError, dataset_class
from unipad.data.loader import all_batches, held_out_batches, step_batches
from unipad.data.nuscenes import NuScenesDataset
from unipad.draw.views import rendered_views
from unipad.errors import UserError
from unipad.model.pretrain import Pretrain
from unipad.optimizer import make_optimizer
from unipad.recipes import PRETRAIN
from unipad.runtime import generators

TOY = '''
"""Three frames: one camera that looks ahead (+y), a wall of LiDAR points 12 m ahead; the last frame is missing."""

from pathlib import Path

import numpy as np

from unipad.data.dataset import BadFrame, DrivingDataset, Sample


class Toy(DrivingDataset):
    @classmethod
    def splits(cls, root, version):
        return {"train": "all", "val": "all"}

    def __init__(self, root, version, split, data, **settings):
        self.files = [Path(root) / f"{i}.npy" for i in range(3)]
        super().__init__(len(self.files), root, version, split, data, **settings)

    def load(self, frame):
        if frame == 2:
            raise BadFrame(self.files[frame], "is missing")
        rng = np.random.default_rng(frame)
        H, W = self.data.image_size
        camera = np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], np.float32)
        pixels = np.array([[W / 2, 0, W / 2, 0], [0, W / 2, H / 2, 0], [0, 0, 1, 0], [0, 0, 0, 1]], np.float32)
        points = np.zeros((200, 5), np.float32)
        points[:, 0], points[:, 1], points[:, 2] = rng.uniform(-8, 8, 200), 12, rng.uniform(-2, 2, 200)
        return Sample(
            images=[rng.integers(0, 256, (H, W, 3), np.uint8)],
            lidar2image=(pixels @ camera)[None],
            lidar2camera=camera[None],
            points=points,
            point_labels=None,
            boxes=np.array([[0, 12, 0, 2, 4, 2, 0, 0, 0]] * (frame + 1), np.float32),
            labels=np.arange(frame + 1),
            token=f"toy-{frame}",
        )


class Unrelated:
    pass
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The class `Toy`, imported by its name from a file outside the package, as --dataset does."""
    (tmp_path / "toy_set.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    yield dataset_class("toy_set:Toy")
    sys.modules.pop("toy_set")


@pytest.mark.parametrize("modality", ["camera", "lidar"])
def test_training_on_a_custom_dataset(toy, tmp_path, modality):
    recipe = PRETRAIN[modality]["tiny"]
    recipe = replace(recipe, rays=replace(recipe.rays, per_view=16), augment=Augment(rotation=0.3))
    point_range = (recipe.grid.low, recipe.grid.high)
    train_split, val_split = toy.train_val_splits(tmp_path, "any")
    dataset = toy(tmp_path, "any", train_split, recipe.data, point_range=point_range, augment=recipe.augment)
    net = Pretrain(recipe)
    optimizer = make_optimizer(net, recipe.optim)
    before = [p.detach().clone() for p in net.parameters()]
    for step, (batch, bad_frames) in zip(range(2), step_batches(dataset, micro_batch=2), strict=False):
        assert set(batch.tokens) <= {"toy-0", "toy-1"}
        assert all(bad == f"{tmp_path / '2.npy'}: is missing" for bad in bad_frames)
        losses, _ = net(batch.to("cpu"), generators(seed=0, step=step, positions=range(2), device="cpu"))
        loss = sum(losses.values())
        assert loss.isfinite()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))

    val_set = toy(tmp_path, "any", val_split, recipe.data, point_range=point_range)
    ((_, batch),) = held_out_batches(val_set, count=1)
    assert batch.tokens == ("toy-0",)
    assert rendered_views(net, batch.to("cpu"), generators=None, stride=16).shape[2] == 3  # an RGB picture
    assert [bad for _, bad in all_batches(val_set)] == [[], [], [f"{tmp_path / '2.npy'}: is missing"]]


def test_defaults_of_the_dataset_interface(toy, tmp_path):
    data = PRETRAIN["camera"]["tiny"].data
    dataset = toy(tmp_path, "any", "all", data)
    assert toy.has_images(tmp_path, "any", "all") and not toy.tasks and not dataset.scenes()
    with pytest.raises(DataError, match="needs --data-root"):
        toy.default_root(data)
    with pytest.raises(DataError, match="has no labels of LiDAR points"):
        dataset.require_point_labels()
    dataset.frames = dataset.frames[:2]  # frame 0 has class 0, frame 1 has classes 0 and 1
    balanced = dataset.balanced(seed=0)
    assert len(balanced) == 2 and balanced.frames[1] == 1  # one frame drawn per class; only frame 1 has class 1


@pytest.mark.parametrize("modality", ["camera", "fusion"])
def test_a_camera_encoder_without_images_is_a_user_error(modality, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "has_images", classmethod(lambda *_: False))
    with pytest.raises(DataError, match=f"{tmp_path} any has no images, which a camera encoder needs; use --modality"):
        toy.train_and_val(tmp_path, "any", PRETRAIN[modality]["tiny"], label_fraction=1.0, point_range=None)


def test_label_fractions_are_checked_by_the_base_class(toy, tmp_path):
    data = PRETRAIN["camera"]["tiny"].data
    assert len(toy(tmp_path, "any", "all", data, label_fraction=0.5)) == 2  # frames 0 and 2
    with pytest.raises(DataError, match="--label-fraction 0.7 is not 1/k"):
        toy(tmp_path, "any", "all", data, label_fraction=0.7)


def test_the_default_dataset_is_nuscenes_with_its_splits(city_copy):
    assert dataset_class(DEFAULT_DATASET) is NuScenesDataset
    assert NuScenesDataset.train_val_splits(city_copy, "v1.0-mini") == ("mini_train", "mini_val")
    (city_copy / "v1.0-mini").rename(city_copy / "v1.0-test")
    assert NuScenesDataset.splits(city_copy, "v1.0-test") == {"test": "test"}
    with pytest.raises(DataError, match="v1.0-test has no training split"):
        NuScenesDataset.train_val_splits(city_copy, "v1.0-test")
    (city_copy / "v1.0-test").rename(city_copy / "v2")
    with pytest.raises(DataError, match="--version v2 is not known; use v1.0-trainval, v1.0-test, v1.0-mini, or list"):
        NuScenesDataset.train_val_splits(city_copy, "v2")


@pytest.mark.parametrize("name", ["", "toy_set", "toy_set:", "toy_set:Nobody", "no_such.module:Toy", ":Toy"])
def test_a_class_that_cannot_be_imported_is_a_user_error(toy, name):
    with pytest.raises(UserError, match=f"--dataset {name} cannot be imported .*; give package.module:Class"):
        dataset_class(name)


@pytest.mark.parametrize("name", ["toy_set:Unrelated", "toy_set:np"])
def test_a_class_that_is_no_dataset_is_a_user_error(toy, name):
    with pytest.raises(UserError, match=f"--dataset {name} is not a subclass of unipad.data.dataset.DrivingDataset."):
        dataset_class(name)

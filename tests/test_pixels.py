"""The way of the pixels: bytes from the files to the device, divided there; none are read where no loss needs them.

What loading computes faster than by its formula is compared with the formula, bit by bit.
"""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from benchmarks import bench_data
from benchmarks.bench_data import Args
from unipad import runtime
from unipad.config import Augment, Data, Paste
from unipad.data.collate import collate
from unipad.data.cutpaste import load_objects
from unipad.data.dataset import BadFrame, Sample
from unipad.data.nuscenes import NuScenesDataset
from unipad.data.transforms import HIDDEN_COLOR, augment_sample, grid_mask, photometric_distortion
from unipad.errors import UserError
from unipad.model.pretrain import Pretrain
from unipad.recipes import DETECT, PRETRAIN
from unipad.runtime import World, generators

VERSION = "v1.0-mini"
LIDAR = PRETRAIN["lidar"]["tiny"]
ALL_AUGMENTATION = replace(LIDAR.augment, photometric=True, grid_mask=1.0)


def sample_of(images):
    """A sample with these images and one point."""
    matrices = np.tile(np.eye(4, dtype=np.float32), (len(images), 1, 1))
    points, boxes = np.zeros((1, 5), np.float32), np.zeros((0, 9), np.float32)
    return Sample(images, matrices, matrices, points, None, boxes, np.zeros(0, np.int64), "token")


def noise(rng, *size):
    return rng.integers(0, 256, (*size, 3), np.uint8)


def train_sets(root):
    """The LiDAR recipe's training set, augmented, as it is opened for training; and the same with pixels."""
    recipe = replace(LIDAR, augment=ALL_AUGMENTATION)
    grid = recipe.grid
    without, val_set = NuScenesDataset.train_and_val(root, VERSION, recipe, 1.0, (grid.low, grid.high))
    assert not without.pixels and val_set.pixels  # pictures of validation frames show their images
    with_color = replace(recipe, render=replace(recipe.render, rgb_weight=1.0))
    with_pixels, _ = NuScenesDataset.train_and_val(root, VERSION, with_color, 1.0, (grid.low, grid.high))
    return without, with_pixels


def test_images_travel_as_bytes_and_are_divided_where_the_batch_is_moved_to():
    rng = np.random.default_rng(0)
    samples = [sample_of([noise(rng, 40, 33), noise(rng, 20, 70)]), sample_of([noise(rng, 64, 96), noise(rng, 8, 8)])]
    expected = torch.zeros(2, 2, 3, 64, 96)
    for sample, images in zip(samples, expected, strict=True):
        for image, padded in zip(sample.images, images, strict=True):
            padded[:, : image.shape[0], : image.shape[1]] = torch.from_numpy(image).permute(2, 0, 1)
    expected.div_(255)
    assert len(expected.unique()) == 256
    batch = collate(samples)
    assert batch.images.dtype == torch.uint8 and batch.images.nbytes == expected.numel()
    moved = batch.to("cpu")
    assert moved.images.dtype == torch.float32 and torch.equal(moved.images, expected)
    assert torch.equal(moved.to("cpu").images, expected)  # divided once
    assert torch.equal(batch.keyframe().to("cpu").images, expected)
    assert batch.images.dtype == torch.uint8  # not changed
    # channels are last in memory, as they were decoded and as the encoder needs them
    assert all(b.images.permute(0, 1, 3, 4, 2).is_contiguous() for b in (batch, moved))


@pytest.mark.parametrize("modality", ["camera", "lidar"])
def test_a_batch_that_was_not_moved_is_refused(modality, city):
    recipe = PRETRAIN[modality]["tiny"]
    batch = collate([NuScenesDataset(city, VERSION, "mini_train", recipe.data)[0]])
    with pytest.raises(AssertionError, match="divided by `Batch.to`"):
        Pretrain(recipe)(batch, generators(0, 0, [0], "cpu"))


def test_without_pixels_everything_else_is_the_same(city):
    """Rays, losses and gradients too, and what augmentation draws after the photometric distortion's random numbers."""
    read = [[d.read(i, np.random.default_rng(i)) for i in (0, 1)] for d in train_sets(city)]
    for a, b in zip(*read, strict=True):
        assert [image.shape for image in a.images] == [(128, 224, 0)] * 6
        assert [image.shape for image in b.images] == [(128, 224, 3)] * 6
        for name, value in vars(a).items():
            if name != "images":
                np.testing.assert_array_equal(value, getattr(b, name), err_msg=name)
    results = []
    for samples in read:
        torch.manual_seed(0)
        net, batch = Pretrain(LIDAR), collate(samples).to("cpu")
        losses, missed = net(batch, generators(0, 0, [0, 1], "cpu"))
        sum(losses.values()).backward()
        gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        results.append({**losses, "missed": missed, **gradients})
    without, with_pixels = results
    assert without.keys() == with_pixels.keys() and "depth" in without
    assert all(torch.equal(value, with_pixels[name]) for name, value in without.items())
    assert collate(read[0]).images.nbytes == 0 and collate(read[0]).images.shape == (2, 6, 0, 128, 224)
    color = Pretrain(replace(LIDAR, render=replace(LIDAR.render, rgb_weight=1.0)))
    with pytest.raises(RuntimeError, match="size"):  # there are no colors to compare with
        color(collate(read[0]).to("cpu"), generators(0, 0, [0, 1], "cpu"))


def test_an_image_that_is_not_read_may_be_damaged(city_copy):
    """It has the size in the tables. A dataset opened after a file is missing leaves its frame out, as with pixels."""
    without, with_pixels = train_sets(city_copy)
    missing, damaged = (city_copy / with_pixels.index.image_files[frame, 2].decode() for frame in (0, 1))
    missing.unlink()
    damaged.write_bytes(b"not a picture")
    for i in (0, 1):
        with pytest.raises(BadFrame, match="is missing|not an image"):
            with_pixels[i]
        assert without[i].images[2].shape == (128, 224, 0)
    without, with_pixels = train_sets(city_copy)
    assert without.frames.tolist() == with_pixels.frames.tolist() and 0 not in without.frames
    assert without.contents() == with_pixels.contents()
    tables = NuScenesDataset(city_copy, VERSION, "mini_train", Data()).without_pixels()
    sample = tables[1]
    assert sample.images[0].shape == (72, 128, 0)
    np.testing.assert_array_equal(
        sample.lidar2image, NuScenesDataset(city_copy, VERSION, "mini_train", Data())[1].lidar2image
    )


def test_which_recipes_read_pixels():
    assert not LIDAR.reads_pixels and not PRETRAIN["lidar"]["lidar-0.075"].reads_pixels
    assert replace(LIDAR, render=replace(LIDAR.render, rgb_weight=1.0)).reads_pixels
    for recipes in (PRETRAIN, DETECT):
        assert all(recipe.reads_pixels for name in ("camera", "fusion") for recipe in recipes[name].values())
    assert not any(recipe.reads_pixels for recipe in DETECT["lidar"].values())


def test_bench_data_counts_the_bytes_of_a_sample(city, capsys):
    """Of the tiny recipes, on the small city: six padded images of 3 bytes a pixel, or none; less than 1 MB else."""
    bench_data.main(Args(("train/camera/tiny", "train/lidar/tiny"), repeats=1, data_root=city))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["| train/camera/tiny", "| train/lidar/tiny"]
    assert all(float(row[1]) > 0 for row in rows)
    with_images, without = (float(row[3]) for row in rows)
    assert with_images - without == pytest.approx(6 * 3 * 128 * 224 / 1e6, abs=0.1) and without < 1
    with pytest.raises(UserError, match="train/lidar/small; choose from train/camera/tiny"):
        bench_data.main(Args(("train/lidar/small",)))


def test_objects_are_pasted_without_pictures_where_pixels_are_not_read(city):
    with_pixels = NuScenesDataset(city, VERSION, "mini_train", Data())
    without = with_pixels.without_pixels()
    objects, pictured = (load_objects(dataset, Paste()) for dataset in (without, with_pixels))
    assert not len(objects.pictures) and len(pictured.pictures)
    np.testing.assert_array_equal(objects.boxes, pictured.boxes)
    a, b = (
        d.with_objects(o).read(0, np.random.default_rng(0)) for d, o in ((without, objects), (with_pixels, pictured))
    )
    assert len(a.boxes) > len(with_pixels[0].boxes)
    np.testing.assert_array_equal(a.points, b.points)
    assert {image.shape for image in a.images} == {(72, 128, 0)}


def distorted(image, rng):
    """`photometric_distortion` by its formula, step after step, on floats."""

    def coin():
        return rng.random() < 0.5

    pixels = image.astype(np.float32)
    brightness = rng.uniform(-32, 32) if coin() else 0.0
    contrast_first = coin()
    contrast = rng.uniform(0.5, 1.5) if coin() else 1.0
    saturation = rng.uniform(0.5, 1.5) if coin() else 1.0
    hue = rng.uniform(-18, 18) if coin() else 0.0
    pixels += brightness
    if contrast_first:
        pixels *= contrast
    if saturation != 1 or hue != 0:
        hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0] + hue) % 360
        hsv[..., 1] *= saturation
        pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if not contrast_first:
        pixels *= contrast
    if coin():
        pixels = pixels[..., rng.permutation(3)]
    return np.rint(pixels.clip(0, 255)).astype(np.uint8)


def test_colors_equal_their_formula_bit_by_bit():
    images = [noise(np.random.default_rng(i), 31, 57) for i in range(3)]
    for seed in range(60):
        rngs = [np.random.default_rng(seed) for _ in range(3)]
        found = photometric_distortion(sample_of(images), rngs[0]).images
        np.testing.assert_array_equal(found, [distorted(image, rngs[1]) for image in images])
        photometric_distortion(sample_of([image[..., :0] for image in images]), rngs[2])
        assert len({rng.random() for rng in rngs}) == 1  # all drew as many numbers


def test_hidden_pixels_equal_their_formula():
    images = [noise(np.random.default_rng(0), 40, 57), noise(np.random.default_rng(1), 64, 96)]
    for seed in range(30):
        found = augment_sample(sample_of(images), np.random.default_rng(seed), Augment(grid_mask=1.0)).images
        rng = np.random.default_rng(seed)
        rng.uniform(size=2), rng.random()  # rotation and scale; whether to mask
        period = rng.integers(2, 64)  # both heights are padded to 64
        top, left = rng.integers(period, size=2)
        for image, masked, padded_width in zip(images, found, (64, 96), strict=True):
            visible = grid_mask(64, padded_width, period, top, left)[: len(image), : image.shape[1]]
            np.testing.assert_array_equal(masked, np.where(visible[..., None], image, HIDDEN_COLOR))


def test_images_may_have_any_layout_in_memory():
    """A dataset's `load` may return views: color planes, BGR reversed, read-only."""
    image = noise(np.random.default_rng(0), 40, 57)
    planes = np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0)
    reversed_colors = np.ascontiguousarray(image[..., ::-1])[..., ::-1]
    read_only = image.copy()
    read_only.setflags(write=False)
    images = [image, planes, reversed_colors, read_only]
    for seed in range(20):
        colors = [photometric_distortion(sample_of([i]), np.random.default_rng(seed)).images[0] for i in images]
        masked = [augment_sample(sample_of([i]), np.random.default_rng(seed), Augment(grid_mask=1.0)) for i in images]
        for color, sample in zip(colors, masked, strict=True):
            np.testing.assert_array_equal(color, colors[0])
            np.testing.assert_array_equal(sample.images[0], masked[0].images[0])


@pytest.mark.parametrize(
    ("device", "cores", "processes", "expected"),
    [
        ("cuda", 64, 8, 4),
        ("cuda", 16, 8, 1),
        ("cuda", 8, 2, 3),
        ("cuda", 1, 1, 1),
        ("cuda", 2, 1, 1),
        ("cpu", 64, 1, 1),
    ],
)
def test_the_default_of_workers_leaves_every_process_a_core(monkeypatch, device, cores, processes, expected):
    """If there are enough: each has at least one worker."""
    monkeypatch.setattr(runtime, "_usable_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    world = World(0, processes, torch.device(device))
    assert world.workers(None) == expected and world.workers(7) == 7 and world.workers(0) == 0

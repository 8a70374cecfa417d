"""Image features as targets: their files, how rays read them, the city's, and a training step and metrics with them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import train
from tests.test_data_docs import TEXT
from tests.test_rays import make_batch, seeded_generators
from tests.test_train import SMALL, checkpoint, curve
from unipad.checkpoint import write_checkpoint
from unipad.config import Augment, Data
from unipad.config_dict import to_dict
from unipad.data.city.solids import CATEGORIES, CATEGORY
from unipad.data.collate import collate
from unipad.data.dataset import BadFrame, DataError
from unipad.data.features import read_features
from unipad.data.loader import held_out_batches
from unipad.data.nuscenes import NuScenesDataset
from unipad.data.synthetic import class_features
from unipad.data.transforms import augment_sample
from unipad.errors import UserError
from unipad.evaluate.rendering import evaluate_rendering
from unipad.model.pretrain import Pretrain
from unipad.model.rays import choose_rays, features_at, lidar_rays, project_points
from unipad.recipes import PRETRAIN

VERSION, FEATURES = "v1.0-mini", Path("features")
IMAGE = "samples/CAM_FRONT/a.b__1.jpg"
SIZE = (90, 160)


def write(folder, array, ending=".npy", **more):
    """Write the features of `IMAGE`; more: further arrays of an archive."""
    file = folder / "samples/CAM_FRONT" / f"a.b__1{ending}"
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, array) if ending == ".npy" else np.savez_compressed(file, features=array, **more)
    return file


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("ending", [".npy", ".npz"])
@pytest.mark.parametrize("shape", [(9, 16, 5), (6, 11, 5), (7, 11, 5), (90, 160, 5), (1, 1, 5)])
def test_features_of_any_stride_and_type_are_read(shape, ending, dtype, tmp_path):
    """Also of 14 pixels: 90 / 14 = 6.4, 160 / 14 = 11.4, which scripts round down or up."""
    array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    write(tmp_path, np.asfortranarray(array), ending)
    features = read_features(tmp_path, IMAGE, SIZE, channels=5)
    assert features.dtype == dtype and features.flags.c_contiguous and np.array_equal(features, array)


GOOD = np.ones((9, 16, 40), np.float16)


@pytest.mark.parametrize(
    "array, message",
    [
        (GOOD.transpose(2, 0, 1), r"has the shape 40 x 9 x 16: write \[h, w, channels\], .* cover the 90 x 160 image"),
        (GOOD[0], "has the shape 16 x 40"),
        (GOOD[:, :9], "has the shape 9 x 9 x 40"),
        (GOOD[..., :0], "has the shape 9 x 16 x 0"),
        (GOOD.astype(np.float64), "values of type float64: write float16 or float32"),
        (GOOD.astype(np.int8), "values of type int8"),
        (
            GOOD[..., :4],
            "has 4 channels, but other files or --data.feature-channels have 40: .* 0 takes the number from the files",
        ),
        (np.where(np.arange(40) == 3, np.nan, GOOD).astype(np.float16), "values that are not finite"),
        (np.where(np.arange(40) == 3, np.inf, GOOD).astype(np.float32), "values that are not finite"),
        (np.array([{"a": 1}], object), "is damaged, or no .npy or .npz file"),
    ],
)
def test_unusable_features_are_named(array, message, tmp_path):
    file = write(tmp_path, array)
    with pytest.raises(BadFrame, match=f"^{file}: .*{message}"):
        read_features(tmp_path, IMAGE, SIZE, channels=40)


def test_unusable_files_are_named(tmp_path):
    with pytest.raises(BadFrame, match="a.b__1.npy: is missing"):
        read_features(tmp_path, IMAGE, SIZE, channels=40)
    archive = write(tmp_path, GOOD, ".npz", others=GOOD)
    with pytest.raises(BadFrame, match=r"a.b__1.npz: has 2 arrays \(features, others\): keep only"):
        read_features(tmp_path, IMAGE, SIZE, channels=40)
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(BadFrame, match="a.b__1.npz: is damaged"):
        read_features(tmp_path, IMAGE, SIZE, channels=40)
    content = write(tmp_path, GOOD).read_bytes()
    header = content.replace(b"(9, 16, 40), }" + 12 * b" ", b"(9, 16000000000000, 40), }")  # memory for 1 PB
    assert header != content and len(header) == len(content)
    for damaged in (b"", content[:70], content[:-1], header, b"\xff" + content[1:]):
        write(tmp_path, GOOD).write_bytes(damaged)
        with pytest.raises(BadFrame, match="a.b__1.npy: is damaged"):
            read_features(tmp_path, IMAGE, SIZE, channels=40)


def dataset_of(root, **settings):
    data = replace(Data(image_size=(64, 112), features=FEATURES), **settings)
    return NuScenesDataset(root, VERSION, "mini_train", data)


def test_a_dataset_with_features(city):
    """Six images of 72 x 128 pixels, features of squares of 4 pixels, whatever size the images are resized to."""
    batch = collate([dataset_of(city)[0], dataset_of(city, feature_channels=16)[1]])
    assert batch.features.shape == (2, 6, 18, 32, 16) and batch.features.dtype == torch.float16
    assert (batch.feature_sizes == torch.tensor([18, 32])).all() and batch.feature_sizes.shape == (2, 6, 2)
    assert batch.to("cpu").features.dtype == torch.float16  # two bytes per number cross the bus
    without = dataset_of(city, features=None)[0]
    assert without.features is None and collate([without]).features is None


def test_features_of_several_sizes_are_padded(city):
    samples = [dataset_of(city)[i] for i in (0, 1)]
    samples[1].features[2] = np.full((5, 40, 16), 7, np.float32)
    batch = collate(samples)
    assert batch.features.shape == (2, 6, 18, 40, 16) and batch.features.dtype == torch.float32
    assert batch.feature_sizes[1, 2].tolist() == [5, 40] and batch.feature_sizes[0, 2].tolist() == [18, 32]
    assert (batch.features[1, 2, :5] == 7).all() and not batch.features[1, 2, 5:].any()
    assert not batch.features[0, 2, :, 32:].any()


def test_the_number_of_channels_is_counted_and_missing_files_are_refused(city_copy):
    recipe = PRETRAIN["lidar"]["features-tiny"]
    recipe = replace(recipe, data=replace(recipe.data, feature_channels=0))

    def open_sets():
        return NuScenesDataset.train_and_val(city_copy, VERSION, recipe, label_fraction=1.0, point_range=None)

    assert [dataset.data.feature_channels for dataset in open_sets()] == [16, 16]
    files = sorted((city_copy / "features").glob("samples/CAM_FRONT/*.npy"))
    damaged = [file.read_bytes() for file in files]
    for file in files:
        file.write_bytes(b"")
    with pytest.raises(DataError, match="CAM_FRONT/.*npy: is damaged, or no .npy or .npz file.$"):
        open_sets()
    for file, content in zip(files, damaged, strict=True):
        file.write_bytes(content)
    files[0].rename(files[0].with_suffix(".NPY"))
    with pytest.raises(
        DataError, match=r"/features has no features of 1 of 18 images, such as samples/CAM_FRONT/.*\.npy;"
    ):
        open_sets()


def test_a_class_without_features_is_refused(city, monkeypatch):
    monkeypatch.setattr(NuScenesDataset, "_read_features", lambda self, frame: None)
    with pytest.raises(DataError, match="NuScenesDataset reads no features: fill in Sample.features"):
        dataset_of(city).data_with_feature_channels()


def test_rays_read_features_between_the_middles_of_squares():
    """Features of 3 x 5 squares of a 12 x 30 image, worked on paper: column + 10 row, and the view.

    Square (0, 0) is 6 pixels wide and 4 high, its middle is at u = 3, v = 2.
    """
    grid = torch.arange(5.0) + 10 * torch.arange(3.0)[:, None]
    maps = torch.stack([torch.stack([grid, torch.full_like(grid, view)], dim=-1) for view in (0.0, 1.0)])
    batch = replace(
        make_batch([[0.0, 6.0, 2.0]]),
        features=torch.nn.functional.pad(maps, (0, 0, 0, 2, 0, 1), value=99)[None].half(),  # padded
        feature_sizes=torch.tensor([3, 5]).expand(1, 2, 2),
    )
    pixels = torch.tensor([[3.0, 2], [6, 2], [3, 4], [6, 4], [0, 0], [29.9, 11.9], [27, 10]]).expand(2, 7, 2)
    features = features_at(batch, 0, pixels)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features[0, :, 0], torch.tensor([0, 0.5, 5, 5.5, 0, 24, 24]))
    assert features[..., 1].tolist() == [[0] * 7, [1] * 7]
    # the point 5 m ahead of view 0 is at its pixel (16, 8): column 16 / 6 - 1 / 2, row 8 / 4 - 1 / 2
    config = replace(PRETRAIN["camera"]["tiny"].rays, per_view=1, near_radius=0.0, far_radius=1e3)
    rays = lidar_rays(batch, config, per_view=1, generators=seeded_generators(0))
    torch.testing.assert_close(rays.features[0], torch.tensor([16 / 6 - 0.5 + 15, 0.0]))
    assert rays[:1].features.shape == (1, 2) and choose_rays(batch, config, seeded_generators(0)).features.shape == (
        2,
        2,
    )
    assert lidar_rays(replace(batch, features=None), config, 1, seeded_generators(0)).features is None


def test_augmentation_moves_no_feature(city):
    """Rotated, scaled and flipped points read the same features as the recorded ones."""
    augment = Augment(rotation=1.0, scale=(0.8, 1.2), translation=(1.0, 1.0, 0.2), flip_x=1.0, flip_y=0.5)
    sample = dataset_of(city)[0]
    moved = augment_sample(sample, np.random.default_rng(0), augment)
    read = []
    for each in (sample, moved):
        batch = collate([each]).to("cpu")
        projected, visible = project_points(batch.points[:, :3], batch.lidar2image[0], batch.image_sizes[0])
        read.append((features_at(batch, 0, projected[..., :2]), visible))
    (recorded, visible), (augmented, still_visible) = read
    both = visible & still_visible
    assert both.sum() > 1000 and (visible == still_visible).float().mean() > 0.999
    torch.testing.assert_close(augmented[both], recorded[both], rtol=0, atol=2e-2)


def test_class_features_by_hand():
    category = np.zeros((6, 9), np.uint8)
    category[:4, :2] = CATEGORY["vehicle.car"]
    features = class_features(category, channels=8).astype(np.float64)
    assert features.shape == (2, 3, 8)
    sky, half = features[1, 2], features[0, 0]
    np.testing.assert_allclose(np.linalg.norm(sky), 1, atol=1e-3)
    car = 2 * half - sky  # half of the pixels of the first square are of the car
    np.testing.assert_allclose(np.linalg.norm(car), 1, atol=3e-3)
    assert abs(car @ sky) < 0.9 and np.array_equal(features[1], np.stack([sky] * 3))


def test_features_of_the_city_are_those_of_the_points_classes(city):
    """Points whose label is that of most of their square: the labels come from the LiDAR, not from the images."""
    sample = dataset_of(city, image_size=None)[0]
    labels = NuScenesDataset(city, VERSION, "mini_train", Data()).index.lidarseg_files[0]
    category = np.fromfile(city / labels.decode(), np.uint8)
    batch = collate([sample]).to("cpu")
    projected, visible = project_points(batch.points[:, :3], batch.lidar2image[0], batch.image_sizes[0])
    vectors = class_features(np.arange(len(CATEGORIES), dtype=np.uint8).repeat(16).reshape(-1, 4, 4)[:, :1].repeat(4, 1)
                             .reshape(-1, 4), 16)[:, 0]  # fmt: skip
    read = features_at(batch, 0, projected[..., :2])[visible]
    nearest = torch.nn.functional.cosine_similarity(read[:, None], torch.from_numpy(vectors).float(), dim=-1).argmax(1)
    truth = torch.from_numpy(category).expand(6, -1)[visible]
    seen = truth != CATEGORY["vehicle.ego"]
    assert (nearest == truth)[seen].float().mean() > 0.85


@pytest.mark.parametrize("modality", ["camera", "lidar"])
@pytest.mark.parametrize("kind", ["cosine", "l1"])
def test_a_step_and_the_metric_of_held_out_frames(modality, kind, city, monkeypatch):
    recipe = PRETRAIN[modality]["features-tiny"]
    recipe = replace(recipe, data=replace(recipe.data, image_size=(64, 112)), rays=replace(recipe.rays, per_view=16))
    recipe = replace(recipe, render=replace(recipe.render, features_loss=kind, samples=16, importance=8))
    train_set, _ = NuScenesDataset.train_and_val(city, VERSION, recipe, 1.0, (recipe.grid.low, recipe.grid.high))
    assert train_set.pixels == (modality == "camera")
    net = Pretrain(recipe)
    batch = collate([train_set[0]]).to("cpu")
    losses, _ = net(batch, seeded_generators(0))
    assert "features" in losses
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    assert net.renderer.feature_head.weight.grad.any()

    def metric():
        metrics = evaluate_rendering(net, held_out_batches(train_set, 1), seed=0, device=torch.device("cpu"))
        assert ("psnr" in metrics) == (modality == "camera")
        return metrics[f"features_{kind}"]

    # a head that gives the same vector on every ray has the metric of that vector
    constant = batch.features[0, 0, 0, 0].float()
    net.renderer.feature_head.weight.data.zero_()
    net.renderer.feature_head.bias.data.copy_(constant)
    truth = batch.features[0].float()[:, 1::2, 1::2]
    if kind == "cosine":
        expected = torch.nn.functional.cosine_similarity(truth, constant, dim=-1).mean()
    else:
        expected = (truth - constant).abs().mean()
    whole = metric()
    assert whole == pytest.approx(expected.item(), abs=0.05)
    monkeypatch.setattr("unipad.evaluate.rendering.CHUNK", 100)  # so a few rays of each view at once
    assert metric() == pytest.approx(whole, rel=1e-6)
    net.renderer.feature_head.bias.data.neg_()
    assert metric() != pytest.approx(expected.item(), abs=0.05)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--render.features-weight", "0"], "need each other"),
        (["--data.features", "None"], "need each other"),
        (["--data.no-cameras"], "rays through the cameras' pixels"),
        (["--render.features-loss", "l2"], None),
    ],
)
def test_settings_that_cannot_be_combined(flags, message):
    with pytest.raises(UserError if message else SystemExit, match=message):
        train.parse(["--modality", "lidar", "--preset", "features-tiny", *flags])
    if flags[0] == "--data.no-cameras":  # also where the dataset has no images
        recipe = PRETRAIN["lidar"]["features-tiny"]
        words = "see no pixels, which some losses need: add --render.features-weight 0 --data.features None"
        with pytest.raises(UserError, match=words):
            train.with_ray_origins(recipe, has_images=False, print0=print)


def test_a_step_with_camera_sweeps_in_bf16(city):
    """Features are those of the keyframe's views; the rendered ones, and the loss, stay fp32."""
    recipe = PRETRAIN["camera"]["features-tiny"]
    recipe = replace(recipe, data=replace(recipe.data, image_size=(64, 112), camera_sweeps=2))
    recipe = replace(recipe, rays=replace(recipe.rays, per_view=16))
    batch = collate([NuScenesDataset(city, VERSION, "mini_train", recipe.data)[1]]).to("cpu")
    assert batch.images.shape[1] == 12 and batch.features.shape[1] == 6
    net = Pretrain(recipe)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = net(batch, seeded_generators(0))
    assert losses["features"].dtype == torch.float32 and 0 < losses["features"] < 2
    losses["features"].backward()
    assert net.renderer.feature_head.weight.grad.any()


def test_a_run_is_evaluated_with_features_and_where_they_are_gone(city_copy, tmp_path):
    recipe = PRETRAIN["lidar"]["features-tiny"]
    args = {"data_root": str(city_copy), "version": VERSION}
    saved = {"model": Pretrain(recipe).state_dict(), "step": 1}
    write_checkpoint(saved | {"config": {"args": args, "recipe": to_dict(recipe), "steps": 1}}, tmp_path / "run.pt")

    def metrics(*flags):
        flags = ["--device", "cpu", "--workers", 0, "--pictures", 1, "--picture-stride", 16, *flags]
        evaluation.main(evaluation.parse([tmp_path / "run.pt", *flags]))
        return json.loads((tmp_path / "eval" / "render.json").read_text())

    assert {"features_cosine", "depth_rmse"} <= metrics().keys()
    (city_copy / "features").rename(city_copy / "elsewhere")
    assert "features_cosine" in metrics("--data.features", "elsewhere")
    with pytest.raises(UserError, match="has no features of 18 of 18 images, .* or do without: --data.features None"):
        metrics()
    without = metrics("--data.features", "None")
    assert "depth_rmse" in without and "features_cosine" not in without


def run_train(out, *flags):
    """Train with few rays: weights of the run in `out`, {name: value} of what its first step logged."""
    train.main(train.parse([*SMALL, *flags]))
    return checkpoint(out)["model"], {
        name: curve(out, f"train/{name}")[1] for name in ("loss", "features", "grad_norm")
    }


def new_run(city, out, *flags):
    """Flags of a new run in `out`."""
    return ["--modality", "lidar", "--preset", "features-tiny", "--data-root", city, "--out", out, *flags]


@pytest.mark.parametrize("resume", ["the run", "auto"])
def test_a_run_that_counted_the_channels_resumes_bit_equal(resume, city_copy, tmp_path):
    """The number found is the run's: in its config.json, and where the flags that chose it are given again."""
    counting = ["--data.feature-channels", 0, "--steps", 2]
    whole, _ = run_train(tmp_path / "whole", *new_run(city_copy, tmp_path / "whole", *counting))
    run = tmp_path / "run"
    run_train(run, *new_run(city_copy, run, *counting, "--stop-at", 1))
    assert json.loads((run / "config.json").read_text())["recipe"]["data"]["feature_channels"] == 16
    again = ["--resume", run] if resume == "the run" else new_run(city_copy, run, *counting, "--resume", "auto")
    resumed, _ = run_train(run, *again)
    assert resumed["renderer.feature_head.weight"].shape[0] == 16 and resumed.keys() == whole.keys()
    assert checkpoint(run)["step"] == 2 and all(torch.equal(resumed[name], whole[name]) for name in whole)
    for file in (city_copy / "features").rglob("*.npy"):  # of another model meanwhile
        np.save(file, np.load(file)[..., :8])
    words = (
        "has 8 channels, but .* have 16"
        if resume == "the run"
        else "was started with --data.feature-channels 16, not 8"
    )
    with pytest.raises(UserError, match=words):
        run_train(run, *again)


def test_accumulated_micro_batches_have_about_the_loss_of_a_batch(city, tmp_path):
    """And its gradient norm, in a step of two samples; not the same, since batch norms get one sample at a time."""
    flags = ["--steps", 1, "--batch-size", 2]
    _, whole = run_train(tmp_path / "whole", *new_run(city, tmp_path / "whole", *flags))
    _, halves = run_train(tmp_path / "halves", *new_run(city, tmp_path / "halves", *flags, "--accumulate", 2))
    assert whole["features"] == pytest.approx(halves["features"], rel=0.1)
    assert whole["loss"] == pytest.approx(halves["loss"], rel=0.2)
    assert whole["grad_norm"] == pytest.approx(halves["grad_norm"], rel=0.5)


def test_a_dataset_without_cameras_is_refused(city, monkeypatch):
    monkeypatch.setattr(NuScenesDataset, "_read_features", lambda self, frame: [])
    with pytest.raises(DataError, match="has no images, which --data.features needs"):
        dataset_of(city).data_with_feature_channels()
    dataset = dataset_of(city)
    dataset.index = replace(dataset.index, image_files=dataset.index.image_files[:, :0])
    dataset._check_features()  # does not raise


def test_models_without_the_loss_have_no_head():
    assert PRETRAIN["camera"]["tiny"].render.features_weight == 0
    names = Pretrain(PRETRAIN["camera"]["tiny"]).state_dict()
    with_head = Pretrain(PRETRAIN["camera"]["features-tiny"]).state_dict()
    assert with_head.keys() - names.keys() == {"renderer.feature_head.weight", "renderer.feature_head.bias"}


def test_the_script_of_the_page_writes_features(city_copy, tmp_path, monkeypatch):
    """With a model that stands for DINOv2: its features of a patch are the mean colors there, normalized."""
    (script,) = re.findall(r"^```python\n(import numpy.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert len(re.sub(r"\n\s*\n", "\n", script).splitlines()) <= 22
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/nuscenes").symlink_to(city_copy)

    class Patches(torch.nn.Module):
        def forward_features(self, pixels):
            patches = torch.nn.functional.avg_pool2d(pixels, 14).flatten(2).transpose(1, 2)
            return {"x_norm_patchtokens": patches}

    monkeypatch.setattr(torch.hub, "load", lambda repository, name: Patches())
    exec(compile(script, "docs/data.md", "exec"), {})
    dataset = dataset_of(city_copy, features=Path("dinov2"))
    features = dataset[0].features[0]
    assert features.shape == (5, 9, 3) and features.dtype == np.float16  # 72 x 128 pixels are 5.1 x 9.1 patches
    image = Image.open(city_copy / dataset.index.image_files[0, 0].decode())
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (np.asarray(image.resize((9, 5), Image.Resampling.BOX)) / 255 - mean) / std
    assert np.abs(features - expected).mean() < 0.1

"""Occupancy: the metrics compared with other implementations of their definitions, the model, and runs of the scripts.

The labels are tested in test_occupancy_labels.py.
"""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
from benchmarks.label_efficiency import METRICS
from tests import scripts
from tests.test_eval import ONE_PROCESS, evaluate, evaluate_in_own_process, save_run
from tests.test_train import checkpoint, curve
from unipad.batch import FREE, OCCUPANCY_CLASSES, OCCUPANCY_SHAPE
from unipad.cli import check_recipe
from unipad.config import Augment, Data, Grid, Occupancy, Paste
from unipad.data.collate import collate
from unipad.data.nuscenes import NuScenesDataset
from unipad.data.transforms import apply_transform, make_transform
from unipad.draw.occupancy import UNSEEN, highest, occupancy_views
from unipad.draw.scene3d import occupied_scene
from unipad.draw.segments import COLORS
from unipad.errors import UserError
from unipad.evaluate.occupancy import count, count_all, evaluate_occupancy, occupancy_table, summarize
from unipad.evaluate.rayiou import THRESHOLDS, count_rays, first_hits, lidar_directions
from unipad.model.occupancy import OccupancyModel, all_voxels, in_cells, learned_voxels, losses, voxel_centers
from unipad.model.pretrain import Pretrain
from unipad.recipes import OCCUPANCY, PRETRAIN
from unipad.runtime import generators

RECIPE = OCCUPANCY["lidar"]["tiny"]
VERSION = "v1.0-mini"
ROAD, CAR, MANMADE = (OCCUPANCY_CLASSES.index(name) for name in ("driveable_surface", "car", "manmade"))


@pytest.fixture(scope="module")
def validation(labeled):
    return NuScenesDataset(labeled, VERSION, "mini_val", RECIPE.data).with_occupancy()


@pytest.fixture(scope="module")
def batch(validation):
    return collate([validation[0], validation[2]]).to("cpu")


def rngs(count):
    return generators(seed=0, step=0, positions=range(count), device="cpu")


# Metrics


def other_miou(pairs):
    """mIoU of (predicted, labels) pairs from sets of voxels, class by class: another implementation."""
    ious = {}
    for c in range(17):
        shared = either = 0
        for predicted, (true, _, seen) in pairs:
            voxels = set(zip(*np.nonzero(seen), strict=True))
            p = {v for v in voxels if predicted[v] == c}
            t = {v for v in voxels if true[v] == c}
            shared, either = shared + len(p & t), either + len(p | t)
        if either:
            ious[OCCUPANCY_CLASSES[c]] = shared / either
    return sum(ious.values()) / len(ious), ious


def march(classes, origin, direction, step=0.002):
    """(class, distance) that a ray hits first by steps of 2 mm up to 120 m: another implementation."""
    t = np.arange(0, 120, step)
    cells = np.floor((origin + t[:, None] * direction - (-40, -40, -1)) / 0.4).astype(int)
    inside = ((cells >= 0) & (cells < OCCUPANCY_SHAPE)).all(axis=1)
    t, cells = t[inside], cells[inside]
    full = np.flatnonzero(classes[tuple(cells.T)] != FREE)
    if not len(t) or not len(full):
        return FREE, t[-1] if len(t) else 0.0
    voxel = cells[full[0]]
    return classes[tuple(voxel)], t[(cells == voxel).all(axis=1)].max()


def test_metrics_of_wrong_predictions_are_those_of_other_implementations(validation, tmp_path):
    """A fifth of the voxels of parts of two frames are random; a class that is only predicted has IoU 0."""
    pairs, counts = [], []
    for i in (0, 2):
        labels = validation[i].occupancy.copy()
        part = np.zeros(OCCUPANCY_SHAPE, bool)
        part[90:130, 85:115] = True  # sets are slow
        labels[2] &= part
        rng = np.random.default_rng(i)
        predicted = np.where(rng.random(OCCUPANCY_SHAPE) < 0.2, rng.integers(0, 18, OCCUPANCY_SHAPE), labels[0])
        pairs.append((predicted.astype(np.uint8), labels))
        counts.append(count(*map(torch.from_numpy, pairs[-1])))
    summary = summarize(counts, tmp_path)
    miou, ious = other_miou(pairs)
    assert 0 < miou < 0.9 and summary["miou"] == pytest.approx(miou, abs=1e-12)
    assert {n: v for n, v in summary["iou_per_class"].items() if not math.isnan(v)} == pytest.approx(ious, abs=1e-12)
    assert summary["iou_per_class"]["others"] == 0  # only predicted
    assert json.loads((tmp_path / "occupancy_summary.json").read_text())["miou"] == summary["miou"]


def test_rays_hit_what_they_hit_by_small_steps(validation):
    labels = validation[1].occupancy[0]
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(40, 3))
    directions[:, 2] *= 0.3
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    origins = np.tile([[0.94, 0.0, 1.84], [-10.3, 0.1, 1.2], [-60.0, 3.0, 2.0], [0.5, 0.5, 9.0]], (10, 1))
    hit, distance = first_hits(*map(torch.from_numpy, (labels, origins, directions)))
    for i in range(len(origins)):
        expected = march(labels, origins[i], directions[i])
        assert hit[i] == expected[0] and abs(distance[i] - expected[1]) < 0.004, i
    assert (hit != FREE).sum() > 10 and (hit == FREE).sum() > 3


def test_rays_by_hand():
    """A wall at x = 10 m is predicted at 11.6 m, 1.6 m further (4 voxels); a car in front of it is right."""
    true = torch.full(OCCUPANCY_SHAPE, FREE, dtype=torch.uint8)
    predicted = true.clone()
    true[125], predicted[129] = MANMADE, MANMADE
    true[115, 100] = predicted[115, 100] = CAR  # from y = 0 to 0.4 m
    origin, ahead = torch.tensor([[0.2, -0.2, 2.0], [0.2, 0.2, 2.0]]).double(), torch.tensor([[1.0, 0, 0]] * 2).double()
    hit, distance = first_hits(true, origin, ahead)
    assert hit.tolist() == [MANMADE, CAR]
    assert distance.tolist() == pytest.approx([10.4 - 0.2, 6.4 - 0.2])  # to the far face of the voxel
    counts = count_rays(predicted, true, np.array([[0.2, 0.0, 2.0]]))
    ious = counts.ious()
    directions = lidar_directions()
    assert len(directions) == 39 * 360 and np.allclose(np.linalg.norm(directions, axis=1), 1)
    assert ious[:, CAR].tolist() == [1, 1, 1] and np.isnan(ious[0, ROAD])
    # along a ray the walls are 1.6 m apart, or more if it meets them at an angle: less than 2 m within 37 degrees
    assert ious[0, MANMADE] == 0 and 0.2 < ious[1, MANMADE] < 0.5 < ious[2, MANMADE] < 1
    assert THRESHOLDS == (1, 2, 4)


class Perfect(OccupancyModel):
    def predict(self, batch):
        return list(batch.occupancy[:, 0])


def test_ground_truth_scores_one_and_is_written_as_a_submission(validation, tmp_path):
    model = Perfect(RECIPE)
    counts = count_all(model, validation, ONE_PROCESS, batch_size=2, folder=tmp_path / "occupancy", rays=True)
    summary = summarize(counts.values(), tmp_path)
    assert (summary["miou"], summary["iou"], summary["rayiou"]) == (1, 1, 1)
    assert list(summary["iou_per_class"]) == list(OCCUPANCY_CLASSES[:FREE])
    file = (tmp_path / "occupancy_summary.json").read_text()
    assert math.isnan(summary["iou_per_class"]["others"]) and "NaN" not in file  # the city has none
    assert json.loads(file)["iou_per_class"]["others"] is None
    assert json.loads(file)["rayiou_per_class"]["others"] == [None] * 3
    words = occupancy_table(summary)
    assert (
        "mIoU: 1.0000" in words and "RayIoU at 2 m: 1.0000" in words and all(n in words for n in OCCUPANCY_CLASSES[:17])
    )
    pairs = []
    for i in range(len(validation)):
        sample = validation[i]
        written = np.load(tmp_path / "occupancy" / f"{sample.token}.npz")
        assert written.files == ["arr_0"] and written["arr_0"].dtype == np.uint8
        assert np.array_equal(written["arr_0"], sample.occupancy[0])
        pairs.append((written["arr_0"], sample.occupancy))
    assert other_miou(pairs[:1])[0] == 1


def test_unreadable_frames_are_named_and_do_not_count(labeled, tmp_path, capsys):
    root = shutil.copytree(labeled, tmp_path / "city")
    dataset = NuScenesDataset(root, VERSION, "mini_val", RECIPE.data).with_occupancy()
    file = root / dataset.occupancy_index.files[1].decode()
    file.write_bytes(b"")
    folder = tmp_path / "eval" / "occupancy"
    folder.mkdir(parents=True)
    (folder / f"{dataset.index.tokens[1].decode()}.npz").write_bytes(b"of an earlier model")
    others = folder / "of_another_split.npz"
    others.touch()
    counts = count_all(Perfect(RECIPE), dataset, ONE_PROCESS, folder=folder)
    out, err = capsys.readouterr()
    assert others.exists() and {file.stem for file in folder.iterdir()} - {others.stem} == counts.keys()
    assert len(counts) == 2 and f"skipped {file}: is damaged" in err
    assert "incomplete: 1 of 3 frames of mini_val have no prediction" in out
    assert evaluate_occupancy(Perfect(RECIPE), dataset, tmp_path, ONE_PROCESS) == {"mIoU": 1, "IoU": 1}


# Model


def test_voxels_find_their_place_in_the_volume():
    """By hand: the LiDAR is 0.94 m ahead of the ego frame's origin and 1.84 m above it, and its x axis points right."""
    ego2lidar = torch.tensor([[0.0, -1, 0, 0], [1, 0, 0, -0.94], [0, 0, 1, -1.84], [0, 0, 0, 1]])
    grid = Grid(low=(-40.0, -40.0, -3.0), high=(40.0, 40.0, 9.0), cell=(1.25, 1.25, 2.0))
    voxel = torch.tensor([(120 * 200 + 50) * 16 + 3])  # x = 8.2 m ahead, y = -19.8 m left, z = 0.4 m
    assert [v.item() for v in voxel_centers(voxel)] == pytest.approx([8.2, -19.8, 0.4], abs=1e-5)
    expected = [(19.8 + 40) / 1.25, (8.2 - 0.94 + 40) / 1.25, (0.4 - 1.84 + 3) / 2]
    assert in_cells(voxel, ego2lidar, grid)[0].tolist() == pytest.approx(expected, abs=1e-4)
    assert len(all_voxels("cpu")) == 640_000


def test_augmentation_moves_voxels_with_the_points(validation):
    """Labels stay; a voxel's place in the volume is that of the points in it, turned, scaled, shifted and flipped."""
    sample = validation[0]
    moved = apply_transform(sample, make_transform(0.4, 1.1, (0.3, -0.2, 0.1), flip_x=True))
    voxel = all_voxels("cpu")[::997]
    ego = torch.stack([*voxel_centers(voxel), torch.ones(len(voxel))], dim=1).double().numpy()
    points = np.zeros((len(voxel), 5), np.float32)
    points[:, :3] = (ego @ sample.ego2lidar.T.astype(np.float64))[:, :3]
    moved_points = apply_transform(
        replace(sample, points=points), make_transform(0.4, 1.1, (0.3, -0.2, 0.1), flip_x=True)
    ).points
    cells = in_cells(voxel, torch.from_numpy(moved.ego2lidar), Grid(low=(0.0,) * 3, high=(9.0,) * 3, cell=(1.0,) * 3))
    assert np.allclose(cells.numpy(), moved_points[:, :3], atol=1e-3)
    assert moved.occupancy is sample.occupancy


def test_learned_voxels_are_those_in_the_mask_and_in_the_volume(batch):
    for mask, channel in (("camera", 2), ("lidar", 1), ("none", None)):
        sample, voxel, cells, shift = learned_voxels(batch, Occupancy(mask=mask), RECIPE.grid, rngs(2))
        assert not shift.any()
        for b in range(2):
            kept = batch.occupancy[b, channel].flatten() > 0 if channel else torch.ones(640_000, dtype=torch.bool)
            at = in_cells(all_voxels("cpu"), batch.ego2lidar[b], RECIPE.grid)
            near = ((at > -1) & (at < torch.tensor(RECIPE.grid.shape) + 1)).all(dim=1)
            assert torch.equal(voxel[sample == b], (kept & near).nonzero()[:, 0])
            assert torch.equal(cells[sample == b], at[kept & near])


@pytest.mark.parametrize("most, full_ones", [(100, 50), (60_000, None)])
def test_drawn_voxels_are_half_full_and_the_shift_corrects_for_it(most, full_ones, batch):
    """If fewer than half can be full, all full ones are drawn. The shift is the log of how much larger the odds of free
    to full are among the drawn voxels than among all."""
    cfg = Occupancy(max_voxels=most)
    sample, voxel, _, shift = learned_voxels(batch, cfg, RECIPE.grid, rngs(2))
    assert torch.equal(voxel, learned_voxels(batch, cfg, RECIPE.grid, rngs(2))[1])
    assert (batch.occupancy[:, 2].flatten(1)[sample, voxel] > 0).all() and len(sample) == 2 * most
    all_sample, all_voxel, *_ = learned_voxels(batch, Occupancy(), RECIPE.grid, rngs(2))
    for b in range(2):
        assert len(voxel[sample == b].unique()) == most
        full, all_full = (
            batch.occupancy[b, 0].flatten()[v[s == b]] != FREE for s, v in ((sample, voxel), (all_sample, all_voxel))
        )
        assert full.sum() == (full_ones or all_full.sum())
        odds, all_odds = ((~f).sum() / f.sum() for f in (full, all_full))  # free to full
        assert shift[sample == b].sub(odds.log() - all_odds.log()).abs().max() < 1e-4


def test_losses_by_hand():
    """Two voxels of three classes, with probabilities 1/3 and 3/4 of the true one.

    Lovász: of class 0 the errors are 2/3 at its voxel and 1/8 at the other one, and already the first makes its IoU 0:
    2/3. Of class 2 they are 1/3 at the other voxel, which makes its IoU 1/2, and 1/4 at its own, which makes it 0:
    1/3 * 1/2 + 1/4 * 1/2. Class 1 does not occur.
    """
    logits = torch.tensor([[0.0, 0, 0], [0, 0, math.log(6)]]).double()
    labels = torch.tensor([0, 2])
    values = losses(Occupancy(classes=3, lovasz_weight=0.5), logits, labels)
    assert values["cross_entropy"].item() == pytest.approx((math.log(3) + math.log(4 / 3)) / 2)
    assert values["lovasz"].item() == pytest.approx(0.5 * (2 / 3 + 7 / 24) / 2)
    none = losses(Occupancy(), torch.zeros(0, 18, requires_grad=True), torch.zeros(0, dtype=torch.int64))
    assert not any(none.values())


def test_training_and_prediction_read_the_same_logits(batch):
    model = OccupancyModel(RECIPE).eval()
    with torch.no_grad():
        volume, _ = model.encoder(batch, generators=None)
        sample, voxel, cells, _ = learned_voxels(batch, Occupancy(max_voxels=3000), RECIPE.grid, rngs(2))
        logits = model.head(volume, sample, voxel, cells)
        predicted = torch.stack(model.predict(batch)).flatten(1)
    best = logits.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 1e-4
    assert clear.float().mean() > 0.9
    assert torch.equal(logits.argmax(1)[clear], predicted[sample, voxel][clear].long())


@pytest.mark.parametrize("modality", ["camera", "lidar", "fusion"])
def test_the_loss_falls_in_a_few_steps_on_one_frame(modality, labeled):
    recipe = OCCUPANCY[modality]["tiny"]
    dataset = NuScenesDataset(
        labeled, VERSION, "mini_train", replace(recipe.data, image_size=(64, 128))
    ).with_occupancy()
    batch = collate([dataset.read(0, np.random.default_rng(0))]).to("cpu")
    model = OccupancyModel(replace(recipe, data=replace(recipe.data, image_size=(64, 128))))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    values = []
    for _ in range(12):
        found = model(batch, rngs(1))
        assert found.keys() == {"cross_entropy", "lovasz"} | ({"depth"} if modality != "lidar" else set())
        loss = sum(found.values())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        values.append((found["cross_entropy"] + found["lovasz"]).item())
    assert values[-1] < 0.6 * values[0], values


# Pictures


def test_the_highest_seen_voxel_is_shown():
    classes = np.full(OCCUPANCY_SHAPE, FREE, np.uint8)
    classes[0, 0, 2], classes[0, 0, 5], classes[0, 0, 9], classes[1, 1, 3] = ROAD, CAR, MANMADE, CAR
    seen = np.zeros(OCCUPANCY_SHAPE, bool)
    seen[:2, :2, :8] = True  # not MANMADE
    picture = highest(classes, seen)
    assert np.allclose(picture[0, 0], COLORS[CAR]) and np.allclose(picture[1, 1], COLORS[CAR])
    assert (picture[0, 1] == 0).all() and np.allclose(picture[9, 9], UNSEEN)


@pytest.mark.parametrize("cameras", [True, False])
def test_pictures_show_truth_above_predictions(cameras, labeled, validation):
    """What is predicted road everywhere has the road's color in the lower half only."""
    dataset = NuScenesDataset(labeled, VERSION, "mini_val", Data(cameras=cameras)).with_occupancy()
    one = collate([dataset[0]]).to("cpu")
    picture = occupancy_views(one, torch.full(OCCUPANCY_SHAPE, ROAD, dtype=torch.uint8), width=100)
    is_car = (np.abs(picture.astype(int) - 255 * COLORS[CAR]).max(axis=-1) < 40)[: -70 - 20]  # without the legend
    upper, lower = np.array_split(is_car, 2)
    assert upper.sum() > 20 and lower.sum() < 5
    assert (picture.shape[1] > 600) == cameras
    mesh = occupied_scene(one, one.occupancy[0, 0])
    assert len(mesh.vertices) > 30_000 and np.abs(mesh.vertices).max() < 60


# Runs

SMALL = ["--task", "occupancy", "--preset", "tiny", "--device", "cpu", "--workers", 0, "--log-every", 1]


def parse(city, out, *flags):
    """Arguments of finetune.py; of a flag that is given twice, the last one counts."""
    small = [*SMALL, "--occupancy.max-voxels", 2000, "--data-root", city, "--out", out, "--steps", 2]
    return finetune.parse([*small, "--modality", "lidar", *flags])


@pytest.fixture(scope="module")
def run(labeled, tmp_path_factory):
    out = tmp_path_factory.mktemp("occupancy") / "run"
    finetune.main(parse(labeled, out, "--label-fraction", 0.5))
    return out


def test_a_run_writes_its_log_picture_and_config(run):
    assert sorted(curve(run)) == [1, 2] and 0 <= curve(run, "val/mIoU")[2] < 0.5
    assert curve(run, "train/lovasz")[1] > 0 and curve(run, "train/cross_entropy")[1] > 0
    assert (run / "images" / "val_000002.png").stat().st_size > 10_000
    config = json.loads((run / "config.json").read_text())
    assert config["recipe"]["label_fraction"] == 0.5 and config["recipe"]["occupancy"]["classes"] == 18


def test_a_run_is_evaluated_and_drawn(run, validation, capsys):
    evaluate(run, "--task", "occupancy", "--batch-size", 2, "--pictures", 1)
    output = capsys.readouterr().out
    assert "mIoU: 0." in output and "RayIoU: 0." in output and "driveable_surface" in output
    picture = np.asarray(Image.open(run / "eval" / "occupancy_0.png"))
    assert picture.shape[1] > 1000 and picture.std() > 20
    assert len(list((run / "eval" / "occupancy").glob("*.npz"))) == len(validation)
    for file, key in METRICS["occupancy"].values():  # what benchmarks.label_efficiency reads
        assert 0 <= json.loads((run / "eval" / file).read_text())[key] < 0.5


def test_two_processes_have_the_scores_of_one(run, tmp_path):
    done = evaluate_in_own_process(run, "--pictures", 1, "--out", tmp_path / "two", start=scripts.run_two)
    assert done.returncode == 0, done.stderr[-4000:]
    evaluate(run, "--pictures", 1, "--out", tmp_path / "one")
    one, two = (
        {file.name: file.read_bytes() for file in (tmp_path / name).glob("**/*") if file.suffix in (".json", ".npz")}
        for name in ("one", "two")
    )
    assert len(one) == 4 and one == two  # the summary and three frames


@pytest.mark.parametrize("modality", ["camera", "lidar"])
def test_the_encoder_is_taken_from_pre_training(modality, labeled, tmp_path):
    source = Pretrain(PRETRAIN[modality]["tiny"])
    pretrained = save_run(tmp_path / "pretrained", source, labeled)
    flags = ["--modality", modality, "--pretrained", pretrained, "--steps", 1, "--lr", 1e-12, "--val-every", 0]
    finetune.main(parse(labeled, tmp_path / "run", *flags))
    expected, weights = source.state_dict(), checkpoint(tmp_path / "run")["model"]
    # --lr 1e-12 keeps the weights, but the step updates the buffers of batch norms: running_*, num_batches_tracked
    taken = [name for name in weights if name.startswith("encoder.") and "running" not in name and "num" not in name]
    assert len(taken) > 20
    for name in taken:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-5, atol=1e-9)


def test_a_stopped_and_resumed_run_is_bit_equal(labeled, tmp_path):
    flags = ["--val-every", 0]
    finetune.main(parse(labeled, tmp_path / "uninterrupted", *flags))
    finetune.main(parse(labeled, tmp_path / "parts", *flags, "--stop-at", 1))
    finetune.main(parse(labeled, tmp_path / "parts", *flags, "--resume", "auto"))
    whole, parts = (checkpoint(tmp_path / name)["model"] for name in ("uninterrupted", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_test_split_gives_only_a_submission(run, city, tmp_path, capsys):
    """The dataset is made to look like nuScenes' test set: with other scene names and no labels."""
    root = shutil.copytree(city, tmp_path / "set", ignore=shutil.ignore_patterns("unipad-index", "gts", "lidarseg*"))
    tables = root / "v1.0-test"
    (root / VERSION).rename(tables)
    scenes = json.loads((tables / "scene.json").read_text())
    names = ("scene-0077", "scene-0078")  # of nuScenes' test split
    (tables / "scene.json").write_text(json.dumps([s | {"name": name} for s, name in zip(scenes, names, strict=True)]))
    flags = ["--data-root", root, "--version", "v1.0-test", "--split", "test", "--pictures", 1]
    evaluate(run, *flags, "--out", tmp_path / "eval")
    assert "no metrics" in capsys.readouterr().out
    assert len(list((tmp_path / "eval" / "occupancy").glob("*.npz"))) == 6  # frames
    assert (tmp_path / "eval" / "occupancy_0.png").exists()


def test_user_errors(run, labeled, tmp_path):
    for flags, words in {
        ("--task", "segment"): "--task segment needs a run of finetune.py --task segment",
        ("--tta",): "--tta needs a run of finetune.py",
    }.items():
        with pytest.raises(UserError, match=words):
            evaluate(run, *flags)
    with pytest.raises(UserError, match="17 classes, but nuScenes has 18"):
        recipe = replace(RECIPE, occupancy=replace(RECIPE.occupancy, classes=17))
        evaluate(save_run(tmp_path / "17", OccupancyModel(recipe), labeled))
    with pytest.raises(UserError, match="--occupancy.classes 5: labels have 18 classes"):
        parse(labeled, tmp_path / "run", "--occupancy.classes", 5)
    with pytest.raises(UserError, match="fine-tuning for occupancy cannot paste objects"):
        check_recipe(replace(RECIPE, paste=Paste()))
    root = shutil.copytree(labeled, tmp_path / "set")
    for file in root.glob("gts/*/*/labels.npz"):
        np.savez(file, semantics=np.zeros((512, 512, 40), np.uint8), mask_lidar=0, mask_camera=0)
    with pytest.raises(UserError, match=r"none of the 3 frames can be read .*more than 200 x 200 x 16 voxels"):
        finetune.main(parse(root, tmp_path / "run"))


def test_augmented_batches_keep_labels_and_frames(labeled):
    """A batch of two, rotated by up to 45 degrees: some voxels leave the volume, and are not learned."""
    augment = Augment(rotation=0.785, flip_x=0.5, flip_y=0.5)
    dataset = NuScenesDataset(labeled, VERSION, "mini_train", RECIPE.data, augment=augment).with_occupancy()
    turned = collate([dataset.read(i, np.random.default_rng(i + 3)) for i in (0, 1)]).to("cpu")
    sample, *_ = learned_voxels(turned, Occupancy(mask="none"), RECIPE.grid, rngs(2))
    assert 400_000 < (sample == 0).sum() < 640_000
    assert turned.occupancy.shape == (2, 3, *OCCUPANCY_SHAPE)

"""Occupancy: the labels that the city writes, the metrics compared with other implementations of their definitions, the
model, and runs of the scripts."""

import json
import math
import shutil
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
from tests.test_eval import ONE_PROCESS, evaluate, save_run
from tests.test_train import checkpoint, curve
from unipad.batch import FREE, OCCUPANCY_CLASSES, OCCUPANCY_SHAPE
from unipad.config import Augment, Data, Grid, Occupancy
from unipad.data import synthetic
from unipad.data.city.occupancy import CLASS_OF, full_voxels
from unipad.data.city.solids import CATEGORIES, SOLID, solid
from unipad.data.dataset import BadFrame, DataError, collate
from unipad.data.nuscenes import NuScenesDataset
from unipad.data.occupancy import read_occupancy
from unipad.data.transforms import apply_transform, make_transform
from unipad.draw.occupancy import UNSEEN, highest, occupancy_views
from unipad.draw.scene3d import occupied_scene
from unipad.draw.segments import COLORS
from unipad.errors import UserError
from unipad.evaluate.occupancy import count, count_all, evaluate_occupancy, occupancy_table, summarize
from unipad.evaluate.rayiou import THRESHOLDS, count_rays, first_hits, lidar_directions
from unipad.model.occupancy import OccupancyModel, all_voxels, in_cells, learned_voxels, losses, voxel_centers
from unipad.model.segment import lovasz_softmax
from unipad.recipes import OCCUPANCY
from unipad.runtime import generators

RECIPE = OCCUPANCY["lidar"]["tiny"]
VERSION = "v1.0-mini"
ROAD, CAR, MANMADE = (OCCUPANCY_CLASSES.index(name) for name in ("driveable_surface", "car", "manmade"))


@pytest.fixture(scope="module")
def labeled(city, tmp_path_factory):
    """Root of a copy of the city with occupancy labels, as the first run of the task completes it."""
    root = shutil.copytree(city, tmp_path_factory.mktemp("labeled") / "city")
    before = contents(root)
    synthetic.add_occupancy(root, workers=1)
    after = contents(root)
    assert before.items() <= after.items()  # no file has changed
    assert sorted(after.keys() - before.keys()) == sorted(f for f in after if f.startswith("gts/"))
    return root


def contents(root):
    """{path below root: bytes} of all files."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def validation(labeled):
    return NuScenesDataset(labeled, VERSION, "mini_val", RECIPE.data).with_occupancy()


@pytest.fixture(scope="module")
def batch(validation):
    return collate([validation[0], validation[2]]).to("cpu")


def rngs(count):
    return generators(seed=0, step=0, positions=range(count), device="cpu")


# Labels


def test_the_citys_labels_are_those_of_its_sensors(labeled, validation):
    """LiDAR points of the keyframe lie in voxels that are seen, and of the class of their lidarseg label; cameras see a
    part of what the LiDAR sees."""
    for i in range(len(validation)):
        sample = validation[i]
        classes, by_lidar, by_cameras = sample.occupancy
        assert not (by_cameras & ~by_lidar).any() and 0.02 < by_cameras.mean() < by_lidar.mean() < 0.6
        labels = sample.point_labels[: len(sample.points)]
        ego = np.linalg.inv(sample.ego2lidar) @ np.c_[sample.points[:, :3], np.ones(len(labels))].T
        cells = np.floor((ego[:3].T - (-40, -40, -1)) / 0.4).astype(int)
        known = ((cells >= 0) & (cells < OCCUPANCY_SHAPE)).all(axis=1) & (labels > 0)
        at = tuple(cells[known].T)
        assert known.sum() > 1000 and by_lidar[at].mean() > 0.97  # range noise moves some points into other voxels
        assert (classes[at] == labels[known]).mean() > 0.9  # some share their voxel with another class
        assert (classes[at] != FREE).mean() > 0.99


def test_a_city_generated_with_labels_has_the_same(labeled, tmp_path):
    """And the labels do not depend on whether the city is new, nor on the number of processes."""
    tiny = {"scenes": 2, "keyframes": 2, "image_size": (32, 48), "columns": 60, "progress": False}
    with_labels = synthetic.generate(tmp_path / "with", workers=2, occupancy=True, **tiny)
    without = synthetic.generate(tmp_path / "without", workers=1, **tiny)
    assert not (without / "gts").exists()
    synthetic.add_occupancy(without, workers=1)
    assert contents(with_labels) == contents(without)
    assert sum(name.startswith("gts/") for name in contents(without)) == 4  # keyframes


def test_classes_are_those_that_the_devkit_merges(city):
    from nuscenes import NuScenes
    from nuscenes.eval.lidarseg.utils import LidarsegClassMapper

    merged = LidarsegClassMapper(NuScenes(VERSION, str(city), verbose=False)).fine_idx_2_coarse_idx_mapping
    assert CLASS_OF.tolist() == [merged[index] for index in range(len(CATEGORIES))]


class EmptyStreet:
    """Stands in for a `Scene`: road everywhere, the ego vehicle at (3, 2), heading 30 degrees from x towards y."""

    class city:
        @staticmethod
        def ground(x, y):
            road = np.full(len(x), CATEGORIES.index("flat.driveable_surface"), np.uint8)
            return road, None, None

    class ego:
        @staticmethod
        def pose(t):
            return np.array([3.0, 2.0, np.pi / 6])


@pytest.mark.parametrize(
    "size, taper, is_round, yaw",
    [
        ((3.0, 1.4, 2.0), (0, 0, 0), False, 0.7),
        ((3.0, 1.4, 2.0), (0.4, 0.2, 0.3), False, 0.7),
        ((0.14, 0.14, 3.0), (0, 0, 0), False, 1.0),
        ((3.0, 1.0, 2.5), (0, 0, 0), True, 0.3),
    ],
    ids=["box", "tapered", "pole", "ellipsoid"],
)
def test_a_voxel_is_full_where_a_solid_overlaps_it(size, taper, is_round, yaw):
    """Compared with 17 x 17 x 17 points of each voxel: one inside proves an overlap; an overlap without one is thin, or
    at an edge of the tapered box."""
    one = np.array([solid((9.0, 8.0, 0.5), yaw, size, "plain", (1, 1, 1), "vehicle.car", taper, is_round)], dtype=SOLID)
    classes = full_voxels(EmptyStreet, 0.0, one)
    full = classes == CAR
    assert (classes[:, :, 2][~full[:, :, 2]] == ROAD).all() and (classes[~full][..., None] != CAR).all()
    cells = np.argwhere(np.ones((40, 40, 16), bool)) + (100, 100, 0)
    steps = (np.arange(17) / 16 - 0.5) * 0.4 * 0.9999
    offsets = np.array(list(product(steps, repeat=3)))
    near = full[100:140, 100:140].any()
    assert near and full.sum() == full[100:140, 100:140].sum()
    sampled = np.zeros(len(cells), bool)
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    for part in np.array_split(np.arange(len(cells)), 200):
        centers = np.array((-40, -40, -1)) + 0.4 * (cells[part] + 0.5)
        p = (centers[:, None] + offsets).reshape(-1, 3)
        world = np.stack([3 + c * p[:, 0] - s * p[:, 1], 2 + s * p[:, 0] + c * p[:, 1], p[:, 2]], axis=1)
        x, y, z = (world - one["center"][0]).T
        x, y = np.cos(yaw) * x + np.sin(yaw) * y, np.cos(yaw) * y - np.sin(yaw) * x
        length, width, height = np.array(size) / 2
        front, back, side = taper
        up = z + height
        if is_round:
            inside = (x / length) ** 2 + (y / width) ** 2 + (z / height) ** 2 < 1
        else:
            inside = (x < length - front * up) & (-x < length - back * up) & (np.abs(y) < width - side * up)
            inside &= np.abs(z) < height
        sampled[part] = inside.reshape(len(part), -1).any(axis=1)
    found = full[tuple(cells.T)]
    assert not (sampled & ~found).any()
    assert (found & ~sampled).sum() <= 0.06 * found.sum() + (6 if size[0] < 1 else 0)


def test_existing_labels_are_kept_and_missing_ones_are_added(labeled, tmp_path):
    root = shutil.copytree(labeled, tmp_path / "city")
    first, second, *_ = sorted(root.glob("gts/*/*/labels.npz"))
    before = second.read_bytes()
    shutil.rmtree(first.parent)
    second.write_bytes(b"of the user")
    assert len(NuScenesDataset(root, VERSION, "mini_train", RECIPE.data).with_occupancy()) == 3
    assert len(NuScenesDataset(root, VERSION, "mini_val", RECIPE.data).with_occupancy()) == 3
    assert first.exists() and second.read_bytes() == b"of the user" != before


def damaged(change):
    """A function that rewrites a labels.npz with `change`d arrays."""

    def rewrite(file):
        arrays = dict(np.load(file))
        np.savez_compressed(file, **change(arrays))

    return rewrite


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-99]), "is damaged, or not an .npz file"),
        (lambda file: file.write_bytes(b""), "is damaged, or not an .npz file"),
        (damaged(lambda a: {k: v for k, v in a.items() if k != "mask_camera"}), "has no array mask_camera"),
        (
            damaged(lambda a: {k: v[:100] for k, v in a.items()}),
            r"has semantics of shape \(100, 200, 16\), but Occ3D-nuScenes' grid has 200 x 200 x 16 voxels",
        ),
        (
            damaged(lambda a: {k: np.zeros((512, 512, 40), np.uint8) for k in a}),
            "has arrays of more than 200 x 200 x 16 voxels",
        ),
        (
            damaged(lambda a: a | {"semantics": a["semantics"] + 1}),
            "has semantics that are not whole numbers from 0 to 17",
        ),
        (damaged(lambda a: a | {"mask_lidar": a["mask_lidar"] + 0.5}), "has mask_lidar that are not whole numbers"),
        (damaged(lambda a: a | {"semantics": np.array([{}])}), "is damaged, or not an .npz file"),
    ],
    ids=["missing", "cut", "empty", "no mask", "shape", "grid", "class", "mask", "objects"],
)
def test_a_wrong_labels_file_is_a_bad_frame_of_one_sentence(damage, words, labeled, tmp_path):
    file = tmp_path / "labels.npz"
    shutil.copy(sorted(labeled.glob("gts/*/*/labels.npz"))[0], file)
    intact = read_occupancy(file)
    assert intact.shape == (3, *OCCUPANCY_SHAPE) and intact.dtype == np.uint8
    damage(file)
    with pytest.raises(BadFrame, match=words) as error:
        read_occupancy(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_masks_of_type_bool_are_read_too(labeled, tmp_path):
    source, file = sorted(labeled.glob("gts/*/*/labels.npz"))[0], tmp_path / "labels.npz"
    arrays = dict(np.load(source))
    np.savez(file, **{k: v.astype(bool) if "mask" in k else v.astype(np.int64) for k, v in arrays.items()})
    assert np.array_equal(read_occupancy(file), read_occupancy(source))


def test_a_dataset_without_labels_is_a_user_error(city_copy, capsys):
    """That is not a synthetic city, whose labels would be made; with some, only frames that have them remain."""
    log = city_copy / VERSION / "log.json"
    log.write_text(log.read_text().replace('"synthetic"', '"n008"'))
    dataset = NuScenesDataset(city_copy, VERSION, "mini_val", RECIPE.data)
    with pytest.raises(DataError, match="has no occupancy labels, such as gts/.*; unpack gts of Occ3D-nuScenes there"):
        dataset.with_occupancy()
    unlabeled = dataset.with_occupancy(labels=False)[0]
    assert unlabeled.occupancy is None and unlabeled.ego2lidar.shape == (4, 4)
    folder = city_copy / "gts" / "scene-0103" / dataset.index.tokens[1].decode()
    folder.mkdir(parents=True)
    assert dataset.with_occupancy().frames.tolist() == [1]
    assert "2 frames are left out; without labels, such as gts/scene-0103/" in capsys.readouterr().err


def test_labels_cannot_be_added_to_a_city_of_unknown_settings(labeled, tmp_path):
    root = shutil.copytree(labeled, tmp_path / "city", ignore=shutil.ignore_patterns("gts"))
    (root / "README.txt").write_text("scenes: many")
    with pytest.raises(UserError, match="cannot be added to the synthetic city in .* --occupancy"):
        synthetic.add_occupancy(root)


def test_origins_of_rays_are_the_lidar_at_keyframes_nearby(validation):
    origins = validation.lidar_origins()
    for i in range(len(validation)):
        at = origins[validation[i].token]
        lidar = np.linalg.inv(validation[i].ego2lidar)[:3, 3]  # the LiDAR's own position
        assert at.shape == (3, 3) and np.abs(at - lidar).sum(axis=1).min() < 1e-5
    first, last = (origins[validation[i].token] for i in (0, 2))
    assert (np.diff(first[:, 0]) > 1).all()  # the vehicle drives ahead
    assert first[0, 0] == pytest.approx(last[2, 0], abs=1e-4)


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
    """(class, distance) that a ray hits first by steps of 2 mm: another implementation."""
    inside, hit, t = False, FREE, 0.0
    while t < 200:
        at = np.floor((origin + t * direction - (-40, -40, -1)) / 0.4).astype(int)
        if ((at >= 0) & (at < OCCUPANCY_SHAPE)).all():
            inside = True
            if hit == FREE and classes[tuple(at)] != FREE:
                hit, voxel = classes[tuple(at)], at
            if hit != FREE and (at != voxel).any():
                return hit, t
        elif inside:
            return hit, t
        t += step
    return FREE, 0.0


def test_metrics_of_wrong_predictions_are_those_of_other_implementations(validation, tmp_path):
    """Random voxels of two small parts of frames are wrong; a class that is only predicted has IoU 0."""
    pairs, counts = [], []
    for i in (0, 2):
        labels = validation[i].occupancy.copy()
        labels[2, 40:] = labels[2, :, 30:] = 0  # sets are slow
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
    # rays that meet the wall at an angle are farther apart: few with less than 1 m, most with less than 2 m
    assert ious[0, MANMADE] == 0 and 0.4 < ious[1, MANMADE] < 1 and ious[2, MANMADE] > ious[1, MANMADE]
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
    counts = count_all(Perfect(RECIPE), dataset, ONE_PROCESS, folder=folder)
    out, err = capsys.readouterr()
    assert len(counts) == 2 == len(list(folder.iterdir())) and f"skipped {file}: is damaged" in err
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
        sample, voxel, cells = learned_voxels(batch, Occupancy(mask=mask), RECIPE.grid, rngs(2))
        for b in range(2):
            kept = batch.occupancy[b, channel].flatten() > 0 if channel else torch.ones(640_000, dtype=torch.bool)
            at = in_cells(all_voxels("cpu"), batch.ego2lidar[b], RECIPE.grid)
            near = ((at > -1) & (at < torch.tensor(RECIPE.grid.shape) + 1)).all(dim=1)
            assert torch.equal(voxel[sample == b], (kept & near).nonzero()[:, 0])
            assert torch.equal(cells[sample == b], at[kept & near])
    few = learned_voxels(batch, Occupancy(max_voxels=100), RECIPE.grid, rngs(2))
    again = learned_voxels(batch, Occupancy(max_voxels=100), RECIPE.grid, rngs(2))
    assert len(few[0]) == 200 and torch.equal(few[1], again[1])
    assert (batch.occupancy[:, 2].flatten(1)[few[0], few[1]] > 0).all()


def test_losses_by_hand():
    """Two voxels of three classes, with probabilities 1/3 and 3/4 of the true one."""
    logits = torch.tensor([[0.0, 0, 0], [0, 0, math.log(6)]]).double()
    labels = torch.tensor([0, 2])
    values = losses(Occupancy(classes=3, lovasz_weight=0.5), logits, labels)
    assert values["cross_entropy"].item() == pytest.approx((math.log(3) + math.log(4 / 3)) / 2)
    assert values["lovasz"].item() == pytest.approx(0.5 * lovasz_softmax(logits.softmax(1), labels).item())
    none = losses(Occupancy(), torch.zeros(0, 18, requires_grad=True), torch.zeros(0, dtype=torch.int64))
    assert not any(none.values())


def test_training_and_prediction_read_the_same_logits(batch):
    model = OccupancyModel(RECIPE).eval()
    with torch.no_grad():
        volume, _ = model.encoder(batch, generators=None)
        sample, voxel, cells = learned_voxels(batch, Occupancy(max_voxels=3000), RECIPE.grid, rngs(2))
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
    for _ in range(8):
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


def test_a_stopped_and_resumed_run_is_bit_equal(labeled, tmp_path):
    flags = ["--val-every", 0]
    finetune.main(parse(labeled, tmp_path / "uninterrupted", *flags))
    finetune.main(parse(labeled, tmp_path / "parts", *flags, "--stop-at", 1))
    finetune.main(parse(labeled, tmp_path / "parts", *flags, "--resume", "auto"))
    whole, parts = (checkpoint(tmp_path / name)["model"] for name in ("uninterrupted", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_test_split_gives_only_a_submission(run, city, tmp_path, capsys):
    """The dataset is made to look like nuScenes' test set: with other scene names and no labels."""
    root = shutil.copytree(city, tmp_path / "set", ignore=shutil.ignore_patterns("unipad-index", "gts"))
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
    sample, voxel, _ = learned_voxels(turned, Occupancy(mask="none"), RECIPE.grid, rngs(2))
    assert 400_000 < (sample == 0).sum() < 640_000
    assert turned.occupancy.shape == (2, 3, *OCCUPANCY_SHAPE)

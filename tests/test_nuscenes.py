"""Reading nuScenes: geometry compared with the devkit's, the choice of frames, and frames that cannot be read."""

import os
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
from nuscenes import NuScenes
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.eval.lidarseg.utils import LidarsegClassMapper
from nuscenes.utils.data_classes import Box, LidarPointCloud
from nuscenes.utils.geometry_utils import BoxVisibility, points_in_box, view_points
from PIL import Image
from pyquaternion import Quaternion

from unipad.batch import CAMERAS, CLASSES
from unipad.config import Data
from unipad.data.collate import collate
from unipad.data.dataset import BadFrame, DataError
from unipad.data.loader import held_out_batches, step_batches
from unipad.data.nuscenes import NuScenesDataset

VERSION = "v1.0-mini"
pytestmark = pytest.mark.usefixtures("own_user_cache")


@pytest.fixture(scope="module")
def nusc(city):
    return NuScenes(VERSION, str(city), verbose=False)


@pytest.fixture(scope="module")
def dataset(city):
    return NuScenesDataset(city, VERSION, "mini_val", Data(sweeps=10))


def boxes_of(sample):
    """Devkit `Box`es for the boxes of a sample, in the LiDAR frame."""
    return [Box(b[:3], b[3:6], Quaternion(axis=[0, 0, 1], radians=b[6])) for b in sample.boxes.astype(float)]


def annotations_of(nusc, sample):
    """The annotations of a sample that have a detection class and LiDAR or radar points, in the order of the tables."""
    records = (nusc.get("sample_annotation", t) for t in nusc.get("sample", sample.token)["anns"])
    return [
        a
        for a in records
        if category_to_detection_name(a["category_name"]) and a["num_lidar_pts"] + a["num_radar_pts"] > 0
    ]


def project(matrix, points):
    """[2, P] pixels and [P] depths of [P, 3] points."""
    u, v, d, _ = matrix.astype(float) @ np.c_[points, np.ones(len(points))].T
    return np.stack([u, v]) / d, d


def test_frames_are_the_keyframes_of_the_split_sorted_by_time(nusc, dataset):
    stamps = [nusc.get("sample", dataset[i].token)["timestamp"] for i in range(len(dataset))]
    names = {
        nusc.get("scene", nusc.get("sample", dataset[i].token)["scene_token"])["name"] for i in range(len(dataset))
    }
    assert stamps == sorted(stamps)
    assert names <= {"scene-0103", "scene-0916"}  # the scenes of mini_val
    assert len(dataset) == sum(s["nbr_samples"] for s in nusc.scene if s["name"] in names)


def test_boxes_match_the_devkit(nusc, dataset):
    for i in range(len(dataset)):
        sample = dataset[i]
        annotations = annotations_of(nusc, sample)
        keep = {a["token"] for a in annotations}
        _, expected, _ = nusc.get_sample_data(nusc.get("sample", sample.token)["data"]["LIDAR_TOP"])
        expected = [b for b in expected if b.token in keep]
        assert len(expected) == len(sample.boxes) > 0
        for ours, theirs, label in zip(boxes_of(sample), expected, sample.labels, strict=True):
            np.testing.assert_allclose(ours.center, theirs.center, atol=1e-4)
            np.testing.assert_allclose(ours.wlh, theirs.wlh, atol=1e-5)
            heading = theirs.orientation.rotation_matrix[:2, 0]  # ours have yaw only
            np.testing.assert_allclose(
                ours.orientation.rotation_matrix[:2, 0], heading / np.linalg.norm(heading), atol=1e-5
            )
            assert CLASSES[label] == category_to_detection_name(theirs.name)


def test_velocity_moves_a_box_to_its_next_keyframe(nusc, dataset):
    """Checked at a scene's first keyframe, where velocities are differences to the next one, not between neighbors."""
    sample = dataset[0]
    record = nusc.get("sample_data", nusc.get("sample", sample.token)["data"]["LIDAR_TOP"])
    ego = nusc.get("ego_pose", record["ego_pose_token"])
    sensor = nusc.get("calibrated_sensor", record["calibrated_sensor_token"])
    lidar2global = Quaternion(ego["rotation"]) * Quaternion(sensor["rotation"])
    speeds = []
    for box, annotation in zip(sample.boxes, annotations_of(nusc, sample), strict=True):
        following = nusc.get("sample_annotation", annotation["next"])
        times = [nusc.get("sample", a["sample_token"])["timestamp"] for a in (annotation, following)]
        moved = lidar2global.rotate(np.array([*box[7:], 0.0])) * (times[1] - times[0]) * 1e-6
        path = np.subtract(following["translation"], annotation["translation"])
        np.testing.assert_allclose(moved[:2], path[:2], atol=1e-2)
        speeds.append(np.hypot(*box[7:]))
    assert max(speeds) > 1  # m/s


def test_boxes_contain_at_least_90_percent_of_num_lidar_pts(nusc, dataset):
    sample = dataset[0]
    keyframe = sample.points[sample.points[:, 4] == 0]
    for box, annotation in zip(boxes_of(sample), annotations_of(nusc, sample), strict=True):
        # 15 % larger, for points on its surface
        inside = points_in_box(box, keyframe[:, :3].T, wlh_factor=1.15).sum()
        assert inside >= 0.9 * annotation["num_lidar_pts"]


def test_box_centers_project_as_in_the_devkit(nusc, dataset):
    """Through lidar2image, compared with the devkit's boxes in each camera's frame."""
    compared = 0
    for i in range(len(dataset)):
        sample = dataset[i]
        tokens = [a["token"] for a in annotations_of(nusc, sample)]
        for view, camera in enumerate(CAMERAS):
            camera_token = nusc.get("sample", sample.token)["data"][camera]
            _, boxes, intrinsic = nusc.get_sample_data(camera_token, box_vis_level=BoxVisibility.ANY)
            for box in boxes:
                if box.token in tokens and box.center[2] > 1:
                    center = sample.boxes[tokens.index(box.token)][None, :3]
                    pixel, depth = project(sample.lidar2image[view], center)
                    np.testing.assert_allclose(depth, box.center[2], atol=1e-3)
                    np.testing.assert_allclose(pixel, view_points(box.center[:, None], intrinsic, True)[:2], atol=0.05)
                    camera_frame = sample.lidar2camera[view] @ [*center[0], 1]
                    np.testing.assert_allclose(camera_frame[:3], box.center, atol=1e-3)
                    compared += 1
    assert compared > 10  # centers


def test_lidar_points_project_as_in_the_devkit(nusc, city):
    sample = NuScenesDataset(city, VERSION, "mini_val", Data())[1]
    data = nusc.get("sample", sample.token)["data"]
    compared = 0
    for view, camera in enumerate(CAMERAS):
        expected, depths, image = nusc.explorer.map_pointcloud_to_image(data["LIDAR_TOP"], data[camera])
        pixels, d = project(sample.lidar2image[view], sample.points[:, :3])
        w, h = image.size
        (u, v), margin = pixels, 1  # margin in pixels, as in the devkit
        inside = (d > 1) & (u > margin) & (u < w - margin) & (v > margin) & (v < h - margin)
        if inside.sum() == len(depths):  # else rounding moved a point over the margin: the points cannot be paired
            np.testing.assert_allclose(pixels[:, inside], expected[:2], atol=0.02)
            np.testing.assert_allclose(d[inside], depths, atol=1e-3)
            compared += inside.sum() > 0
    assert compared >= 5  # of the six cameras


def test_images_match_their_files(nusc, dataset):
    sample = dataset[0]
    for image, camera in zip(sample.images, CAMERAS, strict=True):
        path = nusc.get_sample_data_path(nusc.get("sample", sample.token)["data"][camera])
        expected = np.asarray(Image.open(path)).astype(int)
        assert np.abs(image - expected).max() <= 4  # the JPEG decoders of OpenCV and PIL differ


def test_resized_images_keep_their_geometry(city):
    """Points project to the same relative position; the image is the same up to resampling."""
    full = NuScenesDataset(city, VERSION, "mini_val", Data())[0]
    small = NuScenesDataset(city, VERSION, "mini_val", Data(image_size=(36, 96)))[0]
    h, w = full.images[0].shape[:2]
    for view in range(len(CAMERAS)):
        assert small.images[view].shape == (36, 96, 3)
        pixels, d = project(full.lidar2image[view], full.points[:, :3])
        scaled, d_scaled = project(small.lidar2image[view], full.points[:, :3])
        ahead = d > 1
        np.testing.assert_allclose(d_scaled, d, atol=1e-3)
        np.testing.assert_allclose((scaled / [[96], [36]])[:, ahead], (pixels / [[w], [h]])[:, ahead], atol=1e-3)
        np.testing.assert_allclose(small.images[view].mean((0, 1)), full.images[view].mean((0, 1)), atol=3)
    np.testing.assert_array_equal(small.lidar2camera, full.lidar2camera)


@pytest.mark.parametrize("sweeps", [1, 3, 10])
def test_sweeps_match_the_devkit(nusc, city, sweeps):
    """Except for the keyframe's points on the ego vehicle, which the devkit removes and the dataset keeps."""
    dataset = NuScenesDataset(city, VERSION, "mini_val", Data(sweeps=sweeps))
    for i in range(len(dataset)):
        sample = dataset[i]
        record = nusc.get("sample", sample.token)
        expected, lags = LidarPointCloud.from_file_multisweep(nusc, record, "LIDAR_TOP", "LIDAR_TOP", sweeps)
        on_the_ego_vehicle = (sample.points[:, 4] == 0) & (np.abs(sample.points[:, :2]) < 1).all(axis=1)
        points = sample.points[~on_the_ego_vehicle]
        np.testing.assert_allclose(points[:, :4], expected.points.T, atol=1e-3)
        np.testing.assert_allclose(points[:, 4], lags[0], atol=1e-6)
    # the keyframe's points come first, unchanged
    keyframe = LidarPointCloud.from_file(nusc.get_sample_data_path(record["data"]["LIDAR_TOP"]))
    np.testing.assert_array_equal(sample.points[: keyframe.nbr_points(), :4], keyframe.points.T)


def test_origins_of_sweeps_match_the_devkit(nusc, dataset):
    """Where the LiDAR was, in the keyframe's LiDAR frame; and the time lag, exactly that of the sweep's points."""
    sample = dataset.load(dataset.frames[-1])
    key = record = nusc.get("sample_data", nusc.get("sample", sample.token)["data"]["LIDAR_TOP"])
    for origin in sample.sweep_origins:
        ego, sensor = (nusc.get(k, record[f"{k}_token"]) for k in ("ego_pose", "calibrated_sensor"))
        where = Quaternion(ego["rotation"]).rotate(np.array(sensor["translation"])) + ego["translation"]
        for k in ("ego_pose", "calibrated_sensor"):
            pose = nusc.get(k, key[f"{k}_token"])
            where = Quaternion(pose["rotation"]).inverse.rotate(where - pose["translation"])
        np.testing.assert_allclose(origin[:3], where, atol=1e-3)
        assert origin[3] == pytest.approx(1e-6 * (key["timestamp"] - record["timestamp"]), abs=1e-6)
        record = nusc.get("sample_data", record["prev"]) if record["prev"] else None
    assert set(sample.sweep_origins[:, 3]) == set(sample.points[:, 4]) and np.ptp(sample.sweep_origins[:, 1]) > 1


def test_the_first_keyframe_of_a_scene_has_no_sweeps(dataset):
    assert set(dataset[0].points[:, 4]) == {0}
    assert dataset.load(0).sweep_origins[:, 3].tolist() == [0] + [-1] * 9
    assert len(set(dataset[1].points[:, 4])) > 1


def test_sweeps_agree_on_the_height_of_the_ground(dataset):
    """After ego-motion compensation, the ground in all sweeps is one plane."""
    points = dataset[len(dataset) - 1].points
    lags = np.unique(points[:, 4])
    assert len(lags) >= 3
    near = points[np.hypot(points[:, 0], points[:, 1]) < 15]
    heights = [near[near[:, 4] == lag][:, 2] for lag in lags]
    ground = [np.median(z[z < -1.4]) for z in heights]  # the LiDAR is 1.84 m above the ground
    np.testing.assert_allclose(ground, ground[0], atol=0.05)


def test_point_labels_match_the_devkit(nusc, dataset):
    mapper = LidarsegClassMapper(nusc)
    sample = dataset[1]
    token = nusc.get("sample", sample.token)["data"]["LIDAR_TOP"]
    raw = np.fromfile(os.path.join(nusc.dataroot, nusc.get("lidarseg", token)["filename"]), np.uint8)
    expected = np.vectorize(mapper.fine_idx_2_coarse_idx_mapping.get)(raw)
    keyframe = sample.points[:, 4] == 0
    np.testing.assert_array_equal(sample.point_labels[keyframe], expected)
    assert len(set(expected)) > 5
    assert not sample.point_labels[~keyframe].any()


def test_a_dataset_without_lidarseg_has_no_point_labels(city_copy):
    (city_copy / VERSION / "lidarseg.json").unlink()
    assert NuScenesDataset(city_copy, VERSION, "mini_val", Data())[0].point_labels is None


def test_a_dataset_without_annotations_has_no_boxes(city_copy):
    """As in the test split of nuScenes."""
    for table in ("sample_annotation", "instance"):
        (city_copy / VERSION / f"{table}.json").write_text("[]")
    sample = NuScenesDataset(city_copy, VERSION, "mini_val", Data())[0]
    assert sample.boxes.shape == (0, 9) and sample.labels.shape == (0,)
    assert collate([sample, sample]).box_counts.tolist() == [0, 0]


def test_points_outside_the_range_are_left_out(city):
    unlimited = NuScenesDataset(city, VERSION, "mini_val", Data())[0]
    limited = NuScenesDataset(city, VERSION, "mini_val", Data(), point_range=((-20, -20, -5), (20, 20, 3)))[0]
    x, y, z = unlimited.points[:, :3].T
    inside = (np.abs(x) < 20) & (np.abs(y) < 20) & (z > -5) & (z < 3)
    assert 0 < inside.sum() < len(inside)
    np.testing.assert_array_equal(limited.points, unlimited.points[inside])
    np.testing.assert_array_equal(limited.point_labels, unlimited.point_labels[inside])


def test_label_fraction_keeps_every_kth_frame(city):
    """A fraction 1/k; others are rejected."""

    def tokens(fraction):
        dataset = NuScenesDataset(city, VERSION, "mini_train", Data(), fraction)
        return [dataset[i].token for i in range(len(dataset))]

    all_tokens = tokens(1.0)
    assert tokens(0.5) == all_tokens[::2] and tokens(0.2) == all_tokens[::5]
    for wrong in (0.0, 0.7, 1.5):
        with pytest.raises(DataError, match="--label-fraction"):
            tokens(wrong)


@pytest.fixture
def uneven(city):
    """Made-up labels of twelve frames (no file is read): no box in the first, cars in all others, a bus in the last
    six, pedestrians in every fourth."""
    dataset = NuScenesDataset(city, VERSION, "mini_train", Data())
    # classes: 0 car, 3 bus, 8 pedestrian
    per_frame = [[0, 0] + [3] * (f >= 6) + [8, 8] * (f % 4 == 3) if f else [] for f in range(12)]
    labels = np.array(sum(per_frame, []))
    offsets = np.cumsum([0] + [len(frame) for frame in per_frame])
    dataset.index = replace(dataset.index, labels=labels, box_offsets=offsets)
    dataset.frames = np.arange(12)
    return dataset


def test_balanced_frames_have_each_class_equally_often(uneven):
    """11 frames have cars, 6 buses and 3 pedestrians: (11 + 6 + 3) // 3 frames are drawn for each of the three."""
    balanced = uneven.balanced(seed=0)
    assert len(balanced) == 18 and len(uneven) == 12
    cars, buses, pedestrians = balanced.frames.reshape(3, 6)
    assert set(cars) <= set(range(1, 12)) and len(set(cars)) > 2
    assert set(buses) <= set(range(6, 12)) and len(set(buses)) > 1
    assert set(pedestrians) <= {3, 7, 11} and len(set(pedestrians)) > 1
    assert uneven.balanced(seed=0).frames.tolist() == balanced.frames.tolist()
    assert uneven.balanced(seed=1).frames.tolist() != balanced.frames.tolist()


def test_balanced_frames_are_drawn_from_the_frames_in_use(uneven):
    uneven.frames = uneven.frames[::4]  # 0 without boxes, 4 with cars, 8 with cars and a bus
    with_cars, with_bus = uneven.balanced(seed=0).frames  # (2 + 1) // 2 frames for each of the two classes
    assert with_cars in (4, 8) and with_bus == 8


def test_balancing_without_boxes_is_a_user_error(uneven):
    uneven.frames = uneven.frames[:1]
    with pytest.raises(DataError, match="no frame of .* mini_train has a box to balance the classes by.$"):
        uneven.balanced(seed=0)


def test_balanced_frames_are_read_and_resumed_exactly(city):
    def tokens(count, **settings):
        dataset = NuScenesDataset(city, VERSION, "mini_train", Data(cameras=False)).balanced(seed=5)
        batches = step_batches(dataset, **settings)
        return [next(batches)[0].tokens for _ in range(count)]

    whole = tokens(6, micro_batch=2)
    assert tokens(3, micro_batch=2, start=3) == whole[3:]
    both = [tokens(6, micro_batch=1, rank=rank, world=2) for rank in range(2)]
    assert [a + b for a, b in zip(*both, strict=True)] == whole
    assert len({t for batch in whole for t in batch}) > 1


def first_file(root, dataset, kind):
    """Path of a file of the dataset's frame 0: an image, the LiDAR points or their labels."""
    index = dataset.index
    name = {
        "image": index.image_files[0, 2],  # of one camera
        "lidar": index.lidar_files[index.frame_lidar[0]],
        "labels": index.lidarseg_files[0],
    }[kind]
    return root / name.decode()


def truncate(path, size):
    """Keep the first `size` bytes; negative: cut off the last -size."""
    path.write_bytes(path.read_bytes()[:size])


def write_points(path, **columns):
    """Write nine zero points, one of them with the given x, y, z or i (intensity)."""
    array = np.zeros((9, 5), np.float32)
    for name, value in columns.items():
        array[4, "xyzi".index(name)] = value
    array.tofile(path)


def rewrite(path, change, ending=".jpg"):
    """Replace an image by `change(image)`, encoded in the format of `ending`."""
    cv2.imencode(ending, change(cv2.imread(str(path))))[1].tofile(path)


def halve_with_thumbnail(path):
    """Cut a JPEG in half, after adding a complete thumbnail to its header, as cameras do."""
    content = path.read_bytes()
    thumbnail = content[: content.index(b"\xff\xda")] + b"\xff\xd9"
    header = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    path.write_bytes(content[:2] + header + content[2 : len(content) // 2])


@pytest.mark.parametrize(
    "kind, damage, reason",
    [
        ("lidar", lambda p: truncate(p, -7), "truncated"),
        ("lidar", lambda p: truncate(p, 0), "empty"),
        ("lidar", lambda p: p.unlink(), "missing"),
        ("lidar", lambda p: write_points(p, y=np.nan), "not finite"),
        ("lidar", lambda p: write_points(p, x=1e10), "a point 1e"),
        ("lidar", lambda p: write_points(p, x=1, i=3e38), "an intensity of 3e"),
        ("image", lambda p: p.unlink(), "missing"),
        ("image", lambda p: truncate(p, -100), "truncated"),
        ("image", halve_with_thumbnail, "truncated"),
        ("image", lambda p: p.write_bytes(b"not a picture \xff\xd9"), "not an image"),
        ("image", lambda p: rewrite(p, lambda image: image[:, :90]), "is 72 x 90, neither the 72 x 128 of the tables"),
        ("image", lambda p: rewrite(p, lambda image: image.transpose(1, 0, 2)), "is 128 x 72, neither"),
        ("image", lambda p: rewrite(p, lambda image: image.repeat(3, 0).repeat(3, 1)), "is 216 x 384, neither"),
        ("image", lambda p: (rewrite(p, lambda image: image, ".png"), truncate(p, -3000)), "is damaged"),
        ("labels", lambda p: truncate(p, -1), "labels for"),
        (
            "labels",
            lambda p: p.write_bytes(b"\xff" * p.stat().st_size),
            "label 255, which is not the index of any category",
        ),
    ],
)
def test_a_bad_frame_is_named_and_replaced_by_another(city_copy, kind, damage, reason):
    dataset = NuScenesDataset(city_copy, VERSION, "mini_val", Data())
    path = first_file(city_copy, dataset, kind)
    damage(path)
    with pytest.raises(BadFrame, match=reason) as bad:
        dataset[0]
    assert str(bad.value).startswith(f"{path}: ")

    batch, bad_frames = next(step_batches(dataset, micro_batch=len(dataset)))
    tokens = [t.decode() for t in dataset.index.tokens]
    assert set(batch.tokens) == set(tokens[1:]) and len(batch) == 3
    assert bad_frames == [str(bad.value)]
    assert [b.tokens for _, b in held_out_batches(dataset, count=1)] == [(tokens[1],)]


def test_an_image_of_a_huge_size_is_rejected_before_decoding(city_copy, monkeypatch):
    """Its header says 30,000 x 30,000 pixels, which would be 2.7 GB."""
    dataset = NuScenesDataset(city_copy, VERSION, "mini_val", Data())
    path = first_file(city_copy, dataset, "image")
    content = bytearray(path.read_bytes())
    start = content.index(b"\xff\xc0") + 5  # height and width (2 bytes each) in a JPEG's frame header
    content[start : start + 4] = (30_000).to_bytes(2, "big") * 2
    path.write_bytes(content)
    decoded, decode = [], cv2.imdecode
    monkeypatch.setattr(cv2, "imdecode", lambda *a: decoded.append(decode(*a)) or decoded[-1])
    with pytest.raises(BadFrame, match="is 30000 x 30000, neither"):
        dataset[0]
    assert max((image.size for image in decoded), default=0) <= 3 * 72 * 128  # no more than an image of the city


def test_a_broken_sweep_affects_only_the_frames_that_use_it(city_copy):
    dataset = NuScenesDataset(city_copy, VERSION, "mini_val", Data(sweeps=2))
    sweep = dataset.index.lidar_prev[dataset.index.frame_lidar[1]]
    (city_copy / dataset.index.lidar_files[sweep].decode()).unlink()
    with pytest.raises(BadFrame, match="missing"):
        dataset[1]
    assert len(dataset[0].points) and len(dataset[2].points)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_frame_is_a_user_error(city_copy, workers):
    dataset = NuScenesDataset(city_copy, VERSION, "mini_val", Data())
    shutil.rmtree(city_copy / "samples" / "LIDAR_TOP")
    with pytest.raises(DataError, match=r"none of the \d+ frames can be read \(.*: is missing\)"):
        next(step_batches(dataset, micro_batch=1, workers=workers))
    with pytest.raises(DataError, match="none of the"):
        next(held_out_batches(dataset, count=1))
